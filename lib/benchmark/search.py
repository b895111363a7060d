"""Search: vectors to rankings, rankings to numbers.

    search(q, d, …)                            exact search in bounded memory, one tie rule
    rank(encoder, tasks)                       texts to a ranking, for several tasks
    evaluate(task, run)                        nDCG@10 with its interval
    queries_that_are_documents(task)           whose own document `rank` leaves out
    Encoder, bm25                              what ranks: of lib.benchmark.encoder and .bm25

A `run` is run[query_id][doc_id] = score; ties are broken by document id,
descending, as trec_eval does.
Axes: N documents, Q queries, D width, B rows of a block, G groups of rows.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lib.benchmark import metrics, statistics
from lib.benchmark.bm25 import Bm25, check_texts
from lib.benchmark.bm25 import bm25 as bm25
from lib.benchmark.encoder import Encoder as Encoder
from lib.benchmark.encoder import TooLong
from lib.benchmark.hosted import RefusedText
from lib.pipeline.errors import require

SCORES = 2**24  # held at a time: 64 MiB
ROWS = 2**14  # vectors of documents read at a time
GROUP = 64  # vectors of which only the best score is looked at first
SPARE = 64  # candidates beyond twice k, before the worst are dropped
BACKENDS = ("auto", "torch", "faiss")

Candidates = Iterator[tuple[int, np.ndarray, np.ndarray]]  # a query, rows, their float32 scores


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

    Float32 sums differ in their last bits from library to library, and last bits decide ties. So
    the backend only finds candidates, every document whose score could be among the k best; these
    are scored again, by one formula. Documents are read in blocks and never copied as a whole, so
    they may be a file larger than memory (`np.load(path, mmap_mode="r")`).

    Args:
        queries: (Q, D), taken as float32.
        documents: (N, D), taken as float32; if both are normalised, the score is the cosine.
        backend: torch (on a GPU, if there is one) | faiss | auto (torch, which is as fast). The
            run is the same.

    Raises:
        ValueError: ids and vectors disagree in number or in D, an id comes twice, a vector is not
            finite, or k < 1.
        ImportError: faiss is asked for and absent.
    """
    queries, documents = np.ascontiguousarray(queries, dtype=np.float32), np.asarray(documents)
    shapes = f"{queries.shape} for queries, {documents.shape} for documents"
    ids = f"{len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(documents)} documents"
    one_each = (len(qids), len(pids)) == (len(queries), len(documents))
    require(one_each, f"one id per vector: got {ids}", ValueError)
    one_width = queries.ndim == documents.ndim == 2 and queries.shape[1] == documents.shape[1]
    require(one_width, f"vectors are (n, D) with one D: got {shapes}", ValueError)
    options = f"k={k}, backend={backend!r}: k from 1, backend one of {', '.join(BACKENDS)}"
    require(k > 0 and backend in BACKENDS, options, ValueError)
    for name, ids in (("query", qids), ("document", pids)):
        if len(set(ids)) < len(ids):
            raise ValueError(f"{name} {Counter(ids).most_common(1)[0][0]} comes twice")
    return dict(zip(qids, nearest(queries, documents, qids, pids, None, k, backend)))


def search_windows(
    queries: np.ndarray, documents: list[np.ndarray], qids: list[str], pids: list[str], k=1000
) -> dict[str, dict[str, float]]:
    """Exact search of documents of several vectors, (windows, D): the best of them counts.

    score(q, d) = max_w Σ_i q_i d_wi, summed in float64, rounded to float32;  ties by id, descending
    """
    owner = np.repeat(np.arange(len(pids)), [len(vectors) for vectors in documents])
    queries, vectors = np.ascontiguousarray(queries, dtype=np.float32), np.concatenate(documents)
    return dict(zip(qids, nearest(queries, vectors, qids, pids, owner, k, "torch")))


def blocks(vectors: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """(index of its first row, block) of ROWS rows at a time, float32; float32 is not copied."""
    for first in range(0, len(vectors), ROWS):
        block = np.ascontiguousarray(vectors[first : first + ROWS], dtype=np.float32)
        with warnings.catch_warnings():  # of a file opened for reading; nothing is written
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            block = torch.from_numpy(block)
        yield first, block


def max_norm(vectors: np.ndarray, name_of: Callable[[int], str]) -> float:
    """The largest norm of finite vectors.

    Raises:
        ValueError: a vector is not finite; `name_of` its row is named.
    """
    largest, bad = 0.0, []
    for first, block in blocks(vectors):
        norm = float(torch.linalg.vector_norm(block, dim=1).max())
        if not 1e-12 < norm < np.inf:  # not finite, or its square not a float32
            bad += (first + np.flatnonzero(~block.isfinite().all(dim=1).numpy())).tolist()
            norm = float(torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).max())
        largest = max(largest, norm)
    if bad:
        broken = f"is not finite ({len(bad)} such): the model or its input is broken"
        raise ValueError(f"the vector of {name_of(bad[0])} {broken}")
    return largest


