"""Hugging Face checkpoints: one table of tensors, read in both directions, and config.json.

Weights go tensor by tensor from safetensors into the devices' own shards and back; nothing else is opened.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors' readers need
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.models.transformer import Architecture, Transformer

SHARD_BYTES = 5_000_000_000  # of one exported file, the size that the hub's tools write


@dataclass(frozen=True)
class Tensor:
    """One parameter: where it lives here, its dimensions here and there, and its name there.

    `ours` has a letter per dimension (sppo_jax.sharding), layers apart. `theirs` has a group of letters per
    dimension of the checkpoint's tensor: "HC D" is a matrix whose rows run over heads and channels.
    """

    path: str
    ours: str
    theirs: str
    name: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def letters(self) -> str:
        return ("L" if self.stacked else "") + self.ours

    def shape(self, a: Architecture) -> tuple[int, ...]:
        return tuple(a.size(letter) for letter in self.letters)

    def checkpoint_shape(self, a: Architecture) -> tuple[int, ...]:
        groups = self.theirs.split()
        return tuple(int(np.prod([a.size(letter) for letter in group])) for group in groups)

    def names(self, a: Architecture) -> list[str]:
        return [self.name.format(layer=i) for i in range(a.layers)] if self.stacked else [self.name]

    def from_checkpoint(self, x: np.ndarray, a: Architecture) -> np.ndarray:
        flat = self.theirs.replace(" ", "")
        return x.reshape([a.size(letter) for letter in flat]).transpose([flat.index(c) for c in self.ours])

    def to_checkpoint(self, x: np.ndarray, a: Architecture) -> np.ndarray:
        flat = self.theirs.replace(" ", "")
        x = x.transpose([self.ours.index(c) for c in flat]).reshape(self.checkpoint_shape(a))
        return np.ascontiguousarray(x)


LAYER = "model.layers.{layer}."
MISTRAL = (
    Tensor("embedding", "VD", "V D", "model.embed_tokens.weight"),
    Tensor("layers.attention_norm", "D", "D", LAYER + "input_layernorm.weight"),
    Tensor("layers.q", "DHC", "HC D", LAYER + "self_attn.q_proj.weight"),
    Tensor("layers.k", "DNC", "NC D", LAYER + "self_attn.k_proj.weight"),
    Tensor("layers.v", "DNC", "NC D", LAYER + "self_attn.v_proj.weight"),
    Tensor("layers.o", "HCD", "D HC", LAYER + "self_attn.o_proj.weight"),
    Tensor("layers.mlp_norm", "D", "D", LAYER + "post_attention_layernorm.weight"),
    Tensor("layers.gate", "DF", "F D", LAYER + "mlp.gate_proj.weight"),
    Tensor("layers.up", "DF", "F D", LAYER + "mlp.up_proj.weight"),
    Tensor("layers.down", "FD", "D F", LAYER + "mlp.down_proj.weight"),
    Tensor("norm", "D", "D", "model.norm.weight"),
    Tensor("head", "DV", "V D", "lm_head.weight"),
)
FAMILIES = {"MistralForCausalLM": MISTRAL}


def table(a: Architecture) -> tuple[Tensor, ...]:
    """The tensors that a checkpoint of this architecture holds."""
    return tuple(t for t in MISTRAL if not (t.path == "head" and a.tied))


def abstract(a: Architecture, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter, without a byte of it."""
    return {
        t.path: jax.ShapeDtypeStruct(t.shape(a), jnp.float32, sharding=_placed(t, a, mesh)) for t in table(a)
    }


