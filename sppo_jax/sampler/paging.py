"""Keys and values of the sampler in pages of 64 tokens: where they lie, and how they are written.

A layer's pages are one array [P pages, S tokens, 2N heads, C], heads interleaved k0 v0 k1 v1 as
jax.experimental.pallas.ops.tpu.ragged_paged_attention reads them. A token's column is its position: it lies in
page table[slot, column // S], row column % S. The batch is cut over the mesh axes of letter B; each piece (a
replica) owns a piece of the pages, and page ids count within it. So every function of pages is a shard_map.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sppo_jax import sharding
from sppo_jax.models.architecture import Architecture

PAGE = 64  # tokens
BEYOND = jnp.iinfo(jnp.int32).max  # a page outside every pool: writes to it are dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's keys and values on all replicas. int8 values carry a float32 scale for each token and head."""

    values: Any  # [P, S, 2N, C]
    scale: Any  # [P, S, 2N], or None


def bytes_per_page(architecture: Architecture, dtype: Any, quantize: bool) -> int:
    """Bytes of one page in all layers, over all devices of a replica."""
    heads = architecture.layers * PAGE * 2 * architecture.kv_heads
    return heads * (
        architecture.head_dim + 4 if quantize else architecture.head_dim * jnp.dtype(dtype).itemsize
    )


def shapes(
    pages_per_replica: int, architecture: Architecture, dtype: Any, mesh: Mesh, *, quantize: bool = False
) -> Pages:
    """Shapes and placement of one layer's pages, for compilation before they exist."""
    spec = pages_partition(mesh, architecture.kv_heads, quantize)
    size = (pages_per_replica * sharding.batch_shards(mesh), PAGE, 2 * architecture.kv_heads)

    def like(spec: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    values = like(spec.values, (*size, architecture.head_dim), jnp.int8 if quantize else dtype)
    return Pages(values, like(spec.scale, size, jnp.float32) if quantize else None)


def empty(
    pages_per_replica: int, architecture: Architecture, dtype: Any, mesh: Mesh, *, quantize: bool = False
) -> Pages:
    """One layer's pages, all zeros, allocated in place on the devices of `mesh`."""
    like = shapes(pages_per_replica, architecture, dtype, mesh, quantize=quantize)
    return jax.tree.map(lambda x: _zeros(x.shape, x.dtype, x.sharding)(), like)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Callable[[], Array]:
    """The program that makes one layer's zeros, compiled once for all layers and iterations."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)


def fill(
    pages: Pages,
    k_PTNC: Float[Array, "P T N C"],
    v_PTNC: Float[Array, "P T N C"],
    table_PW: Int[Array, "P W"],
    length_P: Int[Array, " P"],
    mesh: Mesh,
) -> Pages:
    """The pages with the first `length_P` columns of prefill's rows in them; the rest of a row's last page becomes zeros.

    Rows are split over the replicas in order.
    """

    def local(pages: Pages, k_PTNC: Array, v_PTNC: Array, table_PW: Array, length_P: Array) -> Pages:
        rows, size, heads, channels = k_PTNC.shape
        blocks = -(-size // PAGE)
        kv_PTMC = interleave(k_PTNC, v_PTNC)
        real_PT = jnp.arange(size)[None] < length_P[:, None]
        kv_PTMC = jnp.pad(
            jnp.where(real_PT[..., None, None], kv_PTMC, 0),
            ((0, 0), (0, blocks * PAGE - size), (0, 0), (0, 0)),
        )
        kv_JSMC = kv_PTMC.reshape(rows * blocks, PAGE, 2 * heads, channels)
        begin_J = jnp.arange(blocks) * PAGE
        page_PJ = jnp.where(begin_J[None] < length_P[:, None], table_PW[:, :blocks], BEYOND)
        return write(pages, (page_PJ.reshape(-1),), kv_JSMC)

    spec = pages_partition(mesh, k_PTNC.shape[2], pages.scale is not None)
    kv = partition("B.NC", mesh, k_PTNC.shape[2])
    rows = sharding.spec("B", mesh)
    return on_each_device(local, mesh, (spec, kv, kv, rows, rows), spec)(
        pages, k_PTNC, v_PTNC, table_PW, length_P
    )


def copy(pages: Pages, source_B: Int[Array, " B"], target_B: Int[Array, " B"], mesh: Mesh) -> Pages:
    """The pages with page `source` copied to page `target` for each slot whose target is >= 0; other slots cost no time."""

    def local(pages: Pages, source_B: Array, target_B: Array) -> Pages:
        (slot_B,) = jnp.nonzero(target_B >= 0, size=target_B.shape[0], fill_value=0)

        def one(i: Array, pages: Pages) -> Pages:
            slot = slot_B[i]
            return jax.tree.map(lambda x: x.at[target_B[slot]].set(x[source_B[slot]]), pages)

        return jax.lax.fori_loop(0, jnp.sum(target_B >= 0), one, pages)

    spec = pages_partition(mesh, pages.values.shape[2] // 2, pages.scale is not None)
    slots = sharding.spec("B", mesh)
    return on_each_device(local, mesh, (spec, slots, slots), spec)(pages, source_B, target_B)


def interleave(k: Float[Array, "*rows N C"], v: Float[Array, "*rows N C"]) -> Float[Array, "*rows M C"]:
    """Keys and values as pages hold them: k0 v0 k1 v1 along the heads."""
    *rows, heads, channels = k.shape
    return jnp.stack([k, v], axis=-2).reshape(*rows, 2 * heads, channels)


def write(pages: Pages, place: tuple[Array, ...], kv: Float[Array, "*rows M C"]) -> Pages:
    """The pages with `kv` written at the pages (and rows) `place`. int8 pages get it rounded, in steps of |max| / 127."""
    if pages.scale is None:
        return Pages(pages.values.at[place].set(kv.astype(pages.values.dtype), mode="drop"), None)
    scale = jnp.max(jnp.abs(kv.astype(jnp.float32)), axis=-1) / 127
    step = jnp.where(scale == 0, 1, scale)[..., None]
    values = jnp.round(kv.astype(jnp.float32) / step).astype(jnp.int8)
    return Pages(
        pages.values.at[place].set(values, mode="drop"), pages.scale.at[place].set(scale, mode="drop")
    )


def partition(letters: str, mesh: Mesh, kv_heads: int) -> PartitionSpec:
    """The partition of `letters`. Where `tensor` does not divide kv_heads, every device has all heads, the queries' too."""
    if local_heads(sharding.tensor_shards(mesh), kv_heads) == kv_heads:
        letters = letters.replace("N", ".").replace("H", ".")
    return sharding.spec(letters, mesh)


def local_heads(tensor: int, kv_heads: int) -> int:
    """The number of kv heads on one device."""
    return kv_heads if kv_heads % tensor else kv_heads // tensor


def pages_partition(mesh: Mesh, kv_heads: int, quantize: bool) -> Pages:
    """The partitions of one layer's pages."""
    return Pages(partition("B.NC", mesh, kv_heads), partition("B.N", mesh, kv_heads) if quantize else None)


def on_each_device(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`f` applied to each device's pieces. It may not communicate: its loops differ in length between replicas."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