def nearest(
    queries, vectors, qids, pids, owner: np.ndarray | None, k: int, backend: str
) -> Iterator[dict[str, float]]:
    """For each query its k best documents, {id: score}, best first.

    Args:
        owner: the document of each vector, if documents have several; None: one each.
    """
    find = candidates if backend != "faiss" else faiss_candidates()
    device = "cuda" if torch.cuda.is_available() and backend != "faiss" else "cpu"
    max_norm(queries, lambda row: f"query {qids[row]}")
    reach = max_norm(
        vectors, lambda row: f"document {pids[row if owner is None else owner[row]]}"
    ) * np.linalg.norm(queries.astype(np.float64), axis=1)
    N, D = vectors.shape
    # Twice the rounding error of a float32 sum of D products, and as much again for safety; out of
    # float32's range, no sum is trusted.
    errors = np.where((reach > 1e-30) & (reach < 1e37), 4 * D * 2.0**-24 * reach, np.inf)
    several = int(np.bincount(owner).max()) if owner is not None and N else 1
    step = max(1, SCORES // max(1, min(N, ROWS), 2 * min(N, 2 * k + SPARE)))
    scores = torch.empty((min(N, ROWS) + GROUP) * min(len(queries), step), device=device)
    for start in range(0, len(queries), step):
        batch = slice(start, start + step)
        best = [
            TopK(query, vectors, pids, owner, k, error)
            for query, error in zip(queries[batch], errors[batch].tolist())
        ]
        block = torch.from_numpy(queries[batch]).to(device)
        for first, table in blocks(vectors):
            for i, rows, values in find(block, table.to(device), best, k * several, scores):
                best[i].add(first + rows, values)
        yield from ({pid: score for pid, (score, _) in top.exactly().items()} for top in best)


@dataclass
class TopK:
    """The candidates of one query: vectors that could be among its k best.

    A candidate's float32 score is off by `error` at most, and lies within it of the k-th best
    score that is known.
    """

    query: np.ndarray
    vectors: np.ndarray
    pids: list[str]
    owner: np.ndarray | None
    k: int
    error: float
    known: float = -np.inf
    candidates: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # rows, scores
    count: int = 0

    def floor(self) -> float:
        return self.known - self.error

    def add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        self.candidates.append((rows, scores))
        self.count += len(rows)
        if self.count > 2 * self.k + SPARE:
            self.drop()

    def drop(self) -> None:
        """Forget what lies below the floor; of too many above, keep the k best by exact score."""
        rows, scores = (np.concatenate(parts) for parts in zip(*self.candidates))
        documents = scores
        if self.owner is not None:  # one score per document, its best
            order = np.argsort(-scores)
            documents = scores[order[np.unique(self.owner[rows[order]], return_index=True)[1]]]
        if len(documents) >= self.k:
            self.known = max(self.known, float(np.partition(documents, -self.k)[-self.k]))
        keep = ~(scores < self.floor())
        if keep.sum() > self.k + SPARE // 2:
            keep = np.isin(rows, [row for _, row in self.exactly().values()])
        self.candidates, self.count = [(rows[keep], scores[keep])], int(keep.sum())

    def exactly(self) -> dict[str, tuple[float, int]]:
        """{id: (score, row)} of the k best candidates, best first."""
        rows = np.concatenate([rows for rows, _ in self.candidates] or [np.zeros(0, np.int64)])
        owners = rows if self.owner is None else self.owner[rows]
        names = [self.pids[owner] for owner in owners.tolist()]
        scores = exact_scores(self.query, self.vectors, rows).tolist()
        best: dict[str, tuple[float, int]] = {}
        for score, pid, row in sorted(zip(scores, names, rows.tolist()), reverse=True):
            best.setdefault(pid, (score, row))
            if len(best) == self.k:
                break
        return best


def exact_scores(query: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The scores of these rows, summed in float64, rounded to float32."""
    query, scores = query.astype(np.float64), np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        table = vectors[rows[part]].astype(np.float32, copy=False).astype(np.float64)
        scores[part] = (table * query).sum(axis=1)
    return scores


def candidates(queries: Tensor, table: Tensor, best: list[TopK], k: int, buffer) -> Candidates:
    """The rows of a block that reach the floor of a query.

    The largest score of each group of rows is compared first, and its members only if that reaches
    the floor, so choosing costs little beside the product. Before anything is known, the k-th
    largest of the groups' best is a score that k rows reach.
    """
    (B, _), Q = table.shape, len(queries)
    group = max(1, min(GROUP, B // (4 * k)))
    G = -(-B // group)
    scores = buffer[: G * group * Q].view(G, group, Q)
    torch.mm(table, queries.T, out=scores.view(-1, Q)[:B])
    scores.view(-1, Q)[B:] = -torch.inf
    highest = scores.amax(dim=1)  # (G, Q)
    if G >= k and best[0].known == -np.inf:
        learn_known(best, highest.topk(k, dim=0).values[-1])
    floor = torch.tensor([top.floor() for top in best], dtype=torch.float32, device=scores.device)
    high = ~(highest < floor)
    for start in range(0, Q, 128):  # bounds memory if nearly all are high
        i, g = high[:, start : start + 128].T.nonzero(as_tuple=True)
        i += start
        rows = g[:, None] * group + torch.arange(group, device=g.device)  # (groups, group)
        values = scores[g, :, i]
        among = ~(values < floor[i, None]) & (rows < B)
        i = i[:, None].expand_as(rows)
        i, rows, values = (part[among].cpu().numpy() for part in (i, rows, values))
        borders = [0, *(1 + np.flatnonzero(np.diff(i))).tolist(), len(i)]
        yield from ((int(i[a]), rows[a:b], values[a:b]) for a, b in pairwise(borders) if b > a)


def learn_known(best: list[TopK], scores) -> None:
    for top, score in zip(best, scores.tolist()):
        top.known = max(top.known, score)


def faiss_candidates() -> Callable[..., Candidates]:
    """`candidates` by faiss, on its GPUs if it has some.

    If the last row that faiss finds could still be among the best, torch looks again.
    """
    try:
        import faiss
    except ImportError as error:
        way = "install faiss-cpu or faiss-gpu, or use backend='torch'"
        raise ImportError(f"backend='faiss' needs faiss ({error}): {way}") from None
    knn = faiss.knn
    if faiss.get_num_gpus():
        knn = partial(faiss.knn_gpu, faiss.StandardGpuResources())

    def find(queries: Tensor, table: Tensor, best: list[TopK], k: int, buffer) -> Candidates:
        m = min(k + 32, len(table))
        scores, rows = knn(queries.numpy(), table.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
        if m >= k:
            learn_known(best, scores[:, k - 1])
        floor = np.array([top.floor() for top in best], dtype=np.float32)
        sure = (scores[:, -1] < floor) | (m == len(table))
        for i in np.flatnonzero(sure).tolist():
            among = ~(scores[i] < floor[i])
            yield i, rows[i, among], scores[i, among]
        again = np.flatnonzero(~sure).tolist()
        if again:
            rest = [best[i] for i in again]
            for i, rows, scores in candidates(queries[again], table, rest, k, buffer):
                yield again[i], rows, scores

    return find


def rank(
    ranker, tasks: list, batch_size: int = 32, show_progress: bool = True, k: int = 1000
) -> dict[str, tuple[dict, int]]:
    """{task name: (run of the k best, documents longer than the ranker's context)}.

    Documents that tasks share are embedded once. A query that is itself one of
    the documents does not find itself (`queries_that_are_documents`).

    Args:
        ranker: an encoder (encode_documents, encode_queries: `Encoder`, `lib.benchmark.rankers`)
            or a `Bm25`.

    Raises:
        ValueError: an empty query, or a document longer than an encoder reads that has neither
            `truncate` nor `chunk`; task and id are named.
        TypeError: a query or document is no string.
    """
    for task in tasks:
        check_texts(task.documents, task.queries, f"{task.name}: ")
    if isinstance(ranker, Bm25):
        runs = ((ranker.run(task.documents, task.queries, k + 1), ranker.longer) for task in tasks)
    else:
        runs = encoded_runs(ranker, tasks, batch_size, show_progress, k + 1)
    return {
        task.name: (without_itself(run, queries_that_are_documents(task), k), sum(longer))
        for task, (run, longer) in zip(tasks, runs)
    }


def encoded_runs(ranker, tasks, batch_size, show_progress, k) -> Iterator[tuple[dict, list[bool]]]:
    """Each task's run by an encoder, and which of its documents are longer than the context."""
    texts = sorted({text for task in tasks for text in task.documents.values()})
    index = {text: i for i, text in enumerate(texts)}

    def document(i: int) -> str:
        pairs = ((task, *pair) for task in tasks for pair in task.documents.items())
        return next(f"{task.name}: document {pid}" for task, pid, text in pairs if text == texts[i])

    with text_named(ranker, document):
        vectors, owner = ranker.encode_documents(texts, batch_size, show_progress=show_progress)
    longer = ranker.longer
    for task in tasks:
        pids, qids = list(task.documents), list(task.queries)
        with text_named(ranker, lambda i, task=task, qids=qids: f"{task.name}: query {qids[i]}"):
            queries = ranker.encode_queries(list(task.queries.values()), batch_size)
        columns = np.array([index[text] for text in task.documents.values()])
        if len(owner) == 0 or owner[-1] + 1 == len(owner):  # one vector per text
            run = search(queries, vectors[columns], qids, pids, k)
        else:
            first, last = (np.searchsorted(owner, columns, side=side) for side in ("left", "right"))
            windows = [vectors[a:b] for a, b in zip(first, last)]
            run = search_windows(queries, windows, qids, pids, k)
        yield run, [longer[i] for i in columns]


@contextmanager
def text_named(ranker, name_of: Callable[[int], str]) -> Iterator[None]:
    """An error about text i becomes one about `name_of(i)`, its task and id."""
    try:
        yield
    except (TooLong, RefusedText) as error:
        reason = f"is not taken: {error}"
        if isinstance(error, TooLong):
            way = "give the Encoder truncate=True or chunk='mean'"
            reason = f"is longer than {ranker.context_length} tokens: {way}"
        raise ValueError(f"{name_of(error.index)} {reason}") from None


def queries_that_are_documents(task) -> list[str]:
    """The queries that are one of the task's documents and would find themselves.

    BEIR leaves that document out. Its rule is written for collections whose queries are documents
    too (ArguAna, Quora). A common id alone says nothing: queries and documents may both be
    numbered from 0. So the document has the query's id and its text (white space aside; with a
    title before the text or without, as `lib.benchmark.sources` joins the two), and is not judged
    relevant.
    """
    themselves = []
    for qid, query in task.queries.items():
        document = task.documents.get(qid)
        if document is not None and task.qrels.get(qid, {}).get(qid, 0) <= 0:
            untitled = document.partition("\n")[2]
            if query.split() in (document.split(), untitled.split()):
                themselves.append(qid)
    return themselves


def without_itself(run: dict, themselves: Collection[str], k: int = 1000) -> dict:
    """The k best of each query; a query of `themselves` loses the document of its own id."""
    themselves = set(themselves)
    return {
        qid: dict([pair for pair in scores.items() if pair[0] != qid or qid not in themselves][:k])
        for qid, scores in run.items()
    }


MEASURES = {
    "ndcg@10": (metrics.ndcg, 10),
    "recall@100": (metrics.recall, 100),
    "precision@10": (metrics.precision, 10),
    "mrr@10": (metrics.mrr, 10),
    "map": (metrics.average_precision, 1000),
}


def per_query(run: dict, qrels: dict) -> dict[str, dict[str, float]]:
    """{measure: {query: value}} of MEASURES; a judged query that the run lacks scores 0."""
    metrics.one_type("query", run, qrels)
    run = metrics.ordered({query: run[query] for query in qrels if query in run})
    return {name: measure(run, qrels, k, per_query=True) for name, (measure, k) in MEASURES.items()}


def averaged(several: Iterable[dict]) -> dict[str, dict[str, float]]:
    """The mean of each measure and query over the `per_query` of several trainings."""
    several = list(several)
    return {
        name: {query: sum(of[name][query] for of in several) / len(several) for query in values}
        for name, values in several[0].items()
    }


def evaluate(task, run: dict, values: dict | None = None) -> dict:
    """The scores of a run: the means of MEASURES, and what is needed to judge them.

    Args:
        values: of `per_query`, if they are known already, or `averaged` over several trainings;
            ties and missing are then those of this run alone.

    Returns:
        The mean of each measure; low and high, the 95 % bootstrap interval of nDCG@10 over
        queries; queries and documents, how many; missing, the judged queries for which the run
        ranks nothing (they score 0). If documents tie so that their order matters: ties, the
        lowest and highest nDCG@10 that any order gives. If there are any: itself, how many queries
        are documents that their own ranking lacks (`rank` leaves them out).
    """
    values = values or per_query(run, task.qrels)
    mean, low, high = statistics.interval(list(values["ndcg@10"].values()))
    means = {name: sum(of.values()) / len(of) for name, of in values.items()}
    scores = {"ndcg@10": mean, "low": low, "high": high} | means | {"ndcg@10": mean}
    scores = {name: round(value, 6) for name, value in scores.items()}
    scores |= {
        "queries": len(task.qrels),
        "documents": len(task.documents),
        "missing": sum(not run.get(query) for query in task.qrels),
    }
    worst, best = metrics.ndcg_range(run, task.qrels, k=10)
    if best - worst > 1e-9:
        scores["ties"] = [round(worst, 6), round(best, 6)]
    if itself := sum(qid not in run.get(qid, {}) for qid in queries_that_are_documents(task)):
        scores["itself"] = itself
    return scores
