"""PairRM's attention: each token attends to the others by content and by distance (DeBERTa, arXiv:2006.03654).

    score[i, j] = (q_i · k_j + q_i · keys[row(i - j)] + k_j · queries[row(i - j)]) / sqrt(3 C)

`keys` and `queries` are the layer's projections of the table of distances; row() is the log bucket of a distance. The two
distance terms are constant along diagonals, and turning diagonals into columns is the cost, which differs by platform:

- "heads": one head at a time, so that its scores stay in the cache, with two gathers. For CPUs.
- "gather": the same for all heads at once. For GPUs; on a TPU it would move 40 to 166 GB per layer of 4096 tokens.
- "shift": the table expanded to all distances, a matrix product per block of rows, and a change of strides. For XLA on TPU
  v2 to v4.
- "pallas": a kernel that keeps the scores of 128 rows in fast memory and turns diagonals by strided rolls. From TPU v5 on.

B batch, T time, H heads, C channels of a head, P rows of the table, O distances.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

FORM = {"cpu": "heads", "gpu": "gather", "tpu": "pallas"}
BLOCK = 128  # rows of a tile of "shift" and "pallas": a TPU's lanes
# Bytes that the kernel may take: T = 2048 in float32 needs about 20 MiB. A v5p has 64 MiB, a v5e 128, v2 to v4 only 16.
_FAST_MEMORY = 32 * 2**20
_SMALL = ("TPU v2", "TPU v3", "TPU v4")
_MASKED = -1e30  # finite, so that a row of padding still has a softmax


def form_of(mesh: Mesh) -> str:
    """Return the form for the devices of `mesh`: their platform's, unless fast memory is too small for the kernel."""
    device = mesh.devices.flat[0]
    if device.platform == "tpu" and device.device_kind.startswith(_SMALL):
        return "shift"
    return FORM[device.platform]


def table_rows(length: int, buckets: int, farthest: int) -> np.ndarray:
    """Return the row of the table for each distance d = i - j from -length to length, int32 [2 length + 1].

    Distances up to buckets / 2 have a row each; beyond, each step of a logarithm up to `farthest` has a row, and all
    larger distances share the last. Needs 1 <= buckets / 2 < farthest - 1, which files.py checks.
    """
    distance = np.arange(-length, length + 1)
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle) / middle
    steps = np.ceil(np.log(far) / np.log((farthest - 1) / middle) * (middle - 1))
    beyond = np.sign(distance) * (middle + steps).astype(np.int64)
    bucket = np.where(np.abs(distance) <= middle, distance, beyond)
    return np.clip(bucket + buckets, 0, 2 * buckets - 1).astype(np.int32)


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BTHC: Float[Array, "B T H C"],
    v_BTHC: Float[Array, "B T H C"],
    keys_PHC: Float[Array, "P H C"],
    queries_PHC: Float[Array, "P H C"],
    length_B: Int[Array, " B"],
    rows: np.ndarray,
    form: str,
) -> Float[Array, "B T H C"]:
    """Return the attention over the first `length_B` tokens; `rows` is `table_rows` of T. Scores and softmax are float32.

    float32 inputs are multiplied in float32 on every platform. For "shift" and "pallas" T must be below 128, or a
    multiple of it.
    """
    return FORMS[form](q_BTHC, k_BTHC, v_BTHC, keys_PHC, queries_PHC, length_B, rows)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Return the precision for products of this dtype: by default a TPU would round float32 to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _average(scores: Array, v_JC: Array, length: Array) -> Array:
    """Return softmax(scores [..., I, J]) v over j < length, divided after the product, where there is least to divide."""
    scores = jnp.where(jnp.arange(scores.shape[-1]) < length, scores, _MASKED)
    weight = jnp.exp(scores - scores.max(-1, keepdims=True))
    seen = _dot("...ij,...jc->...ic", weight.astype(v_JC.dtype), v_JC)
    return (seen / weight.sum(-1, keepdims=True)).astype(v_JC.dtype)


def _one_head(
    index: tuple[Array, Array], q: Array, k: Array, v: Array, keys: Array, queries: Array, n: Array
) -> Array:
    """Return one head of one text [T, C]: q, k, v [T, C]; keys, queries [P, C]; `index` from `_index`; `n` tokens."""
    scores = _dot("ic,jc->ij", q, k)
    scores += _dot("ic,pc->ip", q, keys).reshape(-1).at[index[0]].get(mode="promise_in_bounds")
    scores += _dot("pc,jc->pj", queries, k).reshape(-1).at[index[1]].get(mode="promise_in_bounds")
    return _average(scores / math.sqrt(3 * q.shape[-1]), v, n)


def _index(rows: np.ndarray, length: int, table: int) -> tuple[Array, Array]:
    """Return the flat positions of q_i · keys[row] in [T, P] and of queries[row] · k_j in [P, T]; int32 [T, T] each."""
    at = jnp.arange(length, dtype=jnp.int32)
    row_TT = jnp.asarray(rows)[at[:, None] - at + length]
    return at[:, None] * table + row_TT, row_TT * length + at


