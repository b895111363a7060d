"""The corpus: retrieval tasks, pretraining text and a tokenizer, in one folder.

`build` makes long documents from the documentation inside the installed packages, or takes a folder
or the hub's LoCoV1 instead, and writes LoCoV1's columns:

    documents-<split>.parquet    pid, dataset, passage
    queries-<split>.parquet      qid, dataset, query, answer_pids; answer_gains if graded
    evidence-<split>.parquet     qid, dataset, pid, start_frac, end_frac: where the answer lies, as
                                 shares of the document's characters
    pretrain.parquet             text, source, kind (short | long), split (train | validation);
                                 dataset (c4, wikipedia, …) if there are several
    tokens/                      the tokens of documents and queries, and how often each stands in
                                 the training text (lib/model/token_rows.py)
    tokenizer/                   WordPiece trained on the training text
    manifest.json                packages, counts, the sha256 of every file and of all texts

The same versions and settings give the same bytes: no clock, no random state, no hash order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.benchmark.sources import pretraining_sources
from lib.benchmark.task import SPLITS, CorpusError
from lib.corpus.packages import PACKAGES, Library, assign, distinct, normal, read
from lib.corpus.pretraining import Row, embedded_text, folder_text, hub_text
from lib.corpus.tasks import NATURAL, Tables, embedded_tasks, mirror
from lib.corpus.tokenizer import make_tokenizer
from lib.model import token_rows, word_vectors
from lib.model.tokens import tokenize_whole
from lib.pipeline import files
from lib.pipeline.errors import require
from lib.pipeline.progress import bar

COLUMNS = {
    "documents": ("pid", "dataset", "passage"),
    "queries": ("qid", "dataset", "query", "answer_pids", "answer_gains"),
    "evidence": ("qid", "dataset", "pid", "start_frac", "end_frac"),
    "pretrain": ("text", "source", "kind", "split", "dataset"),
}
COMPRESSED = ("dataset", "kind", "split", "source")  # columns of few values: as a dictionary


@dataclass(frozen=True)
class Settings:
    """What goes into a corpus: the keys of `data` in params.yaml."""

    source: str = "embedded"  # of the tasks: embedded, hub (LoCoV1), longembed, or a folder
    pretraining: str = "embedded"  # embedded, hub (C4, Wikipedia, BookCorpus), or a folder
    tokenizer: str = "embedded"  # embedded: trained here; or a hub id, or a folder
    vocabulary: int = 8192  # word pieces of a tokenizer that is trained here
    books: Iterable[int] = (512, 1024)  # longest documents, in tokens with [CLS] and [SEP]
    natural: Iterable[str] = NATURAL  # the other tasks
    packages: int | Iterable[str] = 0  # how many of PACKAGES are read, 0: all; or their names
    files_per_package: int = 400
    test_documents: int = 1000
    test_queries: int = 500
    validation_documents: int = 1000
    validation_queries: int = 200
    queries_per_document: int = 6  # of the training tasks
    hub_texts: int = 200_000  # of each of the hub's sources


def build(folder: str | Path, show_progress: bool = True, **settings) -> dict:
    """Write the corpus into `folder`, whole or not at all.

    Args:
        settings: those of `Settings`.

    Returns:
        The manifest, as in manifest.json.

    Raises:
        CorpusError: something to read is missing or wrong, or a setting makes no sense.
    """
    folder, s = Path(folder), Settings(**settings)
    check(folder, s)
    library = Library([], {}, {}, [])
    if "embedded" in (s.source, s.pretraining):
        library = embedded(s.packages, s.files_per_package)
    split_of = assign(library.modules)
    modules = {
        split: [module for module in library.modules if split_of[module.unit] == split]
        for split in SPLITS
    }
    if s.pretraining == "embedded":
        rows = embedded_text(modules, library.readmes)
    elif s.pretraining == "hub":
        rows = hub_text(s.hub_texts)
    else:
        rows = folder_text(Path(s.pretraining))
    tokenizer = make_tokenizer(s.tokenizer, rows, s.vocabulary)
    tables = Tables()
    if s.source == "embedded":
        count = Counter(normal(item.summary) for module in library.modules for item in module.items)
        with bar(total=len(SPLITS), desc="tasks", show=show_progress) as progress:
            for split in SPLITS:
                embedded_tasks(tables, split, modules[split], count, tokenizer, s)
                progress.update(1)
    else:
        mirror(tables, s.source)
    return write(folder, tables, rows, tokenizer, library, given=s.source != "embedded")


def check(folder: Path, s: Settings) -> None:
    n = min(s.books, default=512)
    require(n >= 128, f"books: {n} tokens do not hold two items; 512 is the shortest with a sense")
    unknown = ", ".join(repr(name) for name in s.natural if name not in NATURAL)
    require(not unknown, f"natural: unknown task {unknown}; there are {', '.join(NATURAL)}")
    empty = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    require(
        empty or (folder / "manifest.json").is_file(),
        f"{folder} holds something else than a corpus (no manifest.json) and would be replaced: "
        "move it away or name another folder",
    )


def embedded(packages: int | Iterable[str], files_per_package: int) -> Library:
    """The documentation of installed packages, without near-duplicates."""
    names = list(PACKAGES[: packages or None] if isinstance(packages, int) else packages)
    library = read(names, files_per_package)
    library = library._replace(modules=distinct(library.modules))
    require(
        library.modules,
        f"no documented modules in {', '.join(names[:8])}: install the packages of "
        "requirements.lock",
    )
    return library


def write(
    folder: Path, tables: Tables, rows: list[Row], tokenizer, library: Library, given: bool
) -> dict:
    """Everything into a draft beside `folder`, then the draft in its place."""
    try:
        with files.replacing(folder) as draft:
            content = write_tables(draft, tables, rows)
            try:
                tokenizer.save_pretrained(draft / "tokenizer")
            except Exception as error:  # the library raises nothing more exact
                raise OSError(str(error)) from None
            content.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
            write_tokens(draft, tables, tokenizer, given)
            manifest = {
                "content": content.hexdigest(),
                "packages": library.versions,
                "absent": library.absent,
                "tasks": counts(tables),
                **({"dropped": tables.dropped} if tables.dropped else {}),
                "pretraining": {kind: text_counts(rows, kind) for kind in ("short", "long")},
                "vocabulary": len(tokenizer),
                "files": {
                    path.relative_to(draft).as_posix(): files.sha256(path)
                    for path in sorted(draft.rglob("*"))
                    if path.is_file()
                },
            }
            text = json.dumps(manifest, indent=1) + "\n"
            (draft / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
        return manifest
    except OSError as error:
        raise CorpusError(
            f"{folder} cannot be written ({error.strerror or error}): nothing of the new corpus "
            "was kept; choose a folder you may write to, with room for 100 MB"
        ) from None


def write_tables(folder: Path, tables: Tables, rows: list[Row]):
    """The parquet files; the hash of all their rows."""
    parts = {"pretrain": rows}
    for split in SPLITS:
        if tables.queries[split]:
            parts[f"documents-{split}"] = tables.documents[split]
            parts[f"queries-{split}"] = tables.queries[split]
            parts[f"evidence-{split}"] = tables.evidence[split]
    content = hashlib.sha256()
    for name, lines in parts.items():
        save(folder / f"{name}.parquet", lines, COLUMNS[name.partition("-")[0]])
        for line in lines:
            content.update(json.dumps([name, *line]).encode() + b"\n")
    return content


def write_tokens(folder: Path, tables: Tables, tokenizer, given: bool) -> None:
    """The tokens of all documents and queries, so that no later stage has to tokenise them.

    And the counts of the training text in `folder`, for the starts from word vectors; of a `given`
    collection also those of up to as many tokens of its own train documents, since no other text
    says which words are common there.
    """
    texts = dict.fromkeys(
        text
        for split in SPLITS
        for table, column in ((tables.documents, 2), (tables.queries, 2))
        for text in (row[column] for row in table[split])
        if text is not None
    )
    sources = [pretraining_sources(folder, kind) for kind in ("short", "long")]
    counts = word_vectors.frequencies(sources, tokenizer)
    if given and tables.documents["train"]:
        own: dict[str, list[str]] = {}
        for _, task, text in tables.documents["train"]:
            own.setdefault(task, []).append(text)
        counts += word_vectors.frequencies([own], tokenizer, most_tokens=int(counts.sum()))
    rows_of = dict(zip(texts, tokenize_whole(list(texts), tokenizer)))
    token_rows.write(folder / "tokens", rows_of, tokenizer, counts)


def text_counts(rows: list[Row], kind: str) -> dict[str, int]:
    texts = [text for text, _, own, *_ in rows if own == kind]
    return {"texts": len(texts), "characters": sum(map(len, texts))}


def counts(tables: Tables) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {split: {documents, queries}}}"""
    by_task: dict = {}
    for split in SPLITS:
        documents = Counter(task for _, task, _ in tables.documents[split])
        queries = Counter(task for _, task, *_ in tables.queries[split])
        for task, n in sorted(queries.items()):
            by_task.setdefault(task, {})[split] = {"documents": documents[task], "queries": n}
    return by_task


def save(path: Path, rows: list[tuple], names: tuple[str, ...]) -> None:
    """One parquet file, the same bytes from the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = names[: len(rows[0])] if rows else names  # answer_gains, dataset: only if needed
    types = {
        "answer_pids": pa.list_(pa.string()),
        "answer_gains": pa.list_(pa.int64()),
        "start_frac": pa.float64(),
        "end_frac": pa.float64(),
    }
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    columns = zip(*rows) if rows else [()] * len(names)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
    pq.write_table(
        pa.table(arrays, schema=schema),
        path,
        compression="zstd",
        compression_level=6,
        row_group_size=20_000,
        write_statistics=False,
        store_schema=False,
        use_dictionary=[name for name in COMPRESSED if name in names],
    )
