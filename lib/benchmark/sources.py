"""Where retrieval tasks lie, and how each place writes them down.

    of(source)               the source "hub", "longembed" or a folder
    source.splits()          which splits it has: discovered, not assumed
    source.tasks(split)      the names of its tasks
    source.rows(task, split) documents, queries, evidence: rows, one at a time

    parquet      documents-<split>.parquet, queries-<split>.parquet, evidence-<split>.parquet:
                 all tasks in one file
    jsonl        documents/<task>_<split>.jsonl, queries/<task>_<split>.jsonl:
                 LoCoV1's files as the hub has them
    beir         corpus.jsonl, queries.jsonl, qrels/<split>.tsv: one task, named as its folder;
                 also folders of such folders, and of folders of them (cqadupstack/android)
    texts        .txt and .md files: documents to search, without queries or judgements
    hub          hazyresearch/LoCoV1-Documents and -Queries
    longembed    dwzhu/LongEmbed: six tasks, needle and passkey once per length

A row of documents has pid and passage; of queries qid, query and answer_pids (a list, or
{pid: gain}; a list may have its gains in a column `answer_gains`); of evidence qid, pid,
start_frac and end_frac. Rows are checked when a task is made of them (`locov1.assemble`).
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.benchmark.task import BUILD, SPLITS, CorpusError
from lib.pipeline.errors import require

HUB_DOCUMENTS = "hazyresearch/LoCoV1-Documents"
HUB_QUERIES = "hazyresearch/LoCoV1-Queries"
LONGEMBED = "dwzhu/LongEmbed"
LONGEMBED_TASKS = ("narrativeqa", "qmsum", "2wikimqa", "summ_screen_fd", "passkey", "needle")
LONGEMBED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TEXTS = (".txt", ".md")
SEEN = "[!.]*"  # a file whose name begins with a dot is the system's or a cache's, not data
BATCH = 64  # documents read at a time: of 60,000 characters, 4 MB
NEEDED = (
    "give documents-<split>.parquet and queries-<split>.parquet, documents/<task>_<split>.jsonl "
    "and queries/<task>_<split>.jsonl, corpus.jsonl with queries.jsonl and qrels/<split>.tsv, or "
    f".txt and .md files; the embedded corpus: {BUILD}"
)

Rows = tuple[Iterable[dict], Iterable[dict], Iterable[dict]]  # documents, queries, evidence


def of(source: str | Path):
    """The source "hub" or "longembed", or a folder in one of the layouts."""
    if source in ("hub", "longembed"):
        return Hub() if source == "hub" else LongEmbed()
    folder = Path(source)
    require(folder.is_dir(), f"{folder} is no folder, nor hub or longembed: {NEEDED}")
    layouts = (layout(folder) for layout in (Parquet, Jsonl, Beir, Texts))
    chosen = next((layout for layout in layouts if any(layout.paths())), None)
    require(chosen is not None, f"{folder} holds no task: {NEEDED}")
    return chosen


class Folder:
    """A folder in one of the layouts, if a file of it matches one of the patterns."""

    patterns: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def paths(self) -> Iterator[Path]:
        return (path for pattern in self.patterns for path in self.folder.glob(pattern))

    def splits(self) -> list[str]:
        return [split for split in SPLITS if self.tasks(split)]


class Parquet(Folder):
    patterns = ("documents-*.parquet", "queries-*.parquet")

    def splits(self) -> list[str]:
        return [split for split in SPLITS if (self.folder / f"queries-{split}.parquet").is_file()]

    def tasks(self, split: str) -> list[str]:
        path = self.folder / f"queries-{split}.parquet"
        rows = read_parquet(path, ["dataset"]) if path.is_file() else []
        return sorted({str(row["dataset"]) for row in rows})

    def files(self, task: str, split: str) -> tuple:
        names = ("documents", "queries", "evidence")
        return tuple(self.folder / f"{name}-{split}.parquet" for name in names)

    def rows(self, task: str, split: str) -> Rows:
        documents, queries, evidence = self.files(task, split)
        span = ["dataset", "qid", "pid", "start_frac", "end_frac"]
        asked = ["dataset", "qid", "query", "answer_pids"]
        return (
            read_parquet(documents, ["dataset", "pid", "passage"], task),
            read_parquet(queries, asked, task, optional=["answer_gains"]),
            read_parquet(evidence, span, task) if evidence.is_file() else [],
        )


class Jsonl(Folder):
    patterns = (f"documents/{SEEN}.jsonl", f"queries/{SEEN}.jsonl")

    def tasks(self, split: str) -> list[str]:
        paths = (self.folder / "queries").glob(f"{SEEN}_{split}.jsonl")
        return sorted(path.name.removesuffix(f"_{split}.jsonl") for path in paths)

    def files(self, task: str, split: str) -> tuple:
        name = f"{task}_{split}.jsonl"
        return self.folder / "documents" / name, self.folder / "queries" / name, ""

    def rows(self, task: str, split: str) -> Rows:
        documents, queries, _ = self.files(task, split)
        asked = read_jsonl(queries, ("qid", "query", "answer_pids"))
        return read_jsonl(documents, ("pid", "passage")), asked, []


class Beir(Folder):
    """BEIR's layout: a document is its title, a line break and its text; judgements are graded."""

    patterns = ("corpus.jsonl", f"{SEEN}/corpus.jsonl", f"{SEEN}/{SEEN}/corpus.jsonl")

    def folders(self) -> dict[str, Path]:
        """{task: its folder}, sorted."""
        if (self.folder / "corpus.jsonl").is_file():
            return {self.folder.resolve().name: self.folder}
        folders = sorted(path.parent for path in self.paths())
        return {folder.relative_to(self.folder).as_posix(): folder for folder in folders}

    @staticmethod
    def qrels(folder: Path, split: str) -> Path:
        names = ("validation", "dev", "valid") if split == "validation" else (split,)
        paths = [folder / "qrels" / f"{name}.tsv" for name in names]
        return next((path for path in paths if path.is_file()), paths[0])

    def tasks(self, split: str) -> list[str]:
        folders = self.folders().items()
        return [task for task, folder in folders if self.qrels(folder, split).is_file()]

    def files(self, task: str, split: str) -> tuple:
        folder = self.folders().get(task, self.folder / task)
        return folder / "corpus.jsonl", folder / "queries.jsonl", ""

    def rows(self, task: str, split: str) -> Rows:
        documents, queries, _ = self.files(task, split)
        path = self.qrels(documents.parent, split)
        judged = read_qrels(path)
        way = "complete the file, or take it out"
        require(judged, f"{path} calls no document relevant (a gain of 1 or more): {way}")
        return self.documents(documents), self.queries(queries, judged), []

    @staticmethod
    def documents(path: Path) -> Iterator[dict]:
        for row in read_jsonl(path, ("_id", "text")):
            text = row["text"]
            titled = row.get("title") and isinstance(text, str)
            yield {"pid": row["_id"], "passage": f"{row['title']}\n{text}" if titled else text}

    @staticmethod
    def queries(path: Path, judged: dict) -> Iterator[dict]:
        left = dict(judged)
        for row in read_jsonl(path, ("_id", "text")):
            if (answers := left.pop(str(row["_id"]), None)) is not None:
                yield {"qid": row["_id"], "query": row["text"], "answer_pids": answers}
        way = "complete the file, or take the judgements out"
        lost = f"judged query {min(left, default='')!r} is not there ({len(left)} such): {way}"
        require(not left, f"{path}: {lost}")


