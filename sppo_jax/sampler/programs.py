"""The sampler's programs: prefill, admit, decode. Pure functions of weights, pages and slots, compiled before use."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from sppo_jax import compilation, sharding
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler import paging
from sppo_jax.sampler.next_token import next_token
from sppo_jax.sampler.paging import PAGE, Pages

STEPS = 32  # most decode steps of a chunk
AHEAD = (
    2 * STEPS
)  # a chunk begins before the last one's tokens are known: tokens that a slot may have gained by its end
SMALLEST_BUCKET, PREFILL_TOKENS = 32, 1024  # prompt tokens of one row, and of one prefill on one replica

# Columns of the orders that `admit` takes, one row per slot.
NOTHING, START, STOP = 0, 1, 2
ORDER, TOKEN, POSITION, LIMIT, K, ID_HIGH, ID_LOW, SOURCE, TARGET = range(9)
ORDERS = 9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What each of B slots is doing."""

    token: Int[Array, " B"]  # fed next
    position: Int[Array, " B"]  # of that token, from the prompt's first on
    said: Int[Array, " B"]  # tokens of the response so far
    limit: Int[Array, " B"]
    active: Array  # bool [B]
    key: Array  # uint32 [B, 2]: threefry key of (seed, iteration, prompt, k)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes that the programs are compiled for, over all replicas."""

    slots: int
    pages: int
    width: int  # pages that one response may have
    eos: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    quantize: bool = False  # the pages


