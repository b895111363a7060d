"""LoCoV1 and everything of its shape: a retrieval task is documents, queries and judgements.

    load("book_512_deep")                            one task of the corpus built here
    load("qmsum", source="../mirror")                of a folder: see lib/benchmark/sources.py for what it may look like
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
from lib.benchmark.task import BUILD, SPLITS, CorpusError, Task


class Description(NamedTuple):
    """A task of LoCoV1 as the paper's Table 10 has it; lengths are mean characters."""

    source: str
    domain: str
    query: str
    document: str
    train_queries: int
    train_documents: int
    test_queries: int
    test_documents: int
    query_characters: int
    document_characters: int


LOCOV1 = {
    name: Description(*rest)
    for name, *rest in (
        (
            "summ_screen_fd",
            "SCROLLS SummScreenFD",
            "screenwriting",
            "summary of an episode",
            "its transcript",
            3673,
            3673,
            338,
            338,
            590,
            30_792,
        ),
        (
            "gov_report",
            "SCROLLS GovReport",
            "government",
            "summary of a report",
            "the report",
            17_457,
            17_457,
            972,
            972,
            3_871,
            55_280,
        ),
        (
            "qmsum",
            "SCROLLS QMSum",
            "corporate",
            "answer about a meeting",
            "the question and the meeting's transcript",
            1257,
            1257,
            272,
            272,
            430,
            58_129,
        ),
        (
            "qasper_title",
            "QASPER",
            "science",
            "title of a paper",
            "its full text",
            888,
            888,
            416,
            416,
            71,
            22_315,
        ),
        (
            "qasper_abstract",
            "QASPER",
            "science",
            "abstract of a paper",
            "its full text",
            888,
            888,
            416,
            416,
            931,
            22_315,
        ),
        (
            "multifieldqa",
            "LongBench MultiFieldQA-en",
            "general",
            "question",
            "context that answers it",
            120,
            120,
            30,
            30,
            62,
            29_465,
        ),
        (
            "2wikimqa",
            "LongBench 2WikiMQA",
            "general",
            "question over two articles",
            "context that answers it",
            240,
            240,
            60,
            60,
            69,
            37_867,
        ),
        (
            "passage_retrieval",
            "LongBench passage_retrieval_en",
            "general",
            "summary of one paragraph",
            "thirty paragraphs",
            240,
            240,
            60,
            60,
            840,
            35_814,
        ),
        (
            "legal_case_reports",
            "Australian legal case reports (UCI)",
            "law",
            "text about a case (the paper does not say which)",
            "its report",
            3094,
            3094,
            770,
            770,
            14_986,
            47_536,
        ),
        (
            "courtlistener_HTML",
            "CourtListener",
            "law",
            "text that cites an opinion",
            "the opinion, HTML",
            10_000,
            10_000,
            2000,
            2000,
            146,
            57_028,
        ),
        (
            "courtlistener_Plain_Text",
            "CourtListener",
            "law",
            "text that cites an opinion",
            "the opinion, plain text",
            10_000,
            10_000,
            2000,
            2000,
            146,
            48_190,
        ),
        (
            "stackoverflow",
            "StackOverflow",
            "programming",
            "question",
            "answer",
            1599,
            18_005,
            400,
            7741,
            758,
            4_544,
        ),
    )
}


def load(
    task: str, source: str | Path = "embedded", split: str = "test", drop_null: bool | None = None
) -> Task:
    """One task.

    Args:
        source: "embedded" (the corpus of the profile in params.yaml), "hub" (LoCoV1), "longembed", or a folder in any
            layout of lib/benchmark/sources.py.
        drop_null: leave documents without text out, with their queries, as the authors' loader does; the hub's
            QASPER tasks have some. Default: on the hub only; elsewhere a null passage is an error. So is a judgement of a
            document that is not there, but in BEIR's own layout: some of BEIR's collections (ArguAna) have such, and
            they are left out and counted.

    Raises:
        CorpusError: one line that names the file or id, and the way out.
    """
    known_split(split)
    layout = sources.of(source)
    names = layout.tasks(split)
    documents, queries, _ = layout.files(task, split)
    if isinstance(queries, Path) and documents.is_file() and not queries.is_file():
        raise CorpusError(f"{queries} is missing: a mirror has it, fetch it, or {BUILD}")
    if task not in names:
        raise unknown_task(task, names, layout) if names else no_split(layout, split)
    documents, queries, evidence = layout.rows(task, split)
    searched = isinstance(layout, sources.Texts)
    return assemble(
        task,
        split,
        documents,
        queries,
        evidence,
        layout.files(task, split),
        source == "hub" if drop_null is None else drop_null,
        searched,
        isinstance(layout, sources.Beir),
    )


