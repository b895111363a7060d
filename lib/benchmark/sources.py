"""Where retrieval tasks lie, and how each place writes them down.

    of(source)               the layout of "embedded", "hub", "longembed" or a folder
    layout.splits()          which splits it has: discovered, not assumed
    layout.tasks(split)      the names of its tasks
    layout.rows(task, split) documents, queries, evidence: rows, one at a time

    parquet      documents-<split>.parquet, queries-<split>.parquet, evidence-<split>.parquet: all tasks in one file
    jsonl        documents/<task>_<split>.jsonl, queries/<task>_<split>.jsonl: LoCoV1's files as the hub has them
    beir         corpus.jsonl, queries.jsonl, qrels/<split>.tsv: one task, named as its folder; also folders of such folders,
                 and of folders of them (cqadupstack/android)
    texts        .txt and .md files: documents to search, nobody asks and nobody judges
    hub          hazyresearch/LoCoV1-Documents and -Queries
    longembed    dwzhu/LongEmbed: six tasks, needle and passkey once a length

A row of documents has pid and passage; of queries qid, query and answer_pids (a list, or {pid: gain}; a list may have its
gains in a column `answer_gains`); of evidence qid, pid, start_frac and end_frac. What a row may hold is checked where a
task is made of them (`locov1.assemble`).
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.benchmark.task import BUILD, SPLITS, CorpusError
from lib.pipeline import params

HUB_DOCUMENTS = "hazyresearch/LoCoV1-Documents"
HUB_QUERIES = "hazyresearch/LoCoV1-Queries"
LONGEMBED = "dwzhu/LongEmbed"
LONGEMBED_TASKS = ("narrativeqa", "qmsum", "2wikimqa", "summ_screen_fd", "passkey", "needle")
LONGEMBED_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TEXTS = (".txt", ".md")
HIDDEN = "[!.]*"  # a file whose name begins with a dot is the system's or a cache's, not data
BATCH = 64  # documents read at a time: of 60,000 characters, 4 MB


def of(source: str | Path):
    """The layout of a source.

    Raises:
        CorpusError: neither a known name nor a folder in one of the layouts.
    """
    if source == "hub":
        return Hub()
    if source == "longembed":
        return LongEmbed()
    embedded = source == "embedded"
    folder = params.data(params.load()["profile"]) / "corpus" if embedded else Path(source)
    if not folder.is_dir():
        raise CorpusError(
            f"{folder} is no folder: "
            + (
                BUILD
                if embedded
                else "a source is embedded, hub, longembed, or a folder with documents-<split>.parquet and queries-<split>.parquet"
            )
        )
    for layout in (Parquet, Jsonl, Beir, Texts):
        if layout.fits(folder):
            return layout(folder)
    raise CorpusError(
        f"{folder} holds no task: "
        + (
            BUILD
            if embedded
            else "it needs documents-<split>.parquet and queries-<split>.parquet, documents/<task>_<split>.jsonl and "
            "queries/<task>_<split>.jsonl, corpus.jsonl with queries.jsonl and qrels/<split>.tsv, or .txt and .md files"
        )
    )


class Folder:
    """A layout in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)


class Parquet(Folder):
    @staticmethod
    def fits(folder: Path) -> bool:
        return any(folder.glob("documents-*.parquet")) or any(folder.glob("queries-*.parquet"))

    def splits(self) -> list[str]:
        return [split for split in SPLITS if (self.folder / f"queries-{split}.parquet").is_file()]

    def tasks(self, split: str) -> list[str]:
        path = self.folder / f"queries-{split}.parquet"
        return (
            sorted({str(row["dataset"]) for row in read_parquet(path, ["dataset"])})
            if path.is_file()
            else []
        )

    def files(self, task: str, split: str) -> tuple:
        return tuple(
            self.folder / f"{kind}-{split}.parquet" for kind in ("documents", "queries", "evidence")
        )

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        documents, queries, evidence = self.files(task, split)
        spans = (
            read_parquet(evidence, ["dataset", "qid", "pid", "start_frac", "end_frac"], task)
            if evidence.is_file()
            else []
        )
        return (
            read_parquet(documents, ["dataset", "pid", "passage"], task),
            read_parquet(
                queries, ["dataset", "qid", "query", "answer_pids"], task, optional=["answer_gains"]
            ),
            spans,
        )


class Jsonl(Folder):
    @staticmethod
    def fits(folder: Path) -> bool:
        return any(
            any((folder / kind).glob(f"{HIDDEN}.jsonl")) for kind in ("documents", "queries")
        )

    def splits(self) -> list[str]:
        return [
            split
            for split in SPLITS
            if any((self.folder / "queries").glob(f"{HIDDEN}_{split}.jsonl"))
        ]

    def tasks(self, split: str) -> list[str]:
        return sorted(
            path.name.removesuffix(f"_{split}.jsonl")
            for path in (self.folder / "queries").glob(f"{HIDDEN}_{split}.jsonl")
        )

    def files(self, task: str, split: str) -> tuple:
        return (
            self.folder / "documents" / f"{task}_{split}.jsonl",
            self.folder / "queries" / f"{task}_{split}.jsonl",
            "",
        )

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        documents, queries, _ = self.files(task, split)
        return (
            read_jsonl(documents, ("pid", "passage")),
            read_jsonl(queries, ("qid", "query", "answer_pids")),
            [],
        )


