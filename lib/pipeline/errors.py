"""The errors that a reader of a report can put right: one line each, with the way out."""

BUILD = "build it with `make repro` or `dvc repro data`"


class WorkbenchError(ValueError):
    """Something that was given cannot be used; the message names it and the way out."""


class CorpusError(WorkbenchError):
    """A collection, a corpus or its tokenizer cannot be used."""


class TrainingError(WorkbenchError):
    """Training cannot begin or go on; the message says at which step, and why."""


def require(condition, message: str, error: type[Exception] = CorpusError) -> None:
    """Raise `error(message)` unless the condition holds: for what comes from a user or a file."""
    if not condition:
        raise error(message)
