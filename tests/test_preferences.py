"""Logits to probabilities, win rates and diagnostics: published values and invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sppo_jax import preferences
from sppo_jax.preferences import ESTIMATORS, diagnostics, has_cycle, probability_matrix, win_rates

SCORES = np.array([1, 0.5, 0, -0.5, -1])


def rates(logits, estimator, **options):
    p = probability_matrix(logits, estimator, **options)
    return win_rates(p, leave_one_out=estimator == "pairwise_loo")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("score", [0.8093, 0.6667, 0.5, 0.3333, 0.1907]),
        ("pairwise", [0.7104, 0.6097, 0.5, 0.3903, 0.2896]),
        ("pairwise_loo", [0.7630, 0.6372, 0.5, 0.3628, 0.2370]),
    ],
)
def test_T09_golden_win_rates_of_each_estimator(estimator, expected):
    logits = SCORES[:, None] - SCORES
    np.testing.assert_allclose(rates(logits, estimator), expected, atol=5e-5)


def test_T10_score_is_twice_as_sharp_on_transitive_logits():
    logits = SCORES[:, None] - SCORES
    np.testing.assert_allclose(
        probability_matrix(logits, "score"), probability_matrix(logits, sharpness=2.0), atol=1e-12
    )


def test_T10_score_and_pairwise_choose_different_winners():
    logits = np.zeros((5, 5))
    logits[0, 1], logits[0, 2:] = 8, -0.75
    logits -= logits.T
    by_score, by_pairs = rates(logits, "score"), rates(logits, "pairwise")
    assert by_score.argmax() == 0
    assert by_score[0] == pytest.approx(0.828, abs=5e-4)
    assert by_pairs.argmax() == 2
    assert by_pairs[0] == pytest.approx(0.492, abs=5e-4)


def test_T10_a_cycle_survives_pairwise_and_is_lost_by_score():
    logits = np.zeros((3, 3))
    logits[0, 1] = logits[1, 2] = logits[2, 0] = 2
    logits -= logits.T
    np.testing.assert_allclose(probability_matrix(logits, "score"), 0.5)
    p = probability_matrix(logits)
    np.testing.assert_allclose(sorted(set(p.ravel().round(3))), [0.119, 0.5, 0.881])
    assert has_cycle(p)
    assert not has_cycle(probability_matrix(SCORES[:, None] - SCORES))


logits_of = st.integers(2, 8).flatmap(
    lambda k: arrays(np.float64, (3, k, k), elements=st.floats(-30, 30, allow_subnormal=False))
)


@settings(deadline=None, max_examples=60)
@given(logits=logits_of, estimator=st.sampled_from(ESTIMATORS))
def test_invariants_of_any_matrix(logits, estimator):
    p = probability_matrix(logits, estimator)
    k = p.shape[-1]
    np.testing.assert_array_equal(p + np.swapaxes(p, -1, -2), 1.0)
    inclusive, apart = win_rates(p), win_rates(p, leave_one_out=True)
    np.testing.assert_allclose(inclusive.sum(-1), k / 2)
    assert (inclusive >= 0.5 / k - 1e-12).all()
    assert (inclusive <= 1 - 0.5 / k + 1e-12).all()
    np.testing.assert_allclose(inclusive - 0.5, (k - 1) / k * (apart - 0.5), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(logits=logits_of, estimator=st.sampled_from(ESTIMATORS), seed=st.integers(0, 100))
def test_permuting_candidates_permutes_win_rates(logits, estimator, seed):
    order = np.random.default_rng(seed).permutation(logits.shape[-1])
    permuted = logits[:, order][:, :, order]
    np.testing.assert_allclose(rates(permuted, estimator), rates(logits, estimator)[:, order], atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(logits=logits_of, estimator=st.sampled_from(ESTIMATORS))
def test_T25_other_prompts_never_change_a_prompts_win_rates(logits, estimator):
    alone = np.stack([rates(one, estimator) for one in logits])
    np.testing.assert_array_equal(rates(logits, estimator), alone)
    np.testing.assert_array_equal(rates(logits[::-1], estimator)[::-1], alone)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_T11_equal_logits_in_both_orders_are_exactly_half(estimator):
    biased = np.full((4, 4), 1.5)  # a judge that only prefers what it sees first
    np.testing.assert_array_equal(probability_matrix(biased, estimator), 0.5)


def test_T26_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="borda"):
        probability_matrix(np.zeros((2, 2)), "borda")


def test_diagnostics_tell_cycles_ties_bias_length_and_entropy():
    cycle = np.zeros((3, 3))
    cycle[0, 1] = cycle[1, 2] = cycle[2, 0] = 2
    ties = np.zeros((3, 3))
    ladder = np.array([1.0, 0, -1])
    logits = np.stack([cycle - cycle.T, ties, ladder[:, None] - ladder]) + 0.25
    p = probability_matrix(logits)
    found = diagnostics(logits, p, [[9, 9, 9], [9, 9, 9], [30, 20, 10]])
    assert found["cycle_share"] == pytest.approx(1 / 3)
    assert found["tie_share"] == pytest.approx(1 / 3)
    assert found["position_bias"] == pytest.approx(0.5)
    assert found["length_correlation"] == pytest.approx(1.0, abs=0.01)
    # 1/3 for the two prompts in which all lengths or all win rates are equal, 1 for the third.
    assert found["longest_share"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    assert 0 < found["entropy"] < np.log(2)
    assert preferences.diagnostics(ties[None], p[1:2], [[1, 2, 3]])["entropy"] == pytest.approx(np.log(2))


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_the_best_response_is_the_longest_in_one_of_k_prompts_by_chance(longest):
    """Whichever response is best, and however many are equally long."""
    k = 4
    ladder = np.stack([np.roll([1.0, 0, -1, -2], shift) for shift in range(k)])
    logits = ladder[:, :, None] - ladder[:, None, :]
    lengths = np.tile([9] * longest + [5] * (k - longest), (k, 1))
    found = diagnostics(logits, probability_matrix(logits), lengths)
    assert found["longest_share"] == pytest.approx(1 / k)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("sharpness", [5e-324, 1e-320, 1e-300, 1.0, 1e300, 1.7e308])
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1.0, 1e30, 3.4028234e38])
def test_no_finite_logits_and_no_sharpness_give_nan_or_a_warning(estimator, sharpness, size):
    logits = np.array([[0, 1, -1], [-1, 0, 0.5], [1, -1, 0]]) * size
    logits[np.eye(3, dtype=bool)] = np.nan  # nobody reads the diagonal
    with np.errstate(all="raise", under="ignore"):
        p = probability_matrix(logits, estimator, sharpness=sharpness)
        found = win_rates(p, leave_one_out=estimator == "pairwise_loo")
        facts = diagnostics(logits, p, np.array([[3, 4, 5]]))
    assert ((p >= 0) & (p <= 1)).all()
    assert (p + p.T == 1).all()
    assert p[0, 1] >= 0.5 >= p[0, 2]
    np.testing.assert_allclose(found.sum(), 1.5)
    assert all(map(np.isfinite, facts.values()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308, 3.5e38])
def test_logits_beyond_float32_are_refused(value):
    with pytest.raises(ValueError, match="float32's range"):
        probability_matrix([[0, value], [1, 0]], "score")


def test_scores_are_the_log_odds_of_the_probabilities_and_their_mean_has_self_at_zero():
    logits = np.random.default_rng(0).normal(size=(3, 4, 4)) * 3
    off = ~np.eye(4, dtype=bool)
    for estimator in preferences.ESTIMATORS:
        p = preferences.probability_matrix(logits, estimator, sharpness=2.0)
        scores = preferences.score_matrix(logits, estimator, sharpness=2.0)
        np.testing.assert_allclose(scores[:, off], np.log(p / (1 - p))[:, off], rtol=1e-6)
        means = preferences.mean_scores(logits, estimator, sharpness=2.0)
        others = 3 if estimator == "pairwise_loo" else 4
        np.testing.assert_allclose(means, np.log(p / (1 - p)).sum(-1) / others, rtol=1e-6, atol=1e-9)
