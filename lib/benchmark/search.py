"""Search: vectors to rankings, rankings to numbers.

    search(q, d, …)                            exact search in bounded memory, one tie rule
    rank(encoder, tasks)                       texts to a ranking, for several tasks
    evaluate(task, run)                        nDCG@10 with its interval
    queries_that_are_documents(task)           whose own document `rank` leaves out
    Encoder, bm25                              what ranks: lib/benchmark/encoder.py, lib/benchmark/bm25.py

A `run` is run[query_id][doc_id] = score; ties are broken by document id,
descending, as trec_eval does.
Axes: N documents, Q queries, D width.
"""

import warnings
from collections.abc import Collection, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lib.benchmark import metrics, statistics
from lib.benchmark.bm25 import Bm25, bm25
from lib.benchmark.encoder import Encoder, TooLong

__all__ = [
    "Encoder",
    "bm25",
    "evaluate",
    "per_query",
    "queries_that_are_documents",
    "rank",
    "search",
    "search_windows",
    "without_itself",
]

SCORES = 2**24  # held at a time: 64 MiB
ROWS = 2**14  # vectors of documents read at a time
GROUP = 64  # vectors of which only the best score is looked at first
SPARE = 64  # nominees beyond twice k, before the worst are dropped
BACKENDS = ("auto", "torch", "faiss")


def search(
    queries: np.ndarray,
    documents: np.ndarray,
    qids: list[str],
    pids: list[str],
    k: int = 1000,
    backend: str = "auto",
) -> dict[str, dict[str, float]]:
    """Exact inner-product search: the run of the k best documents of each query.

        score(q, d) = Σ_i q_i d_i, summed in float64, rounded to float32;  ties by id, descending

    Float32 sums differ in their last bits from library to library, and last
    bits decide ties. So the backend only nominates: every document whose score
    could be among the k best. These are scored again, by one formula.

    Documents are read in blocks and never copied as a whole, so they may be a
    file larger than memory (`np.load(path, mmap_mode="r")`).

    Args:
        queries: (Q, D), documents: (N, D), taken as float32; normalised, the score is the cosine.
        k: how many at most.
        backend: torch (on a GPU, if there is one) | faiss | auto (torch, which is as fast). The run is the same.

    Raises:
        ValueError: ids and vectors disagree in number or in D, an id comes twice, a vector is not finite, or k < 1.
        ImportError: faiss is asked for and absent.
    """
    queries, documents = np.ascontiguousarray(queries, dtype=np.float32), np.asarray(documents)
    if len(queries) != len(qids) or len(documents) != len(pids):
        raise ValueError(
            f"one id per vector: got {len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(documents)} documents"
        )
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"vectors are (n, D) with one D: got {queries.shape} for queries, {documents.shape} for documents"
        )
    if k < 1 or backend not in BACKENDS:
        raise ValueError(
            f"k={k}, backend={backend!r}: k from 1, backend one of {', '.join(BACKENDS)}"
        )
    for name, ids in (("query", qids), ("document", pids)):
        distinct(name, ids)
    return dict(zip(qids, nearest(queries, documents, qids, pids, None, k, backend)))


