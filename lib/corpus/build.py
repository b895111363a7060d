"""The corpus: retrieval tasks, pretraining text and a tokenizer, in one folder.

Retrieval over long documents needs long documents, and none are committed here. `build` makes them
from the documentation inside the installed packages (lib.corpus.packages), or takes a folder or the
hub's LoCoV1 instead, and writes LoCoV1's columns:

    documents-<split>.parquet    pid, dataset, passage
    queries-<split>.parquet      qid, dataset, query, answer_pids; answer_gains where judgements are graded
    evidence-<split>.parquet     qid, dataset, pid, start_frac, end_frac: where the answer lies, in characters
    pretrain.parquet             text, source, kind (short | long), split (train | validation)
    tokenizer/                   WordPiece trained on the training text
    manifest.json                packages, counts, the sha256 of every file and of all texts

One item is "dotted name, summary, body" of a documented class or function. A query is the summary
of one item, taken out of its document:

    book_<N>_deep       items packed into documents of at most N tokens; the item starts after token N/2
    book_<N>_shallow    the same documents, the item starts in the first 15 %: the control
    book_<N>_any        the same design, up to `queries_per_document` items at any depth: for training, and the only one there
    page_deep           one module's documentation; the item starts in the last 40 %
    page_shallow        the same pages, the item starts in the first 20 %
    tail                summaries of a module's last three items -> its source without docstrings
    digest              one of 24 unrelated items in one document

A book's documents have the same ids and texts in its tasks, so they need embedding once. The same
versions and settings give the same bytes: no clock, no random state, no hash order.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.benchmark.task import BUILD, SPLITS, CorpusError
from lib.corpus.packages import (
    PACKAGES,
    Item,
    Library,
    Module,
    Shingles,
    assign,
    distinct,
    normal,
    read,
)
from lib.model.tokens import SPECIAL, given_tokenizer, load_tokenizer, wordpiece  # noqa: F401
from lib.pipeline import files

NATURAL = ("page_deep", "page_shallow", "tail", "digest")

PER_DEPTH, PER_PAGE, PER_DIGEST = 2, 3, 8  # queries of one document
PAGE_TOKENS = (1_500, 131_072)
DIGEST_ITEMS, DIGEST_TOKENS = 24, (60, 1_500)
BODY_TOKENS = 16  # of an item that is asked for: enough to find it by
LONG = 4_000  # characters that make a pretraining text long
HELD_OUT = 50  # one pretraining source in so many is kept for validation

# The paper's pretraining text, a third each: (hub id, configuration, revision, rows that make a text).
HUB_TEXT = {
    "c4": ("allenai/c4", "en", None, 1),
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", None, 1),
    "bookcorpus": (
        "bookcorpus/bookcorpus",
        None,
        "refs/convert/parquet",
        256,
    ),  # its rows are sentences
}


# ------------------------------------------------------------------ building


def build(
    folder: str | Path,
    source: str = "embedded",
    pretraining: str = "embedded",
    tokenizer: str = "embedded",
    vocabulary: int = 8192,
    books: Iterable[int] = (512, 1024),
    natural: Iterable[str] = NATURAL,
    packages: int | Iterable[str] = 0,
    files_per_package: int = 400,
    test_documents: int = 1000,
    test_queries: int = 500,
    validation_documents: int = 1000,
    validation_queries: int = 200,
    queries_per_document: int = 6,
    hub_texts: int = 200_000,
    show_progress: bool = True,
) -> dict:
    """Write the corpus into `folder`, whole or not at all.

    Args:
        source: of the tasks: embedded, hub (LoCoV1), or longembed, or a folder that lib.benchmark.sources reads.
        pretraining: embedded, hub (C4, Wikipedia, BookCorpus; `hub_texts` of each), or a folder of parquet, jsonl or txt.
        tokenizer: embedded (trained here, `vocabulary` pieces), bert-base-uncased, or a folder with its vocab.txt or tokenizer.json.
        books: longest documents of the core tasks, in tokens with [CLS] and [SEP]; below 512 most hold one item.
        packages: how many of lib.corpus.packages.PACKAGES are read, 0: all; or their names.

    Returns:
        The manifest, as in manifest.json.

    Raises:
        CorpusError: something to read is missing or wrong, or a setting makes no sense.
    """
    folder, books, natural = Path(folder), sorted(set(books)), list(natural)
    check(folder, books, natural)
    library, rows = Library([], {}, {}, []), []
    if "embedded" in (source, pretraining):
        library = embedded(packages, files_per_package)
        split_of = assign(library.modules)
        modules = {
            split: [module for module in library.modules if split_of[module.unit] == split]
            for split in SPLITS
        }
    if pretraining == "embedded":
        rows = embedded_text(modules, library.readmes)
    else:
        rows = hub_text(hub_texts) if pretraining == "hub" else folder_text(Path(pretraining))
    words = make_tokenizer(tokenizer, rows, vocabulary)
    tables = Tables()
    if source == "embedded":
        limits = {
            "train": (None, None),
            "validation": (validation_documents, validation_queries),
            "test": (test_documents, test_queries),
        }
        count = Counter(normal(item.summary) for module in library.modules for item in module.items)
        from lib.pipeline.progress import bar

        progress = bar(total=len(SPLITS), desc="tasks", show=show_progress)
        for split in SPLITS:
            embedded_tasks(
                tables,
                split,
                modules[split],
                count,
                words,
                books,
                natural,
                queries_per_document,
                *limits[split],
            )
            progress.update(1)
        progress.close()
    else:
        mirror(tables, source)
    return write(folder, tables, rows, words, library)


def check(folder: Path, books: list[int], natural: list[str]) -> None:
    if books and books[0] < 128:
        raise CorpusError(
            f"books: {books[0]} tokens do not hold two items; 512 is the shortest that makes sense"
        )
    unknown = sorted(set(natural) - set(NATURAL))
    if unknown:
        raise CorpusError(f"natural: unknown task {unknown[0]!r}; there are {', '.join(NATURAL)}")
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder} is a file: move it away or name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise CorpusError(
            f"{folder} holds something else than a corpus (no manifest.json) and would be replaced: move it away or name another folder"
        )


def embedded(packages: int | Iterable[str], files_per_package: int) -> Library:
    names = list(PACKAGES[: packages or None] if isinstance(packages, int) else packages)
    try:
        library = read(names, files_per_package)
    except OSError as error:
        raise CorpusError(str(error)) from None
    library = library._replace(modules=distinct(library.modules))
    if not library.modules:
        raise CorpusError(
            f"no documented modules in {', '.join(names[:8])}: install the packages of requirements.lock"
        )
    return library


# ------------------------------------------------------------------ documents


class Part(NamedTuple):
    """An item as it goes into a document; its lengths in word pieces."""

    item: Item
    name_tokens: int
    summary_tokens: int
    lines: tuple[int, ...]  # of its body
    unique: bool  # no other item has its summary

    @property
    def tokens(self) -> int:
        return self.name_tokens + self.summary_tokens + sum(self.lines)

    @property
    def asks(self) -> bool:
        """May its summary serve as a query?"""
        return self.unique and sum(self.lines) >= BODY_TOKENS


class Zone(NamedTuple):
    """Where in a document an item must start to be asked for."""

    low: float  # shares of the document
    high: float
    count: int  # queries of one document at most
    after: int = 0  # tokens


class Document(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # of each part, in characters
    starts: list[int]  # of each part, in tokens
    tokens: int

    def inside(self, i: int, zone: Zone) -> bool:
        """Does part i start in the zone, counted in tokens and in characters?"""
        return (
            zone.low <= self.starts[i] / max(self.tokens, 1) <= zone.high
            and self.starts[i] >= zone.after
            and zone.low <= self.spans[i][0] / max(len(self.text), 1) <= zone.high
        )


def as_parts(items: list[Item], count: Counter, tokenizer) -> list[Part]:
    """Items with their lengths. Word pieces never cross white space, so lengths add up, line by line."""
    bodies = [item.body.split("\n") for item in items]
    texts = dict.fromkeys(
        itertools.chain(*bodies, (item.name for item in items), (item.summary for item in items))
    )
    tokens = dict(zip(texts, lengths(tokenizer, list(texts)).tolist()))
    return [
        Part(
            item,
            tokens[item.name],
            tokens[item.summary],
            tuple(tokens[line] for line in body),
            4 <= len(item.summary.split())
            and 4 <= len(normal(item.summary).split())
            and count[normal(item.summary)] == 1,
        )
        for item, body in zip(items, bodies)
    ]


def cut(part: Part, most: int) -> Part:
    """The part, its body cut at the end of a line to at most `most` tokens altogether."""
    if part.tokens <= most:
        return part
    room = most - part.name_tokens - part.summary_tokens
    keep = int(np.searchsorted(np.cumsum(part.lines), room, side="right"))
    body = "\n".join(part.item.body.split("\n")[:keep]).rstrip()
    return part._replace(item=part.item._replace(body=body), lines=part.lines[:keep])


def pack(parts: list[Part], n: int) -> list[list[Part]]:
    """Consecutive parts in documents of at most n tokens, [CLS] and [SEP] included.

    No part takes more than half of a document. The last one is cut to the room that is left, so that
    documents are close to n tokens and "the second half" is the same place in all of them.
    """
    result, current, used = [], [], 0
    for part in parts:
        part = cut(part, n // 2 - 1)
        if sum(part.lines) < BODY_TOKENS // 2 or part.tokens > n // 2 - 1:
            continue
        room = n - 2 - used
        if part.tokens > room:
            last = cut(part, room)
            fits = room >= n // 8 and sum(last.lines) >= 2 * BODY_TOKENS
            result.append(current + [last] if fits else current)
            current, used = ([], 0) if fits else ([part], part.tokens)
        else:
            current.append(part)
            used += part.tokens
    return result + [current] if used > n // 2 else result


def render(parts: list[Part], asked: set[int] = frozenset()) -> Document:
    """The parts joined into one text; those asked for lose their summary."""
    texts, spans, starts, place, tokens = [], [], [], 0, 0
    for i, part in enumerate(parts):
        text = part.item.text(summary=i not in asked)
        texts.append(text)
        spans.append((place, place + len(text)))
        starts.append(tokens)
        place += len(text) + 2
        tokens += part.tokens - (part.summary_tokens if i in asked else 0)
    return Document("\n\n".join(texts), spans, starts, tokens)


def choose(parts: list[Part], zones: dict[str, Zone]) -> tuple[Document, dict[str, list[int]]]:
    """The document without the summaries of the parts asked for, and which those are, zone by zone.

    A part asked for in one zone serves the later ones too. It must lie in its zone before the
    summaries are taken out and after, and its summary must not be left elsewhere in the document.
    """
    before = render(parts)
    chosen: dict[str, list[int]] = {}
    for name, zone in zones.items():
        fits = [i for i, part in enumerate(parts) if part.asks and before.inside(i, zone)]
        taken = [i for i in fits if any(i in found for found in chosen.values())]
        fresh = spread([i for i in fits if i not in taken], max(0, zone.count - len(taken)))
        chosen[name] = sorted(taken + fresh)[: zone.count]
    document = render(parts, {i for found in chosen.values() for i in found})
    plain = f" {normal(document.text)} "
    left = {
        i
        for found in chosen.values()
        for i in found
        if f" {normal(parts[i].item.summary)} " in plain
    }
    return document, {
        name: [i for i in found if i not in left and document.inside(i, zones[name])]
        for name, found in chosen.items()
    }


def spread(things: list, count: int) -> list:
    """`count` of the things, evenly spaced, in order."""
    if count >= len(things):
        return list(things)
    return [things[(2 * i + 1) * len(things) // (2 * count)] for i in range(count)]


def digests(parts: list[Part]) -> list[list[Part]]:
    """Documents of 24 items that have nothing to do with each other: dealt in the order of a hash."""
    low, high = DIGEST_TOKENS
    pool = sorted(
        (part for part in parts if low <= part.tokens <= high),
        key=lambda part: hashlib.sha256(part.item.name.encode()).hexdigest(),
    )
    return [
        pool[start : start + DIGEST_ITEMS]
        for start in range(0, len(pool) - DIGEST_ITEMS + 1, DIGEST_ITEMS)
    ]


def tail(module: Module, count: Counter) -> tuple[Document, str] | None:
    """The module's source without docstrings, and the summaries of its last three documented items; None where that cannot be."""
    asked = [
        item
        for item in module.items
        if item.name.startswith(f"{module.name}.")
        and item.summary
        and count[normal(item.summary)] == 1
    ][-3:]
    if len(asked) < 3 or not 4 * PAGE_TOKENS[0] <= len(module.code) <= 4 * PAGE_TOKENS[1]:
        return None
    plain = f" {normal(module.code)} "
    if any(f" {normal(item.summary)} " in plain for item in asked):
        return None
    places = [place_of(item.name.removeprefix(f"{module.name}."), module.code) for item in asked]
    if None in places:
        return None
    start = min(places)
    return Document(module.code, [(start, len(module.code))], [0], 0), " ".join(
        item.summary for item in asked
    )


