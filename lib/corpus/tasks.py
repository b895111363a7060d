"""Retrieval tasks: those made of documented items, and those of somebody else's collection.

    embedded_tasks(tables, split, modules, …)    the tasks of one split, from documentation
    mirror(tables, source)                       a folder's or the hub's tasks, as they are

    book_<N>_deep       items packed into documents of at most N tokens; the item starts after N/2
    book_<N>_shallow    the same documents, the item starts in the first 15 %: the control
    book_<N>_any        the same design, up to `queries_per_document` items at any depth: for
                        training, and the only training task
    page_deep           one module's documentation; the item starts in the last 40 %
    page_shallow        the same pages, the item starts in the first 20 %
    tail                summaries of a module's last three items -> its source without docstrings
    digest              one of 24 unrelated items in one document

A book's documents have the same ids and texts in its tasks, so they need embedding once.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from lib.benchmark import locov1, sources
from lib.benchmark.task import BUILD, SPLITS, CorpusError, Task
from lib.corpus.documents import (
    Document,
    Part,
    Zone,
    as_parts,
    choose,
    digests,
    pack,
    pages,
    spread,
    tail,
)
from lib.corpus.packages import Module, normal
from lib.corpus.pretraining import writable

NATURAL = ("page_deep", "page_shallow", "tail", "digest")
PER_DEPTH, PER_PAGE, PER_DIGEST = 2, 3, 8  # queries of one document
PAGES = {"page_deep": Zone(0.6, 1.0, PER_PAGE), "page_shallow": Zone(0.0, 0.2, PER_PAGE)}


class Design(NamedTuple):
    """What the made tasks look like."""

    books: list[int]  # longest documents, in tokens
    natural: list[str]  # of NATURAL
    queries_per_document: int  # of the training tasks


class Limits(NamedTuple):
    """How much of a split is kept at most; None: all of it."""

    documents: int | None = None  # of a collection
    queries: int | None = None  # of a task


class Candidate(NamedTuple):
    """A document that may go into a collection."""

    document: Document
    asked: dict[str, list[int]]  # task -> the parts that it asks for
    queries: list[str]  # the query that each part would answer


class Tables:
    """The rows of the corpus while it is made, by split."""

    def __init__(self):
        self.documents: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.queries: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.evidence: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.dropped: dict[str, int] = {}  # documents that a task judges and lacks, by its name

    def add(self, family: str, split: str, candidates: list[Candidate], limits: Limits) -> None:
        """One collection and the tasks on it."""
        if not candidates:
            return
        if split != "train":
            candidates = answered_once(candidates)
        tasks = list(candidates[0].asked)
        kept = [candidates[i] for i in most_useful(candidates, tasks, limits.documents)]
        pids = [f"{family}_{split}_Passage_{number}" for number in range(len(kept))]
        pairs = {
            task: [(d, i) for d, candidate in enumerate(kept) for i in candidate.asked[task]]
            for task in tasks
        }
        pairs = {task: spread(some, limits.queries) for task, some in pairs.items()}
        tasks = [task for task in tasks if pairs[task]]
        for pid, candidate in zip(pids, kept):
            self.documents[split] += [(pid, task, candidate.document.text) for task in tasks]
        for task in tasks:
            for number, (d, i) in enumerate(pairs[task]):
                qid, text = f"{task}_{split}_Query_{number}", kept[d].document.text
                start, end = (place / len(text) for place in kept[d].document.spans[i])
                self.queries[split].append((qid, task, kept[d].queries[i], [pids[d]]))
                self.evidence[split].append((qid, task, pids[d], start, end))


def answered_once(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates without the queries that a document of the collection still holds.

    Such a document would answer the query as well.
    """
    words = "\n".join(f" {normal(candidate.document.text)} " for candidate in candidates)

    def unanswered(candidate: Candidate, parts: list[int]) -> list[int]:
        return [i for i in parts if f" {normal(candidate.queries[i])} " not in words]

    return [
        candidate._replace(
            asked={task: unanswered(candidate, parts) for task, parts in candidate.asked.items()}
        )
        for candidate in candidates
    ]


