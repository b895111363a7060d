"""Is a ranking good?

    ndcg, recall, precision, mrr, average_precision      measure(run, qrels, k): mean, or per query
    ndcg_range(run, qrels)                               the worst and the best that ties leave open
    ranking(scores)                                      document ids, best first

run[query_id][doc_id] = score, qrels[query_id][doc_id] = gain. A judged query that the run lacks
scores 0 and counts.

Source: Järvelin & Kekäläinen 2002; definitions and tie rule of trec_eval, equal
        to pytrec_eval within 1e-6 (tests/benchmark/test_metrics.py).
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import isfinite, log2

import numpy as np

from lib.pipeline.errors import require


class Ordered(dict):
    """The scores of one query, in the order of their ranking."""


def ordered(run: dict) -> dict[str, Ordered]:
    """The run with each query's documents in the order of their ranking: no measure sorts again."""
    return {
        query: Ordered((doc, scores[doc]) for doc in ranking(scores))
        for query, scores in run.items()
    }


def ranking(scores: dict[str, float]) -> list[str]:
    """Document ids, best first: score descending in float32, ties by id descending (trec_eval)."""
    if isinstance(scores, Ordered):
        return list(scores)
    return [doc for _, doc in sorted(zip(float32(scores), scores), reverse=True)]


def float32(scores: dict[str, float]) -> list[float]:
    """Rounded to float32, as Python's floats, which compare ten times faster than numpy's."""
    return np.array(list(scores.values()), dtype=np.float32).tolist()


def ndcg(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Normalised discounted cumulative gain of the first k documents.

        DCG@k = Σ_{i=1..k} gain(d_i) / log2(i + 1),   nDCG@k = DCG@k / best possible DCG@k

    Args:
        run: run[query_id][doc_id] = score.
        qrels: qrels[query_id][doc_id] = gain; 0 and below: not relevant.
        per_query: return {query_id: value} instead of the mean.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: no judged query, a score that is not finite, a query without a relevant
            document, k < 1, or ids of one type in the run and of another in the qrels.
    """
    return measure(run, qrels, k, per_query, lambda gains, best: dcg(gains) / dcg(best[:k]))


def recall(run: dict, qrels: dict, k: int = 100, per_query: bool = False):
    """The share of the relevant documents that are among the first k. Arguments as in `ndcg`."""
    return measure(run, qrels, k, per_query, lambda gains, best: relevant(gains) / len(best))


def precision(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """The share of the first k ranks that hold a relevant document; empty ranks count."""
    return measure(run, qrels, k, per_query, lambda gains, best: relevant(gains) / k)


def mrr(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Reciprocal rank of the first relevant document, 0 if none is among the first k."""

    def value(gains: list[int], best: list[int]) -> float:
        return next((1 / rank for rank, gain in enumerate(gains, start=1) if gain > 0), 0.0)

    return measure(run, qrels, k, per_query, value)


def average_precision(run: dict, qrels: dict, k: int = 1000, per_query: bool = False):
    """The mean, over relevant documents, of the precision at their ranks; its mean is MAP.

    A relevant document that is not among the first k contributes 0.
    """

    def value(gains: list[int], best: list[int]) -> float:
        ranks = [rank for rank, gain in enumerate(gains, start=1) if gain > 0]
        return sum(count / rank for count, rank in enumerate(ranks, start=1)) / len(best)

    return measure(run, qrels, k, per_query, value)


def measure(
    run: dict, qrels: dict, k: int, per_query: bool, value: Callable[[list[int], list[int]], float]
):
    """value(gains of the first k documents, gains > 0 in their best order) of each judged query."""
    require(k > 0, f"k={k}: documents count from 1", ValueError)
    values = {
        query: value([max(0, gains.get(doc, 0)) for doc in ranking(scores)[:k]], best)
        for query, scores, gains, best in judged_queries(run, qrels)
    }
    return values if per_query else sum(values.values()) / len(values)


def ndcg_range(run: dict, qrels: dict, k: int = 10) -> tuple[float, float]:
    """(lowest, highest) mean nDCG@k over all orders of documents that tie in float32."""
    low = high = 0.0
    for _, scores, judged, best in judged_queries(run, qrels):
        gains = [max(0, judged.get(doc, 0)) for doc in scores]
        pairs = [(-score, gain) for score, gain in zip(float32(scores), gains)]
        worst_order = [gain for _, gain in sorted(pairs)]
        best_order = [gain for _, gain in sorted(pairs, key=lambda pair: (pair[0], -pair[1]))]
        low += dcg(worst_order[:k]) / dcg(best[:k])
        high += dcg(best_order[:k]) / dcg(best[:k])
    return low / len(qrels), high / len(qrels)


def dcg(gains: list[int]) -> float:
    return sum(gain / log2(place + 2) for place, gain in enumerate(gains))


def relevant(gains: list[int]) -> int:
    return sum(gain > 0 for gain in gains)


def judged_queries(run: dict, qrels: dict) -> Iterator[tuple[str, dict, dict, list[int]]]:
    """(query, its scores, its judgements, its gains > 0 descending) of each judged query."""
    require(qrels, "no judged query: nothing to average", ValueError)
    one_type("query", run, qrels)
    for query, judged in qrels.items():
        scores = run.get(query, {})
        one_type("document", scores, judged)
        if not all(map(isfinite, scores.values())):
            doc, score = next(pair for pair in scores.items() if not isfinite(pair[1]))
            raise ValueError(f"query {query}: the score of {doc} is {score}")
        best = sorted((gain for gain in judged.values() if gain > 0), reverse=True)
        require(best, f"query {query} has no relevant document: drop it, or judge one", ValueError)
        yield query, scores, judged, best


def one_type(name: str, present: dict, judged: dict, sides=("the run", "the qrels")) -> None:
    """Refuse ids that never equal each other, such as 7 in a run and "7" in the qrels.

    All of them would score 0 without a word.

    Args:
        name: what the ids name, "query" or "document".
        present, judged: {id: …}, of the two sides, whose names are `sides`.

    Raises:
        ValueError: an id of `judged` is absent, and one of the two ids shown is text.
    """
    absent = [id for id in judged if id not in present]
    if len({issubclass(type_, str) for type_ in {*map(type, absent), *map(type, present)}}) < 2:
        return
    for a, b in product(absent, present):
        require(
            isinstance(a, str) == isinstance(b, str),
            f"{name} ids of different types are never equal: {b!r} ({type(b).__name__}) in "
            f"{sides[0]} and {a!r} ({type(a).__name__}) in {sides[1]}: make them all strings",
            ValueError,
        )
