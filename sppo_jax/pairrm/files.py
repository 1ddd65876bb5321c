"""A PairRM's files: a directory or a name on the hub → its files, its checked options, and the hash of both.

Two layouts are published. In `llm-blender/PairRM-hf` everything is in one directory, and config.json is DeBERTa-v2's.
In `llm-blender/PairRM`, the original's "ranker", the tensors are the same, but config.json is the ranker's and names a
backbone, whose config.json and tokenizer complete it. The backbone's own weights are not needed, and not fetched.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sppo_jax.command import say
from sppo_jax.config import EMBEDDED, MOST_LAYERS
from sppo_jax.errors import BadInput
from sppo_jax.hub import repositories
from sppo_jax.hub.names import resolve
from sppo_jax.pairrm import tokenizer

WEIGHTS = "model.safetensors"
BACKBONE_FILES = ("config.json", *tokenizer.FILES, "tokenizer_config.json", *repositories.LICENCES)
FILES = (*BACKBONE_FILES, WEIGHTS)
EMBEDDING = "pretrained_model.embeddings.word_embeddings.weight"
_HOW_TO_GET = "a PairRM is laid out as the repository llm-blender/PairRM-hf or llm-blender/PairRM"
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; w = torch.load('pytorch_model.bin', 'cpu', weights_only=True); "
    "s.save_file({k: v.clone() for k, v in w.items()}, 'model.safetensors')\""
)

# Options that fix the network's shape, with DeBERTa-v2's default for an absent one (None: it must not be absent).
_SHAPE = {
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "vocab_size": None,
    "position_buckets": None,
    "max_position_embeddings": 512,
}
# Options of which this network supports one value: (that value, DeBERTa-v2's default for an absent option).
_ONLY: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("gelu", "gelu"),
    "relative_attention": (True, False),
    "share_att_key": (True, False),
    "pos_att_type": (["c2p", "p2c"], []),
    "norm_rel_ebd": ("layer_norm", "none"),
    "position_biased_input": (False, True),
    "type_vocab_size": (0, 0),
    "conv_kernel_size": (0, 0),
    "n_tasks": (1, 1),
}
_PICKLED = "pytorch_model.bin"
_DEEPEST = 16  # most lists and maps within one another in config.json
_LIMITS = ("source_maxlength", "candidate_maxlength")
# A buffer in checkpoints of old versions of transformers: a row of integers, not a weight.
_BUFFERS = {"pretrained_model.embeddings.position_ids"}
_FLOATS = ("F32", "BF16", "F16", "F64")
_SCORING = (*_SHAPE, *_ONLY, *_LIMITS, "layer_norm_eps", "max_relative_positions")


@dataclass(frozen=True)
class Checkpoint:
    """A complete PairRM on this machine's disk. `read(directory, backbone)` returns it in another process."""

    directory: Path
    config: dict[str, Any]  # options of transformers' DebertaV2Config, checked, and those of the pair head
    weights: Path  # safetensors with pretrained_model.* and head_layer.{1,4}.*
    tokenizer: Path  # tokenizer.json or spm.model
    backbone: Path | None = None  # the directory that completes a ranker's; None where none is needed
    sources: dict[str, str] = field(default_factory=dict)  # repository → commit, if from the hub

    @property
    def identity(self) -> str:
        """`sha256:` and a hash of all that determines the scores (options, tokenizer, weights), but not of their place.

        Raises BadInput for a file that cannot be read.
        """
        options = {key: self.config[key] for key in sorted(_SCORING) if key in self.config}
        whole = hashlib.sha256(json.dumps(options).encode())
        for file in (self.tokenizer, self.weights):
            try:
                with file.open("rb") as stored:
                    whole.update(file.name.encode() + b"\0" + hashlib.file_digest(stored, "sha256").digest())
            except OSError as error:
                raise BadInput(f"PairRM: {str(file)!r} is unreadable: {error.strerror}") from None
        return f"sha256:{whole.hexdigest()}"