def tasks(source: str | Path = "embedded", split: str = "test") -> list[str]:
    """The names of a source's tasks, sorted."""
    known_split(split)
    layout = sources.of(source)
    names = layout.tasks(split)
    if not names:
        raise no_split(layout, split)
    return names


def splits(source: str | Path = "embedded") -> list[str]:
    """Which of train, validation and test a source has: looked up, not assumed."""
    return sources.of(source).splits()


def every(
    source: str | Path = "embedded", also: Iterable[str | Path] = (), split: str = "test"
) -> list[Task]:
    """The tasks of a source, then those of other sources, named `<source>/<task>` by the last part of their source's name.

    A name proves nothing (a source may call a task `BeIR/scifact`): whose a task is, its field `source` says.

    Raises:
        CorpusError: as `load`, or two sources, or two tasks, of one name.
    """
    found = [load(name, source, split) for name in tasks(source, split)]
    names: dict[str, str | Path] = {}
    for other in also:
        prefix = Path(other).resolve().name
        if not prefix:
            raise CorpusError(f"{other} has no name of its own: give a folder below it")
        if prefix in names:
            raise CorpusError(f"{names[prefix]} and {other} are both called {prefix}: rename one")
        names[prefix] = other
        found += [
            replace(load(name, other, split), name=f"{prefix}/{name}", source=prefix)
            for name in tasks(other, split)
        ]
        if not found[-1].queries:
            raise CorpusError(
                f"{other} has texts and no queries, so nothing in it can be scored: take it out (notebook 00 ends by searching such a folder)"
            )
    twice = [name for name, n in Counter(task.name for task in found).items() if n > 1]
    if twice:
        raise CorpusError(
            f"two tasks are called {twice[0]!r}, one of {source} and one of evaluate.also: rename one"
        )
    return found


def training_split(
    source: str | Path, allow_test_training: bool = False, there: list[str] | None = None
) -> str:
    """The split to fine-tune on: train; or, where a source has none and it is allowed in so many words, test.

    Args:
        there: the splits of the source, where they are known already.

    Raises:
        CorpusError: there is no train split, and no permission.
    """
    there = splits(source) if there is None else there
    if "train" in there:
        return "train"
    if allow_test_training and "test" in there:
        return "test"
    raise CorpusError(
        f"{source} has no train split (it has {', '.join(there) or 'none'}), and training on what is tested proves nothing: give a source with a train split; or "
        "set finetune.allow_test_training: true (make repro … SET=finetune.allow_test_training=true), and the report says so beside each number; "
        "or rank it with what was trained elsewhere (evaluate.also)"
    )


# ------------------------------------------------------------------ one task


def assemble(
    name: str,
    split: str,
    documents: Iterable[dict],
    queries: Iterable[dict],
    evidence: Iterable[dict] = (),
    files: tuple = ("", "", ""),
    drop_null: bool = False,
    searched: bool = False,
    drop_absent: bool = False,
) -> Task:
    """A task from its rows, or the error that says which row is wrong; `searched`: it may do without queries.

    `drop_absent`: judgements of documents that are not there are left out, with the queries that they alone answer.
    """
    where, where_asked, where_evidence = files
    texts: dict[str, str] = {}
    null: set[str] = set()
    at: dict[str, int] = {}
    for row_number, row in enumerate(documents, start=1):
        if row["pid"] is None:
            raise CorpusError(
                f"{where}: a document of {name} has no pid (row {row_number}): give it one"
            )
        pid, passage = (
            identifier(
                row["pid"], f"{where}: the id of a document of {name} (row {row_number})", searched
            ),
            row["passage"],
        )
        if pid in at:
            raise CorpusError(
                f"{where}: task {name} has document id {pid!r} twice (its rows {at[pid]} and {row_number}): make ids unique"
            )
        at[pid] = row_number
        if passage is None and drop_null:
            null.add(pid)
        elif passage is None:
            raise CorpusError(
                f"{where}: document {pid!r} of {name} has a null passage (row {row_number}): give it a text, or leave such documents out with drop_null=True"
            )
        elif not isinstance(passage, str):
            raise CorpusError(
                f"{where}: document {pid!r} of {name} is {passage!r:.40} and no text (row {row_number}): give it one"
            )
        else:
            texts[pid] = passage
    if not texts:
        raise CorpusError(
            f"{where}: task {name} has no documents: fetch the file again, or {BUILD}"
        )
    asked: dict[str, str] = {}
    absent: set[str] = set()
    qrels: dict[str, dict[str, int]] = {}
    for row_number, row in enumerate(queries, start=1):
        if row["qid"] is None:
            raise CorpusError(
                f"{where_asked}: a query of {name} has no qid (row {row_number}): give it one"
            )
        asker = f"{where_asked}: the id of a query of {name} (row {row_number})"
        qid, query = identifier(row["qid"], asker), row["query"]
        if qid in qrels:
            raise CorpusError(
                f"{where_asked}: task {name} has query id {qid!r} twice: make ids unique"
            )
        if not isinstance(query, str) or not query.strip():
            raise CorpusError(
                f"{where_asked}: query {qid!r} of {name} is empty: give it a text, or take it out"
            )
        judged = judgements(row, f"{where_asked}: query {qid!r} of {name}")
        missing = [pid for pid in judged if pid not in texts and pid not in null]
        absent.update(missing)
        if missing and not drop_absent:
            raise CorpusError(
                f"{where_asked}: query {qid!r} of {name} is answered by document {missing[0]!r}, which is not there ({len(missing)} of {len(judged)} answers): complete the documents, or take the judgement out"
            )
        judged = {pid: gain for pid, gain in judged.items() if pid in texts}
        if judged:
            asked[qid], qrels[qid] = query, judged
    if not asked and not searched:
        raise CorpusError(
            f"{where_asked}: task {name} has no queries: fetch the file again, or {BUILD}"
        )
    spans = {}
    for row in evidence:
        qid, pid = (
            identifier(row[key], f"{where_evidence}: the {key} of {name}'s evidence")
            for key in ("qid", "pid")
        )
        start, end = row["start_frac"], row["end_frac"]
        if qid not in qrels or start is None or pid in null:
            continue
        if pid not in qrels[qid] or end is None or not 0 <= start <= end <= 1:
            raise CorpusError(
                f"{where_evidence}: the evidence of query {qid!r} of {name} does not lie inside document {pid!r}, or that is no answer: correct or delete the evidence file"
            )
        spans[qid] = (pid, float(start), float(end))
    return Task(name, split, texts, asked, qrels, spans, len(null | absent))


