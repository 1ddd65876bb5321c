"""Stage 2, second half, on the mesh: token ids of pairs → PairRM's logits. DeBERTa-v2 and the pair head in Flax nnx.

The weights go from the safetensors file to the devices one tensor at a time, layers stacked and scanned. Each layer's
projections of the table of distances do not depend on the text: they are computed once, when the weights are loaded.

B batch, T time, D model, H heads, C channels of a head, F feed-forward, V vocabulary, L layers, P rows of the table.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sppo_jax import sharding
from sppo_jax.models.hf import aligned
from sppo_jax.pairrm import deberta_attention, files
from sppo_jax.pairrm.files import Checkpoint

_DISTANCES = ("distances", "distances_norm_weight", "distances_norm_bias")
_PROJECTIONS = ("layers.q", "layers.q_bias", "layers.k", "layers.k_bias")


@dataclass(frozen=True)
class Deberta:
    """The sizes of a PairRM's network."""

    vocab: int
    model: int
    heads: int
    mlp: int
    layers: int
    buckets: int  # log buckets of distance, on either side
    farthest: int  # tokens; larger distances count as this
    norm_eps: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Deberta":
        """Return the sizes in a checkpoint's options, which files.py has checked."""
        config = checkpoint.config
        return cls(
            vocab=config["vocab_size"],
            model=config["hidden_size"],
            heads=config["num_attention_heads"],
            mlp=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            buckets=config["position_buckets"],
            farthest=files.farthest(config),
            norm_eps=config["layer_norm_eps"],
        )


@dataclass(frozen=True)
class Parameter:
    """One parameter: its path here, the name of the checkpoint's tensor, and the shape of both, without layers.

    It is used as it is stored: matrices are [out, in]. `wide` parameters (norms, biases and the head) are float32
    whatever the compute dtype.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    wide: bool

    def names(self, layers: int) -> list[str]:
        """Return the names of the checkpoint's tensors: one per layer, or a single one."""
        return (
            [self.name.format(layer=i) for i in range(layers)]
            if self.path.startswith("layers.")
            else [self.name]
        )


def table(d: Deberta) -> list[Parameter]:
    """Return the parameters of a network of these sizes."""
    body, layer = "pretrained_model.", "pretrained_model.encoder.layer.{layer}."
    tensors = [
        Parameter("embedding", body + "embeddings.word_embeddings.weight", (d.vocab, d.model), wide=False),
        Parameter("distances", body + "encoder.rel_embeddings.weight", (2 * d.buckets, d.model), wide=True),
    ]

    def norm(path: str, name: str) -> list[Parameter]:
        return [
            Parameter(f"{path}_{kind}", f"{name}.{kind}", (d.model,), wide=True)
            for kind in ("weight", "bias")
        ]

    def linear(path: str, name: str, outs: int, ins: int, wide: bool = False) -> list[Parameter]:
        return [
            Parameter(path, f"{name}.weight", (outs, ins), wide),
            Parameter(f"{path}_bias", f"{name}.bias", (outs,), wide=True),
        ]

    tensors += norm("embedding_norm", body + "embeddings.LayerNorm")
    tensors += norm("distances_norm", body + "encoder.LayerNorm")
    for ours, theirs in (("q", "query_proj"), ("k", "key_proj"), ("v", "value_proj")):
        tensors += linear(f"layers.{ours}", f"{layer}attention.self.{theirs}", d.model, d.model)
    tensors += linear("layers.o", layer + "attention.output.dense", d.model, d.model)
    tensors += norm("layers.attention_norm", layer + "attention.output.LayerNorm")
    tensors += linear("layers.up", layer + "intermediate.dense", d.mlp, d.model)
    tensors += linear("layers.down", layer + "output.dense", d.model, d.mlp)
    tensors += norm("layers.mlp_norm", layer + "output.LayerNorm")
    tensors += linear("head_in", "head_layer.1", d.model, 2 * d.model, wide=True)
    tensors += linear("head_out", "head_layer.4", 1, d.model, wide=True)
    return tensors


