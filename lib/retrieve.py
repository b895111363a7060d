"""Search: vectors to rankings, rankings to numbers.

    search(q, d, …)                            exact search with torch or faiss, one tie rule
    rank(encoder, tasks)                       texts to a ranking, for several tasks
    write_run, read_run                        TREC run files, recomputable by trec_eval
    evaluate(task, run)                        nDCG@10 with its interval
    Encoder, bm25                              what ranks: lib/encoder.py, lib/bm25.py

A `run` is run[query_id][doc_id] = score; ties are broken by document id,
descending, as trec_eval does.
Axes: N documents, Q queries, D width.
"""
import json
import re
from pathlib import Path

import numpy as np
import torch

from lib import files, metrics
from lib.bm25 import Bm25, bm25  # noqa: F401
from lib.encoder import Encoder, TooLong  # noqa: F401

SCORES = 32_000_000             # held at a time: 128 MB
BACKENDS = ("auto", "torch", "faiss")


def search(queries: np.ndarray, documents: np.ndarray, qids: list[str], pids: list[str], k: int = 1000,
           backend: str = "auto") -> dict[str, dict[str, float]]:
    """Exact inner-product search: the run of the k best documents of each query.

        score(q, d) = Σ_i q_i d_i, summed in float64, rounded to float32;  ties by id, descending

    Float32 sums differ in their last bits from library to library, and last
    bits decide ties. So the backend only nominates: every document whose score
    could be among the k best. These are scored again, by one formula.

    Args:
        queries: (Q, D), documents: (N, D), float32; normalised, the score is the cosine.
        k: how many at most.
        backend: torch | faiss | auto (faiss where it is installed). The run is the same.

    Raises:
        ValueError: ids and vectors disagree in number or in D, an id comes twice, a vector is not finite, or k < 1.
        ImportError: faiss is asked for and absent.
    """
    queries, documents = (np.ascontiguousarray(vectors, dtype=np.float32) for vectors in (queries, documents))
    if len(queries) != len(qids) or len(documents) != len(pids):
        raise ValueError(f"one id per vector: got {len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(documents)} documents")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"vectors are (n, D) with one D: got {queries.shape} for queries, {documents.shape} for documents")
    if k < 1 or backend not in BACKENDS:
        raise ValueError(f"k={k}, backend={backend!r}: k from 1, backend one of {', '.join(BACKENDS)}")
    for name, ids, vectors in (("query", qids, queries), ("document", pids, documents)):
        places: dict[str, int] = {}
        for place, id in enumerate(ids):
            if places.setdefault(id, place) != place:
                raise ValueError(f"{name} {id} comes twice, at {places[id]} and {place}")
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"the vector of {name} {ids[bad[0]]} is not finite ({len(bad)} such): the model or its input is broken")
    # Columns in descending order of id: among equals, the first column wins.
    columns = sorted(range(len(pids)), key=pids.__getitem__, reverse=True)
    documents = documents[columns]
    nominate = nomination(documents, backend)
    N, D = documents.shape
    k, m, run = min(k, N), min(k, N) + 32, {qid: {} for qid in qids}
    # Twice the rounding error of a float32 sum of D products, per unit of |q|, and as much again for safety.
    doubt = 4 * D * 2.0**-24 * np.linalg.norm(documents, axis=1).max(initial=0)
    pending, block = list(range(len(qids))) if N else [], max(1, SCORES // max(1, N))
    while pending:
        again = []
        for start in range(0, len(pending), block):
            some = pending[start : start + block]
            found = nominate(queries[some], m) if m < N else [(None, np.arange(N))] * len(some)
            for i, (scores, where) in zip(some, found):
                if m < N and scores[-1] >= scores[k - 1] - doubt * np.linalg.norm(queries[i]):
                    again.append(i)                                        # there may be more where these came from
                    continue
                exact = (documents[where].astype(np.float64) * queries[i].astype(np.float64)).sum(axis=1).astype(np.float32)
                best = np.lexsort((where, -exact))[:k]
                run[qids[i]] = {pids[columns[where[j]]]: float(exact[j]) for j in best}
        pending, m = again, 4 * m
    return run


def nomination(documents: np.ndarray, backend: str):
    """A function (queries, m) -> for each query, the m largest float32 scores, descending, and their columns."""
    if backend != "torch":
        try:
            import faiss
        except ImportError as error:
            if backend == "faiss":
                raise ImportError(f"backend='faiss' needs faiss ({error}): install faiss-cpu or faiss-gpu, or use backend='torch'") from None
        else:
            index = faiss.IndexFlatIP(documents.shape[1])
            index.add(documents)
            return lambda queries, m: zip(*index.search(queries, m))
    table = torch.from_numpy(documents).T
    return lambda queries, m: zip(*(part.numpy() for part in (torch.from_numpy(queries) @ table).topk(m)))


def rank(ranker, tasks: list, batch_size: int = 32, show_progress: bool = True, k: int = 1000) -> dict[str, tuple[dict, int]]:
    """{task name: (run of the k best, documents longer than the ranker reads)}; documents that tasks share are embedded once.

    Args:
        ranker: an encoder (encode_documents, encode_queries: `Encoder`, `lib.ranker`) or a `Bm25`.

    Raises:
        ValueError: an empty query, or a document longer than an encoder reads that was told nothing about it; task and id are named.
        TypeError: a query or document is no string.
    """
    for task in tasks:
        for kind, some in (("query", task.queries), ("document", task.documents)):
            for id, text in some.items():
                if not isinstance(text, str):
                    raise TypeError(f"{task.name}: {kind} {id} is {type(text).__name__}, not str")
                if kind == "query" and not text.strip():
                    raise ValueError(f"{task.name}: query {id} is empty")
    if isinstance(ranker, Bm25):
        return {task.name: (without_itself(ranker.run(task.documents, task.queries, k + 1), task.qrels, k), sum(ranker.longer)) for task in tasks}
    texts = sorted({text for task in tasks for text in task.documents.values()})
    place = {text: i for i, text in enumerate(texts)}
    try:
        vectors, owner = ranker.encode_documents(texts, batch_size, show_progress=show_progress)
    except TooLong as error:
        name, pid = next((task.name, pid) for task in tasks for pid, text in task.documents.items() if text == texts[error.index])
        raise ValueError(f"{name}: document {pid} is longer than {ranker.reads} tokens: give the Encoder truncate=True or chunk='mean'") from None
    longer, ranked = ranker.longer, {}
    for task in tasks:
        pids, qids = list(task.documents), list(task.queries)
        columns = np.array([place[task.documents[pid]] for pid in pids])
        queries = ranker.encode_queries([task.queries[qid] for qid in qids], batch_size, show_progress=False)
        if len(owner) == len(texts):
            run = search(queries, vectors[columns], qids, pids, k + 1)
        else:
            first, last = np.searchsorted(owner, columns), np.searchsorted(owner, columns, side="right")
            run = search_windows(queries, [vectors[a:b] for a, b in zip(first, last)], qids, pids, k + 1)
        ranked[task.name] = without_itself(run, task.qrels, k), sum(longer[i] for i in columns)
    return ranked


def search_windows(queries: np.ndarray, documents: list[np.ndarray], qids: list[str], pids: list[str], k: int = 1000) -> dict[str, dict[str, float]]:
    """Exact search where a document is several vectors, (its windows, D), and scores what the best of them scores.

        score(q, d) = max_w Σ_i q_i d_wi, summed in float64, rounded to float32;  ties by id, descending
    """
    columns = sorted(range(len(pids)), key=pids.__getitem__, reverse=True)
    table = np.concatenate([documents[column] for column in columns]).astype(np.float64).T
    starts = np.concatenate([[0], np.cumsum([len(documents[column]) for column in columns])[:-1]])
    run, block = {}, max(1, SCORES // 2 // table.shape[1])
    for start in range(0, len(qids), block):
        scores = np.maximum.reduceat(queries[start : start + block].astype(np.float64) @ table, starts, axis=1).astype(np.float32)
        for qid, row in zip(qids[start : start + block], scores):
            run[qid] = {pids[columns[j]]: float(row[j]) for j in np.argsort(-row, kind="stable")[:k]}
    return run


def without_itself(run: dict, qrels: dict, k: int) -> dict:
    """The k best of each query, without the document that has the query's own id and is not judged relevant: BEIR's rule, where queries are documents too."""
    return {qid: dict([(pid, score) for pid, score in found.items() if pid != qid or qrels.get(qid, {}).get(pid, 0) > 0][:k]) for qid, found in run.items()}


MEASURES = {"ndcg@10": (metrics.ndcg, 10), "recall@100": (metrics.recall, 100), "precision@10": (metrics.precision, 10), "mrr@10": (metrics.mrr, 10),
            "map": (metrics.average_precision, 1000)}


def per_query(run: dict, qrels: dict) -> dict[str, dict[str, float]]:
    """{measure: {query: value}} of the measures in MEASURES; a judged query that the run lacks scores 0."""
    run = metrics.ordered({query: run[query] for query in qrels if query in run})
    return {name: measure(run, qrels, k, per_query=True) for name, (measure, k) in MEASURES.items()}


def evaluate(task, run: dict, values: dict | None = None) -> dict:
    """What the run is worth: the means of MEASURES, and of nDCG@10 the 95 % bootstrap interval over queries (low, high).

    `values`: of `per_query`, where they are known already. Also: queries, documents; missing, the judged queries for which the run ranks nothing (they score 0); and, where
    scores tie so that the order among equals matters, ties: the lowest and highest nDCG@10 any order gives.
    """
    values = values or per_query(run, task.qrels)
    mean, low, high = metrics.interval(list(values["ndcg@10"].values()))
    worst, best = metrics.ndcg_range(run, task.qrels, k=10)
    result = {"ndcg@10": mean, "low": low, "high": high, **{name: sum(some.values()) / len(some) for name, some in values.items() if name != "ndcg@10"}}
    result = {name: round(value, 6) for name, value in result.items()}
    result |= {"queries": len(task.qrels), "documents": len(task.documents), "missing": len(metrics.missing(run, task.qrels))}
    return result | ({"ties": [round(worst, 6), round(best, 6)]} if best - worst > 1e-9 else {})


def write_run(run: dict, path: str | Path, tag: str = "lib", k: int = 1000) -> None:
    """A TREC run file: `qid Q0 pid rank score tag`, ids as they are (JSON-quoted where they hold white space).

    Scores are float32, as trec_eval reads them. A query without documents has no line.

    Raises:
        ValueError: a score that is not finite, or a tag that is no single word.
    """
    if not re.fullmatch(r"\S+", tag):
        raise ValueError(f"tag {tag!r}: one word")
    lines = []
    for qid, scores in run.items():
        for rank, pid in enumerate(metrics.ranking(scores)[:k], start=1):
            score = np.float32(scores[pid])
            if not np.isfinite(score):
                raise ValueError(f"query {qid}: the score of {pid} is {score}")
            lines.append(f"{quote(qid)} Q0 {quote(pid)} {rank} {score!s} {tag}\n")
    files.write(path, "".join(lines))


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """The run of a file written by `write_run`, or by any TREC tool; scores are rounded to float32.

    Raises:
        ValueError: a line that is no run line, or a document ranked twice; path and line are named.
    """
    run: dict = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            parts = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', line) if '"' in line else line.rstrip("\n").split(" ")
            parts = line.split() if len(parts) != 6 else parts
            try:
                if len(parts) != 6:
                    raise ValueError(f"a run line has six fields (qid Q0 pid rank score tag), got {len(parts)}")
                qid, pid, score = unquote(parts[0]), unquote(parts[2]), float(np.float32(parts[4]))
                if not np.isfinite(score):
                    raise ValueError(f"the score is {parts[4]}")
                if pid in run.setdefault(qid, {}):
                    raise ValueError(f"query {qid} ranks {pid} twice")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            run[qid][pid] = score
    return run


def quote(name: str) -> str:
    return json.dumps(name) if re.search(r'\s|^"|^$', name) else name


def unquote(name: str) -> str:
    return json.loads(name) if name.startswith('"') else name
