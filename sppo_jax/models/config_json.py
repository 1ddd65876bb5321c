"""config.json, key by key: which keys change what is computed, by the rule of transformers' own configuration classes."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax.command import printable
from sppo_jax.errors import BadInput, one_line
from sppo_jax.files import is_file, read_json

# Keys that transformers looks up in every model's configuration, whether or not its class has them, and their values
# that change nothing.
ASKED_OF_ALL: dict[str, Any] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "attention_chunk_size": None,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "quantization_config": None,
    "compression_config": None,
    "transformers_weights": None,  # another file of weights
    "fusion_config": None,
    "text_config": None,  # configurations of other networks within this one
    "decoder": None,
    "generator": None,
    "text_encoder": None,
}
# Keys that concern training, random weights, the kernel of attention, devices, outputs or the tokenizer.
ELSEWHERE = frozenset(
    [
        "attention_dropout",
        "initializer_range",
        "pretraining_tp",
        "gradient_checkpointing",
        "attn_implementation",
        "experts_implementation",
        "tokenizer_class",
        "keys_to_ignore_at_inference",
        # how the weights are spread over devices
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
    ]
)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Other spellings of dtypes: PyTorch's, and those of command lines.
DTYPES = {
    "half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32", "double": "float64",
}  # fmt: skip
PYTORCH = frozenset(
    ["float16", "half", "bfloat16", "float32", "float", "float64", "double"]
)  # names that transformers reads
SHOWN = 80  # characters of a key or value in a message
NAMED = 20  # ignored keys in a line


@dataclass(frozen=True)
class Known:
    """The keys that transformers' configuration class of one model type has."""

    name: str  # such as LlamaConfig
    neutral: Mapping[str, Any]  # keys that may change what is computed, and their values that change nothing
    elsewhere: frozenset[str]  # keys that change nothing that is computed from tokens and weights


@functools.cache
def known(model_type: str) -> Known:
    """Return the keys of transformers' own class for `model_type`.

    A key changes nothing if the base class has it (labels, dtypes, kinds of output), or generation's configuration. For
    the class's other keys its default changes nothing.
    """
    from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig  # takes a second

    own = CONFIG_MAPPING[model_type]
    attributes = {name for name in dir(own) if not name.startswith("__")}
    properties = {name for name in attributes if isinstance(getattr(PretrainedConfig, name, None), property)}
    elsewhere = vars(PretrainedConfig()).keys() | vars(GenerationConfig()).keys() | properties | ELSEWHERE
    neutral = dict.fromkeys(attributes | own.attribute_map.keys()) | vars(own()) | ASKED_OF_ALL
    return Known(own.__name__, neutral, frozenset(elsewhere - ASKED_OF_ALL.keys()))


class Options:
    """The keys of one object of config.json. Each is taken once; `finish` judges the keys that were not taken."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path, self.left = path, dict(raw)
        self.ignored: list[str] = []  # keys that transformers ignores, for people

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
            raise BadInput(f"{self.path}: {key} is {shown(value)}; needed {wanted}")
        return kind(value)

    def nullable(self, key: str, kind: type, absent: Any) -> Any:
        """Return the value as `take` does, None for null, and `absent` for an absent key."""
        return self.take(key, kind, None if key in self.left else absent)

    def activation(self, key: str, default: str) -> str:
        """Return the name in ACTIVATIONS of an activation. Raises BadInput for one that is not supported."""
        value = self.take(key, object, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise BadInput(f"{self.path}: {key} is {shown(value)}; computed here: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refusal(self, key: str, value: Any, neutral: Any) -> BadInput:
        """Return the line for a key whose value changes what is computed; `neutral` would change nothing."""
        if key in ("quantization_config", "compression_config"):
            method = value.get("quant_method", "of some kind") if isinstance(value, dict) else shown(value)
            return BadInput(
                f"{self.path}: {key} ({method}): quantised weights are not read; give the checkpoint that was quantised, "
                "or its weights dequantised and without this key"
            )
        without = "without it" if neutral is None else f"with {key}={shown(neutral)}"
        return BadInput(
            f"{self.path}: option {key}={shown(value)} is not computed here; give a checkpoint {without}"
        )

    def finish(self, keys: Known) -> None:
        """Put the left keys that transformers ignores into `ignored`.

        Raises BadInput for a key of transformers' class whose value may change what is computed.
        """
        for key, value in sorted(self.left.items()):
            if value is None or key in keys.elsewhere:
                continue
            if key not in keys.neutral:
                self.ignored.append(key)
            elif value != (neutral := keys.neutral[key]) and (value is not False or neutral is not None):
                raise self.refusal(key, value, neutral)

    def note(self, keys: Known) -> str | None:
        """Return the line about the ignored keys; None without any."""
        if not self.ignored:
            return None
        names = [" ".join(printable(name[:SHOWN]).split()) for name in sorted(self.ignored)]
        more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
        named = ", ".join(names[:NAMED] + more)
        return f"{self.path}: ignored, since transformers' {keys.name} has no such key: {named}"


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that config.json names (`dtype`, else `torch_dtype`), as NumPy spells it; None for "auto"."""
    value = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(value, str) or value == "auto":
        return None
    value = value.removeprefix("torch.")
    return DTYPES.get(value, value)


def for_tokenizer(directory: Path) -> dict[str, Any]:
    """Return the keywords with which transformers' AutoTokenizer reads a directory; {} means that it needs none.

    It reads config.json too, and fails at a dtype that is spelled otherwise than PyTorch's names, of which a tokenizer
    needs nothing: then it gets the configuration without it.
    """
    path = directory / "config.json"
    config = read_json(path) if is_file(path) else {}
    named = [config[key] for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    if all(name in PYTORCH for name in named) or not isinstance(config.get("model_type"), str):
        return {}
    return {"config": _without_dtype(config)}


def why_unread(directory: Path) -> str | None:
    """Return why transformers does not read config.json, its dtype aside; None if it does, or there is none."""
    path = directory / "config.json"
    config = read_json(path) if is_file(path) else {}
    try:
        if isinstance(config.get("model_type"), str):
            _without_dtype(config)
    except Exception as error:  # many kinds, of transformers and of its checks of types
        return one_line(error)
    return None


def _without_dtype(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration, made from all keys but the dtype."""
    from transformers import AutoConfig

    others = {
        key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "model_type")
    }
    return AutoConfig.for_model(config["model_type"], **others)
