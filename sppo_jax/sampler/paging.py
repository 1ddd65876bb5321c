"""Keys and values of the sampler in pages of 64 tokens, and one query's attention over them.

A layer's pages are one array [P pages, S tokens, 2N heads, C], heads interleaved k0 v0 k1 v1 as
jax.experimental.pallas.ops.tpu.ragged_paged_attention reads them. A token's column is its position: it lies in
page table[slot, column // S], row column % S. The batch is cut over the mesh axes of letter B; each piece (a
replica) owns a piece of the pages, and page ids count within it. So whatever touches pages is a shard_map.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sppo_jax import sharding
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.attention import MASKED

PAGE = 64  # tokens
GROUP, GROUP_OF_CPU = 256, 32  # pages that the XLA form takes at a time; a CPU's cache holds few
# Of the TPU kernel. Each slot is computed for all queries of a block: with 32 that takes longer (1302 bundles) than
# reading 512 tokens of two heads (960 cycles of v5e), with 8 not (644). Blocks are read whole, dead pages included.
PAGES_PER_BLOCK, QUERIES_PER_BLOCK = 8, 8
BEYOND = jnp.iinfo(jnp.int32).max  # a page of no pool: what is written there is dropped
Kernel = Literal["xla", "ragged"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's keys and values, of all replicas. int8 values carry the float32 scale of each token and head."""

    values: Any  # [P, S, 2N, C]
    scale: Any  # [P, S, 2N], or None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """What one decode step reads and where it writes, for all layers of one window.

    Tables begin at the first page that the window shows, and columns count from there.
    """

    page_B: Any  # the new token's; BEYOND where the slot is not active
    row_B: Any
    table_BW: Any
    length_B: Any  # columns, the new token's included; 0 where the slot is not active
    first_B: Any  # first column inside the window
    slot_I: Any  # the live pages, one item each: whose it is,
    block_I: Any  # and its place in the table
    items_R: Any  # how many items each replica has
    window: int | None = field(metadata={"static": True})


def choose(mesh: Mesh, forced: str, architecture: Architecture, dtype: Any) -> Kernel:
    """The kernel for `mesh`: on TPUs "ragged", where it serves the architecture and `forced` is not "xla"."""
    serves = _on_tpu(mesh, forced) and _serves(mesh.shape["tensor"], architecture, jnp.dtype(dtype))
    return "ragged" if serves else "xla"


def served(mesh: Mesh, forced: str, architecture: Architecture, dtype: Any) -> Callable[[int], bool]:
    """For which numbers of devices of `mesh` do replicas have the best kernel that there is for them, and heads of their own?"""
    ragged = _on_tpu(mesh, forced)

    def serves(tensor: int) -> bool:
        return architecture.kv_heads % tensor == 0 and _serves(tensor, architecture, jnp.dtype(dtype))

    return lambda tensor: not ragged or serves(tensor)


def _on_tpu(mesh: Mesh, forced: str) -> bool:
    return sharding.platform(mesh) == "tpu" and forced != "xla"


def _serves(tensor: int, a: Architecture, dtype: Any) -> bool:
    """What the kernel of jax 0.10.2 compiles for: whole tiles of heads, and heads of 128 channels.

    Of wider ones it takes one alone on a device, in bfloat16: Gemma-2-9B needs replicas of 8 devices, not 4.
    """
    heads = _local(tensor, a.kv_heads)
    words = 2 * heads * dtype.itemsize / 4
    tiled = words in (1, 2, 4, 8) or words % 8 == 0
    return tiled and (a.head_dim == 128 or (a.head_dim % 128 == 0 and heads == 1 and dtype.itemsize == 2))


def bytes_per_page(architecture: Architecture, dtype: Any, quantize: bool) -> int:
    """Of one page in all layers, over all devices of `tensor`."""
    heads = architecture.layers * PAGE * 2 * architecture.kv_heads
    return heads * (
        architecture.head_dim + 4 if quantize else architecture.head_dim * jnp.dtype(dtype).itemsize
    )


def shapes(
    pages_per_replica: int, architecture: Architecture, dtype: Any, mesh: Mesh, *, quantize: bool = False
) -> Pages:
    """One layer's pages without their memory: what ahead-of-time compilation takes."""
    spec = _pages_spec(mesh, architecture.kv_heads, quantize)
    size = (pages_per_replica * sharding.batch_shards(mesh), PAGE, 2 * architecture.kv_heads)

    def like(spec: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    values = like(spec.values, (*size, architecture.head_dim), jnp.int8 if quantize else dtype)
    return Pages(values, like(spec.scale, size, jnp.float32) if quantize else None)


def empty(
    pages_per_replica: int, architecture: Architecture, dtype: Any, mesh: Mesh, *, quantize: bool = False
) -> Pages:
    """One layer's pages of zeros, born where they stay."""
    like = shapes(pages_per_replica, architecture, dtype, mesh, quantize=quantize)
    return jax.tree.map(lambda x: _zeros(x.shape, x.dtype, x.sharding)(), like)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Callable[[], Array]:
    """Compiled once for all layers and iterations."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)


def fill(
    pages: Pages,
    k_PTNC: Float[Array, "P T N C"],
    v_PTNC: Float[Array, "P T N C"],
    table_PW: Int[Array, "P W"],
    length_P: Int[Array, " P"],
    mesh: Mesh,
) -> Pages:
    """Store the first `length_P` columns of prefill's rows; the rest of the last page becomes zeros.

    Rows are split over the replicas in order.
    """

    def local(pages: Pages, k_PTNC: Array, v_PTNC: Array, table_PW: Array, length_P: Array) -> Pages:
        rows, size, heads, channels = k_PTNC.shape
        blocks = -(-size // PAGE)
        kv_PTMC = _interleave(k_PTNC, v_PTNC)
        real_PT = jnp.arange(size)[None] < length_P[:, None]
        kv_PTMC = jnp.pad(
            jnp.where(real_PT[..., None, None], kv_PTMC, 0),
            ((0, 0), (0, blocks * PAGE - size), (0, 0), (0, 0)),
        )
        kv_JSMC = kv_PTMC.reshape(rows * blocks, PAGE, 2 * heads, channels)
        begin_J = jnp.arange(blocks) * PAGE
        page_PJ = jnp.where(begin_J[None] < length_P[:, None], table_PW[:, :blocks], BEYOND)
        return _store(pages, (page_PJ.reshape(-1),), kv_JSMC)

    spec = _pages_spec(mesh, k_PTNC.shape[2], pages.scale is not None)
    kv = _spec("B.NC", mesh, k_PTNC.shape[2])
    rows = sharding.spec("B", mesh)
    return _shard_map(local, mesh, (spec, kv, kv, rows, rows), spec)(
        pages, k_PTNC, v_PTNC, table_PW, length_P
    )


def copy(pages: Pages, source_B: Int[Array, " B"], target_B: Int[Array, " B"], mesh: Mesh) -> Pages:
    """Page `source` to page `target`, for slots with target >= 0. Takes time for these alone."""

    def local(pages: Pages, source_B: Array, target_B: Array) -> Pages:
        (slot_B,) = jnp.nonzero(target_B >= 0, size=target_B.shape[0], fill_value=0)

        def one(i: Array, pages: Pages) -> Pages:
            slot = slot_B[i]
            return jax.tree.map(lambda x: x.at[target_B[slot]].set(x[source_B[slot]]), pages)

        return jax.lax.fori_loop(0, jnp.sum(target_B >= 0), one, pages)

    spec = _pages_spec(mesh, pages.values.shape[2] // 2, pages.scale is not None)
    slots = sharding.spec("B", mesh)
    return _shard_map(local, mesh, (spec, slots, slots), spec)(pages, source_B, target_B)


def work(
    position_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    table_BW: Int[Array, "B W"],
    window: int | None,
    mesh: Mesh,
) -> Work:
    """The work of the step that writes column `position_B` of each active slot and looks back from there."""

    def local(position_B: Array, active_B: Array, table_BW: Array) -> Work:
        slots, width = table_BW.shape
        new_BW = jnp.take_along_axis(table_BW, (position_B // PAGE)[:, None], axis=1, mode="clip")
        oldest_B = jnp.zeros_like(position_B)
        if window is not None:
            oldest_B = jnp.maximum(position_B + 1 - window, 0)
            width = min(width, (window + 2 * PAGE - 2) // PAGE)
        place_BW = oldest_B[:, None] // PAGE + jnp.arange(width)[None]
        length_B = jnp.where(active_B, position_B + 1 - oldest_B // PAGE * PAGE, 0)
        blocks_B = -(-length_B // PAGE)
        end_B = jnp.cumsum(blocks_B)
        item_I = jnp.arange(slots * width)
        slot_I = jnp.minimum(jnp.searchsorted(end_B, item_I, side="right"), slots - 1)
        return Work(
            page_B=jnp.where(active_B, new_BW[:, 0], BEYOND),
            row_B=position_B % PAGE,
            # Page 0 stands in for what a slot that is not active may hold: the ragged kernel reads one page of it.
            table_BW=jnp.where(
                active_B[:, None], jnp.take_along_axis(table_BW, place_BW, axis=1, mode="clip"), 0
            ),
            length_B=length_B,
            first_B=oldest_B % PAGE,
            slot_I=slot_I,
            block_I=item_I - (end_B - blocks_B)[slot_I],
            items_R=end_B[-1:],
            window=window,
        )

    slots = sharding.spec("B", mesh)
    return _shard_map(local, mesh, (slots, slots, slots), slots)(position_B, active_B, table_BW)


def attend(
    q_BHC: Float[Array, "B H C"],
    k_BNC: Float[Array, "B N C"],
    v_BNC: Float[Array, "B N C"],
    pages: Pages,
    work: Work,
    *,
    scale: float | None,
    softcap: float | None,
    kernel: Kernel,
    mesh: Mesh,
) -> tuple[Float[Array, "B H C"], Pages]:
    """Write the new keys and values, then let each slot's query see its columns: the output, and the pages.

    Scores times `scale` (None: 1/sqrt(C)), soft-capped like attention.attend, softmax in float32. What a slot gets
    depends on no other slot and not on which pages it has, in no bit on a CPU. Slots that are not active get something finite.
    """
    scale = q_BHC.shape[2] ** -0.5 if scale is None else scale
    cpu = sharding.platform(mesh) == "cpu"
    see = _ragged if kernel == "ragged" else functools.partial(_xla, cpu=cpu)

    def local(q_BHC: Array, k_BNC: Array, v_BNC: Array, pages: Pages, work: Work) -> tuple[Array, Pages]:
        pages = _store(pages, (work.page_B, work.row_B), _interleave(k_BNC, v_BNC))
        return see(q_BHC, pages, work, scale, softcap), pages

    heads = k_BNC.shape[1]
    spec = _pages_spec(mesh, heads, pages.scale is not None)
    kv, queries = _spec("BNC", mesh, heads), _spec("BHC", mesh, heads)
    ins = (queries, kv, kv, spec, sharding.spec("B", mesh))
    return _shard_map(local, mesh, ins, (queries, spec))(q_BHC, k_BNC, v_BNC, pages, work)


def _xla(q_BHC: Array, pages: Pages, work: Work, scale: float, softcap: float | None, *, cpu: bool) -> Array:
    """Live pages alone, a group at a time; each leaves max, sum and weighted values, which are joined at the end."""
    size, join = (GROUP_OF_CPU, _join_in_order) if cpu else (GROUP, _join)
    slots, heads, channels = q_BHC.shape[0], pages.values.shape[2] // 2, pages.values.shape[3]
    q_BNHC = q_BHC.reshape(slots, heads, -1, channels)

    def group(t: Array, parts: tuple[Array, ...]) -> tuple[Array, ...]:
        item_G = t * size + jnp.arange(size)  # nobody reads what comes of those past the last
        slot_G, block_G = work.slot_I.at[item_G].get(mode="clip"), work.block_I.at[item_G].get(mode="clip")
        page_G = work.table_BW.at[slot_G, block_G].get(mode="clip")
        kv_GSNKC = pages.values.at[page_G].get(mode="clip").reshape(size, PAGE, heads, 2, channels)
        # Else XLA on a TPU gives the pages the order that the products like, and copies all of them in every step.
        kv_GSNKC = with_layout_constraint(kv_GSNKC, Layout(major_to_minor=(0, 1, 2, 3, 4)))
        k_GNSC, v_GNSC = (kv_GSNKC[:, :, :, i].swapaxes(1, 2).astype(q_BHC.dtype) for i in range(2))
        column_GS = block_G[:, None] * PAGE + jnp.arange(PAGE)[None]
        seen_GS = (column_GS < work.length_B[slot_G][:, None]) & (column_GS >= work.first_B[slot_G][:, None])
        seen_G11S = seen_GS[:, None, None]

        score_GNHS = jnp.einsum("GNHC,GNSC->GNHS", q_BNHC[slot_G], k_GNSC, preferred_element_type=jnp.float32)
        score_GNHS *= scale
        if pages.scale is not None:
            scale_GSNK = pages.scale.at[page_G].get(mode="clip").reshape(size, PAGE, heads, 2)
            k_scale_GN1S, v_scale_GN1S = (scale_GSNK[..., i].swapaxes(1, 2)[:, :, None] for i in range(2))
            score_GNHS *= k_scale_GN1S
        if softcap is not None:
            score_GNHS = softcap * jnp.tanh(score_GNHS / softcap)
        score_GNHS = jnp.where(seen_G11S, score_GNHS, MASKED)
        top_GNH = jnp.max(score_GNHS, axis=-1)
        weight_GNHS = jnp.exp(score_GNHS - top_GNH[..., None])
        sum_GNH = jnp.sum(weight_GNHS, axis=-1)
        if pages.scale is not None:
            weight_GNHS *= v_scale_GN1S
        # Rows that are not seen hold what another slot left, which may not be finite.
        v_GNSC = jnp.where(seen_GS[:, None, :, None], v_GNSC, 0)
        value_GNHC = jnp.einsum(
            "GNHS,GNSC->GNHC", weight_GNHS.astype(q_BHC.dtype), v_GNSC, preferred_element_type=jnp.float32
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(part, x, t * size, axis=0)
            for part, x in zip(parts, (top_GNH, sum_GNH, value_GNHC), strict=True)
        )

    groups = -(-work.slot_I.shape[0] // size)
    like = ((), (), (channels,))
    parts = tuple(jax.lax.empty((groups * size, *q_BNHC.shape[1:3], *c), jnp.float32) for c in like)
    with jax.named_scope("live_pages"):
        parts = jax.lax.fori_loop(0, -(-work.items_R[0] // size), group, parts)
    return join(parts, work).astype(q_BHC.dtype).reshape(q_BHC.shape)


def _join(parts: tuple[Array, ...], work: Work) -> Array:
    """Softmax of each slot from those of its pages."""
    blocks_B = -(-work.length_B // PAGE)
    block_W = jnp.arange(work.table_BW.shape[1])
    item_BW = (jnp.cumsum(blocks_B) - blocks_B)[:, None] + block_W
    own_BW11 = (block_W < blocks_B[:, None])[..., None, None]
    top_BWNH, sum_BWNH, value_BWNHC = (x.at[item_BW].get(mode="clip") for x in parts)
    top_BWNH = jnp.where(own_BW11, top_BWNH, MASKED)
    share_BWNH = jnp.exp(top_BWNH - jnp.max(top_BWNH, axis=1, keepdims=True))
    sum_BNH = jnp.sum(jnp.where(own_BW11, share_BWNH * sum_BWNH, 0), axis=1)
    value_BNHC = jnp.sum(jnp.where(own_BW11[..., None], share_BWNH[..., None] * value_BWNHC, 0), axis=1)
    return value_BNHC / jnp.where(sum_BNH == 0, 1, sum_BNH)[..., None]  # 0: not active


def _join_in_order(parts: tuple[Array, ...], work: Work) -> Array:
    """The same page after page: what jnp.sum gives hangs on the table's width, in its last bits."""
    blocks_B = -(-work.length_B // PAGE)
    begin_B = jnp.cumsum(blocks_B) - blocks_B

    def page(j: Array, sofar: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_BNH, sum_BNH, value_BNHC = sofar
        own_B11 = (j < blocks_B)[:, None, None]
        next_BNH, more_BNH, values_BNHC = (x.at[begin_B + j].get(mode="clip") for x in parts)
        new_BNH = jnp.where(own_B11, jnp.maximum(top_BNH, next_BNH), top_BNH)
        old_BNH, add_BNH = jnp.exp(top_BNH - new_BNH), jnp.exp(next_BNH - new_BNH)
        sum_BNH = jnp.where(own_B11, sum_BNH * old_BNH + more_BNH * add_BNH, sum_BNH)
        values_BNHC = value_BNHC * old_BNH[..., None] + values_BNHC * add_BNH[..., None]
        return new_BNH, sum_BNH, jnp.where(own_B11[..., None], values_BNHC, value_BNHC)

    shape = (blocks_B.shape[0], *parts[2].shape[1:])  # B, N, H, C
    start = (jnp.full(shape[:3], MASKED), jnp.zeros(shape[:3]), jnp.zeros(shape))
    _, sum_BNH, value_BNHC = jax.lax.fori_loop(0, jnp.max(blocks_B), page, start)
    return value_BNHC / jnp.where(sum_BNH == 0, 1, sum_BNH)[..., None]


def _ragged(q_BHC: Array, pages: Pages, work: Work, scale: float, softcap: float | None) -> Array:
    """The TPU kernel. A slot that is not active reads one column: the kernel knows no empty sequence.

    It takes one scale for all int8 keys, known when it is compiled, and ours have one for each: "xla" reads those.
    """
    if pages.scale is not None:
        raise ValueError("ragged paged attention cannot read int8 pages: take the kernel xla")
    slots, width = work.table_BW.shape
    return ragged_paged_attention(
        q_BHC,
        pages.values,
        jnp.maximum(work.length_B, 1),
        work.table_BW,
        jnp.arange(slots + 1, dtype=jnp.int32),
        jnp.full(1, slots, jnp.int32),
        sm_scale=scale,
        sliding_window=work.window,
        soft_cap=softcap,
        num_kv_pages_per_block=min(PAGES_PER_BLOCK, width),
        num_queries_per_block=min(QUERIES_PER_BLOCK, slots),
    )


def _interleave(k: Float[Array, "*rows N C"], v: Float[Array, "*rows N C"]) -> Float[Array, "*rows M C"]:
    *rows, heads, channels = k.shape
    return jnp.stack([k, v], axis=-2).reshape(*rows, 2 * heads, channels)


def _store(pages: Pages, place: tuple[Array, ...], kv: Float[Array, "*rows M C"]) -> Pages:
    """`kv` at the pages (and rows of them) `place`, rounded to int8 where the pages are: |max| / 127 a step."""
    if pages.scale is None:
        return Pages(pages.values.at[place].set(kv.astype(pages.values.dtype), mode="drop"), None)
    scale = jnp.max(jnp.abs(kv.astype(jnp.float32)), axis=-1) / 127
    step = jnp.where(scale == 0, 1, scale)[..., None]
    values = jnp.round(kv.astype(jnp.float32) / step).astype(jnp.int8)
    return Pages(
        pages.values.at[place].set(values, mode="drop"), pages.scale.at[place].set(scale, mode="drop")
    )


def _spec(letters: str, mesh: Mesh, kv_heads: int) -> PartitionSpec:
    """Heads lie over `tensor` where it divides the kv heads, else whole on every device, queries' heads with them."""
    if _local(mesh.shape["tensor"], kv_heads) == kv_heads:
        letters = letters.replace("N", ".").replace("H", ".")
    return sharding.spec(letters, mesh)


def _local(tensor: int, kv_heads: int) -> int:
    """Kv heads of one device."""
    return kv_heads if kv_heads % tensor else kv_heads // tensor


def _pages_spec(mesh: Mesh, kv_heads: int, quantize: bool) -> Pages:
    return Pages(_spec("B.NC", mesh, kv_heads), _spec("B.N", mesh, kv_heads) if quantize else None)


def _shard_map(f: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Every axis by hand. Loops run a different number of times on each replica, so nothing in `f` may communicate."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
