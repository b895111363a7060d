"""Is a mean over queries known well, and is one retriever better than another beyond chance?

    interval(values)              mean and 95 % bootstrap interval over queries
    paired(a, b)                  the same of the difference of two retrievers on the same queries
    p_value(a, b)                 the paired randomisation test
    holm(p_values)                p-values that hold for all comparisons together
    standard_error(a, b)          of a difference, over queries and trainings
    detectable(error)             the smallest difference that a comparison finds with 80 % power
    spread(by_seed)               how far the trainings of a row lie apart
    over_trainings(intervals)     the interval of the mean over trainings

Source: Fisher 1935; Holm 1979; Smucker et al. 2007; Bloom 1995 (minimum detectable effects).
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from lib.benchmark.metrics import one_type
from lib.pipeline.errors import require

RESAMPLES = 10_000
BLOCK = 4_000_000  # draws held at a time: 32 MB of indices


def interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): percentile bootstrap over queries, the same bits every time.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    means = resampled(values, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)


def resampled(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of `resamples` draws of len(values) values, with repetition.

    The same seed and the same number of values give the same draws.
    """
    require_finite(values)
    rng = np.random.default_rng(seed)
    n = len(values)
    return np.concatenate(
        [values[rng.integers(n, size=(rows, n))].mean(axis=1) for rows in blocks(resamples, n)]
    )


def blocks(resamples: int, n: int) -> Iterator[int]:
    """Sizes of blocks of draws of n values each that together are `resamples`."""
    block = max(1, BLOCK // n)
    return (min(block, resamples - done) for done in range(0, resamples, block))


def require_finite(values: np.ndarray) -> None:
    require(
        values.ndim == 1 and len(values) and np.isfinite(values).all(),
        f"needs one row of finite values: got shape {values.shape}, "
        f"{(~np.isfinite(values)).sum()} not finite",
        ValueError,
    )


def paired(a: dict[str, float], b: dict[str, float], **options) -> tuple[float, float, float]:
    """(mean of a - b, low, high) over the queries, which must be the same in both.

    All pairs of retrievers share their draws.
    """
    return interval(differences(a, b), **options)


def p_value(
    a: dict[str, float], b: dict[str, float], resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """How often two equally good retrievers differ by as much: two-sided randomisation test.

        p = (1 + #{draws: |mean of ±(a - b)| ≥ |mean of a - b|}) / (1 + draws)

    If the two were equally good, each query's difference could as well have had the other sign.
    Few queries cannot give a small p: three that all gain give 1/4. It is never below
    1 / (1 + draws).

    Raises:
        ValueError: the queries differ, or a value is not finite.
    """
    d = differences(a, b)
    require_finite(d)
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in blocks(resamples, len(d)):
        signs = rng.integers(0, 2, size=(rows, len(d)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs((signs * d).mean(axis=1)) >= abs(d.mean()) - 1e-12).sum())
    return (1 + extreme) / (1 + resamples)


def differences(a: dict[str, float], b: dict[str, float]) -> np.ndarray:
    one_type("query", a, b, ("the first system", "the second"))
    require(
        a.keys() == b.keys(),
        f"two systems on the same queries: {len(a.keys() ^ b.keys())} queries are in one only",
        ValueError,
    )
    return np.array([a[query] - b[query] for query in sorted(a)], dtype=np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all comparisons together.

    p'_(i) = max_{j ≤ i} min(1, (m - j + 1) p_(j)),   p_(1) ≤ … ≤ p_(m)
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.minimum(1, (len(p) - np.arange(len(p))) * p[order]))
    return corrected.tolist()


def standard_error(*systems: np.ndarray) -> float:
    """The standard error of a mean, or of the difference of two, over queries and trainings.

        SE² = s_d² / n + τ² Σ_r 1 / S_r
        τ²  = max(0, mean over systems of (variance of the S_r means - σ_r² / n))

    A score is a_sq = μ + seed_s + query_q + rest_sq. s_d² is the variance over queries of the
    difference of the systems' means over trainings; it holds the queries and the rest. σ_r² is the
    mean square of the rest. τ² is the variance of the seeds, the same for both systems and weighted
    by their degrees of freedom S_r - 1. It is 0 if each system was trained once: then nothing is
    known of another training.

    Args:
        systems: one or two, (S_r, n) each: S_r trainings on the same n queries; the first minus the
            second. A system that is not trained has no seeds: subtract it from the other.

    Returns:
        NaN if there is only one query.
    """
    scores = [np.asarray(system, dtype=np.float64) for system in systems]
    n = scores[0].shape[1]
    if n < 2:
        return math.nan
    means = [system.mean(axis=0) for system in scores]
    of_queries = np.var(means[0] - means[1] if len(means) > 1 else means[0], ddof=1) / n
    several = [system for system in scores if len(system) > 1]
    degrees = [len(system) - 1 for system in several]
    of_seeds = (
        np.average([seed_variance(own) for own in several], weights=degrees) if several else 0
    )
    return math.sqrt(of_queries + max(0.0, of_seeds) * sum(1 / len(own) for own in scores))


def seed_variance(scores: np.ndarray) -> float:
    """τ² of one system, (S, n) with S > 1: of the seeds' means what the rest does not explain."""
    S, n = scores.shape
    rest = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    square = (rest**2).sum() / ((S - 1) * (n - 1))
    return float(np.var(scores.mean(axis=1), ddof=1) - square / n)


def detectable(error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a two-sided test at `alpha` finds with this power.

        (z_{1 - α/2} + z_power) SE = 2.80 SE

    It is that of one comparison. A correction for several asks for more.

    Args:
        error: the standard error of the difference.
    """
    z = NormalDist().inv_cdf
    return (z(1 - alpha / 2) + z(power)) * error


def spread(by_seed: dict[int, float]) -> dict:
    """How far the scores of one row with several seeds lie apart.

    Returns:
        {"by_seed": the scores} and their standard deviation (n - 1) as "deviation", or "range" if
        there are two; {} if there is one.
    """
    scores = list(by_seed.values())
    if len(scores) < 2:
        return {}
    if len(scores) == 2:
        return {"by_seed": by_seed, "range": max(scores) - min(scores)}
    return {"by_seed": by_seed, "deviation": float(np.std(scores, ddof=1))}


def over_trainings(intervals: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(mean, low, high) over S trainings that were measured on the same examples.

        half² = (mean half width)² + t² s² / S

    s² is the variance (S - 1) of the trainings' means, and t the 97.5 % quantile of Student's
    distribution with S - 1 degrees of freedom: 4.30 for three. The examples are the same for all
    trainings, so more trainings do not average out the luck of the examples.

    Args:
        intervals: (mean, low, high) of each training, 95 %. One training keeps its own.
    """
    from scipy.special import stdtrit  # 0.1 s that readers of a metric do not need

    values = np.asarray(intervals, dtype=np.float64)
    if len(values) == 1:
        return tuple(values[0].tolist())
    mean = float(values[:, 0].mean())
    half = (values[:, 2] - values[:, 1]).mean() / 2
    error = math.sqrt(np.var(values[:, 0], ddof=1) / len(values))
    half = math.hypot(half, stdtrit(len(values) - 1, 0.975) * error)
    return mean, mean - half, mean + half
