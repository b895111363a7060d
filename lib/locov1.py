"""LoCoV1 and everything of its shape: a retrieval task is documents, queries and judgements.

    load("book_512_deep")                            one task of the corpus built here
    load("qmsum", source="../mirror")                of a folder
    load("qasper_title", source="hub")               of hazyresearch/LoCoV1-Documents and -Queries
    tasks(source, split)                             the names of all tasks

A folder holds either `documents-<split>.parquet` and `queries-<split>.parquet`, with all tasks in
one file, or the hub's `documents/<task>_<split>.jsonl` and `queries/<task>_<split>.jsonl`. Columns:
pid, dataset, passage; qid, dataset, query, answer_pids. `evidence-<split>.parquet`, where there is
one, says where in its document an answer lies (qid, dataset, pid, start_frac, end_frac).

Ids are strings, always. Whatever would score a task wrongly without a word (an id twice, a
judgement of a document that is not there, a null passage, an empty query) is an error here.
"""
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lib import params
from lib.corpus import BUILD, SPLITS, CorpusError

HUB_DOCUMENTS = "hazyresearch/LoCoV1-Documents"
HUB_QUERIES = "hazyresearch/LoCoV1-Queries"


@dataclass(frozen=True)
class Task:
    """One retrieval task.

    Attributes:
        documents: {pid: text}; queries: {qid: text}; qrels: {qid: {pid: 1}}.
        evidence: {qid: (pid, start, end)}, shares of the document's characters; empty where unknown.
        dropped: documents left out because their passage is null, with the queries only they answer.
    """
    name: str
    split: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    evidence: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    dropped: int = 0


def load(task: str, source: str | Path = "embedded", split: str = "test", drop_null: bool | None = None) -> Task:
    """One task.

    Args:
        source: "embedded" (the corpus of the profile in params.yaml), "hub", or a folder.
        drop_null: leave documents without text out, with their queries, as the authors' loader does; the hub's
            QASPER tasks have some. Default: on the hub only; elsewhere a null passage is an error.

    Raises:
        CorpusError: one line that names the file or id, and the way out.
    """
    known_split(split)
    if source == "hub":
        documents, queries, evidence = *hub(task, split), []
        files = HUB_DOCUMENTS, HUB_QUERIES, ""
    else:
        folder = folder_of(source)
        files, documents, queries, evidence = folder_rows(folder, task, split)
    return assemble(task, split, documents, queries, evidence, files, source == "hub" if drop_null is None else drop_null)


def tasks(source: str | Path = "embedded", split: str = "test") -> list[str]:
    """The names of a source's tasks, sorted."""
    known_split(split)
    if source == "hub":
        return sorted(set(from_hub(HUB_QUERIES, split)["dataset"]))
    folder = folder_of(source)
    if (path := folder / f"queries-{split}.parquet").is_file():
        return sorted(set(map(str, read_parquet(path, ["dataset"])["dataset"])))
    names = sorted(path.name.removesuffix(f"_{split}.jsonl") for path in (folder / "queries").glob(f"*_{split}.jsonl"))
    if not names:
        raise no_split(folder, split)
    return names


def splits(source: str | Path = "embedded") -> list[str]:
    """Which of train, validation and test a source has; the hub has the test split."""
    if source == "hub":
        return ["test"]
    folder = folder_of(source)
    return [split for split in SPLITS if (folder / f"queries-{split}.parquet").is_file() or any((folder / "queries").glob(f"*_{split}.jsonl"))]


# ------------------------------------------------------------------ folders

def folder_of(source: str | Path) -> Path:
    embedded = source == "embedded"
    folder = params.data(params.load()["profile"]) / "corpus" if embedded else Path(source)
    if not folder.is_dir():
        raise CorpusError(f"{folder} is no folder: " + (BUILD if embedded else "data.source is embedded, hub, or a folder with documents-<split>.parquet and queries-<split>.parquet"))
    return folder


def folder_rows(folder: Path, task: str, split: str) -> tuple[tuple, list[dict], list[dict], list[dict]]:
    """(files of documents, queries and evidence, rows of documents, of queries, of evidence)."""
    documents, queries, evidence = (folder / f"{kind}-{split}.parquet" for kind in ("documents", "queries", "evidence"))
    if documents.is_file() or queries.is_file():
        asked = of_task(queries, task, ["qid", "query", "answer_pids"])
        if not asked:
            raise unknown_task(task, tasks(folder, split), queries)
        spans = of_task(evidence, task, ["qid", "pid", "start_frac", "end_frac"]) if evidence.is_file() else []
        return (documents, queries, evidence), of_task(documents, task, ["pid", "passage"]), asked, spans
    documents, queries = (folder / kind / f"{task}_{split}.jsonl" for kind in ("documents", "queries"))
    if not queries.is_file() and not documents.is_file():
        raise unknown_task(task, tasks(folder, split), folder)
    return (documents, queries, ""), read_jsonl(documents, ("pid", "passage")), read_jsonl(queries, ("qid", "query", "answer_pids")), []


