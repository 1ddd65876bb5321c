"""Draw K responses per prompt from the policy: prefill, decode with a cache, next-token sampling, all jitted.

A response is a function of (weights, seed, iteration, prompt, k) alone: each prompt is padded by its own length
only, every batch has the same shape, and the random key of each token folds (seed, iteration, prompt_id, k,
position).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sppo_jax import sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models.transformer import KeyValue, Transformer
from sppo_jax.records import Prompt, Responses
from sppo_jax.tokens import chat_prompt, own_eos_ids, response_text

BUCKET = 32  # prompts are padded to a multiple of this many tokens


class Sampler:
    """A policy ready to decode: weights cast once, programs compiled at first use and reused for every batch."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        sampling: Sampling,
        mesh: Mesh | None = None,
        *,
        eos: Sequence[int] | None = None,
    ):
        """`eos`: ids that end a response; default: those that the tokenizer and its template tell."""
        self.mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
        self.tokenizer, self.sampling, self.architecture = tokenizer, sampling, model.architecture
        ids = own_eos_ids(tokenizer) if eos is None else eos
        self.eos = np.asarray(ids, np.int32)
        self.graph, weights = nnx.split(model)
        self.set_weights(weights)

    def set_weights(self, weights: Any) -> None:
        """Sample from other parameters of the same model from now on."""
        dtype = nnx.merge(self.graph, weights).compute_dtype
        self.weights = jax.jit(lambda w: jax.tree.map(lambda x: x.astype(dtype), w))(weights)

    def generate(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int,
        iteration: int = 0,
        responses: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Responses]:
        """K `responses` (default: sampling.responses) for each prompt, in the order given.

        `on_progress(prompts, tokens)` hears what each finished batch added. Raises BadInput for a prompt that
        leaves no room for max_new_tokens in the model's context.
        """
        records = [chat_prompt(self.tokenizer, p) if isinstance(p, str) else p for p in prompts]
        k = self.sampling.responses if responses is None else responses
        base = jax.random.fold_in(jax.random.key(seed), iteration)
        done: dict[int, Responses] = {}
        for size, rows in self._batches(records, k):
            tokens, lengths, logprobs = self._run([records[i] for i in rows], size, k, base)
            for place, i in enumerate(rows):
                cut = slice(place * k, (place + 1) * k)
                done[i] = self._record(records[i], tokens[cut], lengths[cut], logprobs[cut])
            if on_progress is not None:
                on_progress(len(rows), int(lengths[: len(rows) * k].sum()))
        return [done[i] for i in range(len(records))]

    def _batches(self, prompts: Sequence[Prompt], k: int) -> Iterator[tuple[int, list[int]]]:
        """(padded length, indices) of batches of at most slots // K prompts whose own lengths share a bucket."""
        a, width = self.architecture, self._width(k)
        buckets: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            size = -(-len(prompt.ids) // BUCKET) * BUCKET
            if len(prompt.ids) + self.sampling.max_new_tokens > a.max_positions:
                raise BadInput(
                    f"a prompt of {len(prompt.ids)} tokens and sampling.max_new_tokens="
                    f"{self.sampling.max_new_tokens} exceed the model's {a.max_positions} positions"
                )
            if max(prompt.ids) >= a.vocab:
                raise BadInput(
                    f"a prompt holds token id {max(prompt.ids)}, and the model has {a.vocab} tokens"
                )
            buckets.setdefault(size, []).append(i)
        for size, members in sorted(buckets.items()):
            for start in range(0, len(members), width):
                yield size, members[start : start + width]

    def _width(self, k: int) -> int:
        """Prompts per batch: as many as fill the slots, and a whole number for every piece of the mesh."""
        pieces = sharding.batch_shards(self.mesh)
        return max(1, self.sampling.slots // (k * pieces)) * pieces

    def _run(self, prompts: list[Prompt], size: int, k: int, base: Array) -> tuple[np.ndarray, ...]:
        width = self._width(k)
        tokens = np.zeros((width, size), np.int32)
        lengths = np.ones(width, np.int32)  # rows that only fill the batch hold one token, and are dropped
        ids = np.zeros((width, 2), np.uint32)
        real = np.zeros(width, bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.ids)] = prompt.ids
            lengths[row] = len(prompt.ids)
            ids[row] = prompt.prompt_id >> 32, prompt.prompt_id & 0xFFFFFFFF
            real[row] = True

        def place(x: np.ndarray) -> Array:
            return jax.device_put(x, sharding.named("B" + "T" * (x.ndim - 1), self.mesh))

        s = self.sampling
        logits, cache, keys = _prefill(
            self.graph, self.weights, place(tokens), place(lengths), place(ids), base,
            k=k, room=s.max_new_tokens, mesh=self.mesh,
        )  # fmt: skip
        out, _ = _decode(
            self.graph, self.weights, cache, logits, place(np.repeat(lengths, k)), place(np.repeat(~real, k)),
            keys, jnp.asarray(self.eos), steps=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p,
        )  # fmt: skip
        return tuple(jax.device_get(out))

    def _record(
        self, prompt: Prompt, tokens: np.ndarray, lengths: np.ndarray, logprobs: np.ndarray
    ) -> Responses:
        ids = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        return Responses(
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            prompt_ids=list(prompt.ids),
            response_ids=ids,
            responses=[response_text(self.tokenizer, row) for row in ids],
            finish_reason=["stop" if row[-1] in self.eos else "length" for row in ids],
            logprobs=[float(x) for x in logprobs],
        )


@functools.partial(jax.jit, static_argnames=("graph", "k", "room", "mesh"))
def _prefill(
    graph: Any,
    weights: Any,
    tokens_PT: Int[Array, "P T"],
    length_P: Int[Array, " P"],
    id_P2: Array,
    base: Array,
    *,
    k: int,
    room: int,
    mesh: Mesh,
) -> tuple[Float[Array, "B V"], list[KeyValue], Array]:
    """Run each prompt once and hand its cache, widened by `room`, to its K rows (B = P K), with their keys."""
    model = nnx.merge(graph, weights)
    logits_PV, cache = model.prefill(tokens_PT, length_P)

    def widen(x_PSNC: Array) -> Array:
        x_BSNC = jnp.repeat(jnp.pad(x_PSNC, ((0, 0), (0, room), (0, 0), (0, 0))), k, axis=0)
        return jax.lax.with_sharding_constraint(x_BSNC, sharding.named("BSNC", mesh, x_BSNC.shape))

    def key(id_2: Array, k: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, id_2[0]), id_2[1]), k)

    keys_PK = jax.vmap(jax.vmap(key, (None, 0)), (0, None))(id_P2, jnp.arange(k))
    widened = [(widen(keys), widen(values)) for keys, values in cache]
    return jnp.repeat(logits_PV, k, axis=0), widened, keys_PK.reshape(-1)