class Beir(Folder):
    """BEIR's: a document is its title and its text, a line between them; judgements are graded."""

    @staticmethod
    def fits(folder: Path) -> bool:
        return bool(Beir(folder).places())

    def place(self, task: str) -> Path:
        return self.folder if (self.folder / "corpus.jsonl").is_file() else self.folder / task

    def places(self) -> list[Path]:
        if (self.folder / "corpus.jsonl").is_file():
            return [self.folder]
        return sorted(
            path.parent
            for depth in ("", f"{HIDDEN}/")
            for path in self.folder.glob(f"{depth}{HIDDEN}/corpus.jsonl")
        )

    @staticmethod
    def qrels(place: Path, split: str) -> Path:
        names = {"validation": ("validation", "dev", "valid")}.get(split, (split,))
        return next(
            (path for name in names if (path := place / "qrels" / f"{name}.tsv").is_file()),
            place / "qrels" / f"{split}.tsv",
        )

    def splits(self) -> list[str]:
        return [
            split
            for split in SPLITS
            if any(self.qrels(place, split).is_file() for place in self.places())
        ]

    def tasks(self, split: str) -> list[str]:
        return [
            self.folder.resolve().name
            if place == self.folder
            else place.relative_to(self.folder).as_posix()
            for place in self.places()
            if self.qrels(place, split).is_file()
        ]

    def files(self, task: str, split: str) -> tuple:
        return self.place(task) / "corpus.jsonl", self.place(task) / "queries.jsonl", ""

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        documents, queries, _ = self.files(task, split)
        path = self.qrels(self.place(task), split)
        judged = read_qrels(path)
        if not judged:
            raise CorpusError(
                f"{path} calls no document relevant (a gain of 1 or more): complete the file, or take it out"
            )

        def asked() -> Iterator[dict]:
            left = dict(judged)
            for row in read_jsonl(queries, ("_id", "text")):
                if (answers := left.pop(str(row["_id"]), None)) is not None:
                    yield {"qid": row["_id"], "query": row["text"], "answer_pids": answers}
            if left:
                raise CorpusError(
                    f"{queries}: judged query {min(left)!r} is not there ({len(left)} such): complete the file, or take the judgements out"
                )

        return (
            (
                {
                    "pid": row["_id"],
                    "passage": f"{row['title']}\n{row['text']}"
                    if row.get("title") and isinstance(row["text"], str)
                    else row["text"],
                }
                for row in read_jsonl(documents, ("_id", "text"))
            ),
            asked(),
            [],
        )


class Texts(Folder):
    """The reader's own folder: the id of a document is its path in it. To search, not to score."""

    def __str__(self) -> str:
        return f"{self.folder} (a folder of texts: no parquet, jsonl or BEIR task is there)"

    @staticmethod
    def paths(folder: Path) -> Iterator[Path]:
        return (
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in TEXTS
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )

    @classmethod
    def fits(cls, folder: Path) -> bool:
        return any(cls.paths(folder))

    def splits(self) -> list[str]:
        return ["test"]

    def tasks(self, split: str) -> list[str]:
        return [self.folder.resolve().name] if split == "test" else []

    def files(self, task: str, split: str) -> tuple:
        return self.folder, "", ""

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        return (
            (
                {"pid": path.relative_to(self.folder).as_posix(), "passage": text}
                for path in sorted(self.paths(self.folder))
                if (text := read_text(path)).strip()
            ),
            [],
            [],
        )


class Hub:
    def __str__(self) -> str:
        return HUB_QUERIES

    def splits(self) -> list[str]:
        import datasets

        return [
            split
            for split in SPLITS
            if split in from_hub(HUB_QUERIES, lambda: datasets.get_dataset_split_names(HUB_QUERIES))
        ]

    def tasks(self, split: str) -> list[str]:
        return (
            sorted(set(self.table(HUB_QUERIES, split)["dataset"])) if split in self.splits() else []
        )

    def files(self, task: str, split: str) -> tuple:
        return HUB_DOCUMENTS, HUB_QUERIES, ""

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        def of_task(name: str) -> Iterator[dict]:
            table = self.table(name, split)
            for i in (i for i, owner in enumerate(table["dataset"]) if owner == task):
                yield table[i]

        return of_task(HUB_DOCUMENTS), of_task(HUB_QUERIES), []

    @staticmethod
    def table(name: str, split: str):
        import datasets

        return from_hub(f"{name} ({split})", lambda: datasets.load_dataset(name, split=split), name)