def distinct(name: str, ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        places: dict[str, int] = {}
        for place, id in enumerate(ids):
            if places.setdefault(id, place) != place:
                raise ValueError(f"{name} {id} comes twice, at {places[id]} and {place}")


def blocks(vectors: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """(place of its first row, block) of ROWS rows at a time, float32; no copy where they are float32 already."""
    for first in range(0, len(vectors), ROWS):
        block = np.ascontiguousarray(vectors[first : first + ROWS], dtype=np.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The given NumPy array is not writable"
            )  # a file opened for reading; nothing is written
            block = torch.from_numpy(block)
        yield first, block


def longest(vectors: np.ndarray, name: str, id_of) -> float:
    """The largest norm.

    Raises:
        ValueError: a vector is not finite.
    """
    largest, bad = 0.0, []
    for first, block in blocks(vectors):
        norm = float(torch.linalg.vector_norm(block, dim=1).max())
        if not 1e-12 < norm < np.inf:  # not finite, or its square not a float32
            bad += (first + np.flatnonzero(~block.isfinite().all(dim=1).numpy())).tolist()
            norm = float(torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).max())
        largest = max(largest, norm)
    if bad:
        raise ValueError(
            f"the vector of {name} {id_of(bad[0])} is not finite ({len(bad)} such): the model or its input is broken"
        )
    return largest


def nearest(
    queries: np.ndarray,
    vectors: np.ndarray,
    qids: list[str],
    pids: list[str],
    owner: np.ndarray | None,
    k: int,
    backend: str,
) -> Iterator[dict[str, float]]:
    """For each query its k best documents, {id: score}, best first; `owner`: whose each vector is, where a document has several."""
    nominate = nominees if backend != "faiss" else faiss_nominees()
    device = "cuda" if torch.cuda.is_available() and backend != "faiss" else "cpu"
    longest(queries, "query", qids.__getitem__)
    reach = longest(
        vectors, "document", lambda row: pids[row if owner is None else owner[row]]
    ) * np.linalg.norm(queries.astype(np.float64), axis=1)
    N, D = vectors.shape
    # Twice the rounding error of a float32 sum of D products, and as much again for safety; out of float32's range, no sum is trusted.
    doubts = np.where((reach > 1e-30) & (reach < 1e37), 4 * D * 2.0**-24 * reach, np.inf)
    several = int(np.bincount(owner).max()) if owner is not None and N else 1
    step = max(1, SCORES // max(1, min(N, ROWS), 2 * min(N, 2 * k + SPARE)))
    scores = torch.empty((min(N, ROWS) + GROUP) * min(len(queries), step), device=device)
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        best = [
            Best(query, vectors, pids, owner, k, doubt)
            for query, doubt in zip(queries[some], doubts[some].tolist())
        ]
        block = torch.from_numpy(queries[some]).to(device)
        for first, table in blocks(vectors):
            for i, rows, found in nominate(block, table.to(device), best, k * several, scores):
                best[i].add(first + rows, found)
        yield from (one.documents() for one in best)


class Best:
    """The vectors that could be among the k best of one query: those within `doubt` of the k-th best score that is known."""

    def __init__(
        self,
        query: np.ndarray,
        vectors: np.ndarray,
        pids: list[str],
        owner: np.ndarray | None,
        k: int,
        doubt: float,
    ):
        self.query, self.vectors, self.pids, self.owner, self.k, self.doubt = (
            query,
            vectors,
            pids,
            owner,
            k,
            doubt,
        )
        self.known, self.found, self.count = (
            -np.inf,
            [(np.zeros(0, np.int64), np.zeros(0, np.float32))],
            0,
        )

    def floor(self) -> float:
        return self.known - self.doubt

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        self.found.append((rows, scores))
        self.count += len(rows)
        if self.count > 2 * self.k + SPARE:
            self.drop()

    def drop(self) -> None:
        """Forget what lies below the floor; where too much lies above it, score it exactly and keep the k best."""
        rows, scores = (np.concatenate(part) for part in zip(*self.found))
        documents = scores
        if self.owner is not None:  # one score a document, its best
            order = np.argsort(-scores)
            documents = scores[order[np.unique(self.owner[rows[order]], return_index=True)[1]]]
        if len(documents) >= self.k:
            self.known = max(self.known, float(np.partition(documents, -self.k)[-self.k]))
        keep = ~(scores < self.floor())
        if keep.sum() > self.k + SPARE // 2:
            keep = np.isin(rows, [row for _, row in self.exactly().values()])
        self.found, self.count = [(rows[keep], scores[keep])], int(keep.sum())

    def exactly(self) -> dict[str, tuple[float, int]]:
        """{id: (score, row)} of the k best of what was found, best first."""
        rows = np.concatenate([rows for rows, _ in self.found])
        owners = rows if self.owner is None else self.owner[rows]
        names = [self.pids[place] for place in owners.tolist()]
        best: dict[str, tuple[float, int]] = {}
        for score, pid, row in sorted(
            zip(exact_scores(self.query, self.vectors, rows).tolist(), names, rows.tolist()),
            reverse=True,
        ):
            best.setdefault(pid, (score, row))
            if len(best) == self.k:
                break
        return best

    def documents(self) -> dict[str, float]:
        return {pid: score for pid, (score, _) in self.exactly().items()}


def exact_scores(query: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The score of these rows by the one formula, float32."""
    query, scores = query.astype(np.float64), np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), 4096):
        some = slice(start, start + 4096)
        scores[some] = (
            vectors[rows[some]].astype(np.float32, copy=False).astype(np.float64) * query
        ).sum(axis=1)
    return scores


def nominees(
    queries: Tensor, table: Tensor, best: list[Best], k: int, buffer: Tensor
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(query, rows of the table that reach its floor, their float32 scores).

    The largest score of each group of rows is compared first, and its members
    only where that reaches the floor, so choosing costs little beside the
    product. Before anything is known, the k-th largest of the groups' best is
    a score that k rows reach.
    """
    (B, _), Q = table.shape, len(queries)
    group = max(1, min(GROUP, B // (4 * k)))
    G = -(-B // group)
    scores = buffer[: G * group * Q].view(G, group, Q)
    torch.mm(table, queries.T, out=scores.view(-1, Q)[:B])
    scores.view(-1, Q)[B:] = -torch.inf
    highest = scores.amax(dim=1)  # (G, Q)
    if G >= k and best[0].known == -np.inf:
        for one, known in zip(best, highest.topk(k, dim=0).values[-1].tolist()):
            one.known = max(one.known, known)
    floor = torch.tensor([one.floor() for one in best], dtype=torch.float32, device=scores.device)
    high = ~(highest < floor)
    for start in range(0, Q, 128):  # bounds memory where nearly all are high
        i, g = high[:, start : start + 128].T.nonzero(as_tuple=True)
        i += start
        rows = g[:, None] * group + torch.arange(group, device=g.device)  # (groups, group)
        found = scores[g, :, i]
        among = ~(found < floor[i, None]) & (rows < B)
        i, rows, found = (
            i[:, None].expand_as(rows)[among].cpu().numpy(),
            rows[among].cpu().numpy(),
            found[among].cpu().numpy(),
        )
        borders = [0, *(1 + np.flatnonzero(np.diff(i))).tolist(), len(i)]
        yield from ((int(i[a]), rows[a:b], found[a:b]) for a, b in pairwise(borders) if b > a)


def faiss_nominees():
    """`nominees` by faiss, on its GPUs where it has some; where the last it finds could still be among the best, torch looks again."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"backend='faiss' needs faiss ({error}): install faiss-cpu or faiss-gpu, or use backend='torch'"
        ) from None
    resources = faiss.StandardGpuResources() if faiss.get_num_gpus() else None

    def nominate(
        queries: Tensor, table: Tensor, best: list[Best], k: int, buffer: Tensor
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        m = min(k + 32, len(table))
        vectors = queries.numpy(), table.numpy()
        if resources:
            scores, rows = faiss.knn_gpu(resources, *vectors, m, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, rows = faiss.knn(*vectors, m, metric=faiss.METRIC_INNER_PRODUCT)
        if m >= k:
            for one, known in zip(best, scores[:, k - 1].tolist()):
                one.known = max(one.known, known)
        floor = np.array([one.floor() for one in best], dtype=np.float32)
        sure = (scores[:, -1] < floor) | (m == len(table))
        for i in np.flatnonzero(sure).tolist():
            among = ~(scores[i] < floor[i])
            yield i, rows[i, among], scores[i, among]
        again = np.flatnonzero(~sure).tolist()
        if again:
            yield from (
                (again[i], rows, scores)
                for i, rows, scores in nominees(
                    queries[again], table, [best[i] for i in again], k, buffer
                )
            )

    return nominate


def rank(
    ranker, tasks: list, batch_size: int = 32, show_progress: bool = True, k: int = 1000
) -> dict[str, tuple[dict, int]]:
    """{task name: (run of the k best, documents longer than the ranker reads)}; documents that tasks share are embedded once.

    A query that is itself one of the documents does not find itself (`queries_that_are_documents`).

    Args:
        ranker: an encoder (encode_documents, encode_queries: `Encoder`, `lib.benchmark.rankers`) or a `Bm25`.

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
        ranked = {}
        for task in tasks:
            run = ranker.run(task.documents, task.queries, k + 1)
            ranked[task.name] = (
                without_itself(run, queries_that_are_documents(task), k),
                sum(ranker.longer),
            )
        return ranked
    texts = sorted({text for task in tasks for text in task.documents.values()})
    place = {text: i for i, text in enumerate(texts)}
    try:
        vectors, owner = ranker.encode_documents(texts, batch_size, show_progress=show_progress)
    except (TooLong, RuntimeError) as error:  # lib.benchmark.hosted.RefusedText has an index too
        if not isinstance(getattr(error, "index", None), int):
            raise
        name, pid = next(
            (task.name, pid)
            for task in tasks
            for pid, text in task.documents.items()
            if text == texts[error.index]
        )
        why = (
            f"is longer than {ranker.reads} tokens: give the Encoder truncate=True or chunk='mean'"
            if isinstance(error, TooLong)
            else f"is not taken: {error}"
        )
        raise ValueError(f"{name}: document {pid} {why}") from None
    longer, ranked = ranker.longer, {}
    for task in tasks:
        pids, qids = list(task.documents), list(task.queries)
        columns = np.array([place[task.documents[pid]] for pid in pids])
        try:
            queries = ranker.encode_queries(
                [task.queries[qid] for qid in qids], batch_size, show_progress=False
            )
        except RuntimeError as error:
            if not isinstance(getattr(error, "index", None), int):
                raise
            raise ValueError(
                f"{task.name}: query {qids[error.index]} is not taken: {error}"
            ) from None
        if len(owner) == len(texts):
            run = search(queries, vectors[columns], qids, pids, k + 1)
        else:
            first, last = (
                np.searchsorted(owner, columns),
                np.searchsorted(owner, columns, side="right"),
            )
            run = search_windows(
                queries, [vectors[a:b] for a, b in zip(first, last)], qids, pids, k + 1
            )
        ranked[task.name] = (
            without_itself(run, queries_that_are_documents(task), k),
            sum(longer[i] for i in columns),
        )
    return ranked


def search_windows(
    queries: np.ndarray,
    documents: list[np.ndarray],
    qids: list[str],
    pids: list[str],
    k: int = 1000,
) -> dict[str, dict[str, float]]:
    """Exact search where a document is several vectors, (its windows, D), and scores what the best of them scores.

    score(q, d) = max_w Σ_i q_i d_wi, summed in float64, rounded to float32;  ties by id, descending
    """
    if not pids:
        return {qid: {} for qid in qids}
    owner = np.repeat(np.arange(len(pids)), [len(vectors) for vectors in documents])
    queries, vectors = np.ascontiguousarray(queries, dtype=np.float32), np.concatenate(documents)
    return dict(zip(qids, nearest(queries, vectors, qids, pids, owner, k, "torch")))


def queries_that_are_documents(task) -> list[str]:
    """The queries that are one of the task's documents and would find themselves: BEIR leaves that document out.

    Its rule is written for collections whose queries are documents too (ArguAna, Quora). A common id alone says nothing, as
    where both are numbered from 0. So: the document has the query's id and its text (white space aside; with a title
    before the text or without, as `lib.benchmark.sources` joins the two), and is not judged relevant.
    """
    found = []
    for qid, query in task.queries.items():
        document = task.documents.get(qid)
        if document is not None and task.qrels.get(qid, {}).get(qid, 0) <= 0:
            untitled = document.partition("\n")[2]
            if query.split() in (document.split(), untitled.split()):
                found.append(qid)
    return found


def without_itself(run: dict, themselves: Collection[str], k: int = 1000) -> dict:
    """The k best of each query; without the document of its own id for those that `themselves` names."""
    themselves = set(themselves)
    return {
        qid: dict(
            [(pid, score) for pid, score in found.items() if pid != qid or qid not in themselves][
                :k
            ]
        )
        for qid, found in run.items()
    }


MEASURES = {
    "ndcg@10": (metrics.ndcg, 10),
    "recall@100": (metrics.recall, 100),
    "precision@10": (metrics.precision, 10),
    "mrr@10": (metrics.mrr, 10),
    "map": (metrics.average_precision, 1000),
}


def per_query(run: dict, qrels: dict) -> dict[str, dict[str, float]]:
    """{measure: {query: value}} of the measures in MEASURES; a judged query that the run lacks scores 0."""
    metrics.one_type("query", run, qrels)
    run = metrics.ordered({query: run[query] for query in qrels if query in run})
    return {name: measure(run, qrels, k, per_query=True) for name, (measure, k) in MEASURES.items()}


def evaluate(task, run: dict, values: dict | None = None) -> dict:
    """What the run is worth: the means of MEASURES, and of nDCG@10 the 95 % bootstrap interval over queries (low, high).

    `values`: of `per_query`, where they are known already. Also: queries, documents; missing, the judged queries for
    which the run ranks nothing (they score 0); where scores tie so that the order among equals matters, ties: the lowest
    and highest nDCG@10 any order gives; and, where there are any, itself: how many queries are documents that their own
    ranking lacks (`rank` leaves them out).
    """
    values = values or per_query(run, task.qrels)
    mean, low, high = statistics.interval(list(values["ndcg@10"].values()))
    worst, best = metrics.ndcg_range(run, task.qrels, k=10)
    result = {
        "ndcg@10": mean,
        "low": low,
        "high": high,
        **{
            name: sum(some.values()) / len(some)
            for name, some in values.items()
            if name != "ndcg@10"
        },
    }
    result = {name: round(value, 6) for name, value in result.items()}
    result |= {
        "queries": len(task.qrels),
        "documents": len(task.documents),
        "missing": len(metrics.missing(run, task.qrels)),
    }
    itself = sum(qid not in run.get(qid, {}) for qid in queries_that_are_documents(task))
    return (
        result
        | ({"ties": [round(worst, 6), round(best, 6)]} if best - worst > 1e-9 else {})
        | ({"itself": itself} if itself else {})
    )
