"""Theorem 4.1 in a table game: the average policy of exact SPPO updates nears the von Neumann winner as 1/sqrt(T).

The policy is a vector of probabilities over four actions. One update minimises `sppo_loss` exactly, with win rates
from `preferences`, every action standing for a response and pi for the shares of responses in the sample.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.special import softmax

from sppo_jax import losses
from sppo_jax.losses import sppo_loss
from sppo_jax.preferences import probability_matrix, win_rates

# Rock, paper, scissors (.99 so that logits are finite), and a fourth action that loses .2/.8 to each.
CYCLE = np.array(
    [[0.5, 0.99, 0.01, 0.8], [0.01, 0.5, 0.99, 0.8], [0.99, 0.01, 0.5, 0.8], [0.2, 0.2, 0.2, 0.5]]
)
# An uneven cycle, whose von Neumann winner is (1, 2, 4, 0) / 7.
UNEVEN = np.array(
    [[0.5, 0.9, 0.3, 0.75], [0.1, 0.5, 0.6, 0.65], [0.7, 0.4, 0.5, 0.6], [0.25, 0.35, 0.4, 0.5]]
)
START = np.array([0.5, 0.25, 0.05, 0.2])  # off-centre: the uniform start hides failure by symmetry
UNITS = 400  # responses in the sample that stands for pi where an estimator is not linear in the opponents


def weighted_win_rates(game, pi, estimator):
    """P(y > pi) for every action. The mean over candidates is linear for `pairwise`, so exact shares serve."""
    logits = np.log(game / (1 - game))
    if estimator == "pairwise":
        return probability_matrix(logits) @ pi
    sample = np.repeat(np.arange(len(pi)), np.maximum(1, np.round(pi * UNITS)).astype(int))
    rates = win_rates(probability_matrix(logits[sample][:, sample], estimator))
    return np.array([rates[sample == action][0] for action in range(len(pi))])


@functools.partial(jax.jit, static_argnames="eta")
def descent(reference, rate, eta):
    """Newton's step on sppo_loss from the reference: the loss is quadratic with Hessian 2/n, so it is the minimiser."""
    gradient = jax.grad(lambda x: sppo_loss(x, reference, rate, eta=eta))(reference)
    return -gradient * len(reference) / 2


def play(game, rounds, estimator="pairwise", fixed=None):
    """(average policy, last policy) of exact updates; `fixed` win rates stand for a reward model never asked again."""
    eta = float(np.sqrt(8 * np.log(len(START)) / rounds))
    log_pi, total = np.log(START), np.zeros(len(START))
    for _ in range(rounds):
        pi = np.exp(log_pi)
        total += pi
        rate = weighted_win_rates(game, pi, estimator) if fixed is None else fixed
        moved = log_pi + np.asarray(
            descent(jnp.asarray(log_pi, jnp.float32), jnp.asarray(rate, jnp.float32), eta)
        )
        log_pi = moved - np.log(np.exp(moved).sum())
    return total / rounds, np.exp(log_pi)


def gap(game, pi):
    """Duality gap, max over opponents of P(opponent > pi) less the min of P(pi > opponent): 0 at the winner."""
    against = game @ pi
    return float(against.max() - (1 - against).min())


@pytest.mark.parametrize(
    ("game", "winner"), [(CYCLE, [1 / 3, 1 / 3, 1 / 3, 0]), (UNEVEN, [1 / 7, 2 / 7, 4 / 7, 0])]
)
def test_theorem_4_1_the_average_policys_gap_falls_like_one_over_root_T(game, winner):
    rounds = np.array([16, 64, 256, 1024])
    gaps = np.array([gap(game, play(game, t)[0]) for t in rounds])
    slope = np.polyfit(np.log(rounds), np.log(gaps), 1)[0]
    assert slope < -0.4, (gaps, slope)
    eta = np.sqrt(8 * np.log(4) / rounds)
    assert (gaps <= 2 * (np.log(1 / START.min()) / (eta * rounds) + eta / 8)).all()
    average, last = play(game, 1024)
    np.testing.assert_allclose(average, winner, atol=0.12)
    assert gap(game, last) > 3 * gap(game, average)  # it is the average that converges


