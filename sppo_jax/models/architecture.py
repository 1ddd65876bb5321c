"""config.json → Architecture: every option that changes a decoder's computation is read by name, and none is ignored."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sppo_jax.errors import BadInput
from sppo_jax.files import read_json


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


# Keys of config.json that do not change what is computed from tokens and weights.
NEUTRAL = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range attention_dropout
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    tokenizer_class cache_implementation id2label label2id problem_type task_specific_params finetuning_task
    return_dict output_attentions output_hidden_states chunk_size_feed_forward max_length min_length do_sample
    temperature top_p top_k typical_p num_beams num_beam_groups num_return_sequences repetition_penalty
    diversity_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping bad_words_ids
    begin_suppress_tokens exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id prefix
    remove_invalid_values return_dict_in_generate output_scores suppress_tokens use_bfloat16 torchscript tf_legacy_loss
    pruned_heads tie_encoder_decoder is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    pretraining_tp unsloth_version unsloth_fixed auto_map
    """.split()  # noqa: SIM905
)
# Options that are not supported, and change nothing while they are false.
OFF_WHEN_FALSE = frozenset({"attention_bias", "mlp_bias", "use_bidirectional_attention", "use_mrope"})
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


class Options:
    """The keys of one object of config.json. Each is taken once, and `finish` refuses keys that were not taken."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path, self.left = path, dict(raw)

    def take(self, key: str, kind: type = int, default: Any = ...) -> Any:
        """Return the value as an int or float (finite, above 0), a bool, or unchecked (object); null counts as absent.

        Raises BadInput for an absent key without `default`, and for a value of another kind.
        """
        value = self.left.pop(key, None)
        if value is None:
            if default is ...:
                raise BadInput(f"{self.path}: {key} is missing")
            return default
        if kind is object:
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = isinstance(value, bool) if kind is bool else number and 0 < value < math.inf
        if not fits or (kind is int and value != int(value)):
            wanted = {bool: "true or false", int: "a whole number above 0"}.get(kind, "a number above 0")
            raise BadInput(f"{self.path}: {key} is {value!r}; needed {wanted}")
        return kind(value)

    def nullable(self, key: str, kind: type, absent: Any) -> Any:
        """Return the value as `take` does, None for null, and `absent` for an absent key."""
        return self.take(key, kind, None if key in self.left else absent)

    def activation(self, key: str, default: str) -> str:
        """Return the name in ACTIVATIONS of an activation. Raises BadInput for one that is not supported."""
        value = self.take(key, object, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise BadInput(f"{self.path}: {key} is {value!r}; computed here: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def finish(self) -> None:
        """Raise BadInput for a key that was not taken and may change the computation."""
        for key, value in sorted(self.left.items()):
            off = (
                value is None
                or (value is False and key in OFF_WHEN_FALSE)
                or (key, value) == ("is_causal", True)
            )
            if not off and key not in NEUTRAL and not key.startswith("_"):
                raise BadInput(
                    f"{self.path}: option {key}={value!r} is not computed here; if it does not change what the model "
                    "computes, delete it from config.json"
                )


def read_architecture(directory: Path) -> Architecture:
    """Return the architecture of a Hugging Face directory.

    Raises BadInput, naming the family, option or value that is not supported.
    """
    path = directory / "config.json"
    options = Options(path, read_json(path))
    families = options.take("architectures", object, None)
    family = families[0] if isinstance(families, list) and len(families) == 1 else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadInput(f"{path}: architectures is {families or 'missing'}; known: {', '.join(FAMILIES)}")
    heads, model = options.take("num_attention_heads"), options.take("hidden_size")
    layers, max_positions = options.take("num_hidden_layers"), options.take("max_position_embeddings")
    special = FAMILIES[family](options, layers)  # first, because keys that it takes are absent below
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
    options.finish()
    if heads % architecture.kv_heads:
        raise BadInput(f"{path}: {heads} heads cannot share {architecture.kv_heads} kv heads")
    if architecture.head_dim % 2:
        raise BadInput(f"{path}: head_dim is {architecture.head_dim}; rotary embeddings need an even one")
    return architecture


# The options of each family. An absent option has the default of its class in transformers; sizes must be present.

KV_HEADS = {"MistralForCausalLM": 8, "Gemma2ForCausalLM": 4, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}


def _mistral(options: Options, layers: int) -> dict[str, Any]:
    return {"window": options.nullable("sliding_window", int, 4096)}


def _llama(options: Options, layers: int) -> dict[str, Any]:
    bias = options.take("attention_bias", bool, False)
    return {"window": None, "qkv_bias": bias, "o_bias": bias}


def _gemma2(options: Options, layers: int) -> dict[str, Any]:
    bias, window = options.take("attention_bias", bool, False), options.nullable("sliding_window", int, 4096)
    if options.take("sliding_window_size", int, window) != window:  # published beside sliding_window
        raise BadInput(f"{options.path}: sliding_window and sliding_window_size differ")
    options.take("hidden_act", object, None)  # published too, but hidden_activation is used
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


def _qwen2(options: Options, layers: int) -> dict[str, Any]:
    used = options.take("use_sliding_window", bool, False)
    size, first = options.nullable("sliding_window", int, 4096), options.take("max_window_layers", object, 28)
    if type(first) is not int:
        raise BadInput(f"{options.path}: max_window_layers is {first!r}; needed a whole number")
    window = size if used else None
    kinds = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return {"qkv_bias": True, **_windows(options, window, kinds)}


def _qwen3(options: Options, layers: int) -> dict[str, Any]:
    bias = options.take("attention_bias", bool, False)
    head_dim = options.take("head_dim", default=128)
    own = {"head_dim": head_dim, "qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    return _qwen2(options, layers) | own


FAMILIES = {
    "MistralForCausalLM": _mistral,
    "LlamaForCausalLM": _llama,
    "Gemma2ForCausalLM": _gemma2,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _windows(options: Options, window: int | None, default: list[str]) -> dict[str, Any]:
    """Return `window` and `windowed` from layer_types, or from the family's pattern `default` if that is absent."""
    kinds = options.take("layer_types", object, default)
    named = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    if not named or len(kinds) != len(default):
        raise BadInput(
            f"{options.path}: layer_types must name {FULL} or {SLIDING} for each of {len(default)} layers"
        )
    windowed = tuple(kind == SLIDING for kind in kinds)
    if window is None or not any(windowed):
        return {"window": None}
    return {"window": window, "windowed": () if all(windowed) else windowed}


