"""LoCoV1 and everything of its shape: a retrieval task is documents, queries and judgements.

    load("book_512_deep")                            one task of the corpus built here
    load("qmsum", source="../mirror")                of a folder: lib/benchmark/sources.py
    load("qasper_title", source="hub")               of hazyresearch/LoCoV1-Documents and -Queries
    tasks(source, split), splits(source)             what a source has
    every(source, also)                              all tasks of several
    LOCOV1                                           the paper's twelve tasks

Ids are strings, always. Whatever would score a task wrongly without a word (an id twice, a
judgement of a document that is not there, a null passage, an empty query) is an error here.
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lib.benchmark import runs, sources
from lib.benchmark.task import BUILD, SPLITS, Task
from lib.pipeline import params
from lib.pipeline.errors import require


class Description(NamedTuple):
    """A task of LoCoV1 as the paper's Table 10 has it; lengths are mean characters."""

    domain: str
    train_queries: int
    train_documents: int
    test_queries: int
    test_documents: int
    query_characters: int
    document_characters: int


LOCOV1 = {
    "summ_screen_fd": Description("screenwriting", 3673, 3673, 338, 338, 590, 30_792),
    "gov_report": Description("government", 17_457, 17_457, 972, 972, 3_871, 55_280),
    "qmsum": Description("corporate", 1257, 1257, 272, 272, 430, 58_129),
    "qasper_title": Description("science", 888, 888, 416, 416, 71, 22_315),
    "qasper_abstract": Description("science", 888, 888, 416, 416, 931, 22_315),
    "multifieldqa": Description("general", 120, 120, 30, 30, 62, 29_465),
    "2wikimqa": Description("general", 240, 240, 60, 60, 69, 37_867),
    "passage_retrieval": Description("general", 240, 240, 60, 60, 840, 35_814),
    "legal_case_reports": Description("law", 3094, 3094, 770, 770, 14_986, 47_536),
    "courtlistener_HTML": Description("law", 10_000, 10_000, 2000, 2000, 146, 57_028),
    "courtlistener_Plain_Text": Description("law", 10_000, 10_000, 2000, 2000, 146, 48_190),
    "stackoverflow": Description("programming", 1599, 18_005, 400, 7741, 758, 4_544),
}


# ------------------------------------------------------------------ tasks of sources


def opened(source: str | Path, split: str = "test"):
    """The source; "embedded" is the corpus of the profile in params.yaml."""
    require(split in SPLITS, f"split {split!r}: one of {', '.join(SPLITS)}")
    if source == "embedded":
        source = params.data(params.load()["profile"]) / "corpus"
    return sources.of(source)


def load(
    task: str, source: str | Path = "embedded", split: str = "test", drop_null: bool | None = None
) -> Task:
    """One task.

    Args:
        source: "embedded" (the corpus of the profile in params.yaml), "hub" (LoCoV1), "longembed",
            or a folder in any layout of lib/benchmark/sources.py.
        drop_null: leave documents without text out, with their queries, as the authors' loader
            does; the hub's QASPER tasks have some. Default: on the hub only; elsewhere a null
            passage is an error. So is a judgement of a document that is not there, except in
            BEIR's own layout: some of BEIR's collections (ArguAna) have such, and they are left
            out and counted.

    Raises:
        CorpusError: one line that names the file or id, and the way out.
    """
    layout = opened(source, split)
    files = layout.files(task, split)
    half = isinstance(files[1], Path) and files[0].is_file() and not files[1].is_file()
    require(not half, f"{files[1]} is missing: a mirror has it, fetch it, or {BUILD}")
    names = named_tasks(layout, split)
    near = difflib.get_close_matches(task, names, n=1, cutoff=0.0)[0]
    unknown = f"{layout} has no task {task!r}, did you mean {near!r}? It has {', '.join(names)}"
    require(task in names, unknown)
    return assemble(
        task,
        split,
        *layout.rows(task, split),
        files=files,
        drop_null=source == "hub" if drop_null is None else drop_null,
        drop_absent=isinstance(layout, sources.Beir),
        searched=isinstance(layout, sources.Texts),
    )


def tasks(source: str | Path = "embedded", split: str = "test") -> list[str]:
    """The names of a source's tasks, sorted; a source without the split is a CorpusError."""
    return named_tasks(opened(source, split), split)


def splits(source: str | Path = "embedded") -> list[str]:
    """Which of train, validation and test a source has: looked up, not assumed."""
    return opened(source).splits()