def identifier(value, where: str, searched: bool = False) -> str:
    """An id as a string: a number as it is written, 3.0 as 3 (a column with a gap makes numbers of ids floats).

    Raises:
        CorpusError: it is no string and no number, or a TREC file could not hold it; `searched`: nothing is written of it.
    """
    name = plain(value)
    if not isinstance(value, (str, int)) and name == str(value) or isinstance(value, bool):
        raise CorpusError(f"{where} is {value!r}: an id is a text or a whole number")
    if runs.unwritable([name]) is not None and not searched:
        raise CorpusError(
            f"{where} is {name!r}: a run file has one word for it, so it needs a character and takes no white space and no half character; rename it"
        )
    return name


def plain(value) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def judgements(row: dict, where: str) -> dict[str, int]:
    """{pid: gain} of a query's row, those that are relevant.

    answer_pids may be a list, each worth 1 or its number in answer_gains; {pid: gain}; or, as a map column of parquet
    comes out, a list of (pid, gain). A struct column has all pids in every row: null where a query says nothing.
    """
    answers, gains = row["answer_pids"], row.get("answer_gains")
    if isinstance(answers, dict):
        pairs = list(answers.items())
    elif isinstance(answers, list) and gains is not None:
        if not isinstance(gains, list) or len(gains) != len(answers):
            raise CorpusError(
                f"{where}: answer_gains has {gains!r:.60} for {len(answers)} answer_pids: one gain for each"
            )
        pairs = list(zip(answers, gains))
    elif isinstance(answers, list):
        pairs = [
            tuple(answer) if isinstance(answer, (tuple, list)) and len(answer) == 2 else (answer, 1)
            for answer in answers
        ]
    else:
        pairs = []
    judged: dict[str, int] = {}
    for pid, gain in pairs:
        if (
            gain is None or gain != gain
        ):  # nothing said: null, or what a table of numbers makes of it
            continue
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or gain != int(gain):
            raise CorpusError(f"{where} grades {pid!r} with {gain!r}: a grade is a whole number")
        pid = plain(pid)
        if judged.setdefault(pid, int(gain)) != int(gain):
            raise CorpusError(
                f"{where} grades {pid!r} twice, with {judged[pid]} and {int(gain)}: keep one"
            )
    judged = {pid: gain for pid, gain in judged.items() if gain > 0}
    if not judged:
        raise CorpusError(f"{where} has no answer_pids that are relevant: judge it, or take it out")
    return judged


def known_split(split: str) -> None:
    if split not in SPLITS:
        raise CorpusError(f"split {split!r}: one of {', '.join(SPLITS)}")


def no_split(layout, split: str) -> CorpusError:
    there = layout.splits()
    return CorpusError(
        f"{layout} has no {split} split: "
        + (f"it has {', '.join(there)}" if there else f"fetch it, or {BUILD}")
    )


def unknown_task(task: str, names: list[str], where) -> CorpusError:
    near = difflib.get_close_matches(task, names, n=1, cutoff=0.0)
    return CorpusError(
        f"{where} has no task {task!r}"
        + (f", did you mean {near[0]!r}? It has {', '.join(names)}" if names else ": it is empty")
    )
