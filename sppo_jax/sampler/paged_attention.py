"""Attention of one query per slot over its pages of keys and values: by the TPU's kernel, or in plain XLA."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sppo_jax import sharding
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.attention import MASKED
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler.paging import (
    BEYOND,
    PAGE,
    AnyPages,
    Interleaved,
    Pages,
    local_heads,
    on_each_device,
    pages_partition,
    partition,
    write,
)

# Pages that the XLA kernel reads at a time, on CPUs at most so many bytes of them: they and their copies fit a core's cache.
GROUP, GROUP_OF_CPU, BYTES_OF_CPU = 256, 32, 3 * 2**18
# Block sizes of the TPU kernel. Each slot is computed for all queries of a block: with 32 queries that takes longer
# (1302 bundles) than reading 512 tokens of two heads (960 cycles of v5e), with 8 it does not (644). Blocks are read
# whole, dead pages included.
PAGES_PER_BLOCK, QUERIES_PER_BLOCK = 8, 8
Kernel = Literal["xla", "ragged"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """The pages that one decode step reads and writes, for all layers with one window size.

    Tables begin at the first page inside the window, and columns count from there.
    """

    page_B: Any  # page of the new token; BEYOND where the slot is not active
    row_B: Any  # row of the new token in its page
    table_BW: Any  # page ids
    length_B: Any  # columns, the new token's included; 0 where the slot is not active
    first_B: Any  # first column inside the window
    slot_I: Any  # the slot that each live page belongs to
    block_I: Any  # the place of that page in its slot's table
    items_R: Any  # number of live pages of each replica
    window: int | None = field(metadata={"static": True})


def choose(mesh: Mesh, forced: str, architecture: Architecture, dtype: Any) -> Kernel:
    """The kernel for `mesh`: on TPUs "ragged", if it compiles for the architecture and `forced` is not "xla"."""
    tensor = sharding.tensor_shards(mesh)
    ragged = _on_tpu(mesh, forced) and _compiles(tensor, architecture, jnp.dtype(dtype))
    return "ragged" if ragged else "xla"


def kernel_of(model: Transformer, mesh: Mesh) -> Kernel:
    """The kernel for attention over pages that matches the model's own attention kernel on the platform of `mesh`."""
    return choose(mesh, model.kernel.name, model.architecture, model.compute_dtype)


def supported(mesh: Mesh, forced: str, a: Architecture, dtype: Any) -> Callable[[int], bool]:
    """Return a predicate: can a replica of this many devices use the TPU kernel, each device with kv heads of its own?

    It is always true off TPUs, and where `forced` is "xla".
    """
    ragged = _on_tpu(mesh, forced)
    return lambda tensor: not ragged or (a.kv_heads % tensor == 0 and _compiles(tensor, a, jnp.dtype(dtype)))


def _on_tpu(mesh: Mesh, forced: str) -> bool:
    return sharding.platform(mesh) == "tpu" and forced != "xla"


def _compiles(tensor: int, a: Architecture, dtype: Any) -> bool:
    """Whether jax 0.10.2 compiles the TPU kernel: it needs whole tiles of heads, and heads of 128 channels.

    Wider heads compile with one per device, in bfloat16: Gemma-2-9B needs replicas of 8 devices, not 4.
    """
    heads = local_heads(tensor, a.kv_heads)
    words = 2 * heads * dtype.itemsize / 4
    tiled = words in (1, 2, 4, 8) or words % 8 == 0
    return tiled and (a.head_dim == 128 or (a.head_dim % 128 == 0 and heads == 1 and dtype.itemsize == 2))


def work(
    position_B: Int[Array, " B"],
    active_B: Bool[Array, " B"],
    table_BW: Int[Array, "B W"],
    window: int | None,
    mesh: Mesh,
) -> Work:
    """The `Work` of the step that writes column `position_B` of each active slot and attends from there back."""

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
            # An inactive slot's table may hold anything, so page 0 stands in: the ragged kernel reads one page of it.
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
    return on_each_device(local, mesh, (slots, slots, slots), slots)(position_B, active_B, table_BW)


def attend(
    q_BHC: Float[Array, "B H C"],
    k_BNC: Float[Array, "B N C"],
    v_BNC: Float[Array, "B N C"],
    pages: AnyPages,
    work: Work,
    *,
    scale: float | None,
    softcap: float | None,
    mesh: Mesh,
) -> tuple[Float[Array, "B H C"], AnyPages]:
    """Write the new keys and values, then attend from each slot's query to its columns. Returns the output and the pages.

    Interleaved pages are read by the TPU's kernel. Scores are multiplied by `scale` (None: 1/sqrt(C)) and soft-capped as in
    attention.attend; softmax is in float32. A slot's output depends neither on other slots nor on which pages it has; on a
    CPU that holds for every bit. Inactive slots get finite values.
    """
    scale = q_BHC.shape[2] ** -0.5 if scale is None else scale

    def local(
        q_BHC: Array, k_BNC: Array, v_BNC: Array, pages: AnyPages, work: Work
    ) -> tuple[Array, AnyPages]:
        pages = write(pages, work.page_B, work.row_B, k_BNC, v_BNC)
        if isinstance(pages, Interleaved):
            return _ragged(q_BHC, pages, work, scale, softcap), pages
        return _xla(q_BHC, pages, work, scale, softcap), pages

    heads = k_BNC.shape[1]
    spec = pages_partition(pages, mesh)
    kv, queries = partition("BNC", mesh, heads), partition("BHC", mesh, heads)
    ins = (queries, kv, kv, spec, sharding.spec("B", mesh))
    return on_each_device(local, mesh, ins, (queries, spec))(q_BHC, k_BNC, v_BNC, pages, work)


