"""From the win probabilities and responses of an evaluation to its figures. Pure NumPy and SciPy, float64."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtr, stdtrit

from sppo_jax.preferences import TIE

# On half the squared slope: a Gaussian prior of standard deviation 10, far wider than real slopes.
RIDGE = 0.01
# Mean probabilities nearer than this to 0 or 1 have no finite intercept worth fitting.
_EDGE = 1e-12
_BLOCK = 1_000_000  # numbers resampled at a time
_STEPS = 100

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths with its interval, all in [0, 1], and the slope of the length term, in nats."""

    rate: float
    low: float
    high: float
    slope: float


def interval(
    values: ArrayLike, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval (low, high) of the mean of values [n] over prompts; NaN for fewer than two.

    The expanded percentile interval (Hesterberg 2015): quantiles of the resampled means at Phi(±sqrt(n/(n-1)) t), with
    Student's t of n - 1 degrees of freedom in place of the normal quantile, which makes up for the resamples' smaller
    variance. Equal values have an interval of width 0. The same seed gives the same interval.
    """
    found = _vector("values", values)
    if len(found) < 2:
        return float("nan"), float("nan")
    means = np.concatenate([found[drawn].mean(-1) for drawn in _resampled(len(found), seed, resamples)])
    return _bounds(means, len(found), level)


def length_controlled(
    probability: ArrayLike,
    length: ArrayLike,
    length_against: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> LengthControlled:
    """Length-controlled win rate by an own fit, from win probabilities [n] and both sides' lengths [n] in characters.

    p ~ sigmoid( intercept + slope tanh(delta / std(delta)) ), delta = length - length_against, by maximum likelihood
    with soft labels; the rate is sigmoid(intercept). The slope alone has a ridge, RIDGE/2 slope^2, which keeps it
    finite where lengths and wins go together without exception. If all probabilities are 0 or all are 1, or all deltas
    are equal, the slope is 0 and the rate is the mean. The interval (95 %) is `interval`'s, each resample of the
    prompts fitted anew; NaN of a single prompt. Raises ValueError for probabilities outside of [0, 1].
    """
    p = _vector("probability", probability)
    delta = _vector("length", length) - _vector("length_against", length_against)
    if not len(p) or p.shape != delta.shape:
        raise ValueError(
            f"needed a probability and two lengths of each prompt, found {p.shape}, {delta.shape}"
        )
    if p.min() < 0 or p.max() > 1:
        raise ValueError("probabilities must lie in [0, 1]")
    rate, slope = _fit(p[None], delta[None])
    low = high = float("nan")
    if len(p) > 1:
        refits = [_fit(p[drawn], delta[drawn])[0] for drawn in _resampled(len(p), seed, resamples)]
        low, high = _bounds(np.concatenate(refits), len(p), 0.95)
    return LengthControlled(float(rate[0]), low, high, float(slope[0]))


def ties(probability: ArrayLike) -> float:
    """Share of the probabilities [n] that are ties: within preferences.TIE of 1/2."""
    return float(np.mean(np.abs(_vector("probability", probability) - 0.5) <= TIE))


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of the texts' words (between white space); NaN if there is none.

    An n-gram lies within one text. More text has a smaller share, so compare equal numbers of prompts.
    """
    if n < 1:
        raise ValueError(f"n-grams need n >= 1, found {n}")
    grams = Counter(
        tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)
    )
    return len(grams) / grams.total() if grams else float("nan")


def repeated(texts: Sequence[str]) -> float:
    """Share of the texts that another one equals, character by character; NaN of no texts."""
    copies = Counter(texts)
    return sum(copies[text] > 1 for text in texts) / len(texts) if texts else float("nan")


def _fit(p: Vector, delta: Vector) -> tuple[Vector, Vector]:
    """Rate and slope [R] of R fits at once, from probabilities and differences of length [R, n]."""
    spread = np.where(np.ptp(delta, -1) > 0, delta.std(-1), np.inf)
    x = np.tanh(delta / spread[:, None])
    mean = p.mean(-1)
    fitted = (mean > _EDGE) & (mean < 1 - _EDGE)
    intercept, slope = _newton(p[fitted], x[fitted])
    rates, slopes = mean.copy(), np.zeros_like(mean)
    rates[fitted], slopes[fitted] = expit(intercept), slope
    return rates, slopes


def _newton(p: Vector, x: Vector) -> tuple[Vector, Vector]:
    """Intercept and slope [R] that minimise the soft log-loss plus the ridge, from p and x [R, n], |x| <= 1.

    Steps are damped by log(1 + s)/s with s the largest change of a logit that the step can make, so the loss falls with
    every step from any start (Sun and Tran-Dinh 2019, nu = 2), and near the minimum they become Newton's own.
    """
    intercept, slope = logit(p.mean(-1)), np.zeros(len(p))
    for _ in range(_STEPS):
        at = intercept[:, None] + slope[:, None] * x
        residual = p - expit(at)
        weight = expit(at) * expit(-at)
        total = weight.sum(-1)
        # The intercept is eliminated by centring x, which stays exact where x hardly varies.
        centre = (weight * x).sum(-1) / total
        curvature = (weight * (x - centre[:, None]) ** 2).sum(-1) + RIDGE
        up = residual.sum(-1)
        turn = ((residual * (x - centre[:, None])).sum(-1) - RIDGE * slope) / curvature
        shift = up / total - centre * turn
        size = np.abs(shift) + np.abs(turn)
        if size.max(initial=0) < 1e-10:
            break
        damping = np.log1p(size) / np.maximum(size, np.finfo(np.float64).tiny)
        intercept, slope = intercept + damping * shift, slope + damping * turn
    return intercept, slope


def _resampled(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [b, n] of prompts drawn with replacement, in blocks that bound the memory."""
    random, block = np.random.default_rng(seed), max(1, _BLOCK // n)
    for first in range(0, resamples, block):
        yield random.integers(0, n, (min(block, resamples - first), n))


def _bounds(resampled: Vector, n: int, level: float) -> tuple[float, float]:
    """The expanded percentile interval of a statistic of n prompts, from its resampled values [R]."""
    tail = float(ndtr(-np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _vector(name: str, values: ArrayLike) -> Vector:
    """The values as float64 [n]. Raises ValueError for another shape and for NaN or infinities."""
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} must be one finite number a prompt, found an array {found.shape}")
    return found