def fetch(
    name: str, *, pinned: Mapping[str, str] | None = None, tell: Callable[[str], None] = say
) -> Checkpoint:
    """Return the PairRM `name`, fetched from the hub where needed, and a ranker's backbone with it.

    `name` is `embedded:NAME`, a directory, or `owner/repo[@revision]` on the hub. `pinned` maps repositories to the
    commits that a run was begun with: these are used, even where a directory has that name or a commit is newer.
    Raises BadInput as `read` and `repositories.snapshot` do.
    """
    if name.startswith(EMBEDDED):
        return read(resolve(name))
    pinned = pinned or {}
    judge = _snapshot(name, FILES, pinned, tell)
    found, backbone = [judge], None
    named = _backbone_name(judge.directory)
    if named is not None and not os.path.isdir(judge.directory / named):
        try:
            base = _snapshot(named, BACKBONE_FILES, pinned, tell)
        except BadInput as error:
            raise BadInput(f"PairRM: {name} needs its backbone: {error}") from None
        found.append(base)
        backbone = base.directory
    sources = {one.name: one.revision for one in found if one.revision is not None}
    return replace(read(judge.directory, backbone), sources=sources)


def read(path: str | Path, backbone: str | Path | None = None) -> Checkpoint:
    """Return the PairRM in the directory `path`, without using the hub.

    A ranker's backbone is the directory `backbone`, else the one that its config.json names (relative to `path`, then to
    the working directory). Raises BadInput, naming what is missing, is not a PairRM's, or is an option that the network
    does not support.
    """
    directory = _expanded(path)
    if not os.path.isdir(directory):  # Path.is_dir raises for what it may not look at
        raise BadInput(f"PairRM: there is no directory {str(path)!r}; {_HOW_TO_GET}")
    try:
        directory = directory.absolute()
    except OSError:
        raise BadInput("PairRM: the working directory was deleted; start in another one") from None
    named = _backbone_name(directory)
    base = None if named is None else _backbone(directory, named, backbone)
    places = [place for place in (directory, base) if place is not None]
    files = [place / name for place in places for name in tokenizer.FILES]
    tokens = next((file for file in files if file.is_file()), None)
    weights = directory / WEIGHTS
    lacking = [
        *(() if tokens else (" or ".join(tokenizer.FILES),)),
        *(() if weights.is_file() else (WEIGHTS,)),
    ]
    if tokens is None or lacking:
        raise BadInput(f"PairRM: {str(path)!r} lacks {', '.join(lacking)}; {_how_to_mend(directory)}")
    config = _json(directory)
    rows, width = _embedding(weights)
    if base is not None:
        config = _from_ranker(directory, config, base, rows)
    config = _checked(config, (base or directory) / "config.json")
    if (rows, width) != (config["vocab_size"], config["hidden_size"]):
        raise BadInput(
            f"PairRM: {str(weights)!r} has {rows} tokens of {width} numbers, config.json asks for "
            f"{config['vocab_size']} of {config['hidden_size']}: the two files do not belong together"
        )
    return Checkpoint(directory, config, weights, tokens, base)


