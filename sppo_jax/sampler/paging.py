"""Keys and values of the sampler in pages of 64 tokens: where they lie, and how they are written.

A layer has P pages of S tokens of N heads with C channels. Keys and values are apart, or interleaved as the TPU's kernel
reads them. A token's column is its position: it lies in page table[slot, column // S], row column % S. The batch is cut
over the mesh axes of letter B; each piece (a replica) owns a piece of the pages, and page ids count within it. So every
function of pages is a shard_map.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sppo_jax import sharding
from sppo_jax.models.architecture import Architecture

PAGE = 64  # tokens
BEYOND = jnp.iinfo(jnp.int32).max  # a page outside every pool: writes to it are dropped
# The dimensions of interleaved pages, and of keys, values and scales that are apart, as sharding.spec's letters.
BOTH, APART, TURNED = "B.NC", ("B.NC", "B.NC", "B.N"), ("BNC.", "BN.C", "BN.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's keys and values on all replicas, apart. In int8 each token and head carries a float32 scale.

    `turned`, on CPUs, they lie as products read them, in 0.7 of the time. On a TPU writing a token would then copy all pages.
    """

    keys: Any  # [P, S, N, C]; turned: [P, N, C, S]
    values: Any  # [P, S, N, C]; turned: [P, N, S, C]
    key_scale: Any = None  # [P, S, N]; turned: [P, N, S]
    value_scale: Any = None
    turned: bool = field(default=False, metadata={"static": True})

    @property
    def heads(self) -> int:
        """N."""
        return self.values.shape[1 if self.turned else 2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interleaved:
    """One layer's keys and values on all replicas as jax.experimental.pallas.ops.tpu.ragged_paged_attention reads them."""

    both: Any  # [P, S, 2N, C], heads in the order k0 v0 k1 v1

    @property
    def heads(self) -> int:
        """N."""
        return self.both.shape[2] // 2


AnyPages = Pages | Interleaved


def bytes_per_page(architecture: Architecture, dtype: Any, quantize: bool) -> int:
    """Bytes of one page in all layers, over all devices of a replica."""
    heads = architecture.layers * PAGE * 2 * architecture.kv_heads
    return heads * (
        architecture.head_dim + 4 if quantize else architecture.head_dim * jnp.dtype(dtype).itemsize
    )


def shapes(
    pages_per_replica: int,
    architecture: Architecture,
    dtype: Any,
    mesh: Mesh,
    *,
    interleaved: bool = False,
    quantize: bool = False,
) -> AnyPages:
    """Shapes and placement of one layer's pages, for compilation before they exist.

    Raises ValueError for interleaved ones in int8: the TPU's kernel takes one scale for all keys, fixed when it is compiled.
    """
    if interleaved and quantize:
        raise ValueError("interleaved pages cannot be in int8")
    pages = pages_per_replica * sharding.batch_shards(mesh)
    heads, channels = architecture.kv_heads, architecture.head_dim

    def like(letters: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, partition(letters, mesh, heads))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if interleaved:
        return Interleaved(like(BOTH, (pages, PAGE, 2 * heads, channels), dtype))
    turned, dtype = sharding.platform(mesh) == "cpu", jnp.int8 if quantize else dtype
    size = {"B": pages, ".": PAGE, "N": heads, "C": channels}
    keys, values, scale = (
        like(letters, tuple(size[letter] for letter in letters), one)
        for letters, one in zip(TURNED if turned else APART, (dtype, dtype, jnp.float32), strict=True)
    )
    return Pages(keys, values, scale, scale, turned) if quantize else Pages(keys, values, turned=turned)


def empty(like: AnyPages) -> AnyPages:
    """One layer's pages of these shapes, all zeros, allocated in place on their devices."""
    return jax.tree.map(lambda x: _zeros(x.shape, x.dtype, x.sharding)(), like)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Callable[[], Array]:
    """The program that makes one layer's zeros, compiled once for all layers and iterations."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)


def fill(
    pages: AnyPages,
    k_PTNC: Float[Array, "P T N C"],
    v_PTNC: Float[Array, "P T N C"],
    table_PW: Int[Array, "P W"],
    length_P: Int[Array, " P"],
    mesh: Mesh,
) -> AnyPages:
    """The pages with the first `length_P` columns of prefill's rows in them; the rest of a row's last page becomes zeros.

    Rows are split over the replicas in order.
    """

    def local(pages: AnyPages, k_PTNC: Array, v_PTNC: Array, table_PW: Array, length_P: Array) -> AnyPages:
        rows, size, heads, channels = k_PTNC.shape
        blocks = -(-size // PAGE)
        real_PT11 = (jnp.arange(size)[None] < length_P[:, None])[..., None, None]
        pad = ((0, 0), (0, blocks * PAGE - size), (0, 0), (0, 0))
        k_JSNC, v_JSNC = (
            jnp.pad(jnp.where(real_PT11, x, 0), pad).reshape(rows * blocks, PAGE, heads, channels)
            for x in (k_PTNC, v_PTNC)
        )
        begin_J = jnp.arange(blocks) * PAGE
        page_PJ = jnp.where(begin_J[None] < length_P[:, None], table_PW[:, :blocks], BEYOND)
        return write(pages, page_PJ.reshape(-1), None, k_JSNC, v_JSNC)

    spec = pages_partition(pages, mesh)
    kv = partition("B.NC", mesh, k_PTNC.shape[2])
    rows = sharding.spec("B", mesh)
    return on_each_device(local, mesh, (spec, kv, kv, rows, rows), spec)(
        pages, k_PTNC, v_PTNC, table_PW, length_P
    )


def copy(pages: AnyPages, source_B: Int[Array, " B"], target_B: Int[Array, " B"], mesh: Mesh) -> AnyPages:
    """The pages with page `source` copied to page `target` for each slot whose target is >= 0; other slots cost no time."""

    def local(pages: AnyPages, source_B: Array, target_B: Array) -> AnyPages:
        (slot_B,) = jnp.nonzero(target_B >= 0, size=target_B.shape[0], fill_value=0)

        def one(i: Array, pages: AnyPages) -> AnyPages:
            slot = slot_B[i]
            return jax.tree.map(lambda x: x.at[target_B[slot]].set(x[source_B[slot]]), pages)

        return jax.lax.fori_loop(0, jnp.sum(target_B >= 0), one, pages)

    spec = pages_partition(pages, mesh)
    slots = sharding.spec("B", mesh)
    return on_each_device(local, mesh, (spec, slots, slots), spec)(pages, source_B, target_B)


def write(
    pages: AnyPages,
    page: Int[Array, " R"],
    row: Int[Array, " R"] | None,
    k: Float[Array, "R *S N C"],
    v: Float[Array, "R *S N C"],
) -> AnyPages:
    """The pages with `k` and `v` written at these rows of them: [R, N, C]; or, without `row`, as whole pages: [R, S, N, C].

    int8 pages get them rounded, in steps of |max| / 127.
    """
    if isinstance(pages, Interleaved):
        both = jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], 2 * k.shape[-2], k.shape[-1])
        place = (page,) if row is None else (page, row)
        return Interleaved(pages.both.at[place].set(both.astype(pages.both.dtype), mode="drop"))

    def put(into: Array, x: Array, channels_first: bool = False) -> Array:  # x: [R, S, N, ...] or [R, N, ...]
        x = x.astype(into.dtype)
        if not pages.turned:
            return into.at[(page,) if row is None else (page, row)].set(x, mode="drop")
        if row is None:
            x = x.swapaxes(1, 2)
            return into.at[page].set(x.swapaxes(2, 3) if channels_first else x, mode="drop")
        place = (page, *[slice(None)] * (2 if channels_first else 1), row)
        return into.at[place].set(x, mode="drop")

    if pages.key_scale is None:
        return replace(pages, keys=put(pages.keys, k, channels_first=True), values=put(pages.values, v))
    (k, k_scale), (v, v_scale) = _rounded(k), _rounded(v)
    return replace(
        pages,
        keys=put(pages.keys, k, channels_first=True),
        values=put(pages.values, v),
        key_scale=put(pages.key_scale, k_scale),
        value_scale=put(pages.value_scale, v_scale),
    )


def _rounded(x: Float[Array, "*rows C"]) -> tuple[Array, Array]:
    """`x` in whole steps between -127 and 127, and the step of each vector."""
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 127
    return jnp.round(x.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)[..., None]), scale


def partition(letters: str, mesh: Mesh, kv_heads: int) -> PartitionSpec:
    """The partition of `letters`. Where `tensor` does not divide kv_heads, every device has all heads, the queries' too."""
    if local_heads(sharding.tensor_shards(mesh), kv_heads) == kv_heads:
        letters = letters.replace("N", ".").replace("H", ".")
    return sharding.spec(letters, mesh)


def local_heads(tensor: int, kv_heads: int) -> int:
    """The number of kv heads on one device."""
    return kv_heads if kv_heads % tensor else kv_heads // tensor


def pages_partition(pages: AnyPages, mesh: Mesh) -> AnyPages:
    """The partitions of one layer's pages."""
    if isinstance(pages, Interleaved):
        return Interleaved(partition(BOTH, mesh, pages.heads))
    keys, values, scale = (
        partition(letters, mesh, pages.heads) for letters in (TURNED if pages.turned else APART)
    )
    apart = Pages(keys, values, turned=pages.turned)
    return apart if pages.key_scale is None else replace(apart, key_scale=scale, value_scale=scale)


def on_each_device(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`f` applied to each device's pieces. It may not communicate: its loops differ in length between replicas."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
