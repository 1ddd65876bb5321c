"""Each loss against its equation worked by hand, and what gradients may and may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import losses
from sppo_jax.pairs import log_partition

LOGPROB = jnp.array([[-10.0, -12.0], [-7.0, -5.5]])
REF = jnp.array([[-11.0, -11.5], [-7.0, -6.0]])
RATIO = np.array([[1.0, -0.5], [0.0, 0.5]])
RATES = jnp.array([[0.7, 0.3], [0.6, 0.45]])

ALL = {
    "sppo": lambda lp, ref: losses.sppo_loss(lp, ref, RATES, eta=10.0),
    "sppo_single": lambda lp, ref: losses.sppo_single_loss(lp, ref, jnp.array([0.8, 0.55]), eta=10.0),
    "sppo_hard": lambda lp, ref: losses.sppo_hard_loss(lp, ref, eta=10.0),
    "dpo": lambda lp, ref: losses.dpo_loss(lp, ref, eta=10.0),
    "ipo": lambda lp, ref: losses.ipo_loss(lp, ref, eta=10.0),
    "difference": lambda lp, ref: losses.difference_loss(lp, ref, RATES, eta=10.0),
}


def test_sppo_is_the_mean_squared_distance_to_eta_times_win_rate_minus_half():
    expected = np.mean([(1 - 2) ** 2, (-0.5 + 2) ** 2, (0 - 1) ** 2, (0.5 + 0.5) ** 2])
    np.testing.assert_allclose(ALL["sppo"](LOGPROB, REF), expected, rtol=1e-6)


def test_sppo_takes_any_shape_and_a_baseline_for_each_prompt():
    flat = losses.sppo_loss(LOGPROB.ravel(), REF.ravel(), RATES.ravel(), eta=10.0)
    np.testing.assert_allclose(flat, ALL["sppo"](LOGPROB, REF), rtol=1e-6)
    baseline = jnp.array([[0.6], [0.5]])
    shifted = losses.sppo_loss(LOGPROB, REF, RATES, eta=10.0, baseline=baseline)
    expected = np.mean((RATIO - 10 * (np.asarray(RATES) - np.asarray(baseline))) ** 2)
    np.testing.assert_allclose(shifted, expected, rtol=1e-6)


def test_sppo_single_uses_the_pair_probability_in_both_directions():
    expected = np.mean([0.5 * ((1 - 3) ** 2 + (-0.5 + 3) ** 2), 0.5 * ((0 - 0.5) ** 2 + (0.5 + 0.5) ** 2)])
    np.testing.assert_allclose(ALL["sppo_single"](LOGPROB, REF), expected, rtol=1e-6)


def test_T23_sppo_hard_is_the_mean_of_the_squares_half_of_trls_sum():
    sum_of_squares = np.mean([(1 - 5) ** 2 + (-0.5 + 5) ** 2, (0 - 5) ** 2 + (0.5 + 5) ** 2])
    np.testing.assert_allclose(ALL["sppo_hard"](LOGPROB, REF), sum_of_squares / 2, rtol=1e-6)


def test_dpo_and_ipo_see_the_margin_alone():
    margin = RATIO[:, 0] - RATIO[:, 1]
    np.testing.assert_allclose(ALL["dpo"](LOGPROB, REF), np.mean(np.log1p(np.exp(-margin / 10))), rtol=1e-6)
    np.testing.assert_allclose(ALL["ipo"](LOGPROB, REF), np.mean((margin - 5) ** 2), rtol=1e-6)
    for name in ("dpo", "ipo"):
        np.testing.assert_allclose(ALL[name](LOGPROB - 3.0, REF), ALL[name](LOGPROB, REF), rtol=1e-5)


def test_difference_is_the_mean_over_all_pairs_of_the_squared_difference_of_residuals():
    logprob, payoff = jnp.array([-3.0, -5.0, -4.0]), jnp.array([0.8, 0.5, 0.2])
    residual = np.array([1.0, -0.5, 2.0]) - 10 * np.array([0.8, 0.5, 0.2])
    expected = np.mean([(residual[i] - residual[j]) ** 2 for i, j in [(0, 1), (0, 2), (1, 2)]])
    reference = logprob - jnp.array([1.0, -0.5, 2.0])
    found = losses.difference_loss(logprob, reference, payoff, eta=10.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    shifted = losses.difference_loss(logprob + 7.0, reference, payoff - 0.5, eta=10.0)
    np.testing.assert_allclose(shifted, found, rtol=1e-5)  # neither log Z nor a baseline matters


def test_the_sum_of_differences_over_all_pairs_is_K_times_the_pointwise_loss_about_its_mean():
    rng = np.random.default_rng(0)
    logprob, reference, payoff = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(3))

    def centred(x):
        return x - x.mean(-1, keepdims=True)

    def pairs(x):
        return losses.difference_loss(x, reference, payoff, eta=3.0) * 4 * 10

    def pointwise(x):
        return (
            losses.sppo_loss(centred(x), centred(reference), centred(payoff), eta=3.0, baseline=0.0) * 4 * 5
        )

    np.testing.assert_allclose(pairs(logprob), 5 * pointwise(logprob), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(pairs)(logprob), 5 * jax.grad(pointwise)(logprob), rtol=1e-4, atol=1e-4
    )


def test_ipo_is_the_difference_of_payoffs_one_and_zero_at_half_the_eta_bit_for_bit():
    payoff = jnp.broadcast_to(jnp.array([1.0, 0.0]), LOGPROB.shape)

    def difference(logprob):
        return losses.difference_loss(logprob, REF, payoff, eta=133.3 / 2)

    found = jax.value_and_grad(difference)(LOGPROB)
    expected = jax.value_and_grad(lambda x: losses.ipo_loss(x, REF, eta=133.3))(LOGPROB)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_anchor_lies_between_reference_and_base_and_is_the_reference_where_they_are_equal():
    base = REF + jnp.array([[3.0, -6.0], [0.0, 1.5]])
    np.testing.assert_allclose(losses.anchor(REF, base, 1 / 3), REF * 2 / 3 + base / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.anchor(REF, base, 1.0), base, rtol=1e-6)
    odd = jnp.asarray(np.random.default_rng(0).normal(size=100) * 300, jnp.float32)
    np.testing.assert_array_equal(losses.anchor(odd, odd, 1 / 3), odd)


@pytest.mark.parametrize("name", ALL)
def test_T32_no_gradient_flows_into_the_reference(name):
    policy, reference = jax.grad(ALL[name], argnums=(0, 1))(LOGPROB, REF)
    assert float(jnp.abs(policy).max()) > 0
    np.testing.assert_array_equal(reference, 0.0)


@pytest.mark.parametrize("name", ALL)
def test_left_out_rows_change_neither_value_nor_gradient(name):
    where = {"sppo": jnp.array([[True], [False]])}.get(name, jnp.array([True, False]))
    call = {
        "sppo": lambda lp, **k: losses.sppo_loss(lp, REF, RATES, eta=10.0, **k),
        "sppo_single": lambda lp, **k: losses.sppo_single_loss(
            lp, REF, jnp.array([0.8, 0.55]), eta=10.0, **k
        ),
        "sppo_hard": lambda lp, **k: losses.sppo_hard_loss(lp, REF, eta=10.0, **k),
        "dpo": lambda lp, **k: losses.dpo_loss(lp, REF, eta=10.0, **k),
        "ipo": lambda lp, **k: losses.ipo_loss(lp, REF, eta=10.0, **k),
        "difference": lambda lp, **k: losses.difference_loss(lp, REF, RATES, eta=10.0, **k),
    }[name]
    value, grad = jax.value_and_grad(lambda lp: call(lp, where=where))(LOGPROB)
    other = LOGPROB.at[1].set(jnp.array([-99.0, -1.0]))
    np.testing.assert_allclose(call(other, where=where), value, rtol=1e-6)
    np.testing.assert_array_equal(grad[1], 0.0)
    assert float(value) != pytest.approx(float(call(LOGPROB)))


def test_every_loss_of_the_table_is_tested_here_and_shows_its_equation():
    assert set(losses.LOSSES) == set(ALL)
    for loss in losses.LOSSES.values():
        assert loss.equation.startswith("mean ")


def test_log_partition_at_eta_1000_pushes_nearly_all_down():
    """The published example: +1.6, -248, ... against +350, +100, ... with the constant."""
    rates = np.array([0.85, 0.6, 0.5, 0.35, 0.2])
    targets = 1000 * (rates - log_partition(rates, 1000.0))
    np.testing.assert_allclose(targets, [1.6, -248.4, -348.4, -498.4, -648.4], atol=0.05)


def test_log_partition_tends_to_the_mean_win_rate_at_small_eta():
    rates = np.array([0.9, 0.5, 0.4])
    assert log_partition(rates, 1e-4) == pytest.approx(rates.mean(), abs=1e-4)