def _xla(q_BHC: Array, pages: Pages, work: Work, scale: float, softcap: float | None) -> Array:
    """Attention in plain XLA over live pages alone, a group at a time.

    The loop stores each page's max, sum and weighted values, which are joined at the end.
    """
    size, join = (_group_of_cpu(pages), _join_in_order) if pages.turned else (GROUP, _join)
    (slots, _, channels), heads = q_BHC.shape, pages.heads
    q_BNHC = q_BHC.reshape(slots, heads, -1, channels)

    def read(x: Array, page_G: Array) -> Array:
        found = x.at[page_G].get(mode="clip")
        if pages.turned:
            return found
        # Otherwise XLA on a TPU lays the pages out as the products prefer, and copies all of them in every step.
        return with_layout_constraint(found, Layout(major_to_minor=tuple(range(found.ndim)))).swapaxes(1, 2)

    def group(t: Array, parts: tuple[Array, ...]) -> tuple[Array, ...]:
        item_G = t * size + jnp.arange(size)  # results of items past the last are never read
        slot_G, block_G = work.slot_I.at[item_G].get(mode="clip"), work.block_I.at[item_G].get(mode="clip")
        page_G = work.table_BW.at[slot_G, block_G].get(mode="clip")
        keys_G, v_GNSC = (read(x, page_G).astype(q_BHC.dtype) for x in (pages.keys, pages.values))
        column_GS = block_G[:, None] * PAGE + jnp.arange(PAGE)[None]
        seen_GS = (column_GS < work.length_B[slot_G][:, None]) & (column_GS >= work.first_B[slot_G][:, None])
        seen_G11S = seen_GS[:, None, None]

        scores = "GNHC,GNCS->GNHS" if pages.turned else "GNHC,GNSC->GNHS"
        score_GNHS = jnp.einsum(scores, q_BNHC[slot_G], keys_G, preferred_element_type=jnp.float32)
        score_GNHS *= scale
        if pages.key_scale is not None:
            score_GNHS *= read(pages.key_scale, page_G)[:, :, None]
        if softcap is not None:
            score_GNHS = softcap * jnp.tanh(score_GNHS / softcap)
        score_GNHS = jnp.where(seen_G11S, score_GNHS, MASKED)
        top_GNH = jnp.max(score_GNHS, axis=-1)
        weight_GNHS = jnp.exp(score_GNHS - top_GNH[..., None])
        sum_GNH = jnp.sum(weight_GNHS, axis=-1)
        if pages.value_scale is not None:
            weight_GNHS *= read(pages.value_scale, page_G)[:, :, None]
        # Rows outside the mask hold another slot's leftovers, which may not be finite.
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


def _group_of_cpu(pages: Pages) -> int:
    """The number of pages that the XLA kernel reads at a time on a CPU."""
    each = 2 * math.prod(pages.values.shape[1:]) * pages.values.dtype.itemsize
    return min(GROUP_OF_CPU, max(1, BYTES_OF_CPU // each))


def _join(parts: tuple[Array, ...], work: Work) -> Array:
    """The output of each slot, from the partial softmax of its pages."""
    blocks_B = -(-work.length_B // PAGE)
    block_W = jnp.arange(work.table_BW.shape[1])
    item_BW = (jnp.cumsum(blocks_B) - blocks_B)[:, None] + block_W
    own_BW11 = (block_W < blocks_B[:, None])[..., None, None]
    top_BWNH, sum_BWNH, value_BWNHC = (x.at[item_BW].get(mode="clip") for x in parts)
    top_BWNH = jnp.where(own_BW11, top_BWNH, MASKED)
    share_BWNH = jnp.exp(top_BWNH - jnp.max(top_BWNH, axis=1, keepdims=True))
    sum_BNH = jnp.sum(jnp.where(own_BW11, share_BWNH * sum_BWNH, 0), axis=1)
    value_BNHC = jnp.sum(jnp.where(own_BW11[..., None], share_BWNH[..., None] * value_BWNHC, 0), axis=1)
    # The sum of a slot that is not active is 0.
    return value_BNHC / jnp.where(sum_BNH == 0, 1, sum_BNH)[..., None]


def _join_in_order(parts: tuple[Array, ...], work: Work) -> Array:
    """Join as `_join` does, but page after page: the last bits of jnp.sum depend on the table's width."""
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


def _ragged(q_BHC: Array, pages: Interleaved, work: Work, scale: float, softcap: float | None) -> Array:
    """Attention by the TPU kernel. An inactive slot reads one column: the kernel does not allow empty sequences."""
    slots, width = work.table_BW.shape
    return ragged_paged_attention(
        q_BHC,
        pages.both,
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
