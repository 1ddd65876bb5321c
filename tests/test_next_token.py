"""The next token: its distribution, exact cuts, and the inputs that a draw may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import sharding
from sppo_jax.sampler.next_token import exponential, in_top_k, next_token

draw = jax.jit(next_token, static_argnames=("temperature", "top_p", "top_k"))


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def random_logits(rows=64, vocab=768, seed=0):
    """Normal logits, from rows that are nearly flat to rows that are nearly one-hot."""
    normal = np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32)
    return normal * np.geomspace(0.1, 20, rows, dtype=np.float32)[:, None]


def kept_by_sorting(logits_BV, temperature, top_p, top_k):
    """The members of top-k and then of the nucleus, by a stable sort in float64."""
    scaled_BV = np.asarray(logits_BV, np.float64) / temperature
    kept_BV = np.ones(scaled_BV.shape, bool)
    if 0 < top_k < scaled_BV.shape[1]:
        kept_BV = scaled_BV >= np.sort(scaled_BV, axis=-1)[:, -top_k, None]
    weight_BV = np.where(kept_BV, np.exp(scaled_BV - scaled_BV.max(-1, keepdims=True)), 0.0)
    order_BV = np.argsort(-weight_BV, axis=-1, kind="stable")
    sorted_BV = np.take_along_axis(weight_BV, order_BV, -1)
    before_BV = np.cumsum(sorted_BV, -1) - sorted_BV
    for column in range(1, before_BV.shape[1]):  # only strictly larger weights count
        tied_B = sorted_BV[:, column] == sorted_BV[:, column - 1]
        before_BV[tied_B, column] = before_BV[tied_B, column - 1]
    above_BV = np.empty_like(before_BV)
    np.put_along_axis(above_BV, order_BV, before_BV, -1)
    return kept_BV & (above_BV < top_p * weight_BV.sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.5, 0.6, 0), (1.0, 1.0, 7), (0.7, 0.9, 12), (2.0, 0.95, 40)],
)
def test_tokens_are_drawn_from_the_stated_distribution(temperature, top_p, top_k):
    draws = 20_000
    logits_V = np.random.default_rng(1).normal(size=50).astype(np.float32) * 1.5
    tiled = jnp.broadcast_to(logits_V, (draws, 50))
    drawn, _ = draw(tiled, keys(draws), temperature=temperature, top_p=top_p, top_k=top_k)
    inside_V = kept_by_sorting(logits_V[None], temperature, top_p, top_k)[0]
    exact_V = np.where(inside_V, np.exp(logits_V.astype(np.float64) / temperature), 0.0)
    exact_V /= exact_V.sum()
    count_V = np.bincount(drawn, minlength=50)
    assert count_V[~inside_V].sum() == 0
    chi_square = ((count_V - draws * exact_V)[inside_V] ** 2 / (draws * exact_V[inside_V])).sum()
    freedom = inside_V.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1e-6, 0), (0.9, 0), (0.999, 0), (1.0, 20), (0.9, 20), (0.5, 700)]
)
def test_a_draw_is_exactly_that_from_the_logits_masked_by_sorting(top_p, top_k):
    holes_BV = random_logits(seed=1)
    holes_BV[np.random.default_rng(2).random(holes_BV.shape) < 0.7] = -np.inf
    one_hot_BV = np.where(np.arange(768) == np.arange(64)[:, None] * 11, 0.0, -np.inf)
    rounded_BV = np.asarray(jnp.asarray(random_logits(seed=3), jnp.bfloat16), np.float32)  # ties, too
    for logits_BV in (
        random_logits(), random_logits() - 1000, np.round(random_logits()), holes_BV, one_hot_BV, rounded_BV
    ):  # fmt: skip
        logits_BV = jnp.asarray(logits_BV, jnp.float32)
        masked_BV = jnp.where(kept_by_sorting(logits_BV, 0.7, top_p, top_k), logits_BV, -jnp.inf)
        whole, _ = draw(masked_BV, keys(64), temperature=0.7, top_p=1.0)
        cut, _ = draw(logits_BV, keys(64), temperature=0.7, top_p=top_p, top_k=top_k)
        np.testing.assert_array_equal(cut, whole)


def test_top_k_is_the_sorted_one_with_ties_signs_zeros_and_infinities():
    logits_BV = np.concatenate([random_logits(), np.round(random_logits()), random_logits() - 1000])
    logits_BV[::5, ::3] = -np.inf
    logits_BV[::7, ::2] = -0.0
    logits_BV[::7, 1::2] = 0.0
    for k in (1, 20, 767):
        expected = logits_BV >= np.sort(logits_BV, axis=-1)[:, -k, None]
        np.testing.assert_array_equal(in_top_k(jnp.asarray(logits_BV), k), expected)


def test_top_k_of_nothing_or_of_the_whole_vocabulary_cuts_nothing():
    def text(k):
        return draw.lower(random_logits(), keys(64), temperature=0.7, top_p=0.9, top_k=k).as_text()

    assert text(0) == text(768) == text(1000) != text(767)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.0, 1.0, 0), (0.7, 0.9, 20), (0.7, 1.0, 0)])
def test_log_probabilities_are_those_at_temperature_one_over_the_whole_vocabulary(temperature, top_p, top_k):
    logits_BV = random_logits()
    token_B, logprob_B = draw(logits_BV, keys(64), temperature=temperature, top_p=top_p, top_k=top_k)
    assert (token_B.dtype, logprob_B.dtype) == (jnp.int32, jnp.float32)
    expected_BV = jax.nn.log_softmax(logits_BV)
    expected_B = np.take_along_axis(np.asarray(expected_BV), np.asarray(token_B)[:, None], -1)[:, 0]
    np.testing.assert_allclose(logprob_B, expected_B, rtol=2e-7, atol=1e-6)


def test_bfloat16_logits_are_worked_on_in_float32():
    logits_BV = jnp.asarray(random_logits(), jnp.bfloat16)
    coarse = draw(logits_BV, keys(64), temperature=0.7, top_p=0.9, top_k=20)
    fine = draw(logits_BV.astype(jnp.float32), keys(64), temperature=0.7, top_p=0.9, top_k=20)
    np.testing.assert_array_equal(coarse[0], fine[0])
    np.testing.assert_array_equal(coarse[1], fine[1])


@pytest.mark.parametrize("vocab", [768, 777])
def test_temperature_zero_takes_the_first_of_the_largest(vocab):
    logits_BV = np.round(random_logits(vocab=vocab))
    logits_BV[0] = -np.inf
    logits_BV[0, [130, 131, 700]] = -1000
    found, _ = draw(logits_BV, keys(64), temperature=0.0, top_p=1.0)
    np.testing.assert_array_equal(found, logits_BV.argmax(-1))
    assert found[0] == 130


@pytest.mark.parametrize("setting", [{"temperature": 1e-45}, {"temperature": 5e-324}, {"top_p": 1e-45}, {"top_p": 1e-39}, {"top_p": 5e-324}])  # fmt: skip
@pytest.mark.timeout(60)
def test_a_setting_that_is_zero_in_float32_is_nearly_zero(setting):
    """With a nucleus of no mass the draw would look for a better token for ever."""
    found, _ = draw(random_logits(), keys(64), **({"temperature": 1.0, "top_p": 1.0} | setting))
    np.testing.assert_array_equal(found, random_logits().argmax(-1))


@pytest.mark.parametrize("temperature", [1e39, 1e300])
def test_a_temperature_that_is_infinite_in_float32_makes_all_possible_tokens_equal(temperature):
    logits_BV = np.where(np.arange(768) % 2, random_logits(), -np.inf).astype(np.float32)
    found, logprob_B = draw(logits_BV, keys(64), temperature=temperature, top_p=1.0)
    flat, _ = draw(np.where(np.isfinite(logits_BV), 0.0, -np.inf), keys(64), temperature=1.0, top_p=1.0)
    np.testing.assert_array_equal(found, flat)
    assert np.isfinite(logprob_B).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.9, 20)])
def test_a_row_depends_in_no_bit_on_the_others(top_p, top_k):
    """Other rows change how many rounds are run, not what a row gets."""
    logits_BV, others_BV = random_logits(), random_logits(seed=1)[::-1]
    found = draw(logits_BV, keys(64), temperature=0.7, top_p=top_p, top_k=top_k)
    for row in (0, 20, 40, 63):
        mixed_BV, place = others_BV.copy(), 63 - row
        mixed_BV[place] = logits_BV[row]
        mixed_keys = keys(64, seed=1).at[place].set(keys(64)[row])
        alone = draw(mixed_BV, mixed_keys, temperature=0.7, top_p=top_p, top_k=top_k)
        assert alone[0][place] == found[0][row]
        assert alone[1][place].tobytes() == found[1][row].tobytes()


def test_eight_devices_draw_the_tokens_of_one(eight_devices):
    cuts = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    expected = draw(random_logits(), keys(64), **cuts)
    placed_BV = jax.device_put(random_logits(), sharding.named("BV", eight_devices))
    found = draw(placed_BV, jax.device_put(keys(64), sharding.named("B", eight_devices)), **cuts)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_a_row_of_nan_ends_and_spoils_its_own_row_alone():
    logits_BV = random_logits()
    expected = draw(logits_BV, keys(64), temperature=0.7, top_p=0.9, top_k=20)
    logits_BV[3], logits_BV[4] = np.nan, -np.inf
    token_B, logprob_B = draw(logits_BV, keys(64), temperature=0.7, top_p=0.9, top_k=20)
    np.testing.assert_array_equal(np.delete(token_B, [3, 4]), np.delete(expected[0], [3, 4]))
    assert np.isnan(logprob_B[3:5]).all()
    assert ((token_B >= 0) & (token_B < 768)).all()


def test_noise_is_exponential_of_the_bits_of_jax_and_precise_where_it_is_small():
    bits_BV = jax.vmap(lambda key: jax.random.bits(key, (8192,)))(keys(64))
    u_BV = ((np.asarray(bits_BV) >> 1) + 0.5) / 2**31
    noise_BV = np.asarray(jax.jit(exponential, static_argnums=1)(keys(64), 8192))
    exact_BV = -np.log1p(-u_BV)
    np.testing.assert_allclose(noise_BV[exact_BV < 5], exact_BV[exact_BV < 5], rtol=1e-5)
    np.testing.assert_allclose(noise_BV, exact_BV, rtol=1e-2)  # large ones lose anyway
    assert noise_BV.min() < 1e-5