def read_parquet(path: Path, columns: list[str], filters: list | None = None, optional: list[str] = ()) -> dict[str, list]:
    """Columns of a file; the optional ones where it has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        names = pq.read_schema(path).names
        absent = [name for name in columns if name not in names]
        if absent:
            raise CorpusError(f"{path} has no column {', '.join(absent)}: it needs {', '.join(columns)}")
        return pq.read_table(path, columns=[*columns, *(name for name in optional if name in names)], filters=filters).to_pydict()
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing: fetch it, or {BUILD}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}): delete it and fetch it again, or {BUILD}") from None


def of_task(path: Path, task: str, columns: list[str]) -> list[dict]:
    table = read_parquet(path, ["dataset", *columns], filters=[("dataset", "==", task)])
    return [dict(zip(columns, row)) for row in zip(*(table[name] for name in columns))]


def read_jsonl(path: Path, names: tuple[str, ...]) -> list[dict]:
    """One JSON object a line; a broken line is named."""
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise CorpusError(f"{path}:{number}: no JSON object, the file may be cut off: delete it and fetch it again") from None
                absent = [name for name in names if name not in row] if isinstance(row, dict) else list(names)
                if absent:
                    raise CorpusError(f"{path}:{number}: has no {', '.join(absent)}: a line needs {', '.join(names)}")
                rows.append(row)
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing: a mirror has documents/<task>_<split>.jsonl and queries/<task>_<split>.jsonl") from None
    return rows


# ------------------------------------------------------------------ the hub

def hub(task: str, split: str) -> tuple[list[dict], list[dict]]:
    documents, queries = from_hub(HUB_DOCUMENTS, split), from_hub(HUB_QUERIES, split)
    rows = [[row for row in data.filter(lambda row: row["dataset"] == task)] for data in (documents, queries)]
    if not rows[1]:
        raise unknown_task(task, sorted(set(queries["dataset"])), HUB_QUERIES)
    return rows[0], rows[1]


def from_hub(name: str, split: str):
    """A data set of the hub, through its local cache; never runs code from there."""
    import datasets
    import huggingface_hub
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not any(offline) and not reachable(name):
            # The cache at once; load_dataset would ask six times, for half a minute.
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        # The HTTP client's errors are of no common family; none is our bug.
        raise CorpusError(f"{name} ({split}) cannot be loaded from the hub ({type(error).__name__}: {' '.join(str(error).split())[:160]}): without a network, "
                          "give data.source a folder with documents/<task>_<split>.jsonl and queries/<task>_<split>.jsonl") from None
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


# ------------------------------------------------------------------ one task

def assemble(name: str, split: str, documents: Iterable[dict], queries: Iterable[dict], evidence: Iterable[dict] = (), files: tuple = ("", "", ""),
             drop_null: bool = False) -> Task:
    """A task from its rows, or the error that says which row is wrong."""
    where, where_asked, where_evidence = files
    texts: dict[str, str] = {}
    null: set[str] = set()
    at: dict[str, int] = {}
    for row_number, row in enumerate(documents, start=1):
        if row["pid"] is None:
            raise CorpusError(f"{where}: a document of {name} has no pid (row {row_number}): give it one")
        pid, passage = str(row["pid"]), row["passage"]
        if pid in at:
            raise CorpusError(f"{where}: task {name} has document id {pid!r} twice (its rows {at[pid]} and {row_number}): make ids unique")
        at[pid] = row_number
        if passage is None and drop_null:
            null.add(pid)
        elif not isinstance(passage, str):
            raise CorpusError(f"{where}: document {pid!r} of {name} has a null passage (row {row_number}): give it a text, or leave such documents out with drop_null=True")
        else:
            texts[pid] = passage
    if not texts:
        raise CorpusError(f"{where}: task {name} has no documents: fetch the file again, or {BUILD}")
    asked: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for row_number, row in enumerate(queries, start=1):
        if row["qid"] is None:
            raise CorpusError(f"{where_asked}: a query of {name} has no qid (row {row_number}): give it one")
        qid, query, answers = str(row["qid"]), row["query"], row["answer_pids"]
        if qid in qrels:
            raise CorpusError(f"{where_asked}: task {name} has query id {qid!r} twice: make ids unique")
        if not isinstance(query, str) or not query.strip():
            raise CorpusError(f"{where_asked}: query {qid!r} of {name} is empty: give it a text, or take it out")
        if not isinstance(answers, list) or not answers:
            raise CorpusError(f"{where_asked}: query {qid!r} of {name} has no answer_pids: judge it, or take it out")
        judged = {str(pid): 1 for pid in answers}
        missing = [pid for pid in judged if pid not in texts and pid not in null]
        if missing:
            raise CorpusError(f"{where_asked}: query {qid!r} of {name} is answered by document {missing[0]!r}, which is not there ({len(missing)} of {len(judged)} answers): complete the documents, or take the judgement out")
        judged = {pid: 1 for pid in judged if pid not in null}
        if judged:
            asked[qid], qrels[qid] = query, judged
    if not asked:
        raise CorpusError(f"{where_asked}: task {name} has no queries: fetch the file again, or {BUILD}")
    spans = {}
    for row in evidence:
        qid, start, end = str(row["qid"]), row["start_frac"], row["end_frac"]
        if qid not in qrels or start is None or str(row["pid"]) in null:
            continue
        if str(row["pid"]) not in qrels[qid] or end is None or not 0 <= start <= end <= 1:
            raise CorpusError(f"{where_evidence}: the evidence of query {qid!r} of {name} does not lie inside document {row['pid']!r}, or that is no answer: correct or delete the evidence file")
        spans[qid] = (str(row["pid"]), float(start), float(end))
    return Task(name, split, texts, asked, qrels, spans, len(null))


def known_split(split: str) -> None:
    if split not in SPLITS:
        raise CorpusError(f"split {split!r}: one of {', '.join(SPLITS)}")


def no_split(folder: Path, split: str) -> CorpusError:
    there = splits(folder)
    return CorpusError(f"{folder} has no {split} split (neither documents-{split}.parquet nor documents/<task>_{split}.jsonl): " +
                       (f"it has {', '.join(there)}" if there else f"fetch it, or {BUILD}"))


def unknown_task(task: str, names: list[str], where) -> CorpusError:
    near = difflib.get_close_matches(task, names, n=1, cutoff=0.0)
    return CorpusError(f"{where} has no task {task!r}" + (f", did you mean {near[0]!r}? It has {', '.join(names)}" if names else ": it is empty"))
