"""Is a ranking good, and is one better than another beyond chance?

    ndcg(run, qrels)          trec_eval's nDCG@k
    interval(values)          mean and 95 % bootstrap interval over queries
    paired(a, b)              the same for a difference between two systems on the same queries

Source: Järvelin & Kekäläinen 2002; definition and tie rule of trec_eval, equal
        to pytrec_eval within 1e-6 (tests/test_metrics.py).
"""
from collections.abc import Sequence
from math import log2

import numpy as np


def ranking(scores: dict[str, float]) -> list[str]:
    """Document ids, best first: score descending in float32, ties by id descending (trec_eval's rule)."""
    rounded = np.array(list(scores.values()), dtype=np.float32).tolist()   # Python's floats, which compare ten times faster than numpy's
    return [doc for _, doc in sorted(zip(rounded, scores), reverse=True)]


def ndcg(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Normalised discounted cumulative gain of the first k documents.

        DCG@k = Σ_{i=1..k} gain(d_i) / log2(i + 1),   nDCG@k = DCG@k / best possible DCG@k

    Args:
        run: run[query_id][doc_id] = score.
        qrels: qrels[query_id][doc_id] = gain; 0 and below: not relevant.
        per_query: return {query_id: value} instead of the mean.

    Returns:
        A fraction in [0, 1]. A judged query that the run lacks scores 0 and counts.

    Raises:
        ValueError: no judged query, a score that is not finite, a query whose judgements hold nothing relevant, or k < 1.
    """
    if k < 1:
        raise ValueError(f"nDCG@{k}: k counts documents, from 1")
    if not qrels:
        raise ValueError("no judged query: nothing to average")
    values = {}
    for query, judged in qrels.items():
        scores = run.get(query, {})
        for doc, score in scores.items():
            if not np.isfinite(score):
                raise ValueError(f"query {query}: the score of {doc} is {score}")
        gains = [max(0, judged.get(doc, 0)) for doc in ranking(scores)[:k]]
        best = sorted((gain for gain in judged.values() if gain > 0), reverse=True)[:k]
        if not best:
            raise ValueError(f"query {query} has no relevant document: drop it, or judge one")
        values[query] = dcg(gains) / dcg(best)
    return values if per_query else sum(values.values()) / len(values)


def dcg(gains: Sequence[float]) -> float:
    return sum(gain / log2(place + 2) for place, gain in enumerate(gains))


def interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over queries, the same bits every time."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"an interval needs one row of finite values: got shape {values.shape}, {int((~np.isfinite(values)).sum())} not finite")
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // len(values))                               # 32 MB of indices at a time
    means = np.concatenate([values[rng.integers(len(values), size=(min(block, resamples - done), len(values)))].mean(axis=1)
                            for done in range(0, resamples, block)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)


def paired(a: dict[str, float], b: dict[str, float], **options) -> tuple[float, float, float]:
    """(mean of a - b, low, high) over the queries, which must be the same in both."""
    if a.keys() != b.keys():
        raise ValueError(f"two systems on the same queries: {len(a.keys() ^ b.keys())} queries are in one only")
    return interval([a[query] - b[query] for query in sorted(a)], **options)
