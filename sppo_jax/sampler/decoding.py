"""The sampler's three pure functions, which programs.py compiles: prefill, admit, decode.

They map (weights, slots, pages) to (slots, pages); nothing in them depends on which prompts are sampled.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from sppo_jax import sharding
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler import paged_attention, paging
from sppo_jax.sampler.capacity import Shape
from sppo_jax.sampler.next_token import next_token
from sppo_jax.sampler.paging import PAGE, AnyPages

STEPS = 32  # most decode steps of a chunk
NOTHING, START, STOP = 0, 1, 2  # Order.action


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The state of B slots: arrays, or their shapes and placements."""

    token: Any  # int32 [B]: the last token of the sequence, to be fed next
    position: Any  # int32 [B]: its position; the prompt's first token has 0
    generated: Any  # int32 [B]: tokens of the response so far; the next draw's random key folds it
    limit: Any  # int32 [B]: most tokens of the response
    active: Any  # bool [B]: the slot has a response that has not ended
    key: Any  # uint32 [B, 2]: threefry key of (seed, iteration, prompt_id, k)


class Order(NamedTuple):
    """What `admit` does to one slot. The host sends them as rows of one int32 array [B, 9]: one transfer."""

    action: Any = NOTHING  # NOTHING: go on; START: begin the response described below; STOP: free the slot
    token: Any = 0  # the prompt's last token
    position: Any = 0  # the position of that token
    limit: Any = 0  # most tokens of the response
    k: Any = 0  # the response's number among its prompt's
    id_high: Any = 0  # bits 32 to 63 of prompt_id
    id_low: Any = 0  # bits 0 to 31
    source: Any = -1  # page to copy from: the prompt's last page, where it is not full
    target: Any = -1  # page to copy to; -1: no copy


class Drawn(NamedTuple):
    """What one chunk drew, on the host."""

    tokens: np.ndarray  # int32 [B, STEPS]
    logprobs: np.ndarray  # float32 [B, STEPS], nats
    counts: np.ndarray  # int32 [B]: how many of the STEPS tokens belong to the slot's response
    active: np.ndarray  # bool [B]: the response has not ended
    steps: int  # decode steps run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """The state of a chunk's loop."""

    step: Any  # int32 []
    slots: Any  # Slots
    pages: Any  # list[AnyPages], one for each layer
    tokens: Any  # int32 [B, STEPS]: column `step` is drawn next
    logprobs: Any  # float32 [B, STEPS]