def place_of(dotted: str, code: str) -> int | None:
    """Where `Class.method` is defined: the method's first definition after the class."""
    place = 0
    for name in dotted.split("."):
        match = re.compile(rf"(?m)^[ \t]*(?:async def|def|class) {re.escape(name)}\b").search(
            code, place
        )
        if not match:
            return None
        place = match.start()
    return place


# ------------------------------------------------------------------ tasks


class Tables:
    """The rows of the corpus while it is made, by split."""

    def __init__(self):
        self.documents: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.queries: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.evidence: dict[str, list[tuple]] = {split: [] for split in SPLITS}
        self.dropped: dict[
            str, int
        ] = {}  # documents that a task judges and lacks, by task and split

    def add(
        self,
        family: str,
        split: str,
        found: list[tuple[Document, dict[str, list[int]], list[str]]],
        most_documents: int | None,
        most_queries: int | None,
    ) -> None:
        """One collection and the tasks on it.

        Args:
            found: document, {task: its parts asked for}, and the query that each part would answer.
        """
        if not found:
            return
        tasks = list(found[0][1])
        if split != "train":
            # Nobody else's document may hold the query either: it would answer it as well.
            plain = "\n".join(f" {normal(document.text)} " for document, _, _ in found)
            found = [
                (
                    document,
                    {
                        task: [i for i in parts if f" {normal(queries[i])} " not in plain]
                        for task, parts in chosen.items()
                    },
                    queries,
                )
                for document, chosen, queries in found
            ]
        keep = kept(found, tasks, most_documents)
        pid = {d: f"{family}_{split}_Passage_{place}" for place, d in enumerate(keep)}
        asked = {
            task: spread(
                [(d, i) for d in keep for i in found[d][1][task]],
                len(found) * 100 if most_queries is None else most_queries,
            )
            for task in tasks
        }
        tasks = [task for task in tasks if asked[task]]
        self.documents[split] += [(pid[d], task, found[d][0].text) for d in keep for task in tasks]
        for task in tasks:
            for place, (d, i) in enumerate(asked[task]):
                qid, document = f"{task}_{split}_Query_{place}", found[d][0]
                start, end = document.spans[i]
                self.queries[split].append((qid, task, found[d][2][i], [pid[d]]))
                self.evidence[split].append(
                    (qid, task, pid[d], start / len(document.text), end / len(document.text))
                )


