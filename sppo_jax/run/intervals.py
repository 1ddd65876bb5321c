"""From each prompt's win probability to the interval of the win rate: one rule for the report and for `evaluate`.

Pure NumPy and SciPy, float64. The rule in words, with what was measured of it, is in docs/evaluation.md.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, ndtr, stdtrit

# Of fewer prompts the spread itself is luck: a win rate with its standard error tells nothing, and gets no verdict.
FEW = 20
LEVEL = 0.95
_BLOCK = 1_000_000  # numbers resampled at a time

Vector = NDArray[np.float64]


def interval(
    probability: ArrayLike, *, seed: int = 0, resamples: int = 10_000, level: float = LEVEL
) -> tuple[float, float]:
    """Interval (low, high) of the mean of win probabilities [n], each in [0, 1], over prompts; NaN of none.

    Of FEW prompts or more it is `bounds` of the means of resampled prompts. Of fewer, and where all are won or all lost,
    it is `exact`, since resamples then hardly differ. The same seed gives the same interval. Raises ValueError for other
    values.
    """
    found = vector("probability", probability)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]")
    if not len(found):
        return float("nan"), float("nan")
    if len(found) < FEW or found.mean() in (0, 1):
        return exact(found, level)
    means = np.concatenate([found[drawn].mean(-1) for drawn in resampled(len(found), seed, resamples)])
    return bounds(means, len(found), level)


def exact(probability: Vector, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval (1934) of a share, for win probabilities [n] in [0, 1] whose sum s counts as wins.

    (B(s, n - s + 1, a), B(s + 1, n - s, 1 - a)): quantiles of the beta distribution at a = (1 - level) / 2. Of wins and
    losses alone it covers the mean in at least `level` of the cases. Probabilities spread less than wins and losses of
    the same mean, so of them it is wider than needed.
    """
    n, wins, tail = len(probability), float(probability.sum()), (1 - level) / 2
    low = betaincinv(wins, n - wins + 1, tail) if wins > 0 else 0.0
    high = betaincinv(wins + 1, n - wins, 1 - tail) if wins < n else 1.0
    return float(low), float(high)


def resampled(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [b, n] of prompts drawn with replacement, in blocks that bound the memory."""
    random, block = np.random.default_rng(seed), max(1, _BLOCK // n)
    for first in range(0, resamples, block):
        yield random.integers(0, n, (min(block, resamples - first), n))


def bounds(values: Vector, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The expanded percentile interval (Hesterberg 2015) of a statistic of n prompts, from its resampled values [R].

    Their quantiles at Phi(±sqrt(n/(n-1)) t), with Student's t of n - 1 degrees of freedom in place of the normal quantile,
    which makes up for the resamples' smaller variance. Equal values have an interval of width 0.
    """
    tail = float(ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def vector(name: str, values: ArrayLike) -> Vector:
    """The values as float64 [n]. Raises ValueError for another shape and for NaN or infinities."""
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} must be one finite number a prompt, found an array {found.shape}")
    return found
