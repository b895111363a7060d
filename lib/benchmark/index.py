"""Approximate search, for collections that are too large to look at whole for every query.

    Index(documents, kind)                     hnsw | ivf_flat | ivf_sq8 | ivf_pq, built by faiss
    index.search(q, qids, pids, k, effort)     a run, as `retrieve.search` gives it, that may lack documents
    index.size                                 bytes it holds beside the documents

The index only nominates. What it finds is scored as exact search scores it, so
the two runs differ in what is missing and in nothing else, and
`metrics.recall` of the one against the other says how much that is. Exact
search is the default everywhere; from what size on this pays: README, tests/bench_search.py.
Axes: N documents, Q queries, D width.
"""

import numpy as np

from lib.benchmark import search

KINDS = {
    "hnsw": "a graph over whole vectors",
    "ivf_flat": "lists of whole vectors",
    "ivf_sq8": "lists of vectors of one byte a number",
    "ivf_pq": "lists of vectors of one byte for eight numbers",
}
SAMPLE = 64  # documents for each list, or each code, from which they are learnt


class Index:
    """Nominates documents for a query without looking at them all.

    Args:
        documents: (N, D), kept as they are and not copied (a file opened with `mmap_mode="r"` will do); normalised, where the kind is hnsw.
        kind: one of KINDS.
        lists: of an ivf kind; None: twice the root of N.
        links: of each document in hnsw.

    Raises:
        ValueError: an unknown kind, no documents, too few of them for the lists or the codes, a width that ivf_pq cannot cut, or a vector that is not finite.
        ImportError: faiss is absent.
    """

    def __init__(
        self,
        documents: np.ndarray,
        kind: str = "ivf_flat",
        lists: int | None = None,
        links: int = 32,
    ):
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                f"an index needs faiss ({error}): install faiss-cpu or faiss-gpu, or search exactly with `retrieve.search`"
            ) from None
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: one of {', '.join(KINDS)}")
        if documents.ndim != 2 or not len(documents):
            raise ValueError(f"documents are (N, D), at least one: got {documents.shape}")
        N, D = documents.shape
        lists = lists or max(1, round(2 * N**0.5))
        if kind != "hnsw" and lists > N:
            raise ValueError(f"lists={lists}: there are {N} documents, take fewer lists")
        if kind == "ivf_pq" and (N < 256 or D % 8):
            raise ValueError(
                f"ivf_pq learns 256 codes for each eight numbers: {N} documents of {D} numbers are too few, or no multiple of 8; take ivf_sq8"
            )
        search.longest(documents, "document", str)
        self.faiss, self.documents, self.kind, self.lists = faiss, documents, kind, lists
        if kind == "hnsw":
            self.index = faiss.IndexHNSWFlat(D, links, faiss.METRIC_INNER_PRODUCT)
        else:
            self.index = faiss.index_factory(
                D,
                f"IVF{lists},"
                + {"ivf_flat": "Flat", "ivf_sq8": "SQ8", "ivf_pq": f"PQ{D // 8}np"}[kind],
                faiss.METRIC_INNER_PRODUCT,
            )
            learning = [self.index.cp] + ([self.index.pq.cp] if kind == "ivf_pq" else [])
            for one in learning:
                one.min_points_per_centroid, one.max_points_per_centroid, one.niter = 1, SAMPLE, 10
            sample = np.sort(
                np.random.default_rng(0).choice(
                    N, size=min(N, SAMPLE * max(lists, 256)), replace=False
                )
            )
            self.index.train(np.asarray(documents[sample], dtype=np.float32))
        for _, block in search.blocks(documents):
            self.index.add(block.numpy())

    @property
    def size(self) -> int:
        """Bytes: vectors or codes, ids, links, and what was learnt."""
        N, D, index = self.index.ntotal, self.index.d, self.index
        if self.kind == "hnsw":
            return (
                N * D * 4
                + index.hnsw.neighbors.size() * 4
                + index.hnsw.offsets.size() * 8
                + index.hnsw.levels.size() * 4
            )
        return (
            N * (index.code_size + 8)
            + self.lists * D * 4
            + (256 * D * 4 if self.kind == "ivf_pq" else 0)
        )

    def search(
        self,
        queries: np.ndarray,
        qids: list[str],
        pids: list[str],
        k: int = 10,
        effort: int | None = None,
        candidates: int | None = None,
    ) -> dict[str, dict[str, float]]:
        """The run of the best k of what is found.

        Args:
            queries: (Q, D).
            effort: how much is looked at: lists in an ivf kind, candidates kept on the way through hnsw; None: 64, or every list where there are fewer.
            candidates: how many are nominated and then scored exactly; None: k, and ten times k for ivf_pq, whose own scores are rough.

        Raises:
            ValueError: ids and vectors disagree in number or in D, or k, effort or candidates is out of range.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if len(queries) != len(qids) or len(self.documents) != len(pids):
            raise ValueError(
                f"one id per vector: got {len(qids)} ids for {len(queries)} queries, {len(pids)} for {len(self.documents)} documents"
            )
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise ValueError(
                f"queries are (Q, {self.index.d}), as the documents are: got {queries.shape}"
            )
        most = self.index.ntotal if self.kind == "hnsw" else self.lists
        effort = min(64, most) if effort is None else effort
        candidates = k * (10 if self.kind == "ivf_pq" else 1) if candidates is None else candidates
        if not 1 <= effort <= most or not 1 <= k <= candidates:
            raise ValueError(
                f"effort={effort}, k={k}, candidates={candidates}: effort from 1 to {most}, k from 1, candidates from k"
            )
        search.longest(queries, "query", qids.__getitem__)
        how = (
            self.faiss.SearchParametersHNSW(efSearch=max(effort, candidates))
            if self.kind == "hnsw"
            else self.faiss.SearchParametersIVF(nprobe=effort)
        )
        _, found = self.index.search(queries, min(candidates, len(pids)), params=how)
        run = {}
        for qid, query, rows in zip(qids, queries, found):
            rows = rows[rows >= 0]
            scores = search.exact_scores(query, self.documents, rows).tolist()
            run[qid] = {
                pid: score
                for score, pid in sorted(zip(scores, [pids[row] for row in rows]), reverse=True)[:k]
            }
        return run