def _rope(options: Options, max_positions: int) -> Rope:
    """Return the rotary embedding. Raises BadInput for a kind that is not supported."""
    theta = options.take("rope_theta", float, 10_000.0)
    before, raw = (options.take(key, object, {}) for key in ("rope_scaling", "rope_parameters"))
    if before and raw and before != raw:
        raise BadInput(f"{options.path}: rope_scaling and rope_parameters differ; keep the right one")
    raw = raw or before  # transformers 5 writes rope_parameters
    if not isinstance(raw, dict):
        raise BadInput(f"{options.path}: rope parameters are {raw!r}, needed an object")
    inner = Options(options.path, raw)
    kind = inner.take("rope_type", object, inner.left.get("type") or "default")
    inner.left.pop("type", None)  # its name before transformers 4.43
    theta = inner.take("rope_theta", float, theta)
    if kind == "default":
        rope = Rope(theta)
    elif kind == "linear":
        rope = Rope(theta, "linear", inner.take("factor", float))
    elif kind == "llama3":
        rope = Rope(
            theta,
            "llama3",
            inner.take("factor", float),
            inner.take("low_freq_factor", float),
            inner.take("high_freq_factor", float),
            inner.take("original_max_position_embeddings", default=max_positions),
        )
        if rope.high <= rope.low:
            raise BadInput(f"{options.path}: high_freq_factor must exceed low_freq_factor")
    else:
        raise BadInput(f"{options.path}: rope type is {kind!r}; computed here: default, linear, llama3")
    inner.finish()
    return rope