class Programs:
    """Compiled programs of one model on one mesh. `weights`: the unstacked model's state, arrays or their shapes."""

    def __init__(
        self, graph: Any, weights: Any, mesh: Mesh, shape: Shape, kernel: paging.Kernel | None = None
    ):
        """`kernel`: of paged attention; default: the one that goes with the model's own on this platform."""
        self.graph, self.mesh, self.shape = graph, mesh, shape
        self.weights = jax.tree.map(_described, weights)
        self.model: Transformer = nnx.merge(graph, self.weights)
        self.kernel = kernel_of(self.model, mesh) if kernel is None else kernel
        self.replicas = sharding.batch_shards(mesh)
        a = self.model.architecture
        each = shape.pages // self.replicas
        pool = paging.shapes(each, a, self.model.compute_dtype, mesh, quantize=shape.quantize)
        self.pages: list[Pages] = [pool] * a.layers
        self._compiled: dict[Any, Any] = {}

    def rows(self, bucket: int) -> int:
        """Prompts of one prefill on one replica."""
        return max(1, min(PREFILL_TOKENS // bucket, self.shape.slots // self.replicas))

    def compile(self, buckets: set[int]) -> int:
        """Compile what is not yet, side by side where there is a host's memory for it. Returns how many programs that were."""
        missing = [name for name in ("admit", "decode", *sorted(buckets)) if name not in self._compiled]
        lowered = [self.lower(name) for name in missing]
        if sharding.platform(self.mesh) == "cpu":  # the compiler's memory is the sampler's
            for name, one in zip(missing, lowered, strict=True):
                self._compiled[name] = one.compile()
                compilation.return_memory()
        else:
            with ThreadPoolExecutor() as threads:
                compiled = threads.map(lambda one: one.compile(), lowered)
                self._compiled |= dict(zip(missing, compiled, strict=True))
        return len(missing)

    def __getitem__(self, name: Any) -> Any:
        """The compiled "admit", "decode", or prefill of a bucket."""
        return self._compiled[name]

    def lower(self, name: Any) -> Any:
        """A program before it is compiled; names as in `[]`."""
        b = self.shape.slots
        vector, matrix = sharding.named("B", self.mesh), sharding.named("BT", self.mesh)
        whole = sharding.replicated(self.mesh)

        def ints(*shape: int, placed: Any = None) -> jax.ShapeDtypeStruct:
            default = whole if not shape else vector if len(shape) == 1 else matrix
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed or default)

        slots = self.slots_like()
        table = ints(b, self.shape.width)
        if name == "admit":
            seeds = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
            function = jax.jit(self.admit, donate_argnums=(0, 1), out_shardings=_placed((slots, self.pages)))
            return function.lower(slots, self.pages, seeds, ints(b, ORDERS))
        if name == "decode":
            outs = (*_placed((slots, self.pages)), whole)
            function = jax.jit(self.decode, donate_argnums=(1, 2), out_shardings=outs)
            return function.lower(self.weights, slots, self.pages, table, ints())
        rows = self.rows(name) * self.replicas
        function = jax.jit(self.prefill, donate_argnums=(1,), out_shardings=_placed(self.pages))
        return function.lower(
            self.weights, self.pages, ints(rows, name), ints(rows), ints(rows, -(-name // PAGE))
        )

    def slots_like(self) -> Slots:
        """Shapes and placement of the slots."""
        vector, matrix = sharding.named("B", self.mesh), sharding.named("BT", self.mesh)
        b = self.shape.slots
        like: dict[str, Any] = {
            name: jax.ShapeDtypeStruct((b,), jnp.int32, sharding=vector)
            for name in ("token", "position", "said", "limit")
        }
        like["active"] = jax.ShapeDtypeStruct((b,), jnp.bool_, sharding=vector)
        return Slots(**like, key=cast(Any, jax.ShapeDtypeStruct((b, 2), jnp.uint32, sharding=matrix)))

    def prefill(
        self,
        weights: Any,
        pages: list[Pages],
        tokens_PT: Int[Array, "P T"],
        length_P: Int[Array, " P"],
        table_PW: Int[Array, "P W"],
    ) -> list[Pages]:
        """Put the keys and values of each prompt's first `length` tokens into its pages. Rows of length 0 are none."""
        model, pages = nnx.merge(self.graph, weights), list(pages)
        place_PT = jnp.broadcast_to(jnp.arange(tokens_PT.shape[1])[None], tokens_PT.shape)
        seen = model.whole_attention(place_PT < length_P[:, None], self.mesh)

        def attention(i: int, q_PTHC: Array, k_PTNC: Array, v_PTNC: Array) -> Array:
            pages[i] = paging.fill(pages[i], k_PTNC, v_PTNC, table_PW, length_P, self.mesh)
            return seen(i, q_PTHC, k_PTNC, v_PTNC)

        model.forward(
            tokens_PT, place_PT, attention
        )  # what comes after the last layer's keys is left out by XLA
        return pages

    def admit(
        self, slots: Slots, pages: list[Pages], seeds: UInt32[Array, "2"], orders_BO: Int[Array, "B O"]
    ) -> tuple[Slots, list[Pages]]:
        """Carry out the orders: a slot starts with a new response, stops, or goes on. `seeds`: seed and iteration."""
        order = functools.partial(jnp.take, orders_BO, axis=1)
        starts_B, stops_B = order(ORDER) == START, order(ORDER) == STOP

        def key(high: Array, low: Array, k: Array) -> Array:
            folded = jax.random.key(seeds[0], impl="threefry2x32")
            for part in (seeds[1], high, low, k):
                folded = jax.random.fold_in(folded, jax.lax.bitcast_convert_type(part, jnp.uint32))
            return jax.random.key_data(folded)

        keys_B2 = jax.vmap(key)(order(ID_HIGH), order(ID_LOW), order(K))
        slots = Slots(
            token=jnp.where(starts_B, order(TOKEN), slots.token),
            position=jnp.where(starts_B, order(POSITION), slots.position),
            said=jnp.where(starts_B, 0, slots.said),
            limit=jnp.where(starts_B, order(LIMIT), slots.limit),
            active=(slots.active | starts_B) & ~stops_B,
            key=jnp.where(starts_B[:, None], keys_B2, slots.key),
        )
        source_B, target_B = order(SOURCE), jnp.where(starts_B, order(TARGET), -1)
        return slots, [paging.copy(layer, source_B, target_B, self.mesh) for layer in pages]

    def decode(
        self,
        weights: Any,
        slots: Slots,
        pages: list[Pages],
        table_BW: Int[Array, "B W"],
        quota: Int[Array, ""],
    ) -> tuple[Slots, list[Pages], Int[Array, "B F"]]:
        """At most STEPS tokens in every active slot; fewer once `quota` responses have ended, or none is left.

        The third result is what the host reads: per slot the tokens, the bits of their float32 log-probs, how many, is
        it still active, and the steps run.
        """
        model = nnx.merge(self.graph, weights)
        began = jnp.sum(slots.active)
        b = self.shape.slots

        def unfinished(carry: tuple) -> Array:
            step, slots, *_ = carry
            left = jnp.sum(slots.active)
            return (step < STEPS) & (left > 0) & (began - left < quota)

        def advance(carry: tuple) -> tuple:
            step, slots, pages, tokens_BT, logprobs_BT = carry
            logits_BV, pages = self._forward(model, slots, pages, table_BW)
            keys_B = jax.random.wrap_key_data(slots.key, impl="threefry2x32")
            token_B, logprob_B = next_token(
                logits_BV,
                jax.vmap(jax.random.fold_in)(keys_B, slots.said),
                temperature=self.shape.temperature,
                top_p=self.shape.top_p,
                top_k=self.shape.top_k,
            )
            said_B = slots.said + slots.active
            ended_B = jnp.isin(token_B, jnp.asarray(self.shape.eos, jnp.int32)) | (said_B >= slots.limit)
            tokens_BT = tokens_BT.at[:, step].set(token_B)
            logprobs_BT = logprobs_BT.at[:, step].set(logprob_B)
            slots = dataclasses.replace(
                slots,
                token=token_B,
                position=slots.position + slots.active,
                said=said_B,
                active=slots.active & ~ended_B,
            )
            return step + 1, slots, pages, tokens_BT, logprobs_BT

        before_B = slots.said
        empty = (jnp.zeros((b, STEPS), jnp.int32), jnp.zeros((b, STEPS), jnp.float32))
        step, slots, pages, tokens_BT, logprobs_BT = jax.lax.while_loop(
            unfinished, advance, (jnp.int32(0), slots, list(pages), *empty)
        )
        bits_BT = jax.lax.bitcast_convert_type(logprobs_BT, jnp.int32)
        facts_B3 = jnp.stack(
            [slots.said - before_B, slots.active.astype(jnp.int32), jnp.full(b, step)], axis=1
        )
        found = jnp.concatenate([tokens_BT, bits_BT, facts_B3], axis=1)
        return slots, pages, found

    def _forward(
        self, model: Transformer, slots: Slots, pages: list[Pages], table_BW: Array
    ) -> tuple[Array, list[Pages]]:
        """Logits [B, V] after each slot's token."""
        a, pages = model.architecture, list(pages)
        windows = [a.window_of(i) for i in range(a.layers)]
        works = {
            window: paging.work(slots.position, slots.active, table_BW, window, self.mesh)
            for window in set(windows)
        }

        def attention(i: int, q_B1HC: Array, k_B1NC: Array, v_B1NC: Array) -> Array:
            seen_BHC, pages[i] = paging.attend(
                q_B1HC[:, 0],
                k_B1NC[:, 0],
                v_B1NC[:, 0],
                pages[i],
                works[windows[i]],
                scale=a.query_scale,
                softcap=a.attention_softcap,
                kernel=self.kernel,
                mesh=self.mesh,
            )
            return seen_BHC[:, None]

        hidden_B1D = model.forward(slots.token[:, None], slots.position[:, None], attention)
        return model.logits(hidden_B1D[:, 0]), pages


def kernel_of(model: Transformer, mesh: Mesh) -> paging.Kernel:
    """Of attention over pages: what goes with the model's own on this platform."""
    return paging.choose(mesh, model.kernel.name, model.architecture, model.compute_dtype)


def sampling_mesh(model: Transformer, mesh: Mesh, weights: int, limit: int | None) -> Mesh:
    """The devices of `mesh` as replicas that sample from `model`, which has `weights` bytes in each of them."""
    served = paging.served(mesh, model.kernel.name, model.architecture, model.compute_dtype)
    return sharding.sampling_mesh(mesh, weights, limit, served)


def bucket(length: int) -> int:
    """Prompts are padded to a power of two, by their own length alone."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size


def read(found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """What `decode` tells the host: tokens [B, STEPS], log-probs, counts [B], active [B], steps run."""
    tokens, logprobs = found[:, :STEPS], found[:, STEPS : 2 * STEPS].view(np.float32)
    counts, active, steps = found[:, 2 * STEPS :].T
    return tokens, logprobs, counts, active.astype(bool), int(steps[0])


def _placed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _described(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
