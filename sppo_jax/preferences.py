"""Between judge and pairs: K x K logits become probabilities, win rates, scores and diagnostics. Pure NumPy, float64.

L[..., i, j] is the judge's logit that response i, shown first, beats response j; the diagonal is not read.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ESTIMATORS = ("pairwise", "pairwise_loo", "score")
LARGEST = float(np.finfo(np.float32).max)  # of a logit, of either sign
TIE = 1e-6  # probabilities closer than this to 1/2 count as ties

Matrix = NDArray[np.float64]


def probability_matrix(logits: ArrayLike, estimator: str = "pairwise", *, sharpness: float = 1.0) -> Matrix:
    """P[..., i, j] = P(y_i > y_j), antisymmetric about 1/2: P + P^T = 1.

    pairwise, pairwise_loo: sigmoid( sharpness (L_ij - L_ji) / 2 ), both orders averaged (the paper).
    score: sigmoid( s_i - s_j ), s_i = mean_j (L_ij - L_ji): the official code's projection, in which cycles
    are lost and probabilities are twice as sharp. Raises ValueError as `score_matrix`.
    """
    upper = np.triu(_sigmoid(score_matrix(logits, estimator, sharpness=sharpness)), k=1)
    k = upper.shape[-1]
    # The lower half is one minus the upper, so that win rates sum to K/2 to the last bit that addition allows.
    return upper + np.tril(1 - np.swapaxes(upper, -1, -2), k=-1) + np.eye(k) / 2


def score_matrix(logits: ArrayLike, estimator: str = "pairwise", *, sharpness: float = 1.0) -> Matrix:
    """s(y_i, y_j) [..., i, j] in nats, antisymmetric: the log-odds of `probability_matrix`.

    Raises ValueError for an unknown estimator, a non-square input, or logits beyond float32's range, NaN included.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits must be [..., K, K], found {logits.shape}")
    logits = np.where(np.eye(logits.shape[-1], dtype=bool), 0, logits)
    if not (np.abs(logits) <= LARGEST).all():
        raise ValueError("logits must be finite numbers in float32's range")
    both = logits - np.swapaxes(logits, -1, -2)
    if estimator == "score":
        score = both.mean(axis=-1)
        difference = score[..., :, None] - score[..., None, :]
    elif estimator in ESTIMATORS:
        difference = both / 2
    else:
        raise ValueError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    with np.errstate(
        over="ignore"
    ):  # a product beyond float64 is infinite, and its probability exactly 0 or 1
        found: Matrix = sharpness * difference
    return found


def win_rates(probability: ArrayLike, *, leave_one_out: bool = False) -> NDArray[np.float64]:
    """P(y_i > pi_t) ~ mean_j P[i, j], over all j with self at 1/2, or over j != i: [..., K]."""
    probability = np.asarray(probability, np.float64)
    k = probability.shape[-1]
    if leave_one_out:
        return (probability.sum(axis=-1) - 0.5) / (k - 1)
    return probability.mean(axis=-1)


def mean_scores(
    logits: ArrayLike, estimator: str = "pairwise", *, sharpness: float = 1.0
) -> NDArray[np.float64]:
    """mean_j s(y_i, y_j) in nats [..., K], with self at 0, or over j != i for pairwise_loo.

    The preference score against pi_t of GPO (arXiv:2410.02197), without a bound where a win rate has one.
    """
    scores = score_matrix(logits, estimator, sharpness=sharpness)
    k = scores.shape[-1]
    mean: NDArray[np.float64] = scores.sum(axis=-1) / (k - 1 if estimator == "pairwise_loo" else k)
    return mean


def has_cycle(probability: ArrayLike) -> NDArray[np.bool_]:
    """Whether some i beats j, j beats k and k beats i (each above 1/2): bool [...].

    For complete comparisons every cycle implies such a 3-cycle, up to ties.
    """
    beats = np.asarray(probability, np.float64) > 0.5 + TIE
    three = beats.astype(np.int64) @ beats.astype(np.int64) @ beats.astype(np.int64)
    return np.trace(three, axis1=-2, axis2=-1) > 0


def diagnostics(logits: ArrayLike, probability: ArrayLike, lengths: ArrayLike) -> dict[str, float]:
    """Statistics of n judged prompts, from logits and probability [n, K, K] and response lengths [n, K] in tokens.

    cycle_share: prompts with a 3-cycle. tie_share: pairs within 1e-6 of 1/2. position_bias: mean of
    L_ij + L_ji, twice the advantage of being shown first, in nats. length_correlation: of win rate and length within
    prompts, in [-1, 1]; 0 where one of them never varies. longest_share: prompts whose best response is the longest; a
    prompt with m longest responses counts 1/m, so that chance gives 1/K. entropy: mean binary entropy of P_ij, in nats (log 2: every
    pair is a tie).
    """
    logits, p = np.asarray(logits, np.float64), np.asarray(probability, np.float64)
    k = p.shape[-1]
    i, j = np.triu_indices(k, 1)
    pairs = p[..., i, j]
    inside = np.clip(pairs, 1e-12, 1 - 1e-12)
    rates, lengths = win_rates(p), np.asarray(lengths, np.float64)
    x = (lengths - lengths.mean(-1, keepdims=True)).ravel()
    y = (rates - rates.mean(-1, keepdims=True)).ravel()
    scale = np.sqrt((x @ x) * (y @ y))
    return {
        "cycle_share": float(np.mean(has_cycle(p))),
        "tie_share": float(np.mean(np.abs(pairs - 0.5) < TIE)),
        "position_bias": float(np.mean(logits[..., i, j] + logits[..., j, i])),
        "length_correlation": float(x @ y / scale) if scale > 0 else 0.0,
        "longest_share": float(np.mean((_highest(rates) * _highest(lengths)).sum(-1))),
        "entropy": float(np.mean(-inside * np.log(inside) - (1 - inside) * np.log1p(-inside))),
    }


def _highest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares [..., K] that sum to 1: the whole for the highest value, or equal parts for those that tie."""
    highest = values >= values.max(-1, keepdims=True) - TIE
    return highest / highest.sum(-1, keepdims=True)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) without overflow; exactly 1/2 at 0."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))