def most_useful(candidates: list[Candidate], tasks: list[str], most: int | None) -> list[int]:
    """At most so many documents: those that the first task asks for, then the next; in order."""
    if most is None or len(candidates) <= most:
        return list(range(len(candidates)))
    ranks = [
        next((rank for rank, task in enumerate(tasks) if candidate.asked[task]), len(tasks))
        for candidate in candidates
    ]
    keep: list[int] = []
    for rank in range(len(tasks) + 1):
        keep += spread([i for i, own in enumerate(ranks) if own == rank], most - len(keep))
    return sorted(keep)


def embedded_tasks(
    tables: Tables,
    split: str,
    modules: list[Module],
    count: Counter,
    tokenizer,
    design: Design,
    limits: Limits,
) -> None:
    """Add the tasks of one split, made of the modules' items."""
    parts = as_parts([item for module in modules for item in module.items], count, tokenizer)
    for family, packs, zones in collections(parts, split, design):
        summaries = [[part.item.summary for part in packed] for packed in packs]
        candidates = [
            Candidate(*choose(packed, zones), queries) for packed, queries in zip(packs, summaries)
        ]
        tables.add(family, split, candidates, limits)
    if split != "train" and "tail" in design.natural:
        tails = [made for module in modules if (made := tail(module, count))]
        candidates = [Candidate(document, {"tail": [0]}, [query]) for document, query in tails]
        tables.add("tail", split, candidates, limits)


def collections(
    parts: list[Part], split: str, design: Design
) -> Iterator[tuple[str, list[list[Part]], dict[str, Zone]]]:
    """(family, its documents as parts, {task: zone}) of each collection of a split."""
    for n in design.books:
        zones = {
            f"book_{n}_deep": Zone(0.5, 1.0, PER_DEPTH, after=n // 2),
            f"book_{n}_shallow": Zone(0.0, 0.15, PER_DEPTH),
        }
        if split == "train":
            zones = {f"book_{n}_any": Zone(0.0, 1.0, design.queries_per_document)}
        yield f"book_{n}", pack(parts, n), zones
    if split == "train":
        return
    zones = {task: zone for task, zone in PAGES.items() if task in design.natural}
    if zones:
        yield "page", pages(parts), zones
    if "digest" in design.natural:
        yield "digest", digests(parts), {"digest": Zone(0.0, 1.0, PER_DIGEST)}


def mirror(tables: Tables, source: str) -> None:
    """The tasks of a folder or of the hub, checked, as they are.

    Raises:
        CorpusError: the source cannot be read, has no queries, or has no test split.
    """
    if isinstance(sources.of(source), sources.Texts):
        raise CorpusError(
            f"{source} is a folder of texts, which can be searched (locov1.load), but it has "
            "neither queries nor judgements: give data.source a folder with queries"
        )
    for split in locov1.splits(source):
        for name in locov1.tasks(source, split):
            add_task(tables, name, split, locov1.load(name, source, split))
    for split, rows in tables.queries.items():
        if all(gain == 1 for row in rows for gain in row[4]):
            tables.queries[split] = [row[:4] for row in rows]
    if not tables.queries["test"]:
        raise CorpusError(
            f"{source} has no test split: {BUILD}, or give data.source a folder with "
            "documents-test.parquet and queries-test.parquet"
        )


def add_task(tables: Tables, name: str, split: str, task: Task) -> None:
    if task.dropped:
        tables.dropped[f"{name}, {split}"] = task.dropped
    tables.documents[split] += [(pid, name, writable(text)) for pid, text in task.documents.items()]
    for qid, query in task.queries.items():
        pids, gains = list(task.qrels[qid]), list(task.qrels[qid].values())
        tables.queries[split].append((qid, name, writable(query), pids, gains))
    tables.evidence[split] += [(qid, name, *span) for qid, span in task.evidence.items()]
