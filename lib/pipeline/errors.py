"""The errors that a reader of a report can put right: one line each, with the way out."""

BUILD = "build it with `make repro` or `dvc repro data`"


class WorkbenchError(ValueError):
    """Something that was given cannot be used; the message names it and the way out."""


class CorpusError(WorkbenchError):
    """A collection, a corpus or its tokenizer cannot be used."""
