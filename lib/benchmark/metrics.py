"""Is a ranking good?

    ndcg, recall, precision, mrr, average_precision      measure(run, qrels, k): mean, or per query
    ndcg_range(run, qrels)                               the worst and the best that ties leave open
    ranking(scores)                                      document ids, best first
    missing(run, qrels)                                  judged queries without a ranking

run[query_id][doc_id] = score, qrels[query_id][doc_id] = gain. A judged query that the run lacks
scores 0 and counts.

Source: Järvelin & Kekäläinen 2002; definitions and tie rule of trec_eval, equal
        to pytrec_eval within 1e-6 (tests/benchmark/test_metrics.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import isfinite, log2
from numbers import Number

import numpy as np


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


# ------------------------------------------------------------------ measures


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

    def value(gains: list[float], best: list[float]) -> float:
        return dcg(gains[:k]) / dcg(best[:k])

    return measure(run, qrels, k, per_query, "nDCG", value)


def recall(run: dict, qrels: dict, k: int = 100, per_query: bool = False):
    """The share of the relevant documents that are among the first k. Arguments as in `ndcg`."""

    def value(gains: list[float], best: list[float]) -> float:
        return relevant(gains[:k]) / len(best)

    return measure(run, qrels, k, per_query, "recall", value)


def precision(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """The share of the first k ranks that hold a relevant document; empty ranks count."""

    def value(gains: list[float], best: list[float]) -> float:
        return relevant(gains[:k]) / k

    return measure(run, qrels, k, per_query, "precision", value)


def mrr(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Reciprocal rank of the first relevant document, 0 if none is among the first k."""

    def value(gains: list[float], best: list[float]) -> float:
        return next((1 / rank for rank, gain in enumerate(gains[:k], start=1) if gain > 0), 0.0)

    return measure(run, qrels, k, per_query, "MRR", value)


def average_precision(run: dict, qrels: dict, k: int = 1000, per_query: bool = False):
    """The mean, over relevant documents, of the precision at their ranks; its mean is MAP.

    A relevant document that is not among the first k contributes 0.
    """

    def value(gains: list[float], best: list[float]) -> float:
        ranks = [rank for rank, gain in enumerate(gains[:k], start=1) if gain > 0]
        return sum(count / rank for count, rank in enumerate(ranks, start=1)) / len(best)

    return measure(run, qrels, k, per_query, "MAP", value)


def measure(
    run: dict,
    qrels: dict,
    k: int,
    per_query: bool,
    name: str,
    value: Callable[[list[float], list[float]], float],
):
    """value(gains as ranked, gains > 0 in their best order) of every judged query, or its mean."""
    if k < 1:
        raise ValueError(f"{name}@{k}: k counts documents, from 1")
    values = {
        query: value([max(0, gains.get(doc, 0)) for doc in ranking(scores)], best)
        for query, scores, gains, best in judged_queries(run, qrels)
    }
    return values if per_query else sum(values.values()) / len(values)


def ndcg_range(run: dict, qrels: dict, k: int = 10) -> tuple[float, float]:
    """(lowest, highest) mean nDCG@k over all orders of documents that tie in float32."""
    low = high = 0.0
    for _, scores, judged, best in judged_queries(run, qrels):
        rounded = float32(scores)
        if len(set(rounded)) == len(rounded):
            value = dcg([max(0, judged.get(doc, 0)) for doc in ranking(scores)][:k]) / dcg(best[:k])
            low, high = low + value, high + value
            continue
        gains = [(-score, max(0, judged.get(doc, 0))) for score, doc in zip(rounded, scores)]
        worst_order, best_order = (
            [
                gain
                for _, gain in sorted(gains, key=lambda pair, sign=sign: (pair[0], sign * pair[1]))
            ]
            for sign in (1, -1)
        )
        low += dcg(worst_order[:k]) / dcg(best[:k])
        high += dcg(best_order[:k]) / dcg(best[:k])
    return low / len(qrels), high / len(qrels)


def dcg(gains: Sequence[float]) -> float:
    return sum(gain / log2(place + 2) for place, gain in enumerate(gains))


def relevant(gains: Sequence[float]) -> int:
    return sum(gain > 0 for gain in gains)


# ------------------------------------------------------------------ what can be measured


def judged_queries(
    run: dict, qrels: dict
) -> Iterator[tuple[str, dict[str, float], dict[str, int], list[int]]]:
    """(query, its scores, its judgements, its gains > 0 descending) of each judged query.

    Raises:
        ValueError: the reason why nothing can be measured.
    """
    if not qrels:
        raise ValueError("no judged query: nothing to average")
    one_type("query", run, qrels)
    for query, judged in qrels.items():
        scores = run.get(query, {})
        one_type("document", scores, judged)
        if not all(map(isfinite, scores.values())):
            doc, score = next(pair for pair in scores.items() if not isfinite(pair[1]))
            raise ValueError(f"query {query}: the score of {doc} is {score}")
        best = sorted((gain for gain in judged.values() if gain > 0), reverse=True)
        if not best:
            raise ValueError(f"query {query} has no relevant document: drop it, or judge one")
        yield query, scores, judged, best


def missing(run: dict, qrels: dict) -> list[str]:
    """Judged queries for which the run ranks nothing: they score 0."""
    one_type("query", run, qrels)
    return [query for query in qrels if not run.get(query)]


def id_type(type_: type) -> str:
    """What an id is equal to: 7, np.int64(7) and 7.0 are one, "7" and np.str_("7") another."""
    if issubclass(type_, str):
        return "str"
    return "number" if issubclass(type_, Number) else type_.__name__


def one_type(name: str, present: Mapping, judged: Mapping, sides=("the run", "the qrels")) -> None:
    """Refuse ids that never equal each other, such as 7 in a run and "7" in the qrels.

    All of them would score 0 without a word.

    Args:
        name: what the ids name, "query" or "document".
        present, judged: {id: …}, of the two sides, whose names are `sides`.

    Raises:
        ValueError: an id of `judged` is absent, and the ids are of two types; one of each is shown.
    """
    if judged.keys() <= present.keys():  # nothing is lost, and mostly so: 1 µs
        return
    lost = [id for id in judged if id not in present]
    try:
        "".join(present), "".join(lost)  # all text: twice as fast as to ask each
        return
    except TypeError:
        if len({id_type(each) for each in {*map(type, present), *map(type, lost)}}) < 2:
            return
    for a, b in product(lost, present):
        if id_type(type(a)) != id_type(type(b)):
            raise ValueError(
                f"{name} ids of different types are never equal: {b!r} ({type(b).__name__}) in "
                f"{sides[0]} and {a!r} ({type(a).__name__}) in {sides[1]}: make them all strings"
            )
