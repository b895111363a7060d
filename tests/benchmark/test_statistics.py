"""Intervals and p-values: worked out by hand, equal to enumeration, honest about chance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.benchmark import statistics


def test_two_systems_whose_queries_are_of_two_types_are_refused():
    for compare in (statistics.paired, statistics.p_value):
        with pytest.raises(
            ValueError,
            match=r"query ids .* 1 \(int\) in the first system and '1' \(str\) in the second: "
            r"make them all strings",
        ):
            compare({1: 0.5, 2: 0.5}, {"1": 0.5, "2": 0.25})
    assert statistics.paired({1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.5}) == (0, 0, 0)


def test_interval_of_a_constant_is_the_constant():
    assert statistics.interval([0.25] * 7) == (0.25, 0.25, 0.25)
    assert statistics.interval([0.5]) == (0.5, 0.5, 0.5)


def test_interval_is_the_same_every_time_and_wider_with_more_confidence():
    values = np.random.default_rng(3).random(50)
    mean, low, high = statistics.interval(values)
    assert statistics.interval(list(values)) == (mean, low, high)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    wide = statistics.interval(values, confidence=0.99)
    narrow = statistics.interval(values, confidence=0.5)
    assert wide[1] < low < narrow[1] < mean < narrow[2] < high < wide[2]


@pytest.mark.parametrize("n", [400, 2_000])  # 2,000 values are resampled in several blocks
def test_interval_has_the_normal_approximations_width(n):
    """Means of many values are close to normal: ±1.96 standard errors."""
    values = np.random.default_rng(0).random(n)
    mean, low, high = statistics.interval(values)
    error = values.std() / n**0.5
    assert (mean - low) / error == pytest.approx(1.96, rel=0.05)
    assert (high - mean) / error == pytest.approx(1.96, rel=0.05)


def test_interval_covers_the_truth_as_often_as_it_says():
    """400 experiments with a known mean: 95 % intervals should hold it in 93 to 97 % of them."""
    rng = np.random.default_rng(1)
    held = 0
    for experiment in range(400):
        values = rng.beta(2, 3, size=120)  # mean 0.4, between 0 and 1 like nDCG
        _, low, high = statistics.interval(values, resamples=600, seed=experiment)
        held += low <= 0.4 <= high
    assert 0.93 <= held / 400 <= 0.97


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [[0.1, 0.2]], [math.inf]])
def test_interval_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="one row of finite values"):
        statistics.interval(values)


def test_paired_sees_through_what_queries_have_in_common():
    """Queries differ a lot, systems by 0.02: intervals overlap, but the difference is certain."""
    rng = np.random.default_rng(0)
    base = rng.random(100) * 0.9
    a = {f"q{i}": value + 0.02 + 0.01 * rng.standard_normal() for i, value in enumerate(base)}
    b = {f"q{i}": value for i, value in enumerate(base)}
    difference, low, high = statistics.paired(a, b)
    assert 0.01 < low < difference < high < 0.03
    assert statistics.interval(list(a.values()))[1] < statistics.interval(list(b.values()))[2]


def test_paired_ignores_the_order_of_queries_and_changes_sign():
    a, b = {"x": 0.5, "y": 1.0, "z": 0.0}, {"z": 0.5, "y": 0.5, "x": 0.25}
    difference, low, high = statistics.paired(a, b)
    assert difference == pytest.approx(0.25 / 3)
    assert statistics.paired(dict(reversed(a.items())), b) == (difference, low, high)
    assert statistics.paired(b, a)[0] == -difference
    assert statistics.paired(a, a) == (0, 0, 0)


def test_paired_refuses_different_queries():
    with pytest.raises(ValueError, match="2 queries are in one only"):
        statistics.paired({"x": 1.0, "y": 1.0}, {"x": 1.0, "z": 1.0})


def test_p_values_of_no_difference_are_spread_evenly():
    """300 pairs of equally good systems: p ≤ 0.05 in about 5 % of them, p ≤ 0.5 in about half."""
    rng = np.random.default_rng(5)
    p = []
    for experiment in range(300):
        a, b = (
            {f"q{i}": value for i, value in enumerate(rng.beta(2, 3, size=80))} for _ in range(2)
        )
        p.append(statistics.p_value(a, b, resamples=500, seed=experiment))
    assert (
        0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09 and 0.42 <= np.mean(np.array(p) <= 0.5) <= 0.58
    )


def test_few_queries_cannot_give_a_small_p():
    """n queries that all gain the same: only all signs alike are as extreme, 2 of 2^n."""
    for n in (1, 2, 3, 6):
        p = statistics.p_value({f"q{i}": 0.5 for i in range(n)}, {f"q{i}": 0.25 for i in range(n)})
        assert p == pytest.approx(2 / 2**n, abs=0.02)


def test_p_equals_the_exact_randomisation_test():
    """All 2^10 sign patterns, counted."""
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.1, 0.3):
        d = rng.normal(shift, 0.3, size=10)
        exact = np.mean(
            [
                abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12
                for signs in itertools.product((1, -1), repeat=10)
            ]
        )
        a, b = (
            {f"q{i}": float(value) for i, value in enumerate(d)},
            {f"q{i}": 0.0 for i in range(10)},
        )
        assert statistics.p_value(a, b) == pytest.approx(exact, abs=0.02)
        assert statistics.p_value(a, b) == statistics.p_value(b, a)
    assert statistics.p_value(a, a) == 1


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (
        statistics.holm([0.5, 0.9]) == [1.0, 1.0]
        and statistics.holm([0.2]) == [0.2]
        and statistics.holm([]) == []
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p):
    corrected = statistics.holm(p)
    assert all(raw <= value <= min(1, len(p) * raw) + 1e-12 for raw, value in zip(p, corrected))
    assert [corrected[i] for i in np.argsort(p, kind="stable")] == sorted(corrected)


def test_the_spread_over_seeds_is_a_range_of_two_and_a_deviation_of_more():
    assert statistics.spread({}) == statistics.spread({42: 0.5}) == {}
    two, three = {42: 0.5, 43: 0.25}, {1: 0.1, 2: 0.3, 3: 0.2}
    assert statistics.spread(two) == {"by_seed": two, "range": 0.25}
    assert statistics.spread(three) == {"by_seed": three, "deviation": pytest.approx(0.1)}


# ------------------------------------------------------------------ power


def experiment(rng, seeds=(3, 3), queries=80, tau=0.02, difference=0.0):
    """Scores of two systems, (S, n) each: queries, system by query, seeds and the rest vary."""
    query = 0.3 * rng.normal(size=queries)
    systems = []
    for S, mean in zip(seeds, (difference, 0.0)):
        own, training = 0.15 * rng.normal(size=queries), tau * rng.normal(size=(S, 1))
        systems.append(mean + query + own + training + 0.1 * rng.normal(size=(S, queries)))
    return systems


def test_a_standard_error_by_hand():
    a, b = np.array([[1.0, 3.0, 2.0]]), np.array([[0.0, 1.0, 2.0]])
    assert statistics.standard_error(a) == pytest.approx(np.sqrt(1 / 3))
    assert statistics.standard_error(a, b) == pytest.approx(np.sqrt(1 / 3))  # 1, 2, 0
    # Two trainings that differ by 2 on each query: no rest, and the means' variance is 2.
    two = np.concatenate([a, a + 2])
    assert statistics.standard_error(two) == pytest.approx(np.sqrt(1 / 3 + 2 / 2))
    assert statistics.standard_error(two, b) == pytest.approx(np.sqrt(1 / 3 + 2 * (1 / 2 + 1)))
    assert np.isnan(statistics.standard_error(np.ones((2, 1))))
    assert statistics.detectable(1.0) == pytest.approx(1.960 + 0.842, abs=1e-3)
    assert statistics.detectable(2.0, power=0.5) == pytest.approx(2 * 1.960, abs=1e-3)


def test_the_interval_over_trainings_by_hand():
    assert statistics.over_trainings([(0.2, 0.1, 0.4)]) == (0.2, 0.1, 0.4)
    alike = [(0.2, 0.1, 0.3)] * 3  # the same examples three times: no narrower
    assert statistics.over_trainings(alike) == pytest.approx((0.2, 0.1, 0.3))
    # Variance of the means 1; Student's 4.303 / sqrt(3) = 2.484, and 3² + 2.484² = 3.895².
    apart = [(10.0, 7.0, 13.0), (11.0, 8.0, 14.0), (12.0, 9.0, 15.0)]
    assert statistics.over_trainings(apart) == pytest.approx((11, 11 - 3.895, 11 + 3.895), abs=1e-3)


@pytest.mark.parametrize("luck", [0.0, 0.02, 0.1])
def test_the_interval_over_three_trainings_holds_the_truth(luck):
    """In about 95 of 100 experiments or more, whether the luck is that of examples or of seeds."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(1_000):
        shared = 0.03 * rng.standard_normal()
        means = shared + luck * rng.standard_normal(3)
        _, low, high = statistics.over_trainings([(m, m - 0.059, m + 0.059) for m in means])
        held += low <= 0 <= high
    assert held >= 930


