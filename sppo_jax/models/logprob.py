"""Log-probability of responses under the policy: the one quantity that training, reference and probes share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sppo_jax.models.transformer import Transformer

CHUNK = 256  # positions whose logits exist at once: [B, CHUNK, V] instead of [B, T, V]


def response_logprob(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    prompt_length_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
) -> Float[Array, " B"]:
    """sum over t in [prompt_length, length) of log p(token_t | token_<t), in nats, at temperature 1.

    Sequences are right-padded: prompt, then response, then anything. The masks come from the lengths, so a
    padding id that equals the end of sequence is no trouble. Logits and logsumexp are float32.
    """
    place_T = jnp.arange(tokens_BT.shape[1])
    hidden_BTD = model.hidden(tokens_BT, place_T < length_B[:, None])
    # Position t predicts token t+1; the last position predicts nothing and is cut, not wrapped around.
    hidden_BTD, label_BT, place_T = hidden_BTD[:, :-1], tokens_BT[:, 1:], place_T[1:]
    scored_BT = (place_T >= prompt_length_B[:, None]) & (place_T < length_B[:, None])

    def chunk(hidden: Array, label: Array, scored: Array) -> Array:
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(scored, picked - jax.nn.logsumexp(logits, axis=-1), 0.0), axis=1)

    if label_BT.shape[1] <= CHUNK:
        return chunk(hidden_BTD, label_BT, scored_BT)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0)

    def add(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + chunk(*xs), None

    xs = (split(hidden_BTD), split(label_BT), split(scored_BT))
    return jax.lax.scan(jax.checkpoint(add), jnp.zeros(tokens_BT.shape[0]), xs)[0]