@functools.partial(
    jax.jit, static_argnames=("graph", "steps", "temperature", "top_p"), donate_argnames=("cache",)
)
def _decode(
    graph: Any,
    weights: Any,
    cache: list[KeyValue],
    logits_BV: Float[Array, "B V"],
    prompt_length_B: Int[Array, " B"],
    done_B: Array,
    keys_B: Array,
    eos: Int[Array, " E"],
    *,
    steps: int,
    temperature: float,
    top_p: float,
) -> tuple[tuple[Int[Array, "B T"], Int[Array, " B"], Float[Array, " B"]], list[KeyValue]]:
    """Sample until every row has ended or has `steps` tokens: tokens, lengths (EOS included), log-prob sums."""
    model = nnx.merge(graph, weights)
    rows = keys_B.shape[0]

    def unfinished(state: tuple) -> Array:
        step, _, _, done_B, *_ = state
        return (step < steps) & ~jnp.all(done_B)

    def advance(state: tuple) -> tuple:
        step, tokens_BT, length_B, done_B, total_B, logits_BV, cache = state
        key_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        token_B = next_token(logits_BV, key_B, temperature=temperature, top_p=top_p)
        picked_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
        total_B += jnp.where(done_B, 0.0, picked_B)
        tokens_BT = tokens_BT.at[:, step].set(jnp.where(done_B, 0, token_B))
        length_B += ~done_B
        done_B |= jnp.isin(token_B, eos)
        # A finished row overwrites its last column until the batch ends; nobody reads it.
        logits_BV, cache = model.decode(token_B, prompt_length_B + length_B - 1, cache)
        return step + 1, tokens_BT, length_B, done_B, total_B, logits_BV, cache

    zero_B = jnp.zeros(rows, jnp.int32)
    start = (0, jnp.zeros((rows, steps), jnp.int32), zero_B, done_B, jnp.zeros(rows), logits_BV, cache)
    _, tokens_BT, length_B, _, total_B, _, cache = jax.lax.while_loop(unfinished, advance, start)
    return (tokens_BT, length_B, total_B), cache  # the cache goes out so that its memory can come in donated


def next_token(
    logits_BV: Float[Array, "B V"], key_B: Array, *, temperature: float, top_p: float
) -> Int[Array, " B"]:
    """Sample from softmax(logits / temperature) cut to its nucleus; the argmax at temperature 0.

    Gumbel-max with one key per row, so that a row's draw does not depend on its neighbours.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV.astype(jnp.float32) / temperature
    if top_p < 1:
        scaled_BV = jnp.where(in_nucleus(scaled_BV, top_p), scaled_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, scaled_BV.shape[1:]))(key_B)
    return jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)


def in_nucleus(logits_BV: Float[Array, "B V"], top_p: float) -> Array:
    """Which tokens form the smallest set of most likely ones with mass of at least top_p (ties with the last join).

    Found without sorting: the bits of a non-negative float order like its value, so 30 halvings of the interval
    of integers find the exact weight below which tokens fall out.
    """
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)
    needed_B = top_p * jnp.sum(weight_BV, axis=-1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds  # mass(>= low) suffices, mass(>= high) does not
        middle_B = low_B + (high_B - low_B) // 2
        mass_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0.0), axis=-1)
        enough_B = mass_B >= needed_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
    zero_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, 30, halve, (zero_B, zero_B + one + 1))
    return bits_BV >= low_B[:, None]
