"""What a later stage would refuse, found before the first training step, and what is unknown.

    check(profile, folder)    raises with all faults, or says what is missing and what follows

The stage `data` ends with it. A row that is added later is checked by its own stage. Budgets that
read the same text or pairs too often are said, not refused (lib/efficiency/estimate.py).
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from lib.benchmark import locov1
from lib.benchmark.sources import pretraining_texts
from lib.benchmark.task import CorpusError, Task
from lib.corpus.pretraining import LONG
from lib.corpus.tokenizer import lengths
from lib.efficiency import estimate
from lib.model.tokens import load_tokenizer
from lib.pipeline import params
from lib.pipeline.errors import require

UNKNOWN = 0.05  # share of [UNK] among word pieces above which the page says so
SAMPLE, CHARACTERS = 200, 2_000  # texts, and the beginning of each, that vocabulary is judged by
SIZES = {
    "short": f"at most {LONG:,} characters (paragraphs, one a row or file)",
    "long": f"more than {LONG:,} characters",
}


def check(profile: str, folder: str | Path, collection: str = "") -> dict[str, str]:
    """What the collection lacks and what follows from it, {what: consequence}.

    Args:
        folder: of the corpus that `build` wrote.
        collection: its name in messages; "": the embedded corpus.

    Raises:
        CorpusError: one line with all that a later stage would refuse, each with its way out.
    """
    tasks = {
        split: [locov1.load(name, folder, split) for name in locov1.tasks(folder, split)]
        for split in locov1.splits(folder)
    }
    tokenizer = load_tokenizer(folder)
    faults = [
        *pairs(profile, collection or "the embedded corpus", tasks),
        *pretraining(profile, folder, tokenizer),
        *baselines(profile),
        *others(profile, folder),
    ]
    require(not faults, "; and ".join(dict.fromkeys(faults)))
    return {
        **splits(profile, tasks),
        **evidence(tasks["test"]),
        **long_documents(profile, tasks["test"], tokenizer),
        **vocabulary(tasks["test"], tokenizer),
        **estimate.repetitions(estimate.works(profile, estimate.facts(folder))),
    }


def trained(profile: str, stage: str) -> Iterator[tuple[str, dict]]:
    """(row, its settings) of all that a stage trains."""
    for table in params.TRAINED_BY[stage]:
        for row in params.rows(profile, table):
            yield row, params.settings(profile, stage, row)


def pairs(profile: str, collection: str, tasks: dict[str, list[Task]]) -> Iterator[str]:
    """Fine-tuning: a train split, tasks that rows ask for, and two documents to tell apart."""
    for row, s in trained(profile, "finetune"):
        if s["loss"] == "none" or not s["documents_seen"]:
            continue
        try:
            split = locov1.training_split(collection, s["allow_test_training"], list(tasks))
        except CorpusError as error:
            yield str(error)
            return
        chosen = [task for task in tasks[split] if any(fnmatch(task.name, p) for p in s["tasks"])]
        names = ", ".join(task.name for task in chosen or tasks[split])
        if not chosen:
            yield (
                f"row {row} trains on tasks {', '.join(s['tasks'])}, and the {split} split has "
                f"{names}: correct finetune.tasks"
            )
        elif len({text for task in chosen for text in task.documents.values()}) < 2:
            yield (
                f"the {split} split has one document in all ({names}): to learn what does not "
                "answer takes a second one"
            )


def pretraining(profile: str, folder: str | Path, tokenizer) -> Iterator[str]:
    """Pretraining: texts of both kinds for `mixed`, to train on and held out, long enough."""
    wanted: dict[str, int] = {}  # kind -> the longest length that needs it
    for _, s in trained(profile, "pretrain"):
        for kind in ("short", "long") if s["mixture"] == "mixed" else (s["mixture"],):
            wanted[kind] = max(wanted.get(kind, 0), params.length(profile, s["length"]))
    for kind, length in sorted(wanted.items(), reverse=True):
        for split, purpose in (("train", "to train on"), ("validation", "held out, to measure on")):
            texts = pretraining_texts(folder, kind, split)
            if fault := too_little(kind, purpose, texts, tokenizer, length):
                other = "long" if kind == "short" else "short"
                yield (
                    f"{fault}: add texts of {SIZES[kind]} to TEXT, one alone cannot be divided, or "
                    f"leave that kind out (SET=pretrain.mixture={other})"
                )


def too_little(kind: str, purpose: str, texts: list[str], tokenizer, length: int) -> str:
    """Why the texts are not enough for examples of `length` tokens; "" if they are."""
    if not texts:
        return f"the pretraining text has no {kind} text {purpose}"
    if kind == "short":
        sizes = (lengths(tokenizer, [text[:CHARACTERS]])[0] for text in texts)
        enough = any(size >= min(10, length) - 2 for size in sizes)
        return "" if enough else f"no short text {purpose} has 10 word pieces"
    pieces = 0
    for text in texts:
        pieces += int(lengths(tokenizer, [text])[0])
        if pieces >= length - 2:
            return ""
    return (
        f"the long texts {purpose} are {pieces:,} word pieces together and do not fill the "
        f"{length:,} tokens of an example"
    )


def baselines(profile: str) -> Iterator[str]:
    """Rows of other people's models: what they need is installed, and their key is set."""
    for row, s in params.rows(profile, "baselines").items():
        if "url" in s and find_spec("openai") is None:
            yield f"row {row} needs openai: `make interop` installs it"
        if "key" in s and not os.environ.get(s["key"], "").strip():
            key, url = s["key"], s["url"]
            yield f"row {row} needs the environment variable {key}: set it to the key of {url}"


