"""config.json → Architecture: every option that changes a decoder's computation is read by name, and none is ignored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sppo_jax.config import MOST_LAYERS
from sppo_jax.errors import BadInput
from sppo_jax.files import read_json
from sppo_jax.hub import adapters
from sppo_jax.models.config_json import ACTIVATIONS, Options, known, shown

__all__ = ["ACTIVATIONS", "Architecture", "Rope", "read_architecture"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/C), divided by `factor`: all (linear) or the slow ones (llama3)."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    # llama3: frequencies with wavelengths above original / low are divided by `factor`, those with wavelengths below
    # original / high are kept, and in between the two are mixed.
    low: float = 1.0
    high: float = 4.0
    original: int = 8192  # positions of the original training

    @property
    def meant(self) -> "Rope":
        """The same embedding as others may write it: a factor of 1 changes nothing."""
        return Rope(self.theta) if self.factor == 1 else self


@dataclass(frozen=True)
class Architecture:
    """Sizes and options of one decoder."""

    vocab: int  # V
    model: int  # D
    mlp: int  # F
    layers: int  # L
    heads: int  # H
    kv_heads: int  # N
    head_dim: int  # C
    norm_eps: float
    rope: Rope
    max_positions: int
    # Keys that a query of a windowed layer sees, itself included; None: no layer has a window.
    window: int | None
    tied: bool  # whether the head is the embedding's transpose
    windowed: tuple[bool, ...] = ()  # whether each layer has the window; (): all have it
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's query and key before RoPE
    post_norms: bool = False  # RMSNorm of the outputs of attention and feed-forward
    norm_offset: bool = False  # norms multiply by 1 + scale
    query_scale: float | None = None  # factor of the attention scores; None: 1/sqrt(C)
    attention_softcap: float | None = None  # c: scores become c tanh(score / c)
    logit_softcap: float | None = None
    scaled_embedding: bool = False  # embeddings times sqrt(D)
    lora_rank: int = 0  # R; if above 0, only the adapters are trained

    def window_of(self, layer: int) -> int | None:
        """Return the number of keys that a query of this layer sees, itself included; None: all before it."""
        return self.window if not self.windowed or self.windowed[layer] else None

    def size(self, letter: str) -> int:
        """Return the length of a logical axis (the letters of sppo_jax.sharding)."""
        sizes = {
            "V": self.vocab, "D": self.model, "F": self.mlp, "L": self.layers,
            "H": self.heads, "N": self.kv_heads, "C": self.head_dim, "R": self.lora_rank,
        }  # fmt: skip
        return sizes[letter]


FULL, SLIDING = "full_attention", "sliding_attention"
# Names of layer_types, the second as before transformers 5.
LAYER_TYPES = {FULL: FULL, "attention": FULL, SLIDING: SLIDING}


def read_architecture(directory: Path, tell: Callable[[str], None] | None = None) -> Architecture:
    """Return the architecture of a Hugging Face directory.

    `tell` receives a line about keys of config.json that transformers ignores, if there are any. Raises BadInput, naming
    the family, option or value that is not supported.
    """
    path = directory / "config.json"
    adapters.refuse(directory)
    options = Options(path, read_json(path))
    families, model_type = (
        options.take("architectures", object, None),
        options.take("model_type", object, None),
    )
    family = families[0] if isinstance(families, list) and len(families) == 1 else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(f"{path}: architectures is {families or 'missing'}; known: {', '.join(FAMILIES)}")
    own_type, read_family = FAMILIES[family]
    if model_type not in (None, own_type):
        raise BadInput(
            f"{path}: architectures names {family}, but model_type is {shown(model_type)}, by which transformers goes; "
            f"for this family it is {own_type}"
        )
    heads, model = options.take("num_attention_heads"), options.take("hidden_size")
    layers, max_positions = options.take("num_hidden_layers"), options.take("max_position_embeddings")
    if layers > MOST_LAYERS:
        raise BadInput(
            f"{path}: num_hidden_layers is {shown(layers)}; at most {MOST_LAYERS} are computed here"
        )
    special = read_family(
        options, layers, max_positions
    )  # first, because keys that it takes are absent below
    general = {
        "vocab": options.take("vocab_size"),
        "model": model,
        "mlp": options.take("intermediate_size"),
        "layers": layers,
        "heads": heads,
        "kv_heads": options.nullable("num_key_value_heads", int, KV_HEADS.get(family, heads)) or heads,
        "head_dim": options.take("head_dim", default=max(1, model // heads)),
        "norm_eps": options.take("rms_norm_eps", float, 1e-6),
        "rope": _rope(options, max_positions),
        "max_positions": max_positions,
        "tied": options.take("tie_word_embeddings", bool, False),
        "activation": options.activation("hidden_act", "silu"),
    }
    architecture = Architecture(**(general | special))
    options.finish(known(own_type))
    if heads % architecture.kv_heads:
        raise BadInput(f"{path}: {heads} heads cannot share {architecture.kv_heads} kv heads")
    if architecture.head_dim % 2:
        raise BadInput(f"{path}: head_dim is {architecture.head_dim}; rotary embeddings need an even one")
    if tell is not None and (note := options.note(known(own_type))):
        tell(f"note: {note}")
    return architecture


# The options of each family. An absent option has the default of its class in transformers; sizes must be present.

KV_HEADS = {"MistralForCausalLM": 8, "Gemma2ForCausalLM": 4, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}


def _mistral(options: Options, layers: int, positions: int) -> dict[str, Any]:
    window = options.nullable("sliding_window", int, 4096)
    return _windows(options, window, [FULL if window is None else SLIDING] * layers)


def _llama(options: Options, layers: int, positions: int) -> dict[str, Any]:
    bias = options.take("attention_bias", bool, False)
    # Its class has neither key, but transformers' cache looks for both: generation would keep `window` tokens, and the
    # forward pass all.
    window, named = options.take("sliding_window", int, None), options.left.get("layer_types") is not None
    kinds = _windows(options, window, [FULL] * layers)
    if kinds["window"] is not None or (window is not None and window < positions and not named):
        raise options.refusal("sliding_window", window, None)
    options.ignored += [] if window is None else ["sliding_window"]
    return {"window": None, "qkv_bias": bias, "o_bias": bias}


def _gemma2(options: Options, layers: int, positions: int) -> dict[str, Any]:
    bias, window = options.take("attention_bias", bool, False), options.nullable("sliding_window", int, 4096)
    # Published beside hidden_activation, which is used.
    options.ignored += ["hidden_act"] if options.take("hidden_act", object, None) else []
    return {
        "head_dim": options.take("head_dim", default=256),
        "tied": options.take("tie_word_embeddings", bool, True),
        "activation": options.activation("hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "o_bias": bias,
        "post_norms": True,
        "norm_offset": True,
        "scaled_embedding": True,
        "query_scale": options.take("query_pre_attn_scalar", float, 256.0) ** -0.5,
        "attention_softcap": options.nullable("attn_logit_softcapping", float, 50.0),
        "logit_softcap": options.nullable("final_logit_softcapping", float, 30.0),
        **_windows(options, window, [FULL if i % 2 else SLIDING for i in range(layers)]),
    }


def _qwen2(options: Options, layers: int, positions: int) -> dict[str, Any]:
    used = options.take("use_sliding_window", bool, False)
    kind = int if used else object  # an unused size may be anything, such as 0
    size, first = (
        options.nullable("sliding_window", kind, 4096),
        options.take("max_window_layers", object, 28),
    )
    if type(first) is not int:
        raise BadInput(f"{options.path}: max_window_layers is {shown(first)}; needed a whole number")
    window = size if used else None
    kinds = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return {"qkv_bias": True, **_windows(options, window, kinds)}


def _qwen3(options: Options, layers: int, positions: int) -> dict[str, Any]:
    bias = options.take("attention_bias", bool, False)
    head_dim = options.take("head_dim", default=128)
    own = {"head_dim": head_dim, "qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    return _qwen2(options, layers, positions) | own


# By `architectures`: transformers' model_type, and the options.
FAMILIES: dict[str, tuple[str, Callable[[Options, int, int], dict[str, Any]]]] = {
    "MistralForCausalLM": ("mistral", _mistral),
    "LlamaForCausalLM": ("llama", _llama),
    "Gemma2ForCausalLM": ("gemma2", _gemma2),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
}


def _windows(options: Options, window: int | None, default: list[str]) -> dict[str, Any]:
    """Return `window` and `windowed` from layer_types, or from the family's pattern `default` if that is absent."""
    given = options.left.get("layer_types") is not None
    kinds = options.take("layer_types", object, default)
    named = isinstance(kinds, list) and all(isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds)
    if not named or len(kinds) != len(default):
        raise BadInput(
            f"{options.path}: layer_types must name {FULL} or {SLIDING} for each of {len(default)} layers"
        )
    windowed = tuple(LAYER_TYPES[kind] == SLIDING for kind in kinds)
    if given and window is None and any(windowed):
        raise BadInput(f"{options.path}: layer_types names {SLIDING}, but no sliding_window is in use")
    if window is None or not any(windowed):
        return {"window": None}
    return {"window": window, "windowed": () if all(windowed) else windowed}


