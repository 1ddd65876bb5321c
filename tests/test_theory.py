"""Theorem 4.1 in a table game: the average policy of exact SPPO updates nears the von Neumann winner as 1/sqrt(T)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.special import softmax

from examples.table_game import CYCLE, START, UNEVEN, gap, main, policies, step_size, weighted_win_rates
from sppo_jax import losses
from sppo_jax.preferences import probability_matrix, win_rates


@pytest.mark.parametrize(
    ("game", "winner"), [(CYCLE, [1 / 3, 1 / 3, 1 / 3, 0]), (UNEVEN, [1 / 7, 2 / 7, 4 / 7, 0])]
)
def test_theorem_4_1_the_average_policys_gap_falls_like_one_over_root_T(game, winner):
    rounds = np.array([16, 64, 256, 1024])
    gaps = np.array([gap(game, policies(game, t)[:-1].mean(axis=0)) for t in rounds])
    slope = np.polyfit(np.log(rounds), np.log(gaps), 1)[0]
    assert slope < -0.4, (gaps, slope)
    eta = np.array([step_size(t) for t in rounds])
    assert (gaps <= 2 * (np.log(1 / START.min()) / (eta * rounds) + eta / 8)).all()
    played = policies(game, 1024)
    average, last = played[:-1].mean(axis=0), played[-1]
    np.testing.assert_allclose(average, winner, atol=0.12)
    assert gap(game, last) > 3 * gap(game, average)  # it is the average that converges


def test_theorem_4_1_the_score_estimator_fitted_once_ends_in_one_action_that_loses():
    """The Bradley-Terry projection under the start mixture, then optimised: what a reward model would do."""
    optimal = policies(CYCLE, 1024, fixed=weighted_win_rates(CYCLE, START, "score"))[-1]
    assert optimal.max() > 0.98
    assert gap(CYCLE, optimal) > 0.7


def test_the_weighted_win_rate_is_the_packages_own_mean_over_candidates():
    logits = np.log(CYCLE / (1 - CYCLE))
    sample = np.repeat(np.arange(4), [10, 5, 1, 4])
    rates = win_rates(probability_matrix(logits[sample][:, sample]))
    assert rates[0] == pytest.approx((probability_matrix(logits) @ START)[0], abs=1e-12)


def test_the_picture_is_drawn_into_the_file_that_is_named(tmp_path):
    main(["--to", str(tmp_path / "game.svg")])
    assert "</svg>" in (tmp_path / "game.svg").read_text()


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
        rate = weighted_win_rates(UNEVEN, np.exp(log_pi))
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
