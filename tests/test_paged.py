"""Pages of keys and values: what lands in them, and attention over them against the dense form, in bits where promised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import sharding
from sppo_jax.models import attention, paged
from tests.conftest import ODD

SLOTS, WIDTH, POOL = 8, 4, 40  # of one replica
HEADS, KV_HEADS, CHANNELS = 6, 2, 10
LONGEST = WIDTH * paged.PAGE


def layer(kv_heads=KV_HEADS):
    return dataclasses.replace(ODD, kv_heads=kv_heads, heads=HEADS, head_dim=CHANNELS)


def ragged_slots(rng, slots=SLOTS):
    """Random keys and values of every column, queries, where each slot is, and its own pages."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    keys, values = draw(2, slots, LONGEST, KV_HEADS, CHANNELS)
    position = rng.integers(0, LONGEST, slots).astype(np.int32)
    position[:3] = 0, paged.PAGE - 1, paged.PAGE  # the edges of a page
    table = rng.permutation(POOL)[: slots * WIDTH].reshape(slots, WIDTH).astype(np.int32)
    return draw(slots, HEADS, CHANNELS), keys, values, position, np.ones(slots, bool), table


def step(
    mesh,
    q,
    keys,
    values,
    position,
    active,
    table,
    *,
    window=None,
    softcap=None,
    scale=None,
    quantize=False,
    pages=None,
):
    """Fill the columns before `position`, then one decode step at it: output and pages."""
    rows = np.arange(len(position))
    if pages is None:
        pages = paged.empty(POOL, layer(keys.shape[2]), jnp.float32, mesh, quantize=quantize)

    @jax.jit
    def run(pages, q, keys, values, k, v, position, active, table):
        pages = paged.fill(pages, keys, values, table, position, mesh)
        work = paged.work(position, active, table, window, mesh)
        return paged.attend(q, k, v, pages, work, scale=scale, softcap=softcap, kernel="xla", mesh=mesh)

    out, pages = run(
        pages, q, keys, values, keys[rows, position], values[rows, position], position, active, table
    )
    return np.asarray(out), pages


def dense(q, keys, values, position, window=None, softcap=None, scale=None):
    mask = attention.cache_mask(jnp.asarray(position), keys.shape[1], window)
    return np.asarray(
        attention.attend(*map(jnp.asarray, (q[:, None], keys, values)), mask, scale=scale, softcap=softcap)[
            :, 0
        ]
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"window": 100, "softcap": 3.0, "scale": 0.5}, {"window": 64}, {"window": 1}],
)
def test_ragged_lengths_equal_dense_attention(one_device, options):
    for seed in range(3):
        data = ragged_slots(np.random.default_rng(seed))
        out, _ = step(one_device, *data, **options)
        np.testing.assert_allclose(out, dense(*data[:4], **options), atol=1e-5)
