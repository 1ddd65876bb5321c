"""Draw the next token from the logits: temperature, top-k, top-p, exact and without a sort.

A draw is a race (Gumbel-max written without the logarithm): each token has weight exp((logit - max) / temperature)
and noise of its own from Exponential(1); the largest weight / noise wins, which is token i with probability
weight_i / sum(weight). Each row has its own key and is computed alone, so its token depends on nothing else.

Sorting, masking and `jax.random.categorical` would take a few lines (`kept_by_sorting` in tests/test_next_token.py is that
reference). This file is longer because it keeps exactly that reference's tokens, ties and infinities included, without
sorting the vocabulary, B x V numbers at every decoded token: top-k halves an interval of integers, top-p repeats the race
two or three times, and the noise and the argmax are written for CPUs, where jax's own take twice and about ten times as
long.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

# Temperature and top_p as float32 can compute with them: beyond, they would be 0 or infinite there.
SMALLEST, LARGEST = 1e-30, 1e30


def next_token(
    logits_BV: Float[Array, "B V"],
    key_B: Key[Array, " B"],
    *,
    temperature: float,
    top_p: float,
    top_k: int = 0,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The tokens drawn, and their log-probabilities (nats) at temperature 1 over the whole vocabulary, in float32.

    In Hugging Face's order: temperature, then the `top_k` largest logits (ties with the last included; 0: all), then the
    nucleus of `top_p` among these. Temperature 0 takes the largest logit, the first among equals. A temperature or top_p
    that float32 cannot hold is the nearest one that it can compute with.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    highest_B = jnp.max(logits_BV, axis=-1)
    if temperature == 0:
        token_B = _best(logits_BV)
    else:
        # As 0 it would make the largest weight 0 / 0, as infinity that of a logit of -infinity.
        temperature = min(max(temperature, SMALLEST), LARGEST)
        weight_BV = jnp.exp((logits_BV - highest_B[:, None]) / temperature)
        if 0 < top_k < logits_BV.shape[1]:
            weight_BV = jnp.where(in_top_k(logits_BV, top_k), weight_BV, 0.0)
        token_B = _race(weight_BV, exponential(key_B, logits_BV.shape[1]), top_p)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    total_B = jnp.sum(jnp.exp(logits_BV - highest_B[:, None]), axis=-1)
    return token_B, chosen_B - highest_B - jnp.log(total_B)


def exponential(key_B: Key[Array, " B"], vocab: int) -> Float[Array, "B V"]:
    """Noise from Exponential(1), between 2**-32 and 17.4: V draws per threefry key.

    Small noise wins, so -log(1 - u) is precise there: even a token of probability 1e-9 is drawn as often as it should be.
    """
    first_B, second_B = jax.random.key_data(key_B).T
    count_BV = jax.lax.broadcasted_iota(jnp.uint32, (key_B.shape[0], vocab), 1)
    bits_BV = threefry(first_B[:, None], second_B[:, None], count_BV)
    u_BV = (bits_BV >> 1).astype(jnp.int32).astype(jnp.float32) * 2.0**-31 + 2.0**-32
    series_BV = u_BV * (1 + u_BV * (1 / 2 + u_BV * (1 / 3 + u_BV * (1 / 4))))
    return jnp.where(u_BV < 0.01, series_BV, -jnp.log(jnp.maximum(1 - u_BV, 2.0**-25)))


def threefry(
    first_B1: UInt32[Array, "B 1"], second_B1: UInt32[Array, "B 1"], count_BV: UInt32[Array, "B V"]
) -> UInt32[Array, "B V"]:
    """The bits of `jax.random.bits` for these keys, in one pass: on a CPU jax takes five, and twice the time.

    Threefry-2x32 of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    keys = first_B1, second_B1, first_B1 ^ second_B1 ^ np.uint32(0x1BD11BDA)
    x, y = jnp.broadcast_to(keys[0], count_BV.shape), count_BV + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = x ^ (y << turn | y >> (32 - turn))
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x ^ y


def _race(weight_BV: Float[Array, "B V"], noise_BV: Float[Array, "B V"], top_p: float) -> Int[Array, " B"]:
    """The token with the largest weight / noise in the nucleus: tokens with less than `top_p` of the mass above their weight.

    If the winner of all tokens is in the nucleus, it is the nucleus's winner too; one sum decides. If it is not, no token
    of its weight or less is either, so the race is run again without them: two or three rounds.
    """
    score_BV = weight_BV / noise_BV
    token_B = _best(score_BV)
    if top_p >= 1:
        return token_B
    # No token has less than no mass above it: with 0 the loop below would not end.
    needed_B = max(top_p, SMALLEST) * jnp.sum(weight_BV, axis=-1)

    def outside(token_B: Array) -> tuple[Array, Array]:
        bar_B = jnp.take_along_axis(weight_BV, token_B[:, None], axis=1)[:, 0]
        above_B = jnp.sum(jnp.where(weight_BV > bar_B[:, None], weight_BV, 0.0), axis=-1)
        return above_B >= needed_B, bar_B

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        token_B, outside_B, bar_B = state
        better_B = _best(jnp.where(weight_BV > bar_B[:, None], score_BV, -1.0))
        token_B = jnp.where(outside_B, better_B, token_B)
        return token_B, *outside(token_B)

    # The loop ends: each round raises the bar, and no token lies above the largest weight.
    return jax.lax.while_loop(lambda state: jnp.any(state[1]), again, (token_B, *outside(token_B)))[0]


def in_top_k(logits_BV: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """True for each logit that is at least the k-th largest of its row.

    The threshold is found by halving an interval of integers, which are ordered like the floats with the same bits.
    """
    plain_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)  # -0.0 equals 0.0, but has other bits
    bits_BV = jax.lax.bitcast_convert_type(plain_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

    def open_(bounds: tuple[Array, Array]) -> Array:
        low_B, high_B = bounds  # at least k are >= low, fewer are >= high
        return jnp.any(low_B + 1 < high_B)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)  # the sum could overflow
        count_B = jnp.sum(order_BV >= middle_B[:, None], axis=-1)
        # Exactly k: any number between the k-th and the next is a threshold, and the interval closes on it.
        low_B = jnp.where(count_B >= k, middle_B, low_B)
        high_B = jnp.where(count_B > k, high_B, jnp.where(count_B == k, middle_B + 1, middle_B))
        return low_B, high_B

    low_B, high_B = jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1) + 1
    low_B, _ = jax.lax.while_loop(open_, halve, (low_B, high_B))
    return order_BV >= low_B[:, None]


def _best(score_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The index of each row's largest score, the first among equals; an arbitrary one if the row holds NaN.

    Found block by block, and then in the best block: on a CPU about ten times as fast as argmax.
    """
    rows, vocab = score_BV.shape
    block = math.gcd(vocab, 128)
    score_BGS = score_BV.reshape(rows, -1, block)
    group_B = _first_largest(jnp.max(score_BGS, axis=-1))
    score_BS = jnp.take_along_axis(score_BGS, group_B[:, None, None], axis=1)[:, 0]
    return group_B * block + _first_largest(score_BS)


def _first_largest(x_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    last = x_BV.shape[1] - 1
    index_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    return jnp.min(jnp.where(x_BV == jnp.max(x_BV, axis=-1, keepdims=True), index_BV, last), axis=-1)
