"""The policy: one decoder-only transformer (grouped-query attention, RoPE, RMSNorm, SwiGLU) in Flax nnx.

Layers are stacked on a leading axis L and scanned for training; decoding walks them one by one with a cache
array per layer, because a stacked cache would be copied at every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sppo_jax.models.attention import attend, cache_mask, causal_mask

Weights = dict[str, Array]  # the tensors of one layer, by their name in models/hf.py
KeyValue = tuple[Float[Array, "B S N C"], Float[Array, "B S N C"]]


@dataclass(frozen=True)
class Architecture:
    """Sizes and options, as read from config.json."""

    vocab: int  # V
    model: int  # D
    mlp: int  # F
    layers: int  # L
    heads: int  # H
    kv_heads: int  # N
    head_dim: int  # C
    norm_eps: float
    rope_theta: float
    max_positions: int
    window: int | None  # keys that a query sees, itself included; None: all
    tied: bool  # the head is the embedding's transpose

    def size(self, letter: str) -> int:
        """Length of a logical axis (sppo_jax.sharding)."""
        sizes = {
            "V": self.vocab, "D": self.model, "F": self.mlp, "L": self.layers,
            "H": self.heads, "N": self.kv_heads, "C": self.head_dim,
        }  # fmt: skip
        return sizes[letter]


class Transformer(nnx.Module):
    """The decoder. `model(tokens)` gives float32 logits; weights are masters, cast to `compute_dtype` in use."""

    def __init__(self, architecture: Architecture, weights: dict[str, Any], compute_dtype: Any = jnp.float32):
        """`weights` maps the paths of models/hf.py ("embedding", "layers.q") to arrays."""
        self.architecture = architecture
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.embedding = nnx.Param(weights["embedding"])
        self.norm = nnx.Param(weights["norm"])
        self.head = None if architecture.tied else nnx.Param(weights["head"])
        names = [path.removeprefix("layers.") for path in weights if path.startswith("layers.")]
        self.layers = nnx.Dict({name: nnx.Param(weights[f"layers.{name}"]) for name in names})

    def __call__(
        self, tokens_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position. `valid_BT` is False on padding, on either side."""
        return self.logits(self.hidden(tokens_BT, valid_BT))

    def hidden(
        self, tokens_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The normalised last hidden state. The backward pass keeps each layer's input and computes the rest again."""
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        rope = self._rope(jnp.maximum(jnp.cumsum(valid_BT, axis=1) - 1, 0))
        mask = causal_mask(valid_BT, self.architecture.window)

        def layer(x_BTD: Array, w: Weights) -> tuple[Array, None]:
            return self._block(w, x_BTD, rope, lambda q, k, v: attend(q, k, v, mask)), None

        x_BTD, _ = jax.lax.scan(jax.checkpoint(layer), self.embed(tokens_BT), self.stacked())
        return self._rms_norm(x_BTD, self.norm[...])

    def prefill(
        self, tokens_BT: Int[Array, "B T"], length_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], list[KeyValue]]:
        """Run right-padded prompts: logits after the last real token, and each layer's keys and values."""
        valid_BT = jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]
        rope = self._rope(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape))
        mask = causal_mask(valid_BT, self.architecture.window)
        x_BTD, cache = self.embed(tokens_BT), []
        for i in range(self.architecture.layers):

            def keep(q: Array, k: Array, v: Array) -> Array:
                cache.append((k, v))
                return attend(q, k, v, mask)

            x_BTD = self._block(self.layer(i), x_BTD, rope, keep)
        last_BD = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(self._rms_norm(last_BD, self.norm[...])), cache

    def decode(
        self, token_B: Int[Array, " B"], position_B: Int[Array, " B"], cache: list[KeyValue]
    ) -> tuple[Float[Array, "B V"], list[KeyValue]]:
        """One token per row at `position_B`, which is also its column of the cache; logits of the next."""
        rope = self._rope(position_B[:, None])
        mask = cache_mask(position_B, cache[0][0].shape[1], self.architecture.window)
        rows = jnp.arange(token_B.shape[0])
        x_B1D, new_cache = self.embed(token_B[:, None]), []
        for i, (keys, values) in enumerate(cache):

            def insert(q: Array, k: Array, v: Array, keys: Array = keys, values: Array = values) -> Array:
                keys = keys.at[rows, position_B].set(k[:, 0])
                values = values.at[rows, position_B].set(v[:, 0])
                new_cache.append((keys, values))
                return attend(q, keys, values, mask)

            x_B1D = self._block(self.layer(i), x_B1D, rope, insert)
        return self.logits(self._rms_norm(x_B1D[:, 0], self.norm[...])), new_cache

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self._cast(self.embedding[...][tokens])

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 whatever the compute dtype: a bfloat16 logit is .03 nats off."""
        w_DV = self.embedding[...].T if self.head is None else self.head[...]
        return jnp.einsum("...D,DV->...V", hidden, self._cast(w_DV), preferred_element_type=jnp.float32)

    def stacked(self) -> Weights:
        return {name: param[...] for name, param in self.layers.items()}

    def layer(self, i: int) -> Weights:
        return {name: w[i] for name, w in self.stacked().items()}

    def _block(
        self, w: Weights, x_BTD: Array, rope: tuple[Array, Array], attention: Callable[..., Array]
    ) -> Array:
        w = {name: self._cast(tensor) for name, tensor in w.items()}
        h_BTD = self._rms_norm(x_BTD, w["attention_norm"])
        q_BTHC = _rotate(jnp.einsum("BTD,DHC->BTHC", h_BTD, w["q"]), rope)
        k_BTNC = _rotate(jnp.einsum("BTD,DNC->BTNC", h_BTD, w["k"]), rope)
        v_BTNC = jnp.einsum("BTD,DNC->BTNC", h_BTD, w["v"])
        x_BTD = x_BTD + jnp.einsum("BTHC,HCD->BTD", attention(q_BTHC, k_BTNC, v_BTNC), w["o"])
        h_BTD = self._rms_norm(x_BTD, w["mlp_norm"])
        gate_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", h_BTD, w["gate"]))
        up_BTF = jnp.einsum("BTD,DF->BTF", h_BTD, w["up"])
        return x_BTD + jnp.einsum("BTF,FD->BTD", gate_BTF * up_BTF, w["down"])

    def _rms_norm(self, x: Float[Array, "... D"], scale_D: Float[Array, " D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.architecture.norm_eps)
        return self._cast(wide) * self._cast(scale_D)

    def _rope(self, position_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
        """cos and sin [B, T, 1, C/2], float32, at angles position / theta^(2i/C)."""
        a = self.architecture
        frequency = a.rope_theta ** -(jnp.arange(0, a.head_dim, 2, dtype=jnp.float32) / a.head_dim)
        angle = position_BT.astype(jnp.float32)[..., None, None] * frequency
        return jnp.cos(angle), jnp.sin(angle)

    def _cast(self, x: Array) -> Array:
        return x.astype(self.compute_dtype)


def _rotate(x_BTHC: Float[Array, "B T H C"], rope: tuple[Array, Array]) -> Float[Array, "B T H C"]:
    """RoPE on pairs (i, i + C/2), the half-split layout of Hugging Face's checkpoints."""
    cos, sin = rope
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)
