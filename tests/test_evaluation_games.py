"""The game between policies: mixtures that no policy beats, and rings of policies that beat each other."""

import numpy as np
import pytest

from sppo_jax.evaluation.games import cycle, mixture
from sppo_jax.preferences import has_cycle, probability_matrix

ROCK_PAPER_SCISSORS = [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]


def game(advantages):
    """Win rates [m, m] from the part of the advantages [m, m], in [-1/2, 1/2], above the diagonal."""
    upper = np.triu(advantages, 1)
    return 0.5 + upper - upper.T


def random_games(number, kind):
    random = np.random.default_rng(0)
    for _ in range(number):
        m = random.integers(2, 40 if "size" in kind else 13)
        advantages = random.uniform(-0.5, 0.5, (m, m))
        if kind == "ties":
            advantages[random.random((m, m)) < 0.6] = 0
        if kind == "tenths":
            advantages = advantages.round(1)
        if kind == "near ties":
            advantages *= 1e-8
        if "size" in kind:
            advantages *= 10 ** random.uniform(-8 if kind == "of every size" else -12, 0, (m, m))
        yield game(advantages)


@pytest.mark.parametrize(
    "kind", ["generic", "ties", "tenths", "near ties", "of every size", "of sizes below tolerance"]
)
def test_no_policy_beats_the_mixture_and_the_gap_says_so(kind):
    for p in random_games(120, kind):
        found = mixture(p)
        w = np.array(found.weights)
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(1, abs=1e-12)
        gap = (p @ w).max() - (w @ p).min()
        assert gap < (1e-9 if "tolerance" in kind else 1e-12)
        assert found.gap == pytest.approx(gap, abs=1e-14)
        assert found.value == pytest.approx((w @ p).min(), abs=1e-14)


def test_the_mixture_of_near_ties_is_a_mixture_of_the_scaled_game():
    p = 0.5 + 1e-9 * (np.array([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]) - 0.5)
    p[0, 1], p[1, 0] = 0.5 - 1e-9, 0.5 + 1e-9  # paper beats rock twice as clearly
    np.testing.assert_allclose(mixture(p).weights, [1 / 4, 1 / 4, 1 / 2], atol=1e-5)


def test_rock_paper_scissors_is_played_evenly():
    np.testing.assert_allclose(mixture(ROCK_PAPER_SCISSORS).weights, 1 / 3)
    p = game(np.array([[0, -0.1, 0.3], [0, 0, -0.2], [0, 0, 0]]))
    np.testing.assert_allclose(mixture(p).weights, [1 / 3, 1 / 2, 1 / 6])  # as often as the other two differ


def test_a_policy_that_beats_all_is_the_mixture():
    p = game(np.random.default_rng(1).uniform(-0.4, 0.4, (5, 5)))
    p[2], p[:, 2] = 0.51, 0.49
    p[2, 2] = 0.5
    found = mixture(p)
    np.testing.assert_allclose(found.weights, [0, 0, 1, 0, 0], atol=1e-12)
    assert found.gap == 0


@pytest.mark.parametrize("m", [1, 2, 7])
def test_policies_that_all_tie_share_the_mixture(m):
    found = mixture(np.full((m, m), 0.5))
    np.testing.assert_allclose(found.weights, 1 / m)
    assert (found.value, found.gap) == (0.5, 0)


def test_a_game_always_has_the_same_mixture():
    p = np.full((4, 4), 0.5)
    p[:2, 2:], p[2:, :2] = 0.7, 0.3  # any mixture of the first two is optimal
    found = mixture(p)
    assert found == mixture(p.copy())
    assert sum(found.weights[:2]) == pytest.approx(1)


@pytest.mark.parametrize("solve", [mixture, cycle])
@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([[0.5, 0.6], [0.6, 0.5]], "sum to 1"),
        ([[0.6, 0.6], [0.4, 0.5]], "sum to 1"),
        ([[0.5, 1.2], [-0.2, 0.5]], "lie in"),
        ([[0.5, np.nan], [np.nan, 0.5]], "lie in"),
        ([[0.5, 0.6]], "matrix"),
        ([0.5], "matrix"),
        (np.zeros((0, 0)), "matrix"),
    ],
)
def test_a_matrix_that_is_no_symmetric_game_is_refused(solve, p, message):
    with pytest.raises(ValueError, match=message):
        solve(p)


def test_rounding_of_means_is_no_reason_to_refuse_a_game():
    p = np.array(ROCK_PAPER_SCISSORS)
    p[0, 1] += 1e-12
    assert cycle(p) == [0, 2, 1]
    assert mixture(p).gap < 1e-9


@pytest.mark.parametrize("kind", ["generic", "ties", "tenths"])
def test_a_ring_is_a_shortest_one_of_policies_that_beat_the_next(kind):
    for p in random_games(120, kind):
        ring = cycle(p)
        assert all(p[i, j] > 0.5 for i, j in zip(ring, ring[1:] + ring[:1], strict=True))
        assert len(set(ring)) == len(ring)
        if has_cycle(p):
            assert len(ring) == 3
            assert ring[0] == min(ring)
        beats = (p > 0.5).astype(int)  # its powers count the walks of each length
        walks = [np.linalg.matrix_power(beats, steps).trace() for steps in range(1, len(p) + 1)]
        assert len(ring) == next((steps for steps, closed in enumerate(walks, 1) if closed), 0)


def test_ties_leave_longer_rings():
    p = np.full((5, 5), 0.5)
    for winner, loser in ((1, 4), (4, 2), (2, 3), (3, 1), (0, 1)):
        p[winner, loser], p[loser, winner] = 0.9, 0.1
    assert not has_cycle(p)
    assert cycle(p) == [1, 4, 2, 3]


def test_scores_have_no_ring_on_a_prompt_and_may_have_one_over_several():
    scores = np.array([[3, 2, 1], [1, 3, 2], [2, 1, 3]])  # of three policies' responses to three prompts
    p = probability_matrix(scores[:, :, None] - scores[:, None, :])
    assert not has_cycle(p).any()
    assert cycle(p.mean(0)) == [0, 1, 2]


def test_a_ladder_has_no_ring_and_a_lead_within_a_tie_makes_none():
    scores = np.array([0.3, 0.1, -0.2])
    assert cycle(0.5 + (scores[:, None] - scores) / 2) == []
    assert cycle([[0.5, 0.5 + 5e-7, 0.2], [0.5 - 5e-7, 0.5, 0.6], [0.8, 0.4, 0.5]]) == []
    assert cycle([[0.5]]) == []
