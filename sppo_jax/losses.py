"""The losses: pure functions of log-probabilities and preferences, one equation each.

Everywhere `logprob` and `ref_logprob` are sums over response tokens in nats; the log-ratio is their difference
and no gradient flows into the reference. Losses of pairs have the winner first and the loser second on the
last axis. `where` leaves out elements (padding of the last batch); its shape broadcasts to the loss's terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Values = Array | np.ndarray


def log_ratio(logprob: Float[Values, "..."], ref_logprob: Float[Values, "..."]) -> Float[Array, "..."]:
    """log pi_theta(y|x) - log pi_t(y|x), constant in the reference."""
    return jnp.asarray(logprob) - jax.lax.stop_gradient(jnp.asarray(ref_logprob))


def sppo_loss(
    logprob: Float[Values, "..."],
    ref_logprob: Float[Values, "..."],
    win_rate: ArrayLike,
    *,
    eta: float,
    baseline: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean ( log pi_theta/pi_t - eta (P(y > pi_t) - baseline) )^2

    Equation 4.7 of arXiv:2405.00675: a regression on any set of responses. `baseline` 1/2 stands for
    log Z / eta; an array of each prompt's own log Z / eta gives the form before that simplification.
    """
    target = eta * (jnp.asarray(win_rate) - jnp.asarray(baseline))
    return _mean((log_ratio(logprob, ref_logprob) - target) ** 2, where)


def sppo_single_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    probability: Float[Values, "..."],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean 1/2 [ (l_w - eta (P - 1/2))^2 + (l_l + eta (P - 1/2))^2 ], P = P(winner > loser)

    The official code's `sppo_single`: only the pair's own probability is used, not the win rates.
    """
    both = jnp.stack([jnp.asarray(probability), 1.0 - jnp.asarray(probability)], axis=-1)
    return sppo_loss(logprob, ref_logprob, both, eta=eta, where=_pairwise(where))


def sppo_hard_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean 1/2 [ (l_w - eta/2)^2 + (l_l + eta/2)^2 ]

    Labels 1 and 0 in place of win rates. This is the mean of the squares; TRL and EasyDeL sum them, which is
    twice this value (and twice its gradient).
    """
    return sppo_loss(logprob, ref_logprob, jnp.array([1.0, 0.0]), eta=eta, where=_pairwise(where))


def dpo_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean -log sigmoid( beta (l_w - l_l) ), beta = 1/eta. Equation 7 of arXiv:2305.18290."""
    return _mean(-jax.nn.log_sigmoid(_margin(logprob, ref_logprob) / eta), where)


def ipo_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean ( l_w - l_l - 1/(2 tau) )^2, tau = 1/eta. Equation 17 of arXiv:2310.12036."""
    return _mean((_margin(logprob, ref_logprob) - eta / 2) ** 2, where)


def _margin(logprob: Values, ref_logprob: Values) -> Array:
    ratio = log_ratio(logprob, ref_logprob)
    return ratio[..., 0] - ratio[..., 1]


def _pairwise(where: ArrayLike | None) -> ArrayLike | None:
    return None if where is None else jnp.asarray(where)[..., None]


def _mean(terms: Array, where: ArrayLike | None) -> Array:
    if where is None:
        return jnp.mean(terms)
    return jnp.mean(terms, where=jnp.broadcast_to(jnp.asarray(where), terms.shape))
