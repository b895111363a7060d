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
from lib.benchmark.task import BUILD, SPLITS
from lib.corpus import documents
from lib.corpus.documents import Document, Part, Zone, spread
from lib.corpus.packages import Module, normal
from lib.model.tokens import encodable
from lib.pipeline.errors import require

NATURAL = ("page_deep", "page_shallow", "tail", "digest")
PER_DEPTH, PER_PAGE, PER_DIGEST = 2, 3, 8  # queries of one document
PER_TOKENS = 1_024  # a book asks once for so many tokens, if that is more: long books are few
PAGES = {"page_deep": Zone(0.6, 1.0, PER_PAGE), "page_shallow": Zone(0.0, 0.2, PER_PAGE)}


class Candidate(NamedTuple):
    """A document that may go into a collection."""

    document: Document
    asked: dict[str, list[int]]  # task -> the parts that it asks for
    queries: list[str]  # the query that each part would answer


class Tables:
    """The rows of the corpus while it is made, by split."""

    def __init__(self):
        tables = ({split: [] for split in SPLITS} for _ in range(3))
        self.documents, self.queries, self.evidence = tables
        self.dropped: dict[str, int] = {}  # documents that a task judges and lacks, by its name

    def add(self, family: str, split: str, candidates: list[Candidate], most=(None, None)) -> None:
        """A collection and its tasks; `most`: documents, and queries of each task; None: all."""
        if split != "train":
            candidates = answered_once(candidates)
        kept = most_useful(candidates, most[0])
        pids = [f"{family}_{split}_Passage_{number}" for number in range(len(kept))]
        pairs = {
            task: [(d, i) for d, candidate in enumerate(kept) for i in candidate.asked[task]]
            for task in (kept[0].asked if kept else ())
        }
        pairs = {task: drawn for task, found in pairs.items() if (drawn := spread(found, most[1]))}
        for pid, candidate in zip(pids, kept):
            self.documents[split] += [(pid, task, candidate.document.text) for task in pairs]
        for task, drawn in pairs.items():
            for number, (d, i) in enumerate(drawn):
                qid, document = f"{task}_{split}_Query_{number}", kept[d].document
                start, end = (place / len(document.text) for place in document.spans[i])
                self.queries[split].append((qid, task, kept[d].queries[i], [pids[d]]))
                self.evidence[split].append((qid, task, pids[d], start, end))


def answered_once(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates without the queries whose words a document of the collection still contains.

    Such a document would answer the query as well.
    """
    words = "\n".join(f" {normal(candidate.document.text)} " for candidate in candidates)
    result = []
    for candidate in candidates:
        padded = [f" {normal(query)} " for query in candidate.queries]
        asked = candidate.asked.items()
        asked = {task: [i for i in parts if padded[i] not in words] for task, parts in asked}
        result.append(candidate._replace(asked=asked))
    return result


def most_useful(candidates: list[Candidate], most: int | None) -> list[Candidate]:
    """At most so many documents: those that the first task asks for, then the next; in order."""
    if most is None or len(candidates) <= most:
        return candidates
    ranks = [
        next((rank for rank, parts in enumerate(own.asked.values()) if parts), len(own.asked))
        for own in candidates
    ]
    keep: list[int] = []
    for rank in sorted(set(ranks)):
        keep += spread([i for i, own in enumerate(ranks) if own == rank], most - len(keep))
    return [candidates[i] for i in sorted(keep)]


def embedded_tasks(
    tables: Tables, split: str, modules: list[Module], count: Counter, tokenizer, settings
) -> None:
    """Add the tasks of one split, made of the modules' items.

    Args:
        count: how many items of the library have a summary, by its normalised words.
        settings: `Settings` of build.py.
    """
    most = (None, None)
    if split != "train":
        most = getattr(settings, f"{split}_documents"), getattr(settings, f"{split}_queries")
    items = [item for module in modules for item in module.items]
    parts = documents.as_parts(items, count, tokenizer)
    for family, packs, zones in collections(parts, split, settings):
        candidates = [
            Candidate(*documents.choose(packed, zones), [part.item.summary for part in packed])
            for packed in packs
        ]
        tables.add(family, split, candidates, most)
    if split != "train" and "tail" in settings.natural:
        tails = [tail for module in modules if (tail := documents.tail(module, count))]
        candidates = [Candidate(document, {"tail": [0]}, [query]) for document, query in tails]
        tables.add("tail", split, candidates, most)


def collections(
    parts: list[Part], split: str, settings
) -> Iterator[tuple[str, list[list[Part]], dict[str, Zone]]]:
    """(family, its documents as parts, {task: zone}) of each collection of a split."""
    for n in sorted(set(settings.books)):
        queries = max(PER_DEPTH, n // PER_TOKENS)
        zones = {
            f"book_{n}_deep": Zone(0.5, 1.0, queries, after=n // 2),
            f"book_{n}_shallow": Zone(0.0, 0.15, queries),
        }
        if split == "train":
            zones = {f"book_{n}_any": Zone(0.0, 1.0, settings.queries_per_document)}
        yield f"book_{n}", documents.pack(parts, n), zones
    if split == "train":
        return
    if zones := {task: zone for task, zone in PAGES.items() if task in settings.natural}:
        yield "page", documents.pages(parts), zones
    if "digest" in settings.natural:
        yield "digest", documents.digests(parts), {"digest": Zone(0.0, 1.0, PER_DIGEST)}


def mirror(tables: Tables, source: str) -> None:
    """The tasks of a folder or of the hub, checked, as they are.

    Raises:
        CorpusError: the source cannot be read, has no queries, or has no test split.
    """
    require(
        not isinstance(sources.of(source), sources.Texts),
        f"{source} is a folder of texts, which can be searched (locov1.load), but it has neither "
        "queries nor judgements: give data.source a folder with queries",
    )
    for split in locov1.splits(source):
        for name in locov1.tasks(source, split):
            task = locov1.load(name, source, split)
            if task.dropped:
                tables.dropped[f"{name}, {split}"] = task.dropped
            tables.documents[split] += [
                (pid, name, encodable(text)) for pid, text in task.documents.items()
            ]
            tables.queries[split] += [
                (qid, name, encodable(query), [*task.qrels[qid]], [*task.qrels[qid].values()])
                for qid, query in task.queries.items()
            ]
            tables.evidence[split] += [(qid, name, *span) for qid, span in task.evidence.items()]
        if all(gain == 1 for row in tables.queries[split] for gain in row[4]):
            tables.queries[split] = [row[:4] for row in tables.queries[split]]
    require(
        tables.queries["test"],
        f"{source} has no test split: {BUILD}, or give data.source a folder with "
        "documents-test.parquet and queries-test.parquet",
    )