def test_theorem_4_1_the_score_estimator_fitted_once_ends_in_one_action_that_loses():
    """The Bradley-Terry projection under the start mixture, then optimised: what a reward model would do."""
    scores = weighted_win_rates(CYCLE, START, "score")
    _, optimal = play(CYCLE, 1024, fixed=scores)
    assert optimal.max() > 0.98
    assert gap(CYCLE, optimal) > 0.7


def test_the_weighted_win_rate_is_the_packages_own_mean_over_candidates():
    logits = np.log(CYCLE / (1 - CYCLE))
    sample = np.repeat(np.arange(4), [10, 5, 1, 4])
    rates = win_rates(probability_matrix(logits[sample][:, sample]))
    assert rates[0] == pytest.approx((probability_matrix(logits) @ START)[0], abs=1e-12)


@functools.partial(jax.jit, static_argnames=("loss", "eta", "rho"))
def curvature(log_pi, base, rate, loss, eta, rho):
    """Gradient and Hessian at pi_t of a loss in expectation over pi_t's own responses, with the base in its reference."""
    reference, pi = losses.anchor(log_pi, base, rho), jnp.exp(log_pi)

    def expected(x):
        if loss == "difference":
            return losses.difference_loss(x, reference, rate, eta=eta)
        winner, loser = jnp.divmod(jnp.arange(16), 4)  # each ordered pair, as often as it is drawn and won
        both = jnp.stack([winner, loser], axis=-1)
        each = jax.vmap(lambda pair: losses.ipo_loss(x[pair], reference[pair], eta=eta))(both)
        return jnp.sum(each * pi[winner] * pi[loser] * jnp.asarray(UNEVEN, jnp.float32)[winner, loser])

    return jax.grad(expected)(log_pi), jax.hessian(expected)(log_pi)


def anchored(loss, rounds, rho, eta):
    """The policies of exact updates of UNEVEN, each the minimum of the loss."""
    log_pi, found = np.log(START), []
    for _ in range(rounds):
        rate = weighted_win_rates(UNEVEN, np.exp(log_pi), "pairwise")
        now, base, rate = (jnp.asarray(x, jnp.float32) for x in (log_pi, np.log(START), rate))
        gradient, hessian = (np.asarray(x, np.float64) for x in curvature(now, base, rate, loss, eta, rho))
        # Adding one number to all log pi changes no difference: the Hessian has that null direction.
        moved = log_pi - np.linalg.lstsq(hessian + hessian.max(), gradient, rcond=None)[0]
        log_pi = moved - np.log(np.exp(moved).sum())
        found.append(np.exp(log_pi))
    return np.array(found)


@pytest.mark.parametrize("loss", ["ipo", "difference"])
def test_with_an_anchor_the_last_policy_nears_the_regularised_equilibrium_and_without_it_goes_round(loss):
    """INPO (arXiv:2407.00617): pi* is proportional to pi_0 exp( eta/rho P(y > pi*) ), which its KL penalty asks for."""
    eta, rho = 0.4, 0.05

    def residual(log_odds):
        pi = softmax(log_odds)
        return log_odds - np.log(START) - eta / rho * (UNEVEN @ pi) + np.mean(log_odds - np.log(START))

    solved = optimize.root(residual, np.log(START), tol=1e-12)
    assert solved.success
    equilibrium = softmax(solved.x)
    np.testing.assert_allclose(
        equilibrium, softmax(np.log(START) + eta / rho * UNEVEN @ equilibrium), atol=1e-9
    )
    with_anchor, without = anchored(loss, 300, rho, eta), anchored(loss, 300, 0.0, eta)
    np.testing.assert_allclose(with_anchor[-1], equilibrium, atol=1e-3)
    assert np.abs(START - equilibrium).max() > 0.1
    assert np.ptp(without[-100:], axis=0).max() > 0.5  # still on its way round