@dataclass(frozen=True)
class Decoder:
    """One model's prefill, admit and decode on one mesh."""

    graph: Any  # nnx graph of the serving model
    mesh: Mesh
    shape: Shape

    def prefill(
        self,
        weights: Any,
        pages: list[AnyPages],
        tokens_PT: Int[Array, "P T"],
        length_P: Int[Array, " P"],
        table_PW: Int[Array, "P W"],
    ) -> list[AnyPages]:
        """Return the pages with the keys and values of each prompt's first `length` tokens. Rows of length 0 are padding."""
        model, pages = nnx.merge(self.graph, weights), list(pages)
        place_PT = jnp.broadcast_to(jnp.arange(tokens_PT.shape[1])[None], tokens_PT.shape)
        seen = model.whole_attention(place_PT < length_P[:, None], self.mesh)

        def attention(i: int, q_PTHC: Array, k_PTNC: Array, v_PTNC: Array) -> Array:
            pages[i] = paging.fill(pages[i], k_PTNC, v_PTNC, table_PW, length_P, self.mesh)
            return seen(i, q_PTHC, k_PTNC, v_PTNC)

        # The result is unused, so XLA leaves out everything after the last layer's keys and values.
        model.forward(tokens_PT, model.rope(place_PT), attention)
        return pages

    def admit(
        self, slots: Slots, pages: list[AnyPages], seeds: UInt32[Array, "2"], orders_BO: Int[Array, "B O"]
    ) -> tuple[Slots, list[AnyPages]]:
        """Return the slots after the orders, and the pages with the copies that new responses need.

        `seeds`: seed and iteration; `orders_BO`: the fields of `Order` as columns.
        """
        order = Order(*jnp.unstack(orders_BO, axis=1))
        starts_B, stops_B = order.action == START, order.action == STOP

        def key(high: Array, low: Array, k: Array) -> Array:
            folded = jax.random.key(seeds[0], impl="threefry2x32")
            for part in (seeds[1], high, low, k):
                folded = jax.random.fold_in(folded, jax.lax.bitcast_convert_type(part, jnp.uint32))
            return jax.random.key_data(folded)

        keys_B2 = jax.vmap(key)(order.id_high, order.id_low, order.k)
        slots = Slots(
            token=jnp.where(starts_B, order.token, slots.token),
            position=jnp.where(starts_B, order.position, slots.position),
            generated=jnp.where(starts_B, 0, slots.generated),
            limit=jnp.where(starts_B, order.limit, slots.limit),
            active=(slots.active | starts_B) & ~stops_B,
            key=jnp.where(starts_B[:, None], keys_B2, slots.key),
        )
        target_B = jnp.where(starts_B, order.target, -1)
        return slots, [paging.copy(layer, order.source, target_B, self.mesh) for layer in pages]

    def resize(self, slots: Slots, source_B: Int[Array, " B"]) -> Slots:
        """Return the slots `source_B`, in that order, which count within each replica; -1 stands for a free slot."""

        def local(slots: Slots, source_B: Array) -> Slots:
            found = jax.tree.map(lambda x: x.at[jnp.maximum(source_B, 0)].get(mode="clip"), slots)
            return dataclasses.replace(found, active=found.active & (source_B >= 0))

        rows = sharding.spec("B", self.mesh)
        return paging.on_each_device(local, self.mesh, (rows, rows), rows)(slots, source_B)

    def decode(
        self,
        weights: Any,
        slots: Slots,
        pages: list[AnyPages],
        table_BW: Int[Array, "B W"],
        quota: Int[Array, ""],
        keep: Int[Array, ""],
    ) -> tuple[Slots, list[AnyPages], Int[Array, "B F"]]:
        """Draw at most STEPS tokens in every active slot; stop earlier once `quota` responses, or all but `keep`, have ended.

        The third result is all that the host reads, and `read` takes it apart. It holds per slot the tokens, the bits of
        their float32 log-probs, their number, whether the slot is still active, and the steps run.
        """
        model, (b, width) = nnx.merge(self.graph, weights), table_BW.shape
        # Looked up, since XLA on a CPU would compute an angle's sine again for every head of every layer that uses it.
        rope_T = model.rope(jnp.arange(width * PAGE))
        began = jnp.sum(slots.active)

        def unfinished(chunk: Chunk) -> Array:
            left = jnp.sum(chunk.slots.active)
            return (chunk.step < STEPS) & (left > keep) & (began - left < quota)

        empty = jnp.zeros((b, STEPS), jnp.int32), jnp.zeros((b, STEPS), jnp.float32)
        chunk = jax.lax.while_loop(
            unfinished,
            lambda chunk: self._step(model, rope_T, chunk, table_BW),
            Chunk(jnp.int32(0), slots, list(pages), *empty),
        )
        counts_B = chunk.slots.generated - slots.generated
        facts_B3 = jnp.stack(
            [counts_B, chunk.slots.active.astype(jnp.int32), jnp.full(b, chunk.step)], axis=1
        )
        bits_BT = jax.lax.bitcast_convert_type(chunk.logprobs, jnp.int32)
        return chunk.slots, chunk.pages, jnp.concatenate([chunk.tokens, bits_BT, facts_B3], axis=1)

    def _step(self, model: Transformer, rope_T: tuple[Array, Array], chunk: Chunk, table_BW: Array) -> Chunk:
        """Draw the next token of every slot; it counts in active slots only."""
        slots, shape = chunk.slots, self.shape
        logits_BV, pages = self._forward(model, rope_T, slots, chunk.pages, table_BW)
        keys_B = jax.random.wrap_key_data(slots.key, impl="threefry2x32")
        token_B, logprob_B = next_token(
            logits_BV,
            jax.vmap(jax.random.fold_in)(keys_B, slots.generated),
            temperature=shape.temperature,
            top_p=shape.top_p,
            top_k=shape.top_k,
        )
        generated_B = slots.generated + slots.active
        ended_B = jnp.isin(token_B, jnp.asarray(shape.eos, jnp.int32)) | (generated_B >= slots.limit)
        tokens_BT = chunk.tokens.at[:, chunk.step].set(token_B)
        logprobs_BT = chunk.logprobs.at[:, chunk.step].set(logprob_B)
        slots = dataclasses.replace(
            slots,
            token=token_B,
            position=slots.position + slots.active,
            generated=generated_B,
            active=slots.active & ~ended_B,
        )
        return Chunk(chunk.step + 1, slots, pages, tokens_BT, logprobs_BT)

    def _forward(
        self,
        model: Transformer,
        rope_T: tuple[Array, Array],
        slots: Slots,
        pages: list[AnyPages],
        table_BW: Array,
    ) -> tuple[Array, list[AnyPages]]:
        """Logits [B, V] after each slot's token, and the pages with that token's keys and values."""
        a, pages = model.architecture, list(pages)
        windows = [a.window_of(i) for i in range(a.layers)]
        works = {
            window: paged_attention.work(slots.position, slots.active, table_BW, window, self.mesh)
            for window in set(windows)
        }

        def attention(i: int, q_B1HC: Array, k_B1NC: Array, v_B1NC: Array) -> Array:
            seen_BHC, pages[i] = paged_attention.attend(
                q_B1HC[:, 0],
                k_B1NC[:, 0],
                v_B1NC[:, 0],
                pages[i],
                works[windows[i]],
                scale=a.query_scale,
                softcap=a.attention_softcap,
                mesh=self.mesh,
            )
            return seen_BHC[:, None]

        rope_B1 = jax.tree.map(lambda x: x.at[slots.position[:, None]].get(mode="clip"), rope_T)
        hidden_B1D = model.forward(slots.token[:, None], rope_B1, attention)
        return model.logits(hidden_B1D[:, 0]), pages


def read(found: np.ndarray) -> Drawn:
    """Take apart the third result of `decode`, fetched to the host."""
    tokens, logprobs = found[:, :STEPS], found[:, STEPS : 2 * STEPS].view(np.float32)
    counts, active, steps = found[:, 2 * STEPS :].T
    return Drawn(tokens, logprobs, counts, active.astype(bool), int(steps[0]))
