"""Figures of an evaluation: intervals that cover, length control, ties, repetitions, categories."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, stdtrit
from scipy.stats import binom, binomtest

from sppo_jax.evaluation.statistics import RIDGE, distinct, length_controlled, repeated, ties
from sppo_jax.run.intervals import FEW, bounds, interval


@pytest.mark.parametrize("n", [40, 120, 500])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (1, 0.2), (5, 2)])
def test_intervals_of_win_probabilities_cover_95_percent(n, a, b):
    draws, mean = np.random.default_rng(n), a / (a + b)
    found = [interval(draws.beta(a, b, n), seed=k, resamples=400) for k in range(60_000 // n + 600)]
    assert np.mean([low <= mean <= high for low, high in found]) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("n", [40, 100, 400])
@pytest.mark.parametrize("rate", [0.5, 0.65, 0.8])
def test_intervals_of_wins_and_losses_cover_95_percent(n, rate):
    covered = 0.0
    for wins in range(n + 1):  # every outcome with its probability: the coverage without noise
        if (chance := binom.pmf(wins, n, rate)) > 1e-6:
            low, high = interval(np.arange(n) < wins, resamples=2000)
            covered += chance * (low <= rate <= high)
    assert covered == pytest.approx(0.95, abs=0.02)


def test_an_interval_depends_on_its_seed_alone_and_narrows_with_the_level():
    values = np.random.default_rng(0).beta(2, 1, 100)
    assert interval(values) == interval(values.tolist())
    assert interval(values, seed=1) != interval(values)
    (low, high), (lower, higher) = interval(values, level=0.5), interval(values)
    assert lower < low < values.mean() < high < higher


@pytest.mark.parametrize("n", [1, 2, 3, 8, FEW - 1])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (0.05, 0.02), (1, 0.2), (0.1, 1), (20, 5)])
def test_intervals_of_few_win_probabilities_cover_at_least_95_percent(n, a, b):
    draws, mean = np.random.default_rng(n).beta(a, b, (2000, n)), a / (a + b)
    found = map(interval, draws)
    assert (
        np.mean([low <= mean <= high for low, high in found]) > 0.96
    )  # of 2000: .007 is 1.5 standard errors


@pytest.mark.parametrize("n", [1, 2, 5, 10, FEW - 1])
@pytest.mark.parametrize("rate", [0.02, 0.35, 0.5, 0.9])
def test_intervals_of_few_wins_and_losses_are_exact(n, rate):
    covered = 0.0
    for wins in range(n + 1):
        low, high = interval(np.arange(n) < wins)
        assert (low, high) == pytest.approx(tuple(binomtest(wins, n).proportion_ci()))
        covered += binom.pmf(wins, n, rate) * (low <= rate <= high)
    assert covered >= 0.95


def test_intervals_do_not_jump_where_the_rule_changes():
    draws = np.random.default_rng(5).beta(1, 1, (200, FEW))
    wide = [np.diff(interval(values[:-1]))[0] / np.diff(interval(values))[0] for values in draws]
    assert 1 < np.median(wide) < 2


def test_resampled_bounds_are_as_wide_as_students():
    values = np.random.default_rng(5).normal(size=12)
    means = np.random.default_rng(0).choice(values, (10_000, 12)).mean(-1)
    low, high = bounds(means, 12)
    # The plain percentile interval is a seventh narrower.
    wide = stdtrit(11, 0.975) * values.std(ddof=1) / np.sqrt(12)
    assert (high - low) / 2 == pytest.approx(wide, rel=0.06)


def test_resamples_in_many_blocks_are_those_of_one(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = interval(values, resamples=1000)
    monkeypatch.setattr("sppo_jax.run.intervals._BLOCK", 7 * 50)
    assert interval(values, resamples=1000) == whole


def test_no_prompt_has_no_interval_and_prompts_that_are_all_won_one_that_is_not_a_point():
    assert np.isnan(interval([])).all()
    for n in (2, 200):
        assert interval(np.ones(n)) == (pytest.approx(0.025 ** (1 / n)), 1)
        assert interval(np.zeros(n)) == (0, pytest.approx(1 - 0.025 ** (1 / n)))
    assert interval([0.5] * 200) == (0.5, 0.5)


@pytest.mark.parametrize("values", [[0.5, np.nan], [0.5, np.inf], [[0.5, 0.5]]])
def test_values_that_are_no_finite_number_a_prompt_are_refused(values):
    with pytest.raises(ValueError, match="one finite number a prompt"):
        interval(values)


@pytest.mark.parametrize("values", [[0.5, 1.1], [-0.1] * 30])
def test_values_that_are_no_probabilities_are_refused(values):
    with pytest.raises(ValueError, match="must lie in"):
        interval(values)


def judged(random, n, intercept, slope):
    """Win probabilities around sigmoid(intercept + slope tanh(delta / std)), and both lengths."""
    theirs = random.integers(200, 3000, n)
    mine = np.maximum(1, theirs + random.normal(300, 800, n).astype(int))
    x = np.tanh((mine - theirs) / (mine - theirs).std())
    mean = expit(intercept + slope * x)
    return random.beta(2 * mean, 2 * (1 - mean)), mine, theirs


def test_a_known_length_effect_is_taken_out():
    random, truth = np.random.default_rng(0), expit(-0.4)
    covered, raw = [], []
    for seed in range(150):
        p, mine, theirs = judged(random, 200, -0.4, 1.5)
        found = length_controlled(p, mine, theirs, seed=seed, resamples=200)
        covered.append(found.low <= truth <= found.high)
        raw.append(p.mean() - truth)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)  # 150 trials have a standard error of 0.018
    assert np.mean(raw) > 0.05  # the raw rate is far off
    p, mine, theirs = judged(random, 20_000, -0.4, 1.5)
    found = length_controlled(p, mine, theirs, resamples=20)
    assert (found.rate, found.slope) == (pytest.approx(truth, abs=0.01), pytest.approx(1.5, abs=0.05))


def test_without_a_length_effect_the_rate_is_the_raw_one_within_noise():
    random = np.random.default_rng(1)
    for seed in range(20):
        p, mine, theirs = judged(random, 300, 0.3, 0.0)
        found = length_controlled(p, mine, theirs, seed=seed, resamples=200)
        low, high = interval(p, seed=seed)
        assert low < found.rate < high
        assert found.low < p.mean() < found.high
        assert abs(found.slope) < 0.5


def test_the_fit_is_the_minimum_that_a_general_optimiser_finds():
    random = np.random.default_rng(2)
    for n, slope in ((3, 0), (30, 2), (300, -4)):
        p, mine, theirs = judged(random, n, 0.5, slope)
        x = np.tanh((mine - theirs) / (mine - theirs).std())

        def loss(w, p=p, x=x):
            z = w[0] + w[1] * x
            return (np.logaddexp(0, z) - p * z).sum() + RIDGE / 2 * w[1] ** 2

        best = minimize(loss, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}).x
        found = length_controlled(p, mine, theirs, resamples=2)
        assert (found.rate, found.slope) == pytest.approx((expit(best[0]), best[1]), abs=1e-5)


def test_steps_do_not_diverge_where_one_extreme_length_decides():
    lengths = [-960, -4900, -2500, -1300, -1700, 240, -450, -820, 250, 400_000]
    found = length_controlled([1.0] * 9 + [0.0], lengths, [0] * 10)
    assert 0.9 < found.rate < 1
    assert -100 < found.slope < -3


@pytest.mark.parametrize("p", [[0.2, 0.9, 0.4], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
def test_equal_differences_of_length_leave_the_raw_rate(p):
    found = length_controlled(p, [7, 9, 11], [5, 7, 9])
    assert (found.rate, found.slope) == (pytest.approx(np.mean(p), abs=1e-12), 0)
    many = length_controlled(p * 10, [7, 9, 11] * 10, [5, 7, 9] * 10)
    assert (many.rate, many.slope) == (pytest.approx(np.mean(p), abs=1e-12), 0)
    assert (many.low, many.high) == pytest.approx(interval(p * 10), abs=0.05)


@pytest.mark.parametrize(
    ("p", "slope"),
    [
        ((np.arange(60) >= 30) * 1.0, 1),  # the longer always wins
        ((np.arange(60) < 59) * 1.0, -1),  # the longest alone loses
        (np.ones(60), 0),
        (np.zeros(60), 0),
        (np.full(60, 1e-300), 0),
        (np.r_[1.0, np.full(59, 1e-9)], -1),
        (np.tile([0.0, 1.0], 30), 1),
    ],
)
@pytest.mark.parametrize("size", [1, 1e6])
def test_separated_and_extreme_wins_give_finite_figures(p, slope, size):
    with np.errstate(all="raise", under="ignore"):
        found = length_controlled(p, np.arange(60) * size, np.full(60, 29.5 * size), resamples=300)
    assert 0 <= found.low <= found.rate <= found.high <= 1
    assert np.sign(found.slope) == slope
    assert abs(found.slope) < 100
    if not slope:
        assert found.rate == p.mean()


def test_a_constant_term_that_hides_in_the_lengths_stays_in_the_rate():
    p = np.random.default_rng(3).random(50)
    found = length_controlled(p, 10_000 + np.arange(50), np.arange(50) * 0)  # tanh is 1 of every difference
    assert (found.rate, found.slope) == (pytest.approx(p.mean()), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("n", [1, 2, FEW - 1])
def test_few_prompts_have_a_length_controlled_rate_without_an_interval(n):
    found = length_controlled([0.7] * n, [10] * n, [20] * n)
    assert (found.rate, found.slope) == (pytest.approx(0.7), 0)
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 1.1], [1, 2], [2, 1]), "must lie in"),
        (([0.5], [1, 2], [2, 1]), "two lengths of each prompt"),
        (([], [], []), "two lengths of each prompt"),
        (([np.nan], [1], [2]), "finite number"),
    ],
)
def test_length_control_refuses_what_it_cannot_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        length_controlled(*arguments)


def test_ties_are_probabilities_within_a_millionth_of_one_half():
    assert ties([0.5, 0.5 + 9e-7, 0.5 - 2e-6, 1.0]) == 0.5


def test_distinct_n_counts_n_grams_within_texts():
    texts = ["a b a b", "b  a\nb"]
    assert distinct(texts, 1) == 2 / 7
    assert distinct(texts, 2) == 2 / 5  # "b b" would join the two texts
    assert distinct(texts, 4) == 1
    assert np.isnan(distinct(texts, 5))
    assert np.isnan(distinct(["", " "], 1))
    with pytest.raises(ValueError, match="n >= 1"):
        distinct(texts, 0)


def test_repeated_counts_every_copy():
    assert repeated(["x", "y", "x", "x", "x "]) == 3 / 5
    assert repeated(["x", "y"]) == 0
    assert np.isnan(repeated([]))
