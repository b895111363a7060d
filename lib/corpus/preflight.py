"""What a later stage would refuse, found before the first training step; and what a collection does not have.

    check(profile, corpus)       raises with everything that is wrong, or says what is missing and what that means

The stage `data` ends with it. A row that is added later is looked at by its own stage, before it trains.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from lib.benchmark import locov1
from lib.benchmark.locov1 import Task
from lib.benchmark.task import CorpusError
from lib.corpus import build
from lib.pipeline import params
from lib.report import results

UNKNOWN = 0.05  # share of [UNK] among word pieces from which on it is said
SAMPLE, CHARACTERS = 200, 2_000  # texts, and of each the beginning: what vocabulary is judged by


def check(profile: str, folder: str | Path) -> dict[str, str]:
    """What the collection lacks and what follows from it, {what: consequence}, for the page of the stage `data`.

    Args:
        folder: of the corpus that `corpus.build` wrote.

    Raises:
        CorpusError: one line with all that a later stage would refuse, each with its way out.
    """
    tasks = {
        split: [locov1.load(name, folder, split) for name in locov1.tasks(folder, split)]
        for split in locov1.splits(folder)
    }
    tokenizer = build.load_tokenizer(folder)
    faults = [
        *pairs(profile, folder, tasks),
        *pretraining(profile, folder, tokenizer),
        *baselines(profile),
        *others(profile, folder),
    ]
    if faults:
        raise CorpusError("; and ".join(dict.fromkeys(faults)))
    return {
        **splits(profile, tasks),
        **evidence(tasks["test"]),
        **lengths(profile, tasks["test"], tokenizer),
        **vocabulary(tasks["test"], tokenizer),
    }


# ------------------------------------------------------------------ what is refused


def pairs(profile: str, folder: str | Path, tasks: dict[str, list[Task]]) -> Iterator[str]:
    """Fine-tuning: a split to train on, tasks of the names that rows ask for, and two documents to tell apart."""
    for table in params.TRAINED_BY["finetune"]:
        for row in params.rows(profile, table):
            s = params.settings(profile, "finetune", row)
            if s["loss"] == "none" or not s["documents_seen"]:
                continue
            try:
                split = locov1.training_split(
                    results.collection(profile) or "the embedded corpus",
                    s["allow_test_training"],
                    list(tasks),
                )
            except CorpusError as error:
                yield str(error)
                return
            named = [
                task
                for task in tasks[split]
                if any(fnmatch(task.name, pattern) for pattern in s["tasks"])
            ]
            if not named:
                yield f"row {row} trains on tasks {', '.join(s['tasks'])}, and the {split} split has {', '.join(task.name for task in tasks[split])}: correct finetune.tasks"
            elif len({text for task in named for text in task.documents.values()}) < 2:
                yield f"the {split} split has one document in all ({', '.join(task.name for task in named)}): to learn what does not answer takes a second one"


def pretraining(profile: str, folder: str | Path, tokenizer) -> Iterator[str]:
    """Masked-language pretraining: texts of both kinds for `mixed`, to train on and held out, enough of them to fill an example."""
    wanted: dict[str, int] = {}  # kind -> the longest length that needs it
    for table in params.TRAINED_BY["pretrain"]:
        for row in params.rows(profile, table):
            s = params.settings(profile, "pretrain", row)
            for kind in {"short": ("short",), "long": ("long",), "mixed": ("short", "long")}[
                s["mixture"]
            ]:
                wanted[kind] = max(wanted.get(kind, 0), params.length(profile, s["length"]))
    for kind, length in sorted(wanted.items(), reverse=True):
        for split, purpose in (("train", "to train on"), ("validation", "held out, to measure on")):
            texts = build.pretraining(folder, kind, split)
            at_most = (
                f"at most {build.LONG:,} characters (paragraphs, one a row or file)"
                if kind == "short"
                else f"more than {build.LONG:,} characters"
            )
            way_out = f"add texts of {at_most} to TEXT, one alone cannot be divided, or leave that kind out (SET=pretrain.mixture={'long' if kind == 'short' else 'short'})"
            if not texts:
                yield f"the pretraining text has no {kind} text {purpose}: {way_out}"
            elif kind == "short" and not any(
                count >= min(10, length) - 2 for count in first_lengths(texts, tokenizer)
            ):
                yield f"no {kind} text {purpose} has 10 word pieces: {way_out}"
            elif kind == "long" and (found := filled(texts, tokenizer, length)) < length - 2:
                yield f"the {kind} texts {purpose} are {found:,} word pieces together and do not fill the {length:,} tokens of an example: {way_out}"


def first_lengths(texts: list[str], tokenizer) -> Iterator[int]:
    for start in range(0, len(texts), SAMPLE):
        yield from build.lengths(
            tokenizer, [text[:CHARACTERS] for text in texts[start : start + SAMPLE]]
        ).tolist()


def filled(texts: list[str], tokenizer, length: int) -> int:
    """Word pieces of the texts, counted until they fill `length`."""
    total = 0
    for text in texts:
        total += int(build.lengths(tokenizer, [text])[0])
        if total >= length:
            break
    return total


def baselines(profile: str) -> Iterator[str]:
    """Rows of other people's models: what they need is installed, and their key is set."""
    for row, own in params.rows(profile, "baselines").items():
        wanted = (
            ("openai", "lmdb")
            if "url" in own
            else ("sentence_transformers",)
            if "model" in own
            else ()
        )
        missing = [name for name in wanted if find_spec(name) is None]
        if missing:
            yield f"row {row} needs {' and '.join(name.replace('_', '-') for name in missing)}: `make interop` installs it"
        if "key" in own and not os.environ.get(own["key"], "").strip():
            yield f"row {row} needs the environment variable {own['key']}: set it to the key of {own['url']}"


