"""The losses: pure functions of log-probabilities and preferences, one equation each, and the table of their names.

Everywhere `logprob` and `ref_logprob` are sums over response tokens in nats; the log-ratio is their difference
and no gradient flows into the reference. Each loss takes pi_t as its reference, or the `anchor` between pi_t and the base.
docs/losses.md has the methods that they make up. Losses of pairs have the winner first and the loser second on the
last axis. `where` leaves out elements (padding of the last batch); its shape broadcasts to the loss's terms.

jax is imported inside the functions: the configuration takes its choices from LOSSES, and bad flags are refused before
jax is imported, which takes a second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float

Values = Any  # jax.Array or np.ndarray
ArrayLike = Any  # as jax.typing.ArrayLike


def log_ratio(logprob: Float[Values, "..."], ref_logprob: Float[Values, "..."]) -> Float[Values, "..."]:
    """log pi_theta(y|x) - log pi_t(y|x), constant in the reference."""
    import jax
    import jax.numpy as jnp

    return jnp.asarray(logprob) - jax.lax.stop_gradient(jnp.asarray(ref_logprob))


def anchor(
    ref_logprob: Float[Values, "..."], base_logprob: Float[Values, "..."], share: float
) -> Float[Values, "..."]:
    """(1 - rho) log pi_t + rho log pi_0, rho = `share` in [0, 1]: a reference that also holds to the base.

    Equation 5 of arXiv:2407.00617 (rho is its tau/eta). Exactly log pi_t where the two are equal, as in iteration 1.
    """
    return ref_logprob + share * (base_logprob - ref_logprob)


def sppo_loss(
    logprob: Float[Values, "..."],
    ref_logprob: Float[Values, "..."],
    win_rate: ArrayLike,
    *,
    eta: float,
    baseline: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean ( log pi_theta/pi_t - eta (P(y > pi_t) - baseline) )^2

    Equation 4.7 of arXiv:2405.00675: a regression on any set of responses. `baseline` 1/2 stands for
    log Z / eta; an array of each prompt's own log Z / eta gives the form before that simplification.
    """
    import jax.numpy as jnp

    target = eta * (jnp.asarray(win_rate) - jnp.asarray(baseline))
    return _mean((log_ratio(logprob, ref_logprob) - target) ** 2, where)


def sppo_single_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    probability: Float[Values, "..."],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean 1/2 [ (l_w - eta (P - 1/2))^2 + (l_l + eta (P - 1/2))^2 ], P = P(winner > loser)

    The official code's `sppo_single`: only the pair's own probability is used, not the win rates.
    """
    import jax.numpy as jnp

    both = jnp.stack([jnp.asarray(probability), 1.0 - jnp.asarray(probability)], axis=-1)
    return sppo_loss(logprob, ref_logprob, both, eta=eta, where=_pairwise(where))


def sppo_hard_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean 1/2 [ (l_w - eta/2)^2 + (l_l + eta/2)^2 ]

    Labels 1 and 0 in place of win rates. This is the mean of the squares; TRL and EasyDeL sum them, which is
    twice this value (and twice its gradient).
    """
    import jax.numpy as jnp

    return sppo_loss(logprob, ref_logprob, jnp.array([1.0, 0.0]), eta=eta, where=_pairwise(where))


def dpo_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean -log sigmoid( beta (l_w - l_l) ), beta = 1/eta

    Equation 7 of arXiv:2305.18290.
    """
    import jax

    return _mean(-jax.nn.log_sigmoid(_margin(logprob, ref_logprob) / eta), where)


def ipo_loss(
    logprob: Float[Values, "... 2"],
    ref_logprob: Float[Values, "... 2"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean ( l_w - l_l - 1/(2 tau) )^2, tau = 1/eta

    Equation 17 of arXiv:2310.12036.
    """
    return _mean((_margin(logprob, ref_logprob) - eta / 2) ** 2, where)