class Texts(Folder):
    """The reader's own folder: the id of a document is its path in it. To search, not to score."""

    def __str__(self) -> str:
        return f"{self.folder} (a folder of texts: no parquet, jsonl or BEIR task is there)"

    def paths(self) -> Iterator[Path]:
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            hidden = any(part.startswith(".") for part in parts)
            if path.suffix.lower() in TEXTS and path.is_file() and not hidden:
                yield path

    def tasks(self, split: str) -> list[str]:
        return [self.folder.resolve().name] if split == "test" else []

    def files(self, task: str, split: str) -> tuple:
        return self.folder, "", ""

    def rows(self, task: str, split: str) -> Rows:
        documents = (
            {"pid": path.relative_to(self.folder).as_posix(), "passage": text}
            for path in sorted(self.paths())
            if (text := read_text(path)).strip()
        )
        return documents, [], []


class Hub:
    def __str__(self) -> str:
        return HUB_QUERIES

    def splits(self) -> list[str]:
        import datasets

        names = from_hub(datasets.get_dataset_split_names, HUB_QUERIES)
        return [split for split in SPLITS if split in names]

    def tasks(self, split: str) -> list[str]:
        if split not in self.splits():
            return []
        return sorted(set(self.table(HUB_QUERIES, split)["dataset"]))

    def files(self, task: str, split: str) -> tuple:
        return HUB_DOCUMENTS, HUB_QUERIES, ""

    def rows(self, task: str, split: str) -> Rows:
        def of_task(name: str) -> Iterator[dict]:
            table = self.table(name, split)
            return (table[i] for i, owner in enumerate(table["dataset"]) if owner == task)

        return of_task(HUB_DOCUMENTS), of_task(HUB_QUERIES), []

    @staticmethod
    def table(name: str, split: str):
        import datasets

        return from_hub(datasets.load_dataset, name, split=split)