def kept(found: list, tasks: list[str], most: int | None) -> list[int]:
    """At most so many documents: those that answer a query of the first task, then of the next; distractors last."""
    if most is None or len(found) <= most:
        return list(range(len(found)))
    rank = [
        next((place for place, task in enumerate(tasks) if chosen[task]), len(tasks))
        for _, chosen, _ in found
    ]
    keep: list[int] = []
    for place in range(len(tasks) + 1):
        keep += spread([d for d, r in enumerate(rank) if r == place], most - len(keep))
    return sorted(keep)


def embedded_tasks(
    tables: Tables,
    split: str,
    modules: list[Module],
    count: Counter,
    tokenizer,
    books: list[int],
    natural: list[str],
    queries_per_document: int,
    most_documents: int | None,
    most_queries: int | None,
) -> None:
    parts = as_parts([item for module in modules for item in module.items], count, tokenizer)

    def add(family: str, packs: list[list[Part]], zones: dict[str, Zone]) -> None:
        found = (
            [(*choose(some, zones), [part.item.summary for part in some]) for some in packs]
            if zones
            else []
        )
        tables.add(family, split, found, most_documents, most_queries)

    for n in books:
        zones = {
            f"book_{n}_deep": Zone(0.5, 1.0, PER_DEPTH, after=n // 2),
            f"book_{n}_shallow": Zone(0.0, 0.15, PER_DEPTH),
        }
        add(
            f"book_{n}",
            pack(parts, n),
            {f"book_{n}_any": Zone(0.0, 1.0, queries_per_document)} if split == "train" else zones,
        )
    if split == "train":
        return
    pages = [list(page) for _, page in itertools.groupby(parts, key=lambda part: part.item.module)]
    pages = [
        page
        for page in pages
        if PAGE_TOKENS[0] <= sum(part.tokens for part in page) <= PAGE_TOKENS[1] and len(page) >= 5
    ]
    zones = {"page_deep": Zone(0.6, 1.0, PER_PAGE), "page_shallow": Zone(0.0, 0.2, PER_PAGE)}
    add("page", pages, {task: zone for task, zone in zones.items() if task in natural})
    add(
        "digest",
        digests(parts),
        {"digest": Zone(0.0, 1.0, PER_DIGEST)} if "digest" in natural else {},
    )
    if "tail" in natural:
        found = [ended for module in modules if (ended := tail(module, count))]
        tables.add(
            "tail",
            split,
            [(document, {"tail": [0]}, [query]) for document, query in found],
            most_documents,
            most_queries,
        )


def mirror(tables: Tables, source: str) -> None:
    """The tasks of a folder or of the hub, checked, as they are."""
    from lib.benchmark import locov1, sources

    if isinstance(sources.of(source), sources.Texts):
        raise CorpusError(
            f"{source} is a folder of texts: they can be searched (locov1.load), but nobody asks and nobody judges; give data.source a folder with queries"
        )
    for split in locov1.splits(source):
        for name in locov1.tasks(source, split):
            task = locov1.load(name, source, split)
            tables.dropped |= {f"{name}, {split}": task.dropped} if task.dropped else {}
            tables.documents[split] += [
                (pid, name, writable(text)) for pid, text in task.documents.items()
            ]
            tables.queries[split] += [
                (qid, name, writable(query), list(task.qrels[qid]), list(task.qrels[qid].values()))
                for qid, query in task.queries.items()
            ]
            tables.evidence[split] += [(qid, name, *span) for qid, span in task.evidence.items()]
    for split, rows in tables.queries.items():
        if all(gain == 1 for row in rows for gain in row[4]):
            tables.queries[split] = [row[:4] for row in rows]
    if not tables.queries["test"]:
        raise CorpusError(
            f"{source} has no test split: {BUILD}, or give data.source a folder with documents-test.parquet and queries-test.parquet"
        )


# ------------------------------------------------------------------ pretraining text


def embedded_text(
    modules: dict[str, list[Module]], readmes: dict[str, str]
) -> list[tuple[str, str, str, str]]:
    """(text, source, kind, split) from training modules: docstrings and comments are short, pages and sources long.

    Packages' readmes come along where they share few word runs with documents of the other splits.
    """
    rows = []
    for module in modules["train"]:
        split = held_out(module.name)
        docs = [
            "\n".join(part for part in (item.summary, item.body) if part) for item in module.items
        ]
        rows += [
            (text, module.name, "short", split)
            for text in [*docs, *module.comments]
            if len(text) > 200
        ]
        page = "\n\n".join(item.text() for item in module.items)
        rows += [
            (text, module.name, "long", split) for text in (page, module.code) if len(text) > LONG
        ]
    shingles = Shingles()
    elsewhere = [
        shingles.of(normal(item.text()))
        for split in SPLITS[1:]
        for module in modules[split]
        for item in module.items
    ]
    elsewhere = np.unique(np.concatenate([*elsewhere, np.array([2**64 - 1], dtype=np.uint64)]))
    for package, text in readmes.items():
        for section in re.split(r"\n(?=#+ |.+\n[-=~]{4,}\n)", text):
            codes = shingles.of(normal(section))
            if (
                len(section) > 200
                and len(codes)
                and (elsewhere[np.searchsorted(elsewhere, codes)] == codes).mean() < 0.2
            ):
                rows.append((section.strip(), package, "short", held_out(package)))
    return rows


def held_out(source: str) -> str:
    """train, or validation for one source in HELD_OUT, by a hash of its name."""
    return "validation" if int(sha256(source)[:8], 16) % HELD_OUT == 0 else "train"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def as_rows(found: list[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """(text, source, kind, split) of (text, source): of each kind one text in HELD_OUT, and one at least, is for validation.

    Sources go together, where that holds out a share between a quarter of that and five times as much; where it does
    not (all texts of one source, or each of a few), texts are held out by their own hash. Equal texts go together.
    """
    rows = []
    for kind in ("short", "long"):
        some = [(text, source) for text, source in found if (len(text) > LONG) == (kind == "long")]
        splits = [held_out(source) for _, source in some]
        if not 0.25 <= HELD_OUT * splits.count("validation") / max(1, len(some)) <= 5:
            hashes = [sha256(text) for text, _ in some]
            last = sorted(set(hashes))[: -(-len(set(hashes)) // HELD_OUT)]
            splits = [
                "validation" if len(set(hashes)) > 1 and code in last else "train"
                for code in hashes
            ]
        rows += [(text, source, kind, split) for (text, source), split in zip(some, splits)]
    return rows


def folder_text(folder: Path) -> list[tuple[str, str, str, str]]:
    """Pretraining text of a folder: parquet or jsonl with a column `text` (and `source`), or txt files, one text each."""
    from lib.benchmark.sources import read_jsonl, read_parquet

    if not folder.is_dir():
        raise CorpusError(
            f"{folder} is no folder: data.pretraining is embedded, hub, or a folder of parquet, jsonl or txt files"
        )
    texts: list[tuple[str, str]] = []
    paths = (
        path
        for path in folder.rglob("*")
        if path.suffix in (".parquet", ".jsonl", ".txt") and path.is_file()
    )
    for path in sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ):
        where = path.relative_to(folder).as_posix()
        if path.suffix == ".txt":
            try:
                found = [(path.read_text(encoding="utf-8-sig"), where)]
            except UnicodeDecodeError:
                raise CorpusError(
                    f"{path}: is not UTF-8 text: convert it, or take it out"
                ) from None
        elif path.suffix == ".jsonl":
            found = [
                (row["text"], row.get("source", f"{where}#{number}"))
                for number, row in enumerate(read_jsonl(path, ("text",)))
            ]
        else:
            found = [
                (row["text"], row.get("source", f"{where}#{number}"))
                for number, row in enumerate(read_parquet(path, ["text"], optional=["source"]))
            ]
        for number, (text, source) in enumerate(found, start=1):
            if not isinstance(text, str):
                raise CorpusError(
                    f"{path}: text {number} is {'null' if text is None else type(text).__name__}: give every row a text, or take it out"
                )
            if text.strip():
                texts.append((writable(text), writable(str(source))))
    if not texts:
        raise CorpusError(
            f"{folder} has no text: it needs parquet or jsonl files with a column `text`, or txt files"
        )
    return as_rows(texts)


def writable(text: str) -> str:
    """The text, half characters (which JSON can spell and no file can hold) replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def hub_text(most: int) -> list[tuple[str, str, str, str]]:
    """The first `most` texts of C4, Wikipedia and BookCorpus, streamed."""
    import datasets

    found: list[tuple[str, str]] = []
    for name, (identifier, configuration, revision, joined) in HUB_TEXT.items():
        try:
            stream = iter(
                datasets.load_dataset(
                    identifier, configuration, split="train", revision=revision, streaming=True
                )
            )
            for number in range(most):
                texts = [row["text"] for row in itertools.islice(stream, joined)]
                if not texts:
                    break
                found.append(("\n".join(texts), f"{name}#{number}"))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise CorpusError(
                f"{identifier} cannot be read from the hub ({type(error).__name__}: {' '.join(str(error).split())[:160]}): "
                "without a network, give data.pretraining a folder of parquet, jsonl or txt files"
            ) from None
    return as_rows(found)


# ------------------------------------------------------------------ tokenizer


def make_tokenizer(name: str, rows: list[tuple[str, str, str, str]], vocabulary: int):
    if name == "embedded":
        return train_tokenizer(tokenizer_text(rows), vocabulary)
    try:
        return given_tokenizer(name)
    except CorpusError as error:
        raise CorpusError(f"{error}; or set data.tokenizer to embedded") from None


def tokenizer_text(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """Training text: all that is short and every fourth long one."""
    train = [row for row in rows if row[3] == "train"]
    yield from (row[0] for row in train if row[2] == "short")
    yield from (row[0] for row in [row for row in train if row[2] == "long"][::4])


def train_tokenizer(texts: Iterable[str], vocabulary: int):
    """A lower-casing WordPiece tokenizer, the same from the same text on every run.

    The library's trainer numbers the `##c` pieces of single characters in hash order; here they are
    handed in, numbered, and the model is rebuilt from the finished vocabulary.
    """
    import tokenizers

    words: Counter = Counter()
    for text in texts:
        words.update(re.findall(r"[^\W_]+|_|[^\w\s]", text.lower()))
    characters: Counter = Counter()
    for word, n in words.items():
        for character in set(word):
            characters[character] += n
    alphabet = sorted(character for character, n in characters.items() if n >= 20)[:1_000]
    known = set(alphabet)
    pieces = [f"##{character}" for character in alphabet if character.isalnum()]
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=2,
        show_progress=False,
    )
    # Counts in proportion, ten thousand at most: the trainer takes text, not counts.
    scale = max(1.0, words.most_common(1)[0][1] / 10_000) if words else 1.0
    trained.train_from_iterator(
        (
            " ".join([word] * max(1, round(n / scale)))
            for word, n in sorted(words.items())
            if n > 1 and known.issuperset(word)
        ),
        trainer,
    )
    return wordpiece(trained.get_vocab())


def lengths(tokenizer, texts: list[str]) -> np.ndarray:
    """Word pieces of each text, without [CLS] and [SEP]."""
    backend = tokenizer.backend_tokenizer
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)
    counts = []
    for start in range(0, len(texts), 4096):
        counts += [
            len(encoding)
            for encoding in encode(texts[start : start + 4096], add_special_tokens=False)
        ]
    return np.array(counts, dtype=np.int64)


# ------------------------------------------------------------------ the folder

COLUMNS = {
    "documents": ("pid", "dataset", "passage"),
    "queries": ("qid", "dataset", "query", "answer_pids", "answer_gains"),
    "evidence": ("qid", "dataset", "pid", "start_frac", "end_frac"),
    "pretrain": ("text", "source", "kind", "split"),
}


def write(folder: Path, tables: Tables, rows: list[tuple], tokenizer, library: Library) -> dict:
    """Everything into a folder beside, then that in its place."""
    try:
        with files.replacing(folder) as draft:
            parts = {"pretrain": rows}
            for split in SPLITS:
                if tables.queries[split]:
                    parts |= {
                        f"{kind}-{split}": getattr(tables, kind)[split]
                        for kind in ("documents", "queries", "evidence")
                    }
            content = hashlib.sha256()
            for name, some in parts.items():
                save(draft / f"{name}.parquet", some, COLUMNS[name.partition("-")[0]])
                for row in some:
                    content.update(json.dumps([name, *row]).encode() + b"\n")
            try:
                tokenizer.save_pretrained(draft / "tokenizer")
            except Exception as error:  # the library raises nothing more exact
                raise OSError(str(error)) from None
            content.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
            manifest = {
                "content": content.hexdigest(),
                "packages": library.versions,
                "absent": library.absent,
                "tasks": counts(tables),
                **({"dropped": tables.dropped} if tables.dropped else {}),
                "pretraining": {
                    kind: {
                        "texts": sum(row[2] == kind for row in rows),
                        "characters": sum(len(row[0]) for row in rows if row[2] == kind),
                    }
                    for kind in ("short", "long")
                },
                "vocabulary": len(tokenizer),
                "files": {
                    path.relative_to(draft).as_posix(): files.sha256(path)
                    for path in sorted(draft.rglob("*"))
                    if path.is_file()
                },
            }
            (draft / "manifest.json").write_text(
                json.dumps(manifest, indent=1) + "\n", encoding="utf-8", newline="\n"
            )
        return manifest
    except OSError as error:
        raise CorpusError(
            f"{folder} cannot be written ({error.strerror or error}): nothing of the new corpus was kept; choose a folder "
            "you may write to, with room for 100 MB"
        ) from None


def counts(tables: Tables) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {split: {documents, queries}}}"""
    result: dict = {}
    for split in SPLITS:
        documents, queries = (
            Counter(row[1] for row in rows[split]) for rows in (tables.documents, tables.queries)
        )
        for task in sorted(queries):
            result.setdefault(task, {})[split] = {
                "documents": documents[task],
                "queries": queries[task],
            }
    return result


def save(path: Path, rows: list[tuple], names: tuple[str, ...]) -> None:
    """One parquet file, the same bytes from the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = names[: len(rows[0])] if rows else names  # answer_gains only where some are not 1
    types = {
        "answer_pids": pa.list_(pa.string()),
        "answer_gains": pa.list_(pa.int64()),
        "start_frac": pa.float64(),
        "end_frac": pa.float64(),
    }
    columns = list(zip(*rows)) or [()] * len(names)
    table = pa.table(
        {
            name: pa.array(list(column), type=types.get(name, pa.string()))
            for name, column in zip(names, columns)
        }
    )
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=6,
        row_group_size=20_000,
        write_statistics=False,
        store_schema=False,
        use_dictionary=[name for name in ("dataset", "kind", "split", "source") if name in names],
    )


def pretraining(folder: str | Path, kind: str, split: str = "train") -> list[str]:
    """The pretraining texts of one kind, "short" or "long"; split "validation" was never trained on."""
    from lib.benchmark.sources import read_parquet

    for value, allowed in ((kind, ("short", "long")), (split, ("train", "validation"))):
        if value not in allowed:
            raise CorpusError(f"{value!r}: one of {', '.join(allowed)}")
    return [
        row["text"]
        for row in read_parquet(Path(folder) / "pretrain.parquet", ["text", "kind", "split"])
        if (row["kind"], row["split"]) == (kind, split)
    ]