def others(profile: str, folder: str | Path) -> Iterator[str]:
    """Other sources to rank: they can be read, and are told apart by name."""
    also = params.settings(profile, "evaluate")["also"]
    try:
        locov1.every(folder, also)
    except CorpusError as error:
        yield f"evaluate.also: {error}"


# ------------------------------------------------------------------ what is missing


def splits(profile: str, tasks: dict[str, list[Task]]) -> dict[str, str]:
    said = {}
    if "train" not in tasks:
        allowed = params.settings(profile, "finetune")["allow_test_training"]
        said["no train split"] = (
            "rows train on the test split, as finetune.allow_test_training says: every table marks them (trained on test), and their scores on it prove nothing"
            if allowed
            else "no row is fine-tuned"
        )
    if "validation" not in tasks:
        said["no validation split"] = (
            "nothing is chosen on this collection: losses, rates and budgets are those of params.yaml, which were chosen on the validation split of the embedded "
            "corpus; the column `validation` stays empty"
        )
    return said


def evidence(test: list[Task]) -> dict[str, str]:
    queries, known = (
        sum(len(task.queries) for task in test),
        sum(len(task.evidence) for task in test),
    )
    if known == queries:
        return {}
    if not known:
        return {
            "no evidence is known": "nothing says where in its document an answer stands: figures by place and the needle are left out, figures by the length of the answering document stand in"
        }
    return {
        "evidence is known in part": f"of {known:,} of {queries:,} test queries it is known where their answer stands; figures by place are about those"
    }


def lengths(profile: str, test: list[Task], tokenizer) -> dict[str, str]:
    longest = max(params.length(profile, paper) for paper in params.PAPER_LENGTHS)
    texts = list({text for task in test for text in task.documents.values()})
    longer = sum(
        len(text) > 3 * longest and count > longest - 2
        for text, count in zip(texts, build.lengths(tokenizer, texts).tolist())
    )
    if not longer:
        return {}
    return {
        f"documents longer than {longest:,} tokens": f"{longer:,} of {len(texts):,} test documents: the longest row of {profile} reads their first {longest:,} tokens, BM25 everything (lengths.{profile} in params.yaml)"
    }


def vocabulary(test: list[Task], tokenizer) -> dict[str, str]:
    """Whether the tokenizer knows the collection's words: in another language or script it may not."""
    documents = [
        text[:CHARACTERS] for task in test for text in islice(task.documents.values(), SAMPLE)
    ]
    ids = [i for row in tokenizer(documents, add_special_tokens=False)["input_ids"] for i in row]
    share = ids.count(tokenizer.unk_token_id) / max(1, len(ids))
    if share < UNKNOWN:
        return {}
    return {
        "words that the tokenizer does not know": f"{100 * share:.0f} % of the word pieces of the documents are [UNK]: give TEXT in the collection's language, or data.tokenizer"
    }