def initialise(a: Architecture, key: jax.Array, mesh: Mesh, compute_dtype: Any = jnp.float32) -> Transformer:
    """A random model, each parameter born in its shards: norms 1, matrices normal with deviation .02."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(table(a)))
        return {
            t.path: jnp.ones(t.shape(a)) if t.ours == "D" else 0.02 * jax.random.normal(k, t.shape(a))
            for t, k in zip(table(a), keys, strict=True)
        }

    shardings = {t.path: _placed(t, a, mesh) for t in table(a)}
    return Transformer(a, jax.jit(init, out_shardings=shardings)(key), compute_dtype)


def read_architecture(directory: Path) -> Architecture:
    """Architecture from config.json. Every option is read, and one that we do not compute is refused by name."""
    raw = read_json(directory / "config.json")
    families = raw.get("architectures")
    if families not in [[name] for name in FAMILIES]:
        raise BadInput(
            f"{directory}/config.json: architectures is {families or 'missing'}; known: {', '.join(FAMILIES)}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"{directory}/config.json: rope parameters are {rope!r}, needed an object")
    for key, value, wanted in (
        ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("attention_bias", raw.get("attention_bias", False), (False,)),
        ("mlp_bias", raw.get("mlp_bias", False), (False,)),
    ):
        if value not in wanted:
            raise BadInput(
                f"{directory}/config.json: {key} is {value!r}; only {wanted[0]!r} is computed here"
            )
    try:
        heads = int(raw["num_attention_heads"])
        window = raw.get("sliding_window", 4096)  # absent: transformers' default; null: none
        architecture = Architecture(
            vocab=int(raw["vocab_size"]),
            model=int(raw["hidden_size"]),
            mlp=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            max_positions=int(raw["max_position_embeddings"]),
            window=None if window is None else int(window),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise BadInput(f"{directory}/config.json: {error.args[0]} is missing") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise BadInput(f"{directory}/config.json: {error}") from None
    for field, value in dataclasses.asdict(architecture).items():
        if not (value is None or isinstance(value, bool) or 0 < value < float("inf")):
            raise BadInput(f"{directory}/config.json: {field} is {value}; needed a number above 0")
    if architecture.heads % architecture.kv_heads:
        raise BadInput(
            f"{directory}/config.json: {heads} heads cannot share {architecture.kv_heads} kv heads"
        )
    return architecture


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Transformer:
    """A model from a Hugging Face directory, float32 masters sharded over `mesh` (default: one device).

    `dtype` is the dtype of its matrix products. Host memory: one stacked parameter's local shards at a time.
    Raises BadInput for a tensor that is missing, unknown, misshapen or not finite, before anything compiles.
    """
    directory = Path(path)
    if mesh is None:
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    architecture = read_architecture(directory)
    files = _tensor_files(directory)
    _check_tensors(directory, architecture, files)
    weights = {t.path: _read_sharded(t, architecture, mesh, files) for t in table(architecture)}
    return Transformer(architecture, weights, dtype)


def save(model: Transformer, directory: str | Path) -> None:
    """Write float32 safetensors (several files with an index beyond 5 GB) into an existing `directory`."""
    directory, a = Path(directory), model.architecture
    files: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    filled = 0
    for name, read, size in _checkpoint_tensors(model):
        if files[-1] and filled + size > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append((name, read))
        filled += size
    index: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        save_file({name: read() for name, read in tensors}, directory / file, metadata={"format": "pt"})
        index |= {name: file for name, _ in tensors}
    if len(files) > 1:
        total = sum(4 * int(np.prod(t.shape(a))) for t in table(a))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; BadInput where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index names them; BadInput where one is absent."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise BadInput(
                f"{directory}: no model.safetensors; give a Hugging Face directory with safetensors"
            )
        return [single]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: weight_map names {name!r}, which is not a safetensors file beside it")
        if not (directory / name).is_file():
            raise BadInput(f"{directory}: {name} is missing, though the index names it; download it again")
    return [directory / name for name in names]


def _placed(t: Tensor, a: Architecture, mesh: Mesh) -> jax.sharding.NamedSharding:
    return sharding.named(t.letters, mesh, t.shape(a))


def _tensor_files(directory: Path) -> dict[str, Path]:
    """{tensor name: file} from the files' own headers."""
    found: dict[str, Path] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, "numpy") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: damaged or not safetensors ({error}); download it again") from None
        if twice := found.keys() & set(names):
            raise BadInput(f"{file}: tensor {min(twice)} is also in {found[min(twice)].name}")
        found |= dict.fromkeys(names, file)
    return found


def _check_tensors(directory: Path, a: Architecture, files: dict[str, Path]) -> None:
    wanted = {name: t.checkpoint_shape(a) for t in table(a) for name in t.names(a)}
    if missing := sorted(wanted.keys() - files.keys()):
        raise BadInput(f"{directory}: {len(missing)} tensors are missing, first {missing[0]}")
    # Older exports of tied models repeat the embedding as lm_head, and very old ones keep rotary buffers.
    spare = re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq") if a.tied else re.compile(r".*inv_freq")
    extra = sorted(name for name in files.keys() - wanted.keys() if not spare.fullmatch(name))
    if extra:
        raise BadInput(
            f"{directory}: {len(extra)} tensors are unknown to this architecture, first {extra[0]}"
        )
    for file in set(files.values()):
        with safe_open(file, "numpy") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != wanted[name]:
                    raise BadInput(f"{file}: {name} has shape {shape}, config.json makes it {wanted[name]}")


def _read_sharded(t: Tensor, a: Architecture, mesh: Mesh, files: dict[str, Path]) -> jax.Array:
    """Fill this process's shards layer by layer; each tensor of the checkpoint is read once."""
    shape, placed = t.shape(a), _placed(t, a, mesh)
    where = placed.addressable_devices_indices_map(shape)
    pieces: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}
    for index in where.values():
        assert index is not None
        piece = np.empty(placed.shard_shape(shape), np.float32)
        pieces.setdefault(str(index), (index, piece))
    for layer, name in enumerate(t.names(a)):
        with safe_open(files[name], "numpy") as tensors:
            x = t.from_checkpoint(tensors.get_tensor(name), a)
        if not np.isfinite(np.max(np.abs(x.astype(np.float32)))):
            raise BadInput(f"{files[name]}: {name} holds NaN or infinite values")
        for index, piece in pieces.values():
            if t.stacked:
                piece[layer] = x[index[1:]]
            else:
                piece[...] = x[index]
    local = [jax.device_put(pieces[str(index)][1], device) for device, index in where.items()]
    return jax.make_array_from_single_device_arrays(shape, placed, local)


def _checkpoint_tensors(model: Transformer) -> Iterator[tuple[str, Callable[[], np.ndarray], int]]:
    """(name, reader, bytes) of every tensor to write, gathered from the mesh one layer at a time."""
    a = model.architecture
    for t in table(a):
        param = _param(model, t)
        size = 4 * int(np.prod(t.checkpoint_shape(a)))
        for layer, name in enumerate(t.names(a)):

            def read(t: Tensor = t, param: Any = param, layer: int = layer) -> np.ndarray:
                x = param[...][layer] if t.stacked else param[...]
                return t.to_checkpoint(np.asarray(jax.device_get(x), np.float32), a)

            yield name, read, size


def _param(model: Transformer, t: Tensor) -> Any:
    return model.layers[t.path.removeprefix("layers.")] if t.stacked else getattr(model, t.path)