def named_tasks(layout, split: str) -> list[str]:
    names = layout.tasks(split)
    known = "" if names else ", ".join(layout.splits())
    way = f"it has {known}" if known else f"fetch it, or {BUILD}"
    require(names, f"{layout} has no {split} split: {way}")
    return names


def every(
    source: str | Path = "embedded", also: Iterable[str | Path] = (), split: str = "test"
) -> list[Task]:
    """The tasks of a source, then those of other sources, named `<source>/<task>`.

    <source> is the last part of the other source's path. A name proves nothing (a source may call
    a task `BeIR/scifact`): the field `source` of a task says where it is from. Two sources, or two
    tasks, of one name are a CorpusError.
    """
    loaded = [load(name, source, split) for name in tasks(source, split)]
    names: dict[str, str | Path] = {}
    for other in also:
        prefix = Path(other).resolve().name
        require(prefix, f"{other} has no name of its own: give a folder below it")
        first = names.get(prefix)
        require(first is None, f"{first} and {other} are both called {prefix}: rename one")
        names[prefix] = other
        for name in tasks(other, split):
            task = replace(load(name, other, split), name=f"{prefix}/{name}", source=prefix)
            loaded.append(task)
        way = "take it out (notebook 00 ends by searching such a folder)"
        unscored = f"{other} has texts and no queries, so nothing in it can be scored: {way}"
        require(task.queries, unscored)
    name, times = Counter(task.name for task in loaded).most_common(1)[0]
    twice = f"two tasks are called {name!r}, one of {source} and one of evaluate.also: rename one"
    require(times == 1, twice)
    return loaded


def training_split(
    source: str | Path, allow_test_training: bool | str = False, there: list[str] | None = None
) -> str:
    """The split to fine-tune on: train; of a source without one, test if that is allowed.

    Args:
        allow_test_training: also "always": test, whatever splits the source has.
        there: the splits of the source, if they are known already.
    """
    there = splits(source) if there is None else there
    if "train" in there and allow_test_training != "always":
        return "train"
    require(
        allow_test_training and "test" in there,
        f"{source} has no train split (it has {', '.join(there) or 'none'}), and training on what "
        "is tested proves nothing: give a source with a train split; or set "
        "finetune.allow_test_training: true (make repro … SET=finetune.allow_test_training=true), "
        "and the report says so beside each number; or rank it with what was trained elsewhere "
        "(evaluate.also)",
    )
    return "test"


# ------------------------------------------------------------------ one task


def assemble(
    name: str,
    split: str,
    documents: Iterable[dict],
    queries: Iterable[dict],
    evidence: Iterable[dict] = (),
    files: tuple = ("", "", ""),
    drop_null: bool = False,
    drop_absent: bool = False,
    searched: bool = False,
) -> Task:
    """A task from its rows, or the error that says which row is wrong.

    Args:
        files: that the rows are of, for messages.
        drop_null, drop_absent: leave out documents with a null passage, and judgements of documents
            that are not there; queries that only such documents answer are left out too.
        searched: the task may do without queries, and its ids need not fit into a run file.
    """
    texts, null = read_documents(name, documents, files[0], drop_null, searched)
    asked, qrels, absent = read_queries(name, queries, files[1], texts, null, drop_absent)
    none = f"{files[1]}: task {name} has no queries: fetch the file again, or {BUILD}"
    require(asked or searched, none)
    spans = read_evidence(name, evidence, files[2], qrels, null)
    return Task(name, split, texts, asked, qrels, spans, len(null | absent))


def read_documents(name, rows, where, drop_null, searched) -> tuple[dict[str, str], set[str]]:
    """({pid: text}, documents left out because their passage is null)."""
    texts: dict[str, str] = {}
    null: set[str] = set()
    row_of: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        id_name = f"{where}: the id of a document of {name} (row {number})"
        pid, passage = identifier(row["pid"], id_name, searched), row["passage"]
        first, document = row_of.setdefault(pid, number), f"{where}: document {pid!r} of {name}"
        twice = f"{document} is there twice (rows {first} and {number}): make ids unique"
        require(first == number, twice)
        if passage is None:
            way = "give it a text, or leave such documents out with drop_null=True"
            require(drop_null, f"{document} has a null passage (row {number}): {way}")
            null.add(pid)
        else:
            fault = f"{document} is {str(passage)[:40]} and no text (row {number}): give it one"
            require(isinstance(passage, str), fault)
            texts[pid] = passage
    require(texts, f"{where}: task {name} has no documents: fetch the file again, or {BUILD}")
    return texts, null