def difference_loss(
    logprob: Float[Values, "... R"],
    ref_logprob: Float[Values, "... R"],
    payoff: Float[Values, "... R"],
    *,
    eta: float,
    where: ArrayLike | None = None,
) -> Float[Values, ""]:
    """mean over pairs i < j of ( l_i - l_j - eta (g_i - g_j) )^2, g the payoff of judge.target

    Online IPO's loss (arXiv:2503.08942) where g is a win rate, REBEL's (arXiv:2404.16767) where it is a score. Two
    responses make one pair; the sum over the pairs of R is R times the sum of squared residuals about their mean, so
    log Z and any baseline cancel. With payoffs 1 and 0 and half the eta it is `ipo_loss`.
    """
    import jax.numpy as jnp

    ratio, payoff = log_ratio(logprob, ref_logprob), jnp.asarray(payoff)
    i, j = jnp.triu_indices(ratio.shape[-1], 1)
    target = eta * (payoff[..., i] - payoff[..., j])
    return _mean((ratio[..., i] - ratio[..., j] - target) ** 2, _pairwise(where))


class Judged(Protocol):
    """G prompts with R responses each, best first, worst last: a loss's inputs besides the policy's log-probs."""

    @property
    def ref_logprob(self) -> Values:
        """log pi_t(y|x), or the anchor's, [G, R]."""

    @property
    def payoff(self) -> Values:
        """P(y > pi_t | x), or the mean of the judge's scores in nats, [G, R]."""

    @property
    def baseline(self) -> Values:
        """The payoff whose target is 0 [G]."""

    @property
    def probability(self) -> Values:
        """P(best > worst | x) [G]."""

    @property
    def real(self) -> Values:
        """Whether an entry is a prompt and not padding [G]."""


@dataclass(frozen=True)
class Loss:
    """A loss that the configuration may name."""

    formula: Callable[..., Any]  # one of the functions above
    compute: Callable[[Any, Judged, float], Any]  # the formula's value from (logprob [G, R], prompts, eta)
    # Whether the loss needs a winner and a loser; otherwise it takes any number of responses, and their payoffs.
    pairs: bool = True
    baseline: bool = False  # whether the loss reads a baseline
    squared: bool = False  # whether its value at log-ratios of 0 is the mean squared target

    @property
    def equation(self) -> str:
        """The first line of the formula's docstring; l_w and l_l are the winner's and the loser's log pi_theta/pi_t."""
        return (self.formula.__doc__ or "").splitlines()[0]


# To add a loss, write its formula above and its line here.
LOSSES: dict[str, Loss] = {
    "sppo": Loss(
        sppo_loss,
        lambda logprob_GR, p, eta: sppo_loss(
            logprob_GR,
            p.ref_logprob,
            p.payoff,
            eta=eta,
            baseline=p.baseline[:, None],
            where=p.real[:, None],
        ),
        pairs=False,
        baseline=True,
        squared=True,
    ),
    "sppo_single": Loss(
        sppo_single_loss,
        lambda logprob_GR, p, eta: sppo_single_loss(
            logprob_GR, p.ref_logprob, p.probability, eta=eta, where=p.real
        ),
        squared=True,
    ),
    "sppo_hard": Loss(
        sppo_hard_loss,
        lambda logprob_GR, p, eta: sppo_hard_loss(logprob_GR, p.ref_logprob, eta=eta, where=p.real),
        squared=True,
    ),
    "dpo": Loss(
        dpo_loss, lambda logprob_GR, p, eta: dpo_loss(logprob_GR, p.ref_logprob, eta=eta, where=p.real)
    ),
    "ipo": Loss(
        ipo_loss, lambda logprob_GR, p, eta: ipo_loss(logprob_GR, p.ref_logprob, eta=eta, where=p.real)
    ),
    "difference": Loss(
        difference_loss,
        lambda logprob_GR, p, eta: difference_loss(
            logprob_GR, p.ref_logprob, p.payoff, eta=eta, where=p.real
        ),
        pairs=False,
    ),
}


def _margin(logprob: Values, ref_logprob: Values) -> Values:
    ratio = log_ratio(logprob, ref_logprob)
    return ratio[..., 0] - ratio[..., 1]


def _pairwise(where: ArrayLike | None) -> ArrayLike | None:
    import jax.numpy as jnp

    return None if where is None else jnp.asarray(where)[..., None]


def _mean(terms: Values, where: ArrayLike | None) -> Values:
    import jax.numpy as jnp

    if where is None:
        return jnp.mean(terms)
    return jnp.mean(terms, where=jnp.broadcast_to(jnp.asarray(where), terms.shape))