class LongEmbed:
    def __str__(self) -> str:
        return LONGEMBED

    def splits(self) -> list[str]:
        return ["test"]

    def tasks(self, split: str) -> list[str]:
        plain, by_length = LONGEMBED_TASKS[:-2], LONGEMBED_TASKS[-2:]
        names = [*plain, *(f"{task}_{n}" for task in by_length for n in LONGEMBED_LENGTHS)]
        return names if split == "test" else []

    def files(self, task: str, split: str) -> tuple:
        return LONGEMBED, LONGEMBED, ""

    def rows(self, task: str, split: str) -> Rows:
        name, length = task, None
        if task.startswith(LONGEMBED_TASKS[-2:]):
            name, _, digits = task.rpartition("_")
            length = int(digits)

        def table(part: str) -> Iterator[dict]:
            import datasets

            rows = from_hub(datasets.load_dataset, LONGEMBED, name, split=part)
            return (row for row in rows if length is None or row["context_length"] == length)

        judged: dict[str, dict[str, int]] = {}
        for row in table("qrels"):
            judged.setdefault(str(row["qid"]), {})[str(row["doc_id"])] = 1
        documents = ({"pid": row["doc_id"], "passage": row["text"]} for row in table("corpus"))
        queries = (
            dict(qid=row["qid"], query=row["text"], answer_pids=judged.get(str(row["qid"]), {}))
            for row in table("queries")
        )
        return documents, queries, []


# ------------------------------------------------------------------ files


@contextmanager
def readable(
    path: Path, *errors: type[Exception], way: str = "delete it and fetch it again"
) -> Iterator[None]:
    """Make a CorpusError of a file that is missing or cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing: a mirror has it, fetch it") from None
    except (OSError, UnicodeDecodeError, *errors) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        message = f"{path} cannot be read as UTF-8 text or parquet ({reason}): {way}"
        raise CorpusError(message) from None


def read_parquet(
    path: Path, columns: list[str], task: str | None = None, optional: list[str] = ()
) -> Iterator[dict]:
    """The rows of a file, or those of one task, a batch in memory at a time.

    The file must have `columns`; of the `optional` ones, those that it has are read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with readable(path, pa.ArrowException), pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        absent = ", ".join(name for name in columns if name not in names)
        require(not absent, f"{path} has no column {absent}: it needs {', '.join(columns)}")
        columns = [*columns, *(name for name in optional if name in names)]
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            if task is not None:  # a column of numbers, or of categories, names tasks too
                dataset = pc.cast(batch.column("dataset"), pa.string())
                batch = batch.filter(pc.equal(dataset, task))
            yield from batch.to_pylist()