def others(profile: str, folder: str | Path) -> Iterator[str]:
    """Other sources to rank: they can be read, and are told apart by name."""
    try:
        locov1.every(folder, params.settings(profile, "evaluate")["also"])
    except CorpusError as error:
        yield f"evaluate.also: {error}"


def splits(profile: str, tasks: dict[str, list[Task]]) -> dict[str, str]:
    lacks = {}
    if "train" not in tasks:
        lacks["no train split"] = "no row is fine-tuned"
        if params.settings(profile, "finetune")["allow_test_training"]:
            lacks["no train split"] = (
                "rows train on the test split, as finetune.allow_test_training says: every table "
                "marks them (trained on test), and their scores on it prove nothing"
            )
    if "validation" not in tasks:
        lacks["no validation split"] = (
            "nothing is chosen on this collection: losses, rates and budgets are those of "
            "params.yaml, which were chosen on the validation split of the embedded corpus; the "
            "column `validation` stays empty"
        )
    return lacks


def evidence(test: list[Task]) -> dict[str, str]:
    queries = sum(len(task.queries) for task in test)
    known = sum(len(task.evidence) for task in test)
    nothing = (
        "nothing says where in its document an answer stands: figures by place and the needle are "
        "left out, figures by the length of the answering document stand in"
    )
    part = (
        f"of {known:,} of {queries:,} test queries it is known where their answer stands; figures "
        "by place are about those"
    )
    if known == queries:
        return {}
    return {"evidence is known in part": part} if known else {"no evidence is known": nothing}


def long_documents(profile: str, test: list[Task], tokenizer) -> dict[str, str]:
    longest = max(params.length(profile, paper) for paper in params.PAPER_LENGTHS)
    texts = list({text for task in test for text in task.documents.values()})
    pairs_of = zip(texts, lengths(tokenizer, texts).tolist())
    longer = sum(len(text) > 3 * longest and count > longest - 2 for text, count in pairs_of)
    what = f"documents longer than {longest:,} tokens"
    consequence = (
        f"{longer:,} of {len(texts):,} test documents: the longest row of {profile} reads their "
        f"first {longest:,} tokens, BM25 everything (lengths.{profile} in params.yaml)"
    )
    return {what: consequence} if longer else {}


def vocabulary(test: list[Task], tokenizer) -> dict[str, str]:
    """Whether the tokenizer knows the collection's words, which may be of another script."""
    texts = [text[:CHARACTERS] for task in test for text in islice(task.documents.values(), SAMPLE)]
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row]
    share = ids.count(tokenizer.unk_token_id) / max(1, len(ids))
    consequence = (
        f"{100 * share:.0f} % of the word pieces of the documents are [UNK]: give TEXT in the "
        "collection's language, or data.tokenizer"
    )
    return {"words that the tokenizer does not know": consequence} if share >= UNKNOWN else {}