def _rope(options: Options, max_positions: int) -> Rope:
    """Return the rotary embedding. Raises BadInput for a kind that is not supported."""
    theta = options.take("rope_theta", float, 10_000.0)
    # transformers reads it also here, and prefers it to the one among the parameters.
    original = options.take("original_max_position_embeddings", default=None)
    # transformers 5 writes rope_parameters, and prefers rope_scaling. Empty ones count as absent.
    given = {key: options.take(key, object, None) for key in ("rope_scaling", "rope_parameters")}
    ropes = {
        key: _rope_of(options, key, raw, theta, original, max_positions) for key, raw in given.items() if raw
    }
    before, now = (ropes.get(key) for key in given)
    if before and now and before.meant != now.meant:
        raise BadInput(
            f"{options.path}: rope_scaling and rope_parameters differ: {before.meant} and {now.meant}; keep the right one"
        )
    rope = before or now or Rope(theta)
    options.ignored += (
        [] if original is None or rope.kind == "llama3" else ["original_max_position_embeddings"]
    )
    return rope


def _rope_of(
    options: Options, key: str, raw: Any, theta: float, original: int | None, max_positions: int
) -> Rope:
    """Return what one object of rotary parameters means. Raises BadInput for a kind that is not supported."""
    if not isinstance(raw, dict):
        raise BadInput(f"{options.path}: {key} is {shown(raw)}, needed an object")
    inner = Options(options.path, raw)
    kind = inner.take("rope_type", object, inner.left.get("type") or "default")
    inner.left.pop("type", None)  # its name before transformers 4.43
    theta = inner.take("rope_theta", float, theta)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", inner.take("factor", float))
    elif kind == "llama3":
        named = inner.take("original_max_position_embeddings", default=max_positions)
        rope = Rope(
            theta,
            "llama3",
            inner.take("factor", float),
            inner.take("low_freq_factor", float),
            inner.take("high_freq_factor", float),
            original or named,
        )
        if rope.high <= rope.low:
            raise BadInput(f"{options.path}: high_freq_factor must exceed low_freq_factor")
    else:
        raise BadInput(f"{options.path}: rope type is {shown(kind)}; computed here: default, linear, llama3")
    for name, value in sorted(inner.left.items()):
        if isinstance(value, dict):
            raise BadInput(f"{options.path}: {key} of layers of one kind ({name}) are not computed here")
        if value is None or (name == "partial_rotary_factor" and value == 1):
            continue
        if name == "partial_rotary_factor":
            raise options.refusal(name, value, 1.0)
        # Other types' parameters are left over where a type was changed; transformers warns and goes on.
        options.ignored.append(f"{name} (of rope type {kind})")
    return rope
