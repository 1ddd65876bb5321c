"""The CPU's attention in blocks against dense masks: values, gradients, skipped blocks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import sharding
from sppo_jax.models import attention, cpu_attention
from sppo_jax.models.attention import Kernel
from tests.test_attention import assert_close, padded, seen_and_gradients


def rows_of(*rows, width):
    """Return segment [B, T] for rows of sequences of these lengths; a negative length is padding, as is the rest."""
    found = np.zeros((len(rows), width), np.int32)
    for b, lengths in enumerate(rows):
        begin = 0
        for i, n in enumerate(lengths):
            found[b, begin : begin + abs(n)] = i + 1 if n > 0 else 0
            begin += abs(n)
    return jnp.asarray(found)


PACKED = rows_of((300,), (100, 3, 61, 64, 70), (-70, 130), (1,), (), (-150, 20, 100), width=300)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 70, "scale": 0.1}, {"window": 1}, {"window": 400}, {"softcap": 3.0}, {"kv_heads": 4}],
    ids=str,
)
def test_blocks_equal_dense_masks(one_device, options):
    for mesh in (one_device, None):
        found = seen_and_gradients(Kernel("blocked", mesh), PACKED, **options)
        assert_close(found, seen_and_gradients(Kernel(), PACKED, **options))


@pytest.mark.parametrize(("sizes", "heads"), [((2, 2, 2), 4), ((1, 2, 4), 4), ((1, 2, 4), 6)])
def test_blocks_are_the_same_on_every_mesh(sizes, heads):
    rows = PACKED[:4]
    found = seen_and_gradients(Kernel("blocked", sharding.make_mesh(*sizes)), rows, heads=heads)
    assert_close(found, seen_and_gradients(Kernel(), rows, heads=heads))


def test_a_row_does_not_depend_on_its_neighbours(one_device):
    of = Kernel("blocked", one_device)
    q, k, v = (
        jnp.asarray(np.random.default_rng(n).normal(size=(6, 300, n, 16)).astype(np.float32))
        for n in (4, 2, 2)
    )

    @jax.jit
    def run(q, k, v, rows):
        return attention.whole(rows, [None], of)(0, q, k, v)

    together = run(q, k, v, PACKED)
    for b in range(6):
        alone = run(q[b : b + 1], k[b : b + 1], v[b : b + 1], PACKED[b : b + 1])
        np.testing.assert_array_equal(together[b : b + 1], alone)


def test_bfloat16_is_as_good_as_dense(one_device):
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.normal(size=(6, 300, n, 16)), jnp.float32) for n in (4, 2, 2)]
    real = (PACKED > 0)[..., None, None]

    def run(kernel, dtype):
        def loss(q, k, v):
            seen = attention.whole(PACKED, [None], kernel)(0, q, k, v)
            return jnp.sum(jnp.where(real, seen.astype(jnp.float32), 0) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in exact))

    def away(found):
        return [float(jnp.abs(a.astype(jnp.float32) - b).max()) for a, b in zip(found, truth, strict=True)]

    truth = run(Kernel(), jnp.float32)
    dense, mine = away(run(Kernel(), jnp.bfloat16)), away(run(Kernel("blocked", one_device), jnp.bfloat16))
    assert all(a <= 1.5 * b for a, b in zip(mine, dense, strict=True)), (mine, dense)


@pytest.mark.parametrize("window", [None, 1, 65, 130])
def test_only_blocks_that_share_a_sequence_are_computed(window):
    size, (rows, length) = cpu_attention.BLOCK, PACKED.shape
    wide = jnp.pad(PACKED, ((0, 0), (0, -length % size)))
    first = np.asarray(cpu_attention.first_blocks(wide, window))
    seen = np.asarray(attention.causal_mask(wide, window))
    cut = seen.reshape(rows, first.shape[1], size, first.shape[1], size).any(axis=(2, 4))
    for b in range(rows):
        for i in range(first.shape[1]):
            needed = np.flatnonzero(cut[b, i])
            assert (first[b, i] <= needed).all()
            if b in (0, 1, 3, 4):  # no padding before a sequence: its blocks would begin with it
                assert first[b, i] == (needed[0] if len(needed) else i + 1)


@pytest.mark.parametrize("kernel", ["blocked", "xla"])
def test_scores_of_whole_rows_do_not_exist(one_device, kernel):
    length, heads = 2048, 4
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = [like((1, length, n, 16)) for n in (heads, 2, 2)]
    rows = jnp.ones((1, length), jnp.int32)

    def loss(*args):
        return jnp.sum(attention.whole(rows, [None], Kernel(kernel, one_device))(0, *args))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    taken, scores = compiled.memory_analysis().temp_size_in_bytes, 4 * heads * length**2
    assert taken < 0.15 * scores if kernel == "blocked" else taken > scores


def test_short_rows_are_computed_at_once(one_device):
    """Short rows have no block to skip: the loop would only take time."""

    def loops(length):
        rows = jnp.ones((1, length), jnp.int32)
        heads = jnp.ones((1, length, 2, 16))
        of = attention.whole(rows, [None], Kernel("blocked", one_device))
        return "while" in str(jax.make_jaxpr(lambda x: of(0, x, x, x))(heads))

    assert (loops(2 * cpu_attention.BLOCK), loops(2 * cpu_attention.BLOCK + 1)) == (False, True)


def test_padding_is_finite(one_device):
    valid = padded((0, 130, 200), 200, "middle").astype(jnp.int32)
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 200, 2, 16)), jnp.float32)
    of = attention.whole(valid, [None], Kernel("blocked", one_device))
    out, pullback = jax.vjp(lambda q, k, v: of(0, q, k, v), heads, heads, heads)
    for x in (out, *pullback(jnp.ones_like(out))):
        assert np.isfinite(x).all()
