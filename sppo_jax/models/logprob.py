"""Log-probabilities of responses under a policy: the quantity that training, reference and probes share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sppo_jax import sharding
from sppo_jax.models.transformer import Remat, Transformer
from sppo_jax.models.trees import Trees

CHUNK = 1024  # most tokens whose logits one device computes at once
LOGITS_OF_CPU = 2**24  # most logits that a single CPU holds at once: its products are no faster for more
LOGITS = 2**26  # most logits held at once by the devices that share tokens and split the vocabulary


def response_logprob(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    prompt_length_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
) -> Float[Array, " B"]:
    """Return the sum over t in [prompt_length, length) of log p(token_t | token_<t), in nats, at temperature 1.

    Each row is one sequence, padded on the right: prompt, response, then any ids. The masks come from the lengths, so
    the padding id may equal the end of sequence.
    """
    place_T = jnp.arange(tokens_BT.shape[1])
    trees = Trees.of((place_T < length_B[:, None]).astype(jnp.int32))
    scored_BT = (place_T >= prompt_length_B[:, None]) & (place_T < length_B[:, None])
    before_BU = jnp.broadcast_to(place_T[:-1], (len(tokens_BT), len(place_T) - 1))
    scored = Scored(before_BU, tokens_BT[:, 1:], scored_BT[:, 1:].astype(jnp.int32))
    return packed_logprob(model, tokens_BT, trees, scored, jnp.ones(1, jnp.int32))[:, 0]


class Scored(NamedTuple):
    """The tokens of a row whose log-probabilities are asked for, at most U."""

    before: Int[
        Array, "B U"
    ]  # the place in the row of the token before it: the prompt's last, for a response's first
    label: Int[Array, "B U"]  # its id
    slot: Int[Array, "B U"]  # its response, from 1 on in each row; 0: filler


def packed_logprob(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    trees: Trees,
    scored: Scored,
    slots_S: Int[Array, " S"],
    remat: Remat = "layer",
) -> Float[Array, "B S"]:
    """Return the sum of log p(token | what it sees) over the scored tokens of each of a row's responses `slots_S`, in nats.

    Logits are computed for scored tokens alone. They and logsumexp are float32, at most LOGITS numbers at once: [B, U, V]
    never exists.
    """
    hidden_BTD = model.hidden(tokens_BT, trees, remat)
    hidden_BUD = jnp.take_along_axis(hidden_BTD, scored.before[..., None], axis=1, mode="clip")
    logprob_BU = _token_logprob(model, hidden_BUD, scored.label)
    # Not multiplied: filler may be infinite.
    own_BUS = scored.slot[..., None] == slots_S
    return jnp.sum(jnp.where(own_BUS, logprob_BU[..., None], 0.0), axis=1)


def _token_logprob(
    model: Transformer, hidden_BTD: Float[Array, "B T D"], label_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return log p(label). Each device computes its own rows, and gathers the head block by block.

    Left to the compiler, every chunk would gather the head and sum its gradient over all devices.
    """
    mesh = model.kernel.mesh
    if mesh is None or sharding.batch_shards(mesh) == 1:
        return _chunked(hidden_BTD, label_BT, model=model)
    weight, letters = (model.embedding[...], "VD") if model.head is None else (model.head[...], "DV")
    cut, rows = sharding.spec(letters, mesh, weight.shape), sharding.spec("BT", mesh)
    v, d = letters.index("V"), letters.index("D")
    own = functools.partial(
        _blocked,
        vocabulary=v,
        across=cut[v],
        axis=cut[d],
        model=model,
        most=LOGITS // sharding.shards(mesh, cut[v]),
    )
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, cut), out_specs=rows, check_vma=False)
    # float32, so that blocks, and devices along `tensor`, sum the hidden states' gradient in float32.
    found_BT = mapped(hidden_BTD.astype(jnp.float32), label_BT, weight)
    # A label beyond the vocabulary gives NaN, as on one device.
    return jnp.where(label_BT < weight.shape[v], found_BT, jnp.nan)