def read_queries(name, rows, where, texts, null, drop_absent) -> tuple[dict, dict, set[str]]:
    """(queries, qrels, documents that are judged and not there)."""
    asked: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    absent: set[str] = set()
    for number, row in enumerate(rows, start=1):
        qid = identifier(row["qid"], f"{where}: the id of a query of {name} (row {number})")
        text, query = row["query"], f"{where}: query {qid!r} of {name}"
        require(qid not in qrels, f"{query} is there twice: make ids unique")
        written = isinstance(text, str) and text.strip()
        require(written, f"{query} is empty: give it a text, or take it out")
        gains = judgements(row, query)
        missing = [pid for pid in gains if pid not in texts and pid not in null]
        absent.update(missing)
        share = f"{len(missing)} of {len(gains)} answers"
        lost = f"{(missing or [''])[0]!r}, which is not there ({share})"
        way = "complete the documents, or take the judgement out"
        require(drop_absent or not missing, f"{query} is answered by document {lost}: {way}")
        gains = {pid: gain for pid, gain in gains.items() if pid in texts}
        if gains:
            asked[qid], qrels[qid] = text, gains
    return asked, qrels, absent


def read_evidence(name, rows, where, qrels, null) -> dict[str, tuple[str, float, float]]:
    """{qid: (pid, start, end)} of the queries whose evidence is known."""
    spans = {}
    for row in rows:
        id_name = f"{where}: the id of {name}'s evidence"
        qid, pid = identifier(row["qid"], id_name), identifier(row["pid"], id_name)
        start, end = row["start_frac"], row["end_frac"]
        if qid not in qrels or start is None or pid in null:
            continue
        inside = pid in qrels[qid] and end is not None and 0 <= start <= end <= 1
        fault = f"does not lie inside document {pid!r}, or that is no answer"
        way = "correct or delete the evidence file"
        require(inside, f"{where}: the evidence of query {qid!r} of {name} {fault}: {way}")
        spans[qid] = (pid, float(start), float(end))
    return spans


def identifier(value, where: str, searched: bool = False) -> str:
    """An id as a string that a run file can hold; if only `searched`, any string.

    A number is an id as it is written, 3.0 as 3: a column with a gap makes floats of its ids.
    """
    name = plain(value)
    whole = isinstance(value, (str, int)) or name != str(value)
    fault = f"{where} is {value!r}: an id is a text or a whole number"
    require(whole and not isinstance(value, bool), fault)
    way = "a run file has one word for it: no white space, no half character; rename it"
    require(searched or runs.unwritable([name]) is None, f"{where} is {name!r}: {way}")
    return name


def plain(value) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def judgements(row: dict, where: str) -> dict[str, int]:
    """{pid: gain} of a query's row, those that are relevant.

    answer_pids may be a list, each worth 1 or its number in answer_gains; {pid: gain}; or, as a
    map column of parquet comes out, a list of (pid, gain). A struct column has all pids in every
    row: null where a query says nothing.
    """
    gains: dict[str, int] = {}
    for pid, gain in judged_pairs(row, where):
        if gain is None or gain != gain:  # null, or what a table of numbers makes of it
            continue
        number = isinstance(gain, (int, float)) and not isinstance(gain, bool)
        fault = f"{where} grades {pid!r} with {gain!r}: a grade is a whole number"
        require(number and gain == int(gain), fault)
        first = gains.setdefault(plain(pid), int(gain))
        twice = f"{where} grades {pid!r} twice, with {first} and {gain}: keep one"
        require(first == int(gain), twice)
    gains = {pid: gain for pid, gain in gains.items() if gain > 0}
    require(gains, f"{where} has no answer_pids that are relevant: judge it, or take it out")
    return gains


def judged_pairs(row: dict, where: str) -> list[tuple]:
    answers, gains = row["answer_pids"], row.get("answer_gains")
    if not isinstance(answers, list):
        return list(answers.items()) if isinstance(answers, dict) else []
    if gains is not None:
        paired = isinstance(gains, list) and len(gains) == len(answers)
        fault = f"{gains!r:.60} for {len(answers)} answer_pids: one gain for each"
        require(paired, f"{where}: answer_gains has {fault}")
        return list(zip(answers, gains))
    return [
        tuple(answer) if isinstance(answer, (tuple, list)) and len(answer) == 2 else (answer, 1)
        for answer in answers
    ]