class LongEmbed:
    def __str__(self) -> str:
        return LONGEMBED

    def splits(self) -> list[str]:
        return ["test"]

    def tasks(self, split: str) -> list[str]:
        return (
            [
                name
                for task in LONGEMBED_TASKS
                for name in (
                    [f"{task}_{length}" for length in LONGEMBED_LENGTHS]
                    if task in ("passkey", "needle")
                    else [task]
                )
            ]
            if split == "test"
            else []
        )

    def files(self, task: str, split: str) -> tuple:
        return LONGEMBED, LONGEMBED, ""

    def rows(self, task: str, split: str) -> tuple[Iterable[dict], Iterable[dict], Iterable[dict]]:
        name, length = (
            (task.rpartition("_")[0], int(task.rpartition("_")[2]))
            if task.startswith(("passkey_", "needle_"))
            else (task, None)
        )

        def part(kind: str) -> Iterator[dict]:
            import datasets

            for row in from_hub(
                f"{LONGEMBED} ({name}, {kind})",
                lambda: datasets.load_dataset(LONGEMBED, name, split=kind),
                LONGEMBED,
            ):
                if length is None or row["context_length"] == length:
                    yield row

        judged: dict[str, dict[str, int]] = {}
        for row in part("qrels"):
            judged.setdefault(str(row["qid"]), {})[str(row["doc_id"])] = 1
        return (
            ({"pid": row["doc_id"], "passage": row["text"]} for row in part("corpus")),
            (
                {
                    "qid": row["qid"],
                    "query": row["text"],
                    "answer_pids": judged.get(str(row["qid"]), {}),
                }
                for row in part("queries")
            ),
            [],
        )


# ------------------------------------------------------------------ files


def read_parquet(
    path: Path, columns: list[str], task: str | None = None, optional: list[str] = ()
) -> Iterator[dict]:
    """The rows of a file, of one task where it is named, a batch in memory at a time; the optional columns where it has them."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            absent = [name for name in columns if name not in names]
            if absent:
                raise CorpusError(
                    f"{path} has no column {', '.join(absent)}: it needs {', '.join(columns)}"
                )
            wanted = [*columns, *(name for name in optional if name in names)]
            for batch in file.iter_batches(batch_size=BATCH, columns=wanted):
                if task is not None:  # a column of numbers, or of categories, names tasks too
                    batch = batch.filter(
                        pc.equal(pc.cast(batch.column("dataset"), pa.string()), task)
                    )
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing: fetch it, or {BUILD}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"{path} cannot be read ({' '.join(str(error).split())[:120]}): delete it and fetch it again, or {BUILD}"
        ) from None


def read_jsonl(path: Path, names: tuple[str, ...]) -> Iterator[dict]:
    """One JSON object a line; a broken line is named."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise CorpusError(
                        f"{path}:{number}: no JSON object, the file may be cut off: delete it and fetch it again"
                    ) from None
                absent = (
                    [name for name in names if name not in row]
                    if isinstance(row, dict)
                    else list(names)
                )
                if absent:
                    raise CorpusError(
                        f"{path}:{number}: has no {', '.join(absent)}: a line needs {', '.join(names)}"
                    )
                yield row
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing: a mirror has it, fetch it") from None
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror}): see to its permissions, or fetch it again"
        ) from None


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """{query id: {document id: gain}} of BEIR's three columns; its first line names them."""
    judged: dict[str, dict[str, int]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(
                csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1
            ):
                if number == 1 and row[-1:] == ["score"] or not row:
                    continue
                try:
                    qid, pid, gain = row
                    if judged.setdefault(qid, {}).setdefault(pid, int(gain)) != int(gain):
                        raise CorpusError(
                            f"{path}:{number}: query {qid!r} judges {pid!r} twice, as {judged[qid][pid]} and {gain}: keep one"
                        )
                except CorpusError:
                    raise
                except ValueError:
                    raise CorpusError(
                        f"{path}:{number}: wants query-id, corpus-id and a whole number, tabs between them: got {row!r:.80}"
                    ) from None
    except FileNotFoundError:
        raise CorpusError(
            f"{path} is missing: fetch it, a BEIR folder has qrels/<split>.tsv"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(
            f"{path} is no table of UTF-8 text ({error}): delete it and fetch it again"
        ) from None
    return {
        qid: found
        for qid, answers in judged.items()
        if (found := {pid: gain for pid, gain in answers.items() if gain > 0})
    }


def read_text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        raise CorpusError(
            f"{path} is no UTF-8 text: convert it, or move it out of the folder"
        ) from None
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror}): see to its permissions, or move it out of the folder"
        ) from None


# ------------------------------------------------------------------ the hub


def from_hub(what: str, call, name: str = HUB_QUERIES):
    """call(), through the hub's local cache; never runs code from there."""
    import datasets
    import huggingface_hub

    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not any(offline) and not reachable(name):
            # The cache at once; load_dataset would ask six times, for half a minute.
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return call()
    except Exception as error:
        # The HTTP client's errors are of no common family; none is our bug.
        raise CorpusError(
            f"{what} cannot be loaded from the hub ({type(error).__name__}: {' '.join(str(error).split())[:160]}): without a network, "
            "give a folder with documents/<task>_<split>.jsonl and queries/<task>_<split>.jsonl as source"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline


def reachable(name: str) -> bool:
    """Whether the hub answers at all, asked once."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"))
    except HfHubHTTPError:
        return True
    except Exception:
        return False
    return True