class PairRM(nnx.Module):
    """C = f(e_1) - f(e_2), f(e) = W2 tanh(W1 [e_source; e] + b1) + b2, on the last hidden states at three tokens.

    sigmoid(C) is the model's probability that the first response is better, given that it is shown first. Products are
    computed in `compute_dtype`; the residual stream, norms, softmax and head are always float32, which costs nothing.
    """

    def __init__(self, deberta: Deberta, weights: dict[str, Any], compute_dtype: Any, form: str):
        """`weights` maps the paths of `shapes` to arrays; `form` is one of deberta_attention.FORMS."""
        self.deberta = deberta
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.form = form
        self.weights = nnx.Dict({path.replace(".", "/"): nnx.Param(x) for path, x in weights.items()})

    def __call__(
        self, ids_BT: Int[Array, "B T"], length_B: Int[Array, " B"], marks_B3: Int[Array, "B 3"]
    ) -> Float[Array, " B"]:
        """Return C. Ids beyond `length_B` are padding; `marks_B3` are the positions of the three prefix tokens."""
        x_BTD, _ = self.hidden(ids_BT, length_B)
        return self.head(jnp.take_along_axis(x_BTD, marks_B3[:, :, None], axis=1))

    def hidden(
        self, ids_BT: Int[Array, "B T"], length_B: Int[Array, " B"], every: bool = False
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
        """Return the last hidden states, and with `every` those after each layer; undefined beyond `length_B`."""
        d, length = self.deberta, ids_BT.shape[1]
        rows = deberta_attention.table_rows(length, d.buckets, d.farthest)
        x_BTD = self["embedding"][ids_BT].astype(jnp.float32)
        x_BTD = self._norm(x_BTD, self["embedding_norm_weight"], self["embedding_norm_bias"])
        x_BTD *= (jnp.arange(length) < length_B[:, None])[..., None]

        def layer(x_BTD: Array, w: dict[str, Array]) -> tuple[Array, Array | None]:
            q, k, v = (self._linear(w, name, x_BTD).reshape(*ids_BT.shape, d.heads, -1) for name in "qkv")
            seen = deberta_attention.attend(q, k, v, w["keys"], w["queries"], length_B, rows, self.form)
            h_BTD = self._linear(w, "o", seen.reshape(*ids_BT.shape, -1), wide=True)
            x_BTD = self._norm(x_BTD + h_BTD, w["attention_norm_weight"], w["attention_norm_bias"])
            up_BTF = jax.nn.gelu(self._linear(w, "up", x_BTD, wide=True), approximate=False)
            h_BTD = self._linear(w, "down", up_BTF, wide=True)
            x_BTD = self._norm(x_BTD + h_BTD, w["mlp_norm_weight"], w["mlp_norm_bias"])
            return x_BTD, x_BTD if every else None

        layers = {
            path.removeprefix("layers/"): x[...]
            for path, x in self.weights.items()
            if path.startswith("layers/")
        }
        return jax.lax.scan(layer, x_BTD, layers)

    def head(self, states_B3D: Float[Array, "B 3 D"]) -> Float[Array, " B"]:
        """Return C for the hidden states at the prefix tokens of the prompt and the two responses."""
        source, first, second = jnp.unstack(states_B3D, axis=1)

        def f(e_BD: Array) -> Array:
            w = {name: self[name] for name in ("head_in", "head_in_bias", "head_out")}
            y = jnp.concatenate([source, e_BD], -1)
            y = jnp.tanh(_product(y, w["head_in"]) + w["head_in_bias"])
            return _product(y, w["head_out"])[:, 0]  # its bias cancels

        return f(first) - f(second)

    def __getitem__(self, path: str) -> Array:
        return self.weights[path.replace(".", "/")][...]

    def _linear(self, w: dict[str, Array], name: str, x: Array, wide: bool = False) -> Array:
        """Return x W^T + b, summed in float32 and rounded to the compute dtype unless `wide`."""
        y = _product(x.astype(self.compute_dtype), w[name]) + w[f"{name}_bias"]
        return y if wide else y.astype(self.compute_dtype)

    def _norm(self, x: Array, weight_D: Array, bias_D: Array) -> Array:
        return _layer_norm(x, weight_D, bias_D, self.deberta.norm_eps)


def _product(x: Array, w: Array, equation: str = "...d,fd->...f") -> Array:
    """Return the product of x [..., in] and w [out, in], float32 [..., out]."""
    precision = deberta_attention.precision(w.dtype)
    return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=jnp.float32)


