"""Is a mean over queries known well, and is one retriever better than another beyond chance?

    interval(values)              mean and 95 % bootstrap interval over queries
    paired(a, b)                  the same of the difference of two retrievers on the same queries
    p_value(a, b)                 the paired randomisation test
    holm(p_values)                p-values that hold for all comparisons together
    spread(by_seed)               how far the trainings of a row lie apart

Source: Fisher 1935; Holm 1979; Smucker et al. 2007.
"""

from collections.abc import Iterator, Sequence

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