def check_tensors(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that the weights have exactly the tensors of a network; only the file's header is read.

    Raises BadInput, naming the tensor that is missing, extra, misshapen or not of floating point.
    """
    file = str(checkpoint.weights)
    with opened(checkpoint.weights, "numpy") as stored:
        names = set(stored.keys()) - _BUFFERS
        for problem, odd in (("lacks", shapes.keys() - names), ("has the unknown", names - shapes.keys())):
            if odd:
                raise BadInput(f"PairRM: {file!r} {problem} tensor {min(odd)} ({len(odd)} such)")
        for name, shape in shapes.items():
            header = stored.get_slice(name)
            if (found := list(header.get_shape())) != list(shape):
                raise BadInput(f"PairRM: {file!r} has {name} as {found}, config.json asks for {list(shape)}")
            if header.get_dtype() not in _FLOATS:
                raise BadInput(
                    f"PairRM: {file!r} has {name} as {header.get_dtype()}; give weights of floating point "
                    f"({', '.join(_FLOATS)})"
                )


def check_finite(checkpoint: Checkpoint, name: str, finite: bool, dtype: object) -> None:
    """Raise BadInput unless tensor `name` is finite in the dtype in which it is kept."""
    if not finite:
        raise BadInput(
            f"PairRM: {str(checkpoint.weights)!r} has numbers in {name} that are not finite in {dtype}; "
            "the file is damaged, or was never a judge's: take another copy"
        )


def farthest(config: Mapping[str, Any]) -> int:
    """Return the largest distance, in tokens, that the network distinguishes; larger ones count as this."""
    relative = int(config["max_relative_positions"])
    return relative if relative > 0 else int(config["max_position_embeddings"])


@contextlib.contextmanager
def opened(weights: Path, framework: str) -> Iterator[Any]:
    """Open the safetensors file for reading tensors of "numpy" or "pt". Raises BadInput when it is damaged."""
    try:
        with safe_open(weights, framework) as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"PairRM: {str(weights)!r} is unreadable: {repositories.unreadable(weights, error)}"
        ) from None


def _snapshot(
    name: str, files: tuple[str, ...], pinned: Mapping[str, str], tell: Callable[[str], None]
) -> repositories.Snapshot:
    """Return the repository or directory `name`, at its pinned commit if there is one."""
    return repositories.snapshot(name, pinned.get(name.partition("@")[0]), files, tell=tell)


def _json(directory: Path) -> dict[str, Any]:
    """Return config.json of a directory. Raises BadInput where it is absent, unreadable or not an object."""
    file = directory / "config.json"
    if not os.path.isfile(file):
        raise BadInput(f"PairRM: {str(directory)!r} lacks config.json; {_HOW_TO_GET}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"PairRM: {str(file)!r} is unreadable: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"PairRM: {str(file)!r} is not JSON: {error}") from None
    if not isinstance(config, dict) or _nests(config, _DEEPEST):
        raise BadInput(f"PairRM: {str(file)!r} holds no options; {_HOW_TO_GET}")
    return config


def _nests(value: Any, depth: int) -> bool:
    """Return whether a JSON value is nested deeper than `depth`; even printing it could then fail."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_nests(one, depth - 1) for one in inner)


def _expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded. Raises BadInput where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInput(f"PairRM: there is no directory {str(path)!r}: {error}") from None


def _how_to_mend(directory: Path) -> str:
    """Return advice for a directory that lacks a file."""
    if (directory / WEIGHTS).is_file():
        return _HOW_TO_GET
    if (directory / _PICKLED).is_file():
        return f"{_PICKLED} is converted once, where it lies, by: {CONVERT}"
    return f"{_HOW_TO_GET}; where a repository has only a {_PICKLED}, download it, and convert it there once: {CONVERT}"


# --- the ranker's layout ----------------------------------------------------------------------------------------------


def _backbone_name(directory: Path) -> str | None:
    """Return the backbone that a ranker's config.json names; None for the other layout. Raises BadInput."""
    ranker = _json(directory)
    file = str(directory / "config.json")
    if "ranker_type" not in ranker:
        return None
    for key, only in (("ranker_type", "pairranker"), ("reduce_type", "linear"), ("n_tasks", 1)):
        if ranker.get(key, only) != only:
            raise BadInput(f"PairRM: {file!r} has {key} {ranker[key]!r}; only {only!r} is a PairRM")
    name = ranker.get("model_name")
    if not isinstance(name, str) or not name:
        raise BadInput(f"PairRM: {file!r} has model_name {name!r}, which names no backbone")
    return name


def _backbone(directory: Path, named: str, given: str | Path | None) -> Path:
    """Return the directory with a ranker's DeBERTa options. Raises BadInput where it does not exist."""
    places = (directory / named, _expanded(named)) if given is None else (_expanded(given),)
    found = next((place for place in places if os.path.isdir(place)), None)
    if found is None:
        raise BadInput(
            f"PairRM: {str(directory)!r} needs its backbone {str(given or named)!r}, which is not a directory here"
        )
    return Path(os.path.normpath(found.absolute()))


def _from_ranker(directory: Path, ranker: dict[str, Any], base: Path, rows: int) -> dict[str, Any]:
    """Return the options of a ranker's network. `rows` is its vocabulary: the backbone's, cut, which no option states."""
    own = {key: ranker[key] for key in ("n_tasks", "drop_out", *_LIMITS) if key in ranker}
    return _json(base) | own | {"vocab_size": rows}


# --- the network's options ---------------------------------------------------------------------------------------------


def _checked(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the options with DeBERTa-v2's defaults filled in. Raises BadInput for one that is not supported."""

    def refuse(key: str, why: str) -> BadInput:
        return BadInput(f"PairRM: {str(file)!r} has {key} {config.get(key)!r}; {why}")

    if config.get("model_type") != "deberta-v2":
        raise refuse("model_type", f"not 'deberta-v2'; {_HOW_TO_GET}")
    config = dict(config)
    if isinstance(config.get("pos_att_type"), str):  # as DeBERTa-v3 is published: "p2c|c2p"
        config["pos_att_type"] = config["pos_att_type"].lower().split("|")
    if isinstance(config.get("pos_att_type"), list):
        config["pos_att_type"] = sorted(str(kind).strip() for kind in config["pos_att_type"])
    for key, (only, default) in _ONLY.items():
        if config.setdefault(key, default) != only:
            raise refuse(key, f"this network has {only!r} only")
    for key, default in _SHAPE.items():
        value = config.setdefault(key, default)
        if type(value) is not int or value < 1:
            raise refuse(key, "a whole number of at least 1 is needed")
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise refuse("num_hidden_layers", f"at most {MOST_LAYERS} are computed here")
    for key in _LIMITS:
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 0):
            raise refuse(key, "a whole number is needed")
    if type(config.setdefault("max_relative_positions", -1)) is not int:
        raise refuse("max_relative_positions", "a whole number is needed")
    far = farthest(config)
    if not 1 <= config["position_buckets"] // 2 < far - 1:
        raise refuse("position_buckets", f"with distances up to {far} it must be from 2 to {2 * far - 3}")
    pad = config.get("pad_token_id")
    if pad is not None and (type(pad) is not int or not 0 <= pad < config["vocab_size"]):
        raise refuse("pad_token_id", f"a token of the {config['vocab_size']} is needed")
    eps = config.setdefault("layer_norm_eps", 1e-7)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise refuse("layer_norm_eps", "a number between 0 and 1 is needed")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise refuse("num_attention_heads", f"hidden_size {hidden} is not divisible by it")
    for key, needed in (("embedding_size", hidden), ("attention_head_size", hidden // heads)):
        if config.get(key, needed) != needed:
            raise refuse(key, f"this network has {needed} only, from hidden_size and num_attention_heads")
    return config


def _embedding(weights: Path) -> tuple[int, int]:
    """Return (tokens, width) of the embedding. Raises BadInput where it is absent or not a table."""
    with opened(weights, "numpy") as stored:
        if EMBEDDING not in stored.keys():  # noqa: SIM118  (not a dict)
            raise BadInput(f"PairRM: {str(weights)!r} lacks tensor {EMBEDDING}; {_HOW_TO_GET}")
        shape = stored.get_slice(EMBEDDING).get_shape()
    if len(shape) != 2:
        raise BadInput(f"PairRM: {str(weights)!r} has {EMBEDDING} as {shape}, which is not a table")
    return shape[0], shape[1]