def _layer_norm(x: Array, weight_D: Array, bias_D: Array, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * weight_D + bias_D


def positions(d: Deberta, weights: dict[str, Array], dtype: Any) -> dict[str, Array]:
    """Return each layer's keys and queries of the table of distances, [L, P, H, C]: the same for all texts."""
    table_PD, weight_D, bias_D = (weights[name] for name in _DISTANCES)
    table_PD = _layer_norm(table_PD, weight_D, bias_D, d.norm_eps)

    def projected(name: str) -> Array:
        w_LED = weights[f"layers.{name}"]
        y_LPE = (
            _product(table_PD.astype(w_LED.dtype), w_LED, "pd,led->lpe")
            + weights[f"layers.{name}_bias"][:, None]
        )
        return y_LPE.reshape(*y_LPE.shape[:2], d.heads, d.model // d.heads).astype(dtype)

    return {"layers.keys": projected("k"), "layers.queries": projected("q")}


def shapes(d: Deberta, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every array of a network, without allocating any."""
    stored = {t.path: jax.ShapeDtypeStruct(_stacked(d, t), _kept(t, dtype)) for t in table(d)}
    made = jax.eval_shape(functools.partial(positions, d, dtype=dtype), stored)
    return {path: x for path, x in (stored | made).items() if path not in _DISTANCES}


def check(checkpoint: Checkpoint) -> Deberta:
    """Return a checkpoint's sizes if its files fit together. Reads headers only; raises BadInput as files.check_tensors."""
    d = Deberta.of(checkpoint)
    files.check_tensors(checkpoint, {name: t.shape for t in table(d) for name in t.names(d.layers)})
    return d


def load(checkpoint: Checkpoint, mesh: Mesh, dtype: Any, form: str | None = None) -> PairRM:
    """Return a checkpoint's network with a copy of the weights on every device of `mesh`, computing in `dtype`.

    `form` is that of the attention (default: deberta_attention.form_of). Host memory holds one stacked parameter at a
    time. Raises BadInput as `check` and `files.check_finite` do.
    """
    d, dtype = check(checkpoint), jnp.dtype(dtype)
    everywhere = sharding.replicated(mesh)
    weights = {}
    for t in table(d):
        piece = aligned(_stacked(d, t), _kept(t, dtype))
        for layer, name in enumerate(t.names(d.layers)):
            # Opened each time, because the pages read from a mapped file count as memory.
            part = piece[layer] if t.path.startswith("layers.") else piece
            with files.opened(checkpoint.weights, "numpy") as stored, np.errstate(over="ignore"):
                part[...] = stored.get_tensor(name)
            files.check_finite(checkpoint, name, bool(np.isfinite(part).all()), part.dtype)
        # On a CPU all devices share this one buffer.
        copies = [jax.device_put(piece, device) for device in everywhere.addressable_devices]
        weights[t.path] = jax.make_array_from_single_device_arrays(piece.shape, everywhere, copies)
    needed = {name: weights[name] for name in (*_DISTANCES, *_PROJECTIONS)}
    weights |= jax.jit(functools.partial(positions, d, dtype=dtype))(needed)
    weights = {path: x for path, x in weights.items() if path not in _DISTANCES}
    return PairRM(d, weights, dtype, form or deberta_attention.form_of(mesh))


def _stacked(d: Deberta, t: Parameter) -> tuple[int, ...]:
    return (d.layers, *t.shape) if t.path.startswith("layers.") else t.shape


def _kept(t: Parameter, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if t.wide else dtype