def read_jsonl(path: Path, names: tuple[str, ...]) -> Iterator[dict]:
    """One JSON object per line, each with `names`; a broken line is named."""
    with readable(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            row = row if isinstance(row, dict) else {}
            lacks = ", ".join(name for name in names if name not in row)
            way = "or the file is cut off: delete it and fetch it again"
            form = f"no JSON object with {lacks} (a line needs {', '.join(names)}), {way}"
            require(not lacks, f"{path}:{number}: {form}")
            yield row


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """{query id: {document id: gain}} of BEIR's three columns; its first line may name them."""
    judged: dict[str, dict[str, int]] = {}
    with readable(path, csv.Error), open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows, start=1):
            if number == 1 and row[-1:] == ["score"] or not row:
                continue
            form = f"query-id, corpus-id and a whole number, tabs between them: got {row!r:.80}"
            fits = len(row) == 3 and row[2].strip().lstrip("+-").isdecimal()
            require(fits, f"{path}:{number}: wants {form}")
            qid, pid, gain = row[0], row[1], int(row[2])
            first = judged.setdefault(qid, {}).setdefault(pid, gain)
            twice = f"query {qid!r} judges {pid!r} twice, as {first} and {gain}: keep one"
            require(first == gain, f"{path}:{number}: {twice}")
    return {qid: gains for qid, gains in judged.items() if max(gains.values()) > 0}


def read_text(path: Path) -> str:
    with readable(path, way="convert it, or move it out of the folder"):
        return path.read_bytes().decode("utf-8-sig")


def from_hub(load: Callable, name: str, *configuration: str, **options):
    """load(name, …), through the hub's local cache; never runs code from there."""
    import datasets
    import huggingface_hub

    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not any(offline) and not reachable(name):
            # The cache at once; load_dataset would ask six times, for half a minute.
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return load(name, *configuration, **options)
    except Exception as error:
        # The HTTP client's errors are of no common family; none is our bug.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        part = ", ".join([*configuration, *options.values()])
        what = f"{name} ({part})" if part else name
        form = "documents/<task>_<split>.jsonl and queries/<task>_<split>.jsonl"
        way = f"without a network, give a folder with {form} as source"
        raise CorpusError(f"{what} cannot be loaded from the hub ({reason}): {way}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline


def reachable(name: str) -> bool:
    """Whether the hub answers at all, asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"))
    except Exception as error:
        return isinstance(error, HfHubHTTPError)
    return True


def pretraining_texts(folder: str | Path, kind: str, split: str = "train") -> list[str]:
    """A corpus's pretraining texts of one kind, "short" or "long"; "validation" is held out."""
    sources = pretraining_sources(folder, kind, split).values()
    return [text for texts in sources for text in texts]


def pretraining_sources(
    folder: str | Path, kind: str, split: str = "train"
) -> dict[str, list[str]]:
    """The same by source (C4, Wikipedia, …): {dataset: texts}; {"": texts} if there is one."""
    for value, allowed in ((kind, ("short", "long")), (split, ("train", "validation"))):
        require(value in allowed, f"{value!r}: one of {', '.join(allowed)}")
    sources: dict[str, list[str]] = {}
    columns = ["text", "kind", "split"]
    for row in read_parquet(Path(folder) / "pretrain.parquet", columns, optional=["dataset"]):
        if (row["kind"], row["split"]) == (kind, split):
            sources.setdefault(row.get("dataset", ""), []).append(row["text"])
    return sources