@pytest.mark.parametrize("seeds", [(3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("tau", [0.0, 0.03])
def test_the_squared_error_is_the_variance_of_the_difference(seeds, tau):
    """Over experiments with new queries and new seeds, as far as the bound at 0 lets it be."""
    rng = np.random.default_rng(0)
    runs = [experiment(rng, seeds, tau=tau) for _ in range(1_500)]
    variance = np.var([a.mean() - b.mean() for a, b in runs])
    stated = np.mean([statistics.standard_error(a, b) ** 2 for a, b in runs])
    assert 0.9 * variance < stated < (1.3 if tau == 0 else 1.1) * variance


def test_the_stated_power_holds():
    """A difference of that size is found in 80 of 100 experiments, and none in 5."""
    rng = np.random.default_rng(1)
    runs = [experiment(rng, tau=0.02) for _ in range(2_000)]
    errors = np.array([statistics.standard_error(a, b) for a, b in runs])
    difference = statistics.detectable(np.sqrt(np.mean(errors**2)))
    gaps = np.array([a.mean() - b.mean() for a, b in runs])
    assert np.mean(gaps + difference > 1.96 * errors) == pytest.approx(0.80, abs=0.04)
    assert np.mean(np.abs(gaps) > 1.96 * errors) < 0.10  # the error of few seeds is itself noisy