def _gather(
    q: Array, k: Array, v: Array, keys: Array, queries: Array, length_B: Array, rows: np.ndarray
) -> Array:
    one = functools.partial(_one_head, _index(rows, q.shape[1], len(keys)))
    heads = jax.vmap(one, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    return jax.vmap(heads, in_axes=(0, 0, 0, None, None, 0))(q, k, v, keys, queries, length_B)


def _heads(
    q: Array, k: Array, v: Array, keys: Array, queries: Array, length_B: Array, rows: np.ndarray
) -> Array:
    one = functools.partial(_one_head, _index(rows, q.shape[1], len(keys)))
    tables = jnp.moveaxis(keys, 1, 0), jnp.moveaxis(queries, 1, 0)

    def text(x: tuple[Array, ...]) -> Array:
        *qkv, n = x

        def head(y: tuple[Array, ...]) -> Array:
            q, k, v, keys, queries = y
            return one(q, k, v, keys, queries, n)

        return jnp.moveaxis(jax.lax.map(head, (*(jnp.moveaxis(y, 1, 0) for y in qkv), *tables)), 0, 1)

    return jax.lax.map(text, (q, k, v, length_B))


def _block(length: int) -> int:
    block = min(BLOCK, length)
    assert length % block == 0, f"a length of {length} is not a multiple of {BLOCK}"
    return block


def _spread(keys: Array, queries: Array, rows: np.ndarray) -> tuple[Array, Array]:
    """Return the tables at every distance, [2T, H, C] each, so that every tile of scores reads one contiguous run.

    Keys run from distance T - 1 down (along a row of scores j grows and i - j falls), queries from -(T - 1) up.
    """
    return keys[rows[:-1][::-1]], queries[rows[1:]]


def _shift(
    q: Array, k: Array, v: Array, keys: Array, queries: Array, length_B: Array, rows: np.ndarray
) -> Array:
    length = q.shape[1]
    block = _block(length)
    keys, queries = _spread(keys, queries, rows)

    def term(x_BTHC: Array, table_OHC: Array) -> Array:
        """Return [B, H, T, T], whose row t is x_t · table at the distance of t to every other token."""
        parts = []
        for at in range(0, length, block):
            run = table_OHC[length - at - block : 2 * length - at - 1]
            wide = _dot("bihc,ohc->bhio", x_BTHC[:, at : at + block], run)
            # Row t must move left by block - 1 - t. Read with rows shorter by one, each row starts one further right.
            flat = wide.reshape(*wide.shape[:2], -1)[..., block - 1 : -1] if block > 1 else wide[..., :-1]
            parts.append(flat.reshape(*flat.shape[:2], block, -1)[..., :length])
        return jnp.concatenate(parts, axis=2)

    scores = _dot("bihc,bjhc->bhij", q, k) + term(q, keys) + term(k, queries).swapaxes(-1, -2)
    out = _average(scores / math.sqrt(3 * q.shape[-1]), v.swapaxes(1, 2), length_B[:, None, None, None])
    return out.swapaxes(1, 2)


def _kernel(length: Any, q: Any, k: Any, v: Any, keys: Any, queries: Any, out: Any, scores: Any) -> None:
    """Compute a block of rows of one head of one text: q, out [block, C]; k, v [T, C]; keys, queries [2T, C] (`_spread`).

    `scores` [block, T] is float32 scratch.
    """
    block, total = scores.shape
    text, start = pl.program_id(1), pl.program_id(2) * block

    def dot(x: Array, y: Array) -> Array:
        """Return x y^T [M, N] of x [M, C] and y [N, C]."""
        return jax.lax.dot_general(
            x, y, (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=jnp.float32
        )

    def turned(x: Array) -> Array:
        """Roll row t left by block - 1 - t, so that a diagonal becomes a column."""
        return pltpu.roll(x, x.shape[1] - (block - 1), 1, stride=1, stride_axis=0)

    run = keys[pl.ds(pl.multiple_of(total - start - block, block), total + block)]
    near = turned(dot(q[...], run))[:, :total] + dot(q[...], k[...])
    for at in range(0, total, block):
        run = queries[pl.ds(pl.multiple_of(total + start - at - block, block), 2 * block)]
        far = turned(dot(k[at : at + block], run))[:, :block].T
        scores[:, at : at + block] = near[:, at : at + block] + far
    column = jax.lax.broadcasted_iota(jnp.int32, (block, total), 1)
    x = jnp.where(column < length[text], scores[...] * (1 / math.sqrt(3 * q.shape[1])), _MASKED)
    weight = jnp.exp(x - x.max(-1, keepdims=True))
    seen = jax.lax.dot_general(
        weight.astype(v.dtype),
        v[...],
        (((1,), (0,)), ((), ())),
        precision=precision(v.dtype),
        preferred_element_type=jnp.float32,
    )
    out[...] = (seen / weight.sum(-1, keepdims=True)).astype(out.dtype)


def _pallas(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    queries: Array,
    length_B: Array,
    rows: np.ndarray,
    interpret: bool = False,
) -> Array:
    texts, total, heads, channels = q.shape
    block = _block(total)
    by_head = [jnp.moveaxis(table, 1, 0) for table in _spread(keys, queries, rows)]
    # Heads outermost, so that a head's tables are fetched once for all texts.
    rows_of = pl.BlockSpec((None, None, block, channels), lambda h, b, i, _: (b, h, i, 0))
    all_of = pl.BlockSpec((None, None, total, channels), lambda h, b, i, _: (b, h, 0, 0))
    table = pl.BlockSpec((None, 2 * total, channels), lambda h, b, i, _: (h, 0, 0))
    call = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((texts, heads, total, channels), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(heads, texts, total // block),
            in_specs=[rows_of, all_of, all_of, table, table],
            out_specs=rows_of,
            scratch_shapes=[pltpu.VMEM((block, total), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_FAST_MEMORY),
        interpret=interpret,
    )
    return call(length_B, *(x.swapaxes(1, 2) for x in (q, k, v)), *by_head).swapaxes(1, 2)


FORMS: dict[str, Callable[..., Array]] = {
    "heads": _heads,
    "gather": _gather,
    "shift": _shift,
    "pallas": _pallas,
    # The kernel's arithmetic on any platform, for tests.
    "pallas_interpreted": functools.partial(_pallas, interpret=True),
}