def _blocked(
    wide_BTD: Array,
    label_BT: Array,
    weight: Array,
    *,
    vocabulary: int,
    across: Any,
    axis: Any,
    model: Transformer,
    most: int,
) -> Array:
    """Return log p(label), computed from the device's columns of the head block by block.

    `weight` is the device's part of the head [D, V] or the embedding [V, D], whichever the model has; `vocabulary` is the
    index of dimension V, which is split over the mesh axis `across`. D is split over `axis`, over which a block is
    gathered. None for an axis means that the dimension is whole on each device. The device holds at most `most` logits
    at once, and never more than one block of the gathered head or of its gradient.
    """
    vocab, size = weight.shape[vocabulary], label_BT.size
    columns = -(-vocab // -(-size * vocab // most))
    count = -(-vocab // columns)
    wide_CD = wide_BTD.reshape(size, -1)
    label_C = label_BT.reshape(-1) - (0 if across is None else jax.lax.axis_index(across) * vocab)

    @jax.checkpoint
    def block(i: Array) -> tuple[Array, Array]:
        # Padded here and not once for all blocks: the backward pass would keep a second copy of the device's columns.
        more = [(0, count * columns - vocab if dim == vocabulary else 0) for dim in range(2)]
        w_DU = jax.lax.dynamic_slice_in_dim(jnp.pad(weight, more), i * columns, columns, vocabulary)
        w_DU = w_DU.T if vocabulary == 0 else w_DU
        if axis is not None:
            w_DU = _gathered(w_DU, axis, model.compute_dtype)
        logits_CU = model.logits(wide_CD.astype(model.compute_dtype), w_DU)
        real = jnp.minimum(vocab - i * columns, columns)  # the last block may have fewer columns
        if vocab % columns:
            logits_CU = jnp.where(jnp.arange(columns) < real, logits_CU, -jnp.inf)
        place_C = label_C - i * columns
        here_C = (place_C >= 0) & (place_C < real)
        picked_C = jnp.take_along_axis(logits_CU, jnp.where(here_C, place_C, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(here_C, picked_C, 0.0), jax.nn.logsumexp(logits_CU, axis=-1)

    picked_NC, total_NC = jax.lax.map(block, jnp.arange(count))
    picked_C, total_C = jnp.sum(picked_NC, axis=0), jax.nn.logsumexp(total_NC, axis=0)
    if across is not None:
        largest_C = jax.lax.pmax(jax.lax.stop_gradient(total_C), across)
        total_C = largest_C + jnp.log(jax.lax.psum(jnp.exp(total_C - largest_C), across))
        picked_C = jax.lax.psum(picked_C, across)
    return (picked_C - total_C).reshape(label_BT.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w_DV: Array, axis: Any, dtype: Any) -> Array:
    """Return the block gathered over `axis` in `dtype`, then cast to float32 so that its gradient is summed in float32."""
    return jax.lax.all_gather(w_DV.astype(dtype), axis, axis=0, tiled=True).astype(jnp.float32)


def _gathered_forward(w_DV: Array, axis: Any, dtype: Any) -> tuple[Array, None]:
    return _gathered(w_DV, axis, dtype), None


def _gathered_backward(axis: Any, dtype: Any, saved: None, gradient_DV: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient_DV, axis, scatter_dimension=0, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def chunk_size(vocab: int, mesh: Mesh | None) -> int:
    """Return the number of tokens whose logits a device of `mesh` (None: jax's default one) holds at once."""
    platform = jax.default_backend() if mesh is None else sharding.platform(mesh)
    return min(CHUNK, max(128, (LOGITS_OF_CPU if platform == "cpu" else LOGITS) // vocab))


def _chunked(hidden_BTD: Array, label_BT: Array, *, model: Transformer) -> Array:
    """Return log p(label) on one device, chunk by chunk of tokens."""
    count, size = label_BT.size, chunk_size(model.architecture.vocab, model.kernel.mesh)

    @jax.checkpoint
    def chunk(hidden_CD: Array, label_C: Array) -> Array:
        logits_CV = model.logits(hidden_CD)
        picked_C = jnp.take_along_axis(logits_CV, label_C[:, None], axis=-1)[:, 0]
        return picked_C - jax.nn.logsumexp(logits_CV, axis=-1)

    hidden_ID, label_I = hidden_BTD.reshape(count, -1), label_BT.reshape(count)
    if count <= size:
        return chunk(hidden_ID, label_I).reshape(label_BT.shape)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    found = jax.lax.map(lambda xs: chunk(*xs), (split(hidden_ID), split(label_I)))
    return found.reshape(-1)[:count].reshape(label_BT.shape)
