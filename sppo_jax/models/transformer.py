"""The policy: one decoder-only transformer (grouped-query attention, RoPE, RMSNorm, gated MLP) in Flax nnx.

For training, layers are stacked on a leading axis L and scanned. Decoding runs them one by one with a cache array per
layer, because a stacked cache would be copied at every step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sppo_jax.models.architecture import Architecture, Rope
from sppo_jax.models.attention import SAVED, Kernel, Seen, whole
from sppo_jax.models.trees import Trees

Weights = dict[str, Array]  # the arrays of one layer, by their name in models/hf.py
Attention = Callable[[int, Array, Array, Array], Array]  # (layer, q, k, v) -> output of attention
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


# What the backward pass recomputes: all of a layer but its input, or all but its input and the output of attention.
Remat = Literal["layer", "attention"]
LORA_SCALE = 2  # alpha / rank of every adapter


class Adapter(nnx.Param):
    """A trainable low-rank factor beside a frozen matrix (models/lora.py)."""


class Transformer(nnx.Module):
    """The decoder. `model(tokens)` returns float32 logits; weights are cast to `compute_dtype` when they are used."""

    def __init__(
        self,
        architecture: Architecture,
        weights: dict[str, Any],
        compute_dtype: Any = jnp.float32,
        kernel: Kernel = Kernel(),  # noqa: B008  frozen
    ):
        """`weights` maps the paths of models/hf.py ("embedding", "layers.q") to arrays."""
        self.architecture = architecture
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.kernel = kernel  # for attention over whole sequences
        self.embedding = nnx.Param(weights["embedding"])
        self.norm = nnx.Param(weights["norm"])
        self.head = None if architecture.tied else nnx.Param(weights["head"])
        layers = {
            path.removeprefix("layers."): x for path, x in weights.items() if path.startswith("layers.")
        }
        kinds = {name: Adapter if name.endswith(("_lora_a", "_lora_b")) else nnx.Param for name in layers}
        # Arrays stacked on L; in an `unstacked` model, a list with one dictionary per layer.
        self.layers: Any = nnx.Dict({name: kinds[name](x) for name, x in layers.items()})

    def __call__(
        self, tokens_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Return the logits of the next token at every position. `valid_BT` is False on padding, on either side."""
        trees = None if valid_BT is None else Trees.of(valid_BT.astype(jnp.int32))
        return self.logits(self.hidden(tokens_BT, trees))

    def hidden(
        self, tokens_BT: Int[Array, "B T"], trees: Trees | None = None, remat: Remat = "layer"
    ) -> Float[Array, "B T D"]:
        """Return the normalised last hidden states, by a scan over the layers; the backward pass recomputes `remat`.

        Tokens see only what `trees` lets them see (None: all earlier ones). Prompts with several responses need the kernels
        xla or blocked. With cudnn a row has one tree.
        """
        trees = Trees.of(jnp.ones(tokens_BT.shape, jnp.int32)) if trees is None else trees
        if self.kernel.name != "cudnn":
            return self._hidden(tokens_BT, trees, remat)
        start_B = jnp.argmax(trees.segment > 0, axis=1)  # cuDNN supports padding on the right only
        turned = Trees(*(_turn(x, -start_B) for x in trees))
        return _turn(self._hidden(_turn(tokens_BT, -start_B), turned, remat), start_B)

    def _hidden(self, tokens_BT: Int[Array, "B T"], trees: Trees, remat: Remat) -> Float[Array, "B T D"]:
        rope = self.rope(trees.position)
        seen = self._whole(trees, self.kernel)

        def layer(x_BTD: Array, xs: tuple[Weights, Array]) -> tuple[Array, None]:
            w, kind = xs
            return self._block(w, x_BTD, rope, functools.partial(seen, kind)), None

        kinds_L = jnp.asarray([self._kind(i) for i in range(self.architecture.layers)])
        kept = jax.checkpoint_policies.save_only_these_names(SAVED) if remat == "attention" else None
        x_BTD, _ = jax.lax.scan(
            jax.checkpoint(layer, policy=kept), self.embed(tokens_BT), (self.stacked(), kinds_L)
        )
        return self._rms_norm(x_BTD, self.norm[...])

    def forward(
        self, tokens_BT: Int[Array, "B T"], rope: tuple[Array, Array], attention: Attention
    ) -> Float[Array, "B T D"]:
        """Return the normalised last hidden states, running the layers one by one, for callers that cache keys and values.

        `rope`: of the tokens' positions; `attention(i, q_BTHC, k_BTNC, v_BTNC)` returns the output of attention in layer i,
        [B, T, H, C].
        """
        x_BTD = self.embed(tokens_BT)
        for i in range(self.architecture.layers):
            x_BTD = self._block(self.layer(i), x_BTD, rope, functools.partial(attention, i))
        return self._rms_norm(x_BTD, self.norm[...])

    def rope(self, position: Int[Array, "..."]) -> tuple[Array, Array]:
        """Return cos and sin of the rotary angles, each float32 [..., 1, C/2]."""
        frequency = frequencies(self.architecture.rope, self.architecture.head_dim)
        angle = position.astype(jnp.float32)[..., None, None] * frequency
        return jnp.cos(angle), jnp.sin(angle)

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Return the embeddings of tokens in the compute dtype, scaled if the architecture scales them."""
        x = self._cast(self.embedding[...][tokens])
        if self.architecture.scaled_embedding:  # the factor is rounded to the compute dtype, as in training
            x *= jnp.asarray(math.sqrt(self.architecture.model), self.compute_dtype)
        return x

    def head_matrix(self) -> Any:
        """Return the head [D, V], which may be quantised to 8 bits."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "... D"], w_DV: Any = None) -> Float[Array, "... V"]:
        """Return logits in float32 whatever the compute dtype, because a bfloat16 logit is 0.03 nats off.

        `w_DV` is the head, or some of its columns (default: `head_matrix`).
        """
        w_DV = self.head_matrix() if w_DV is None else w_DV
        x = product("...D,DV->...V", hidden, w_DV, jnp.float32)
        cap = self.architecture.logit_softcap
        return x if cap is None else cap * jnp.tanh(x / cap)

    def whole_attention(self, valid_BT: Bool[Array, "B T"], mesh: Mesh | None = None) -> Attention:
        """Return the attention for a `forward` over whole sequences: causal, each layer with its own window.

        Padding is on the right. `mesh` is that of the sequences (default: the model's own).
        """
        kernel = self.kernel if mesh is None else dataclasses.replace(self.kernel, mesh=mesh)
        seen = self._whole(Trees.of(valid_BT.astype(jnp.int32)), kernel)
        return lambda i, q, k, v: seen(self._kind(i), q, k, v)

    def unstacked(self) -> "Transformer":
        """Return the model with an array per layer: slicing a stacked array would copy it at every decoded token."""
        weights = {"embedding": self.embedding[...], "norm": self.norm[...]}
        weights |= {} if self.head is None else {"head": self.head[...]}
        model = Transformer(self.architecture, weights, self.compute_dtype, self.kernel)
        model.layers = nnx.List(
            nnx.Dict({name: type(param)(param[...][i]) for name, param in self.layers.items()})
            for i in range(self.architecture.layers)
        )
        return model

    def stacked(self) -> Weights:
        """Return the arrays of all layers, stacked on L."""
        return {name: param[...] for name, param in self.layers.items()}

    def layer(self, i: int) -> Weights:
        """Return the arrays of layer i."""
        if isinstance(self.layers, nnx.List):
            return {name: param[...] for name, param in self.layers[i].items()}
        return {name: w[i] for name, w in self.stacked().items()}

    def _block(
        self, w: Weights, x_BTD: Array, rope: tuple[Array, Array], attention: Callable[..., Array]
    ) -> Array:
        """Return the hidden states [B, T, D] after one layer."""
        a = self.architecture
        h_BTD = self._rms_norm(x_BTD, w["attention_norm"])
        q_BTHC = self._linear(w, "q", h_BTD, "D", "HC")
        k_BTNC = self._linear(w, "k", h_BTD, "D", "NC")
        v_BTNC = self._linear(w, "v", h_BTD, "D", "NC")
        if a.qk_norm:
            q_BTHC, k_BTNC = self._rms_norm(q_BTHC, w["q_norm"]), self._rms_norm(k_BTNC, w["k_norm"])
        rotate = _rotate_by_product if self.kernel.name == "splash" else _rotate
        seen_BTHC = attention(rotate(q_BTHC, rope), rotate(k_BTNC, rope), v_BTNC)
        h_BTD = self._linear(w, "o", seen_BTHC, "HC", "D")
        x_BTD += self._rms_norm(h_BTD, w["attention_post_norm"]) if a.post_norms else h_BTD
        h_BTD = self._rms_norm(x_BTD, w["mlp_norm"])
        gate_BTF, up_BTF = (self._linear(w, name, h_BTD, "D", "F") for name in ("gate", "up"))
        h_BTD = self._linear(w, "down", _gated(ACTIVATIONS[a.activation], gate_BTF, up_BTF), "F", "D")
        return x_BTD + (self._rms_norm(h_BTD, w["mlp_post_norm"]) if a.post_norms else h_BTD)

    def _linear(self, w: Weights, name: str, x: Array, ins: str, outs: str) -> Array:
        """Return x W + b, from dimensions `ins` to `outs`, plus LORA_SCALE x A B if the matrix has an adapter."""
        y = product(f"BT{ins},{ins}{outs}->BT{outs}", x, w[name])
        if f"{name}_bias" in w:
            y += self._cast(w[f"{name}_bias"])
        if f"{name}_lora_a" in w:
            low_BTR = product(f"BT{ins},{ins}R->BTR", x, w[f"{name}_lora_a"])
            y += LORA_SCALE * product(f"BTR,R{outs}->BT{outs}", low_BTR, w[f"{name}_lora_b"])
        return y

    def _whole(self, trees: Trees, kernel: Kernel) -> Seen:
        """Return attention over whole rows, for layers of each kind."""
        a = self.architecture
        return whole(trees, self._windows(), kernel, scale=a.query_scale, softcap=a.attention_softcap)

    def _windows(self) -> tuple[int | None, ...]:
        """Return the window of each kind of layer."""
        a = self.architecture
        return (None, a.window) if a.windowed else (a.window,)

    def _kind(self, i: int) -> int:
        """Return the index in `_windows` of layer i's window."""
        return int(self.architecture.windowed[i]) if self.architecture.windowed else 0

    def _rms_norm(self, x: Float[Array, "... D"], scale_D: Float[Array, " D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.architecture.norm_eps)
        if self.architecture.norm_offset:
            return self._cast(wide * (1 + scale_D.astype(jnp.float32)))
        return self._cast(wide) * self._cast(scale_D)

    def _cast(self, x: Array) -> Array:
        return x.astype(self.compute_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByOutput:
    """A matrix with its output dimensions first, the order in which CPUs sample (sampler/weights.py)."""

    value: Any

    def __getitem__(self, index: Any) -> "ByOutput":
        """Return the matrix itself for `...`, as nnx asks of the value of a parameter."""
        return ByOutput(self.value[index])


def product(equation: str, x: Array, w: Any, dtype: Any = None) -> Array:
    """Return the einsum of `x` with a matrix cast to the dtype of `x`, or with a quantised one (sampler/quantized.py).

    The result has `dtype` (default: that of `x`). A matrix's inputs are the last dimensions of `x`.
    """
    if isinstance(w, jax.Array):
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=dtype)
    if isinstance(w, ByOutput):
        # The matrix is the left operand and both have two dimensions, so XLA's kernel for CPUs rearranges `x` and not the matrix,
        # and adds up each number in the same order whatever the number of rows.
        ins = sum(letter in equation.split(",")[0] for letter in equation.split("->")[0].split(",")[1])
        lead, outs = x.shape[: x.ndim - ins], w.value.shape[: w.value.ndim - ins]
        w_OI, x_RI = w.value.reshape(math.prod(outs), -1), x.reshape(math.prod(lead), -1)
        y_OR = jax.lax.dot_general(
            w_OI.astype(x.dtype), x_RI, (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        return y_OR.T.reshape(*lead, *outs)
    # Scaled after the product, so that TPUs and GPUs read int8 in the decode loop and never make a float copy of a matrix.
    # The dimensions that are summed over come first in the matrix, and have length 1 in the scale.
    wide = jnp.einsum(equation, x, w.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
    return (wide * w.scale).astype(dtype or x.dtype)


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return radians per position [C/2], float32 and the same on every platform.

    llama3 (Llama 3.1 and later): a frequency whose wavelength exceeds original / low positions is divided by
    `factor`, one below original / high is kept, and in between the two are mixed.
    """
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    slow = plain / rope.factor
    if rope.kind == "llama3":
        turns = rope.original * plain / (2 * np.pi)  # over the original context
        kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        slow = kept * plain + (1 - kept) * slow
    return slow.astype(np.float32)


def _rotate(x_BTHC: Float[Array, "B T H C"], rope: tuple[Array, Array]) -> Float[Array, "B T H C"]:
    """Return x rotated by RoPE on pairs (i, i + C/2), the half-split layout of Hugging Face's checkpoints."""
    cos, sin = rope
    a, b = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHC.dtype)


def _rotate_by_product(x_BTHC: Float[Array, "B T H C"], rope: tuple[Array, Array]) -> Float[Array, "B T H C"]:
    """Return the same as `_rotate`. For TPUs, where moving half of the channels costs more than a product that does it."""
    cos, sin = (jnp.tile(x, 2) for x in rope)
    half = x_BTHC.shape[-1] // 2
    swap_CK = np.roll(np.eye(2 * half), half, axis=1)  # (a, b) -> (-b, a)
    swap_CK[half:] *= -1
    swapped_BTHK = jnp.einsum(
        "BTHC,CK->BTHK", x_BTHC, jnp.asarray(swap_CK, x_BTHC.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return (x_BTHC.astype(jnp.float32) * cos + swapped_BTHK.astype(jnp.float32) * sin).astype(x_BTHC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: Callable[[Array], Array], gate_BTF: Array, up_BTF: Array) -> Array:
    """Return activation(gate) up, behind an optimisation barrier.

    Otherwise XLA would fuse it, and its gradient, into every product that reads it, and recompute it for each tile.
    """
    return jax.lax.optimization_barrier(activation(gate_BTF) * up_BTF)


def _gated_forward(
    activation: Callable[[Array], Array], gate_BTF: Array, up_BTF: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _gated(activation, gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _gated_backward(
    activation: Callable[[Array], Array], saved: tuple[Array, Array], gradient_BTF: Array
) -> tuple[Array, Array]:
    pullback = jax.vjp(lambda gate, up: activation(gate) * up, *saved)[1]
    return jax.lax.optimization_barrier(pullback(gradient_BTF))


_gated.defvjp(_gated_forward, _gated_backward)


def _turn(x: Array, by_B: Int[Array, " B"]) -> Array:
    """Return x [B, T, ...] with row b rolled by `by_B[b]` places to the right."""
    return jax.vmap(functools.partial(jnp.roll, axis=0))(x, by_B)
