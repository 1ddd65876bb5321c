"""From the win probabilities and responses of an evaluation to its figures. Pure NumPy and SciPy, float64."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from sppo_jax.preferences import TIE
from sppo_jax.run.intervals import FEW, Vector, bounds, exact, resampled, vector

# On half the squared slope: a Gaussian prior of standard deviation 10, far wider than real slopes.
RIDGE = 0.01
# Mean probabilities nearer than this to 0 or 1 have no finite intercept worth fitting.
_EDGE = 1e-12
_STEPS = 100


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths with its interval, all in [0, 1], and the slope of the length term, in nats.

    The ends are NaN where there is no interval.
    """

    rate: float
    low: float
    high: float
    slope: float


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
    are equal, the slope is 0 and the rate is the mean. The interval (95 %) is `intervals.bounds` of resampled prompts, each
    time fitted anew, and `intervals.exact` where all probabilities are 0 or all are 1; NaN of fewer than FEW prompts, whose
    refits are nearly all extremes. Raises ValueError for probabilities outside of [0, 1].
    """
    p = vector("probability", probability)
    delta = vector("length", length) - vector("length_against", length_against)
    if not len(p) or p.shape != delta.shape:
        raise ValueError(
            f"needed a probability and two lengths of each prompt, found {p.shape}, {delta.shape}"
        )
    if p.min() < 0 or p.max() > 1:
        raise ValueError("probabilities must lie in [0, 1]")
    rate, slope = _fit(p[None], delta[None])
    low = high = float("nan")
    if len(p) >= FEW and p.mean() in (0, 1):
        low, high = exact(p)
    elif len(p) >= FEW:
        refits = [_fit(p[drawn], delta[drawn])[0] for drawn in resampled(len(p), seed, resamples)]
        low, high = bounds(np.concatenate(refits), len(p))
    return LengthControlled(float(rate[0]), low, high, float(slope[0]))


def ties(probability: ArrayLike) -> float:
    """Share of the probabilities [n] that are ties: within preferences.TIE of 1/2."""
    return float(np.mean(np.abs(vector("probability", probability) - 0.5) <= TIE))


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
