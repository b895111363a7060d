"""nDCG by hand and against trec_eval's own code; intervals against distributions we know."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.benchmark import metrics, search


def trec_eval(run, qrels, k):
    """{query: nDCG@k} by trec_eval; it drops queries that the run lacks."""
    found = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}"}).evaluate(run)
    return {query: values[f"ndcg_cut_{k}"] for query, values in found.items()}


# ---------------------------------------------------------------- nDCG


def test_ndcg_by_hand():
    qrels = {"q": {"a": 3, "b": 1, "missing": 2}}
    run = {"q": {"x": 9.0, "a": 8.0, "y": 7.0, "b": 6.0}}
    # gains 0 3 0 1 against the ideal 3 2 1
    expected = (3 / math.log2(3) + 1 / math.log2(5)) / (3 + 2 / math.log2(3) + 1 / math.log2(4))
    assert metrics.ndcg(run, qrels) == pytest.approx(expected)
    assert metrics.ndcg(run, qrels, k=2) == pytest.approx(3 / math.log2(3) / (3 + 2 / math.log2(3)))
    assert metrics.ndcg(run, qrels, k=1) == 0


@pytest.mark.parametrize("place", [1, 2, 3, 10, 11])
def test_one_answer_scores_by_its_place(place):
    run = {"q": {f"d{i:02}": -i for i in range(1, 20)}}
    expected = 1 / math.log2(place + 1) if place <= 10 else 0
    assert metrics.ndcg(run, {"q": {f"d{place:02}": 1}}) == pytest.approx(expected)


def test_ties_fall_to_the_later_id():
    run = {"q": {"a": 1.0, "c": 1.0, "b": 1.0, "z": 0.5}}
    assert metrics.ranking(run["q"]) == ["c", "b", "a", "z"]
    assert metrics.ndcg(run, {"q": {"c": 1}}, k=1) == 1
    assert metrics.ndcg(run, {"q": {"a": 1}}, k=2) == 0
    # closer than float32 can tell apart is a tie
    assert metrics.ranking({"a": 1.0 + 1e-9, "b": 1.0}) == ["b", "a"]
    assert metrics.ranking({"a": 1.0 + 1e-6, "b": 1.0}) == ["a", "b"]


def test_a_query_the_run_lacks_scores_zero_and_counts():
    qrels = {"found": {"a": 1}, "lost": {"a": 1}, "empty": {"a": 1}}
    run = {"found": {"a": 1.0}, "empty": {}, "unjudged": {"a": 1.0}}
    assert metrics.ndcg(run, qrels, per_query=True) == {"found": 1.0, "lost": 0.0, "empty": 0.0}
    assert metrics.ndcg(run, qrels) == pytest.approx(1 / 3)
    assert trec_eval(run, qrels, 10).keys() <= {
        "found",
        "empty",
    }  # a mean over fewer queries, without a word


def test_random_runs_equal_trec_eval():
    """Grades, negative ones too, unjudged documents, many ties, scores a float32 apart or less."""
    rng = random.Random(0)
    for trial in range(60):
        docs = [f"d{i}" for i in range(rng.randint(1, 30))]
        qrels = {
            f"q{q}": {
                doc: rng.choice([-1, 0, 0, 1, 1, 2, 5])
                for doc in rng.sample(docs, rng.randint(1, len(docs)))
            }
            | {"answer": 1}
            for q in range(4)
        }
        score = [
            lambda: rng.random(),
            lambda: rng.randint(0, 3),
            lambda: 0.7 + rng.randint(0, 4) * 2e-8,
        ][trial % 3]
        run = {
            query: {doc: float(score()) for doc in rng.sample(docs, rng.randint(1, len(docs)))}
            for query in qrels
        }
        for k in (1, 3, 10, 100):
            assert metrics.ndcg(run, qrels, k, per_query=True) == pytest.approx(
                trec_eval(run, qrels, k), abs=1e-6
            )


@settings(deadline=None, max_examples=80)
@given(
    scores=st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=4),
        st.sampled_from([-1.0, 0.0, -0.0, 0.25, 0.25 + 1e-9, 3.0]),
        min_size=1,
        max_size=12,
    ),
    data=st.data(),
)
def test_any_ids_rank_as_in_trec_eval(scores, data):
    """One judged document at k = its place is found exactly there, also for ids outside ASCII."""
    wanted = data.draw(st.sampled_from(sorted(scores)))
    place = metrics.ranking(scores).index(wanted) + 1
    qrels = {"q": {wanted: 1}}
    found = trec_eval({"q": scores}, qrels, 12)["q"]
    assert found == pytest.approx(1 / math.log2(place + 1), abs=1e-6)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_score_that_is_not_finite_is_refused_by_name(score):
    with pytest.raises(ValueError, match="query q7: the score of d9 is"):
        metrics.ndcg({"q7": {"d8": 1.0, "d9": score}}, {"q7": {"d8": 1}})


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="no judged query"):
        metrics.ndcg({"q": {"d": 1.0}}, {})
    for judged in ({}, {"d": 0}, {"d": -1}):
        with pytest.raises(ValueError, match="query q has no relevant document"):
            metrics.ndcg({"q": {"d": 1.0}}, {"q": judged})
    with pytest.raises(ValueError, match="k=0"):
        metrics.ndcg({"q": {"d": 1.0}}, {"q": {"d": 1}}, k=0)


# ---------------------------------------------------------------- types of ids

EVERY = [
    metrics.ndcg,
    metrics.recall,
    metrics.precision,
    metrics.mrr,
    metrics.average_precision,
    metrics.ndcg_range,
]


@pytest.mark.parametrize(
    "measure",
    [
        *EVERY,
        search.per_query,
        lambda run, qrels: search.evaluate(toy(qrels), run),
    ],
)
def test_query_ids_of_another_type_are_refused(measure):
    for run, qrels in (
        ({7: {"d": 1.0}}, {"7": {"d": 1}}),
        ({"7": {"d": 1.0}}, {7: {"d": 1}}),
        ({np.int64(7): {"d": 1.0}}, {"7": {"d": 1}}),
        ({"8": {"d": 1.0}, 7: {"d": 1.0}}, {"8": {"d": 1}, "7": {"d": 1}}),
        ({b"7": {"d": 1.0}}, {"7": {"d": 1}}),
    ):
        with pytest.raises(
            ValueError,
            match=r"query ids .*7.* \((int|str|int64|bytes)\) in the run "
            r"and .*7.* \(\w+\) in the qrels: make them all strings",
        ):
            measure(run, qrels)


@pytest.mark.parametrize(
    "measure", [*EVERY, search.per_query, lambda run, qrels: search.evaluate(toy(qrels), run)]
)
def test_document_ids_of_another_type_are_refused(measure):
    for run, qrels in (
        ({"q": {7: 1.0}}, {"q": {"7": 1}}),
        ({"q": {"7": 1.0}}, {"q": {7: 1}}),
        ({"q": {"7": 1.0, "8": 0.5}}, {"q": {np.int64(7): 1}}),
        ({"q": {7: 1.0, "8": 0.5}}, {"q": {"7": 1, "8": 1}}),
    ):
        with pytest.raises(
            ValueError,
            match=r"document ids .*7.* \((int|str|int64)\) in the \w+ and .* in the qrels: "
            r"make them all strings",
        ):
            measure(run, qrels)


def toy(qrels):
    return SimpleNamespace(documents={}, queries={}, qrels=qrels)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(int, int), (int, np.int64), (np.int64, int), (str, np.str_), (np.str_, str)],
)
def test_ids_of_one_type_are_allowed_whatever_it_is(ours, theirs):
    """np.int64(7) equals 7, np.str_("7") equals "7". Document 7 is second, query 2 has no hit."""
    run, qrels = (
        {ours(1): {ours(7): 1.0, ours(8): 2.0}},
        {theirs(1): {theirs(7): 1}, theirs(2): {theirs(9): 1}},
    )
    expected = {
        metrics.ndcg: 1 / math.log2(3),
        metrics.recall: 1,
        metrics.precision: 1 / 10,
        metrics.mrr: 1 / 2,
        metrics.average_precision: 1 / 2,
    }
    for measure, value in expected.items():
        assert measure(run, qrels) == pytest.approx(value / 2)
    assert metrics.ndcg_range(run, qrels) == pytest.approx((1 / math.log2(3) / 2,) * 2)
    assert metrics.ndcg({}, qrels) == metrics.ndcg({theirs(1): {}}, qrels) == 0


# ---------------------------------------------------------------- the other measures


def test_measures_by_hand():
    """Places: x a y b; a and b are relevant, and a third that is not found."""
    qrels, run = (
        {"q": {"a": 3, "b": 1, "lost": 2, "y": 0}},
        {"q": {"x": 9.0, "a": 8.0, "y": 7.0, "b": 6.0}},
    )
    assert metrics.recall(run, qrels) == pytest.approx(2 / 3) and metrics.recall(
        run, qrels, k=3
    ) == pytest.approx(1 / 3)
    assert (
        metrics.precision(run, qrels) == pytest.approx(0.2)
        and metrics.precision(run, qrels, k=2) == 0.5
    )
    assert metrics.mrr(run, qrels) == 0.5 and metrics.mrr(run, qrels, k=1) == 0
    assert metrics.average_precision(run, qrels) == pytest.approx((1 / 2 + 2 / 4) / 3)


MEASURES = {
    "recall": "recall",
    "precision": "P",
    "average_precision": "map_cut",
    "ndcg": "ndcg_cut",
}


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_equals_trec_evals_on_runs_with_ties_and_missing_queries(name):
    rng = random.Random(1)
    for trial in range(40):
        docs = [f"d{i}" for i in range(rng.randint(1, 30))]
        qrels = {
            f"q{q}": {
                doc: rng.choice([-1, 0, 0, 1, 1, 2])
                for doc in rng.sample(docs, rng.randint(1, len(docs)))
            }
            | {"answer": 1}
            for q in range(5)
        }
        score = [
            lambda: rng.random(),
            lambda: rng.randint(0, 3),
            lambda: 0.7 + rng.randint(0, 4) * 2e-8,
        ][trial % 3]
        run = {
            query: {doc: float(score()) for doc in rng.sample(docs, rng.randint(1, len(docs)))}
            for query in list(qrels)[trial % 2 :]
        }
        for k in (1, 5, 10, 100):
            found = {
                query: values[f"{MEASURES[name]}_{k}"]
                for query, values in pytrec_eval.RelevanceEvaluator(
                    qrels, {f"{MEASURES[name]}.{k}"}
                )
                .evaluate(run)
                .items()
            }
            ours = getattr(metrics, name)(run, qrels, k, per_query=True)
            assert ours == pytest.approx(
                {query: found.get(query, 0.0) for query in qrels}, abs=1e-6
            )
            assert getattr(metrics, name)(run, qrels, k) == pytest.approx(
                sum(found.values()) / len(qrels), abs=1e-6
            )


def test_reciprocal_rank_equals_trec_evals():
    rng = random.Random(2)
    for _ in range(40):
        docs = [f"d{i}" for i in range(rng.randint(1, 30))]
        qrels = {f"q{q}": {"answer": 1, "d0": rng.choice([0, 1])} for q in range(5)}
        run = {query: {doc: float(rng.randint(0, 3)) for doc in docs} for query in qrels}
        found = {
            query: values["recip_rank"]
            for query, values in pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
            .evaluate(run)
            .items()
        }
        assert metrics.mrr(run, qrels, k=1000, per_query=True) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("name", [*MEASURES, "mrr"])
def test_a_measure_refuses_what_it_cannot_count(name):
    for wrong in (({"q": {"d": math.nan}}, {"q": {"d": 1}}), ({}, {}), ({}, {"q": {"d": 0}})):
        with pytest.raises(ValueError):
            getattr(metrics, name)(*wrong)
    with pytest.raises(ValueError, match="k=0: documents count"):
        getattr(metrics, name)({}, {"q": {"d": 1}}, k=0)


def test_the_range_over_ties_by_hand():
    """a, b and c tie for the second to fourth place, b is the answer."""
    run, qrels = {"q": {"x": 2.0, "a": 1.0, "b": 1.0, "c": 1.0 + 1e-9, "z": 0.5}}, {"q": {"b": 1}}
    assert metrics.ndcg_range(run, qrels) == pytest.approx((1 / math.log2(5), 1 / math.log2(3)))
    assert metrics.ndcg_range(run, {"q": {"x": 1}}) == (1, 1)


@settings(deadline=None, max_examples=60)
@given(
    scores=st.dictionaries(
        st.sampled_from("abcdefgh"), st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6
    ),
    data=st.data(),
)
def test_the_range_holds_every_order_of_the_ties_and_its_ends_are_reached(scores, data):
    qrels = {"q": {doc: data.draw(st.integers(0, 2)) for doc in scores} | {"answer": 1}}
    values = []
    for order in itertools.permutations(scores):  # a tiny step by which each order breaks the ties
        broken = {doc: scores[doc] + 0.001 * place for place, doc in enumerate(order)}
        values.append(metrics.ndcg({"q": broken}, qrels, k=3))
    assert metrics.ndcg_range({"q": scores}, qrels, k=3) == pytest.approx(
        (min(values), max(values))
    )
