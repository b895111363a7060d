"""Is a ranking good?

    ndcg, recall, precision, mrr, average_precision      a measure(run, qrels, k), a mean or a value per query
    ndcg_range(run, qrels)                               the worst and the best that ties leave open
    one_type(name, found, judged)                        ids that could never meet are an error, not a 0

Source: Järvelin & Kekäläinen 2002; definitions and tie rule of trec_eval, equal
        to pytrec_eval within 1e-6 (tests/test_metrics.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import isfinite, log2
from numbers import Number

import numpy as np

# ------------------------------------------------------------------ ids


def kind(type_: type) -> str:
    """What an id is equal to: 7, np.int64(7) and 7.0 are one, "7" and np.str_("7") another."""
    return (
        "str"
        if issubclass(type_, str)
        else "number"
        if issubclass(type_, Number)
        else type_.__name__
    )


def one_type(name: str, found: Mapping, judged: Mapping, sides=("the run", "the qrels")) -> None:
    """Refuse ids that never equal each other, such as 7 in a run and "7" in the qrels, which would all score 0.

    Args:
        name: what the ids name, "query" or "document".
        found, judged: {id: …}, of the two sides, whose names are `sides`.

    Raises:
        ValueError: an id of `judged` is not found, and they are of two types; one of each is shown.
    """
    if judged.keys() <= found.keys():  # nothing is lost, and mostly so: 1 µs
        return
    lost = [id for id in judged if id not in found]
    try:
        "".join(found), "".join(lost)  # all text: twice as fast as to ask each
        return
    except TypeError:
        if len({kind(each) for each in {*map(type, found), *map(type, lost)}}) < 2:
            return
    for a, b in product(lost, found):
        if kind(type(a)) != kind(type(b)):
            raise ValueError(
                f"{name} ids of different types are never equal: {b!r} ({type(b).__name__}) in {sides[0]} "
                f"and {a!r} ({type(a).__name__}) in {sides[1]}: make them all strings"
            )


# ------------------------------------------------------------------ measures


class Ordered(dict):
    """The scores of one query, in the order of their ranking."""


def ordered(run: dict) -> dict[str, Ordered]:
    """The run, each query's documents in the order of their ranking, so that no measure sorts again."""
    return {
        query: Ordered((doc, scores[doc]) for doc in ranking(scores))
        for query, scores in run.items()
    }


def ranking(scores: dict[str, float]) -> list[str]:
    """Document ids, best first: score descending in float32, ties by id descending (trec_eval's rule)."""
    if isinstance(scores, Ordered):
        return list(scores)
    rounded = np.array(
        list(scores.values()), dtype=np.float32
    ).tolist()  # Python's floats, which compare ten times faster than numpy's
    return [doc for _, doc in sorted(zip(rounded, scores), reverse=True)]


def ndcg(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Normalised discounted cumulative gain of the first k documents.

        DCG@k = Σ_{i=1..k} gain(d_i) / log2(i + 1),   nDCG@k = DCG@k / best possible DCG@k

    Args:
        run: run[query_id][doc_id] = score.
        qrels: qrels[query_id][doc_id] = gain; 0 and below: not relevant.
        per_query: return {query_id: value} instead of the mean.

    Returns:
        A fraction in [0, 1]. A judged query that the run lacks scores 0 and counts (`missing` names it).

    Raises:
        ValueError: no judged query, a score that is not finite, a query whose judgements hold nothing relevant, k < 1,
            or ids of one type in the run and of another in the qrels.
    """
    return measure(
        run, qrels, k, per_query, "nDCG", lambda gains, best: dcg(gains[:k]) / dcg(best[:k])
    )


def recall(run: dict, qrels: dict, k: int = 100, per_query: bool = False):
    """The share of the relevant documents that are among the first k. Arguments and errors as in `ndcg`."""
    return measure(
        run, qrels, k, per_query, "recall", lambda gains, best: relevant(gains[:k]) / len(best)
    )


def precision(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """The share of the first k places that hold a relevant document; places that the run leaves empty count."""
    return measure(
        run, qrels, k, per_query, "precision", lambda gains, best: relevant(gains[:k]) / k
    )


def mrr(run: dict, qrels: dict, k: int = 10, per_query: bool = False):
    """Reciprocal rank: 1 over the place of the first relevant document, 0 where none is among the first k."""
    return measure(
        run,
        qrels,
        k,
        per_query,
        "MRR",
        lambda gains, best: next(
            (1 / place for place, gain in enumerate(gains[:k], start=1) if gain > 0), 0.0
        ),
    )


def average_precision(run: dict, qrels: dict, k: int = 1000, per_query: bool = False):
    """The precision at the place of each relevant document among the first k, summed, over the number of relevant ones; its mean is MAP."""

    def value(gains: list[float], best: list[float]) -> float:
        places = [place for place, gain in enumerate(gains[:k], start=1) if gain > 0]
        return sum(found / place for found, place in enumerate(places, start=1)) / len(best)

    return measure(run, qrels, k, per_query, "MAP", value)


def measure(
    run: dict,
    qrels: dict,
    k: int,
    per_query: bool,
    name: str,
    value: Callable[[list[float], list[float]], float],
):
    """value(gains in the order of the ranking, gains > 0 in their best order) of every judged query, or its mean."""
    if k < 1:
        raise ValueError(f"{name}@{k}: k counts documents, from 1")
    values = {
        query: value([max(0, judged.get(doc, 0)) for doc in ranking(scores)], best)
        for query, scores, judged, best in judged_queries(run, qrels)
    }
    return values if per_query else sum(values.values()) / len(values)


def judged_queries(
    run: dict, qrels: dict
) -> Iterator[tuple[str, dict[str, float], dict[str, int], list[int]]]:
    """(query, its scores, its judgements, its gains > 0 descending), or the reason why nothing can be measured."""
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
    """Judged queries for which the run ranks nothing: they score 0.

    Raises:
        ValueError: query ids of one type in the run and of another in the qrels.
    """
    one_type("query", run, qrels)
    return [query for query in qrels if not run.get(query)]


def ndcg_range(run: dict, qrels: dict, k: int = 10) -> tuple[float, float]:
    """(lowest, highest) mean nDCG@k over all orders of documents whose scores tie in float32. Equal where nothing ties."""
    low = high = 0.0
    for query, scores, judged, best in judged_queries(run, qrels):
        rounded = np.array(list(scores.values()), dtype=np.float32).tolist()
        if len(set(rounded)) == len(rounded):
            value = dcg([max(0, judged.get(doc, 0)) for doc in ranking(scores)][:k]) / dcg(best[:k])
            low, high = low + value, high + value
            continue
        gains = [(-score, max(0, judged.get(doc, 0))) for score, doc in zip(rounded, scores)]
        worst_order, best_order = (
            [gain for _, gain in sorted(gains, key=lambda pair: (pair[0], sign * pair[1]))]
            for sign in (1, -1)
        )
        low, high = (
            low + dcg(worst_order[:k]) / dcg(best[:k]),
            high + dcg(best_order[:k]) / dcg(best[:k]),
        )
    return low / len(qrels), high / len(qrels)


def dcg(gains: Sequence[float]) -> float:
    return sum(gain / log2(place + 2) for place, gain in enumerate(gains))


def relevant(gains: Sequence[float]) -> int:
    return sum(gain > 0 for gain in gains)
