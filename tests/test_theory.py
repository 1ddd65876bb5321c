"""Theorem 4.1 in a table game: the average policy of exact SPPO updates nears the von Neumann winner as 1/sqrt(T)."""

import numpy as np
import pytest

from examples.table_game import CYCLE, START, UNEVEN, gap, main, policies, step_size, weighted_win_rates
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
