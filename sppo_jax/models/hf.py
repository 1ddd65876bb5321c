"""Hugging Face checkpoints: one table of tensors, used for reading and writing.

Weights go tensor by tensor from safetensors into the devices' shards and back; no other format is read.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors' readers need
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from sppo_jax import files as disk
from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.architecture import read_architecture as read_architecture
from sppo_jax.models.attention import choose
from sppo_jax.models.checkpoint_files import (
    EMBEDDING,
    FLOATS,
    HEAD,
    INDEX,
    readable,
    tensor_files,
    weight_files,
)
from sppo_jax.models.checkpoint_files import stored_architecture as stored_architecture
from sppo_jax.models.checkpoint_files import stored_dtypes as stored_dtypes
from sppo_jax.models.safetensors_file import Entry, write_safetensors
from sppo_jax.models.transformer import LORA_SCALE, Transformer

SHARD_BYTES = 5_000_000_000  # most bytes of one exported file, as the hub's tools write


@dataclass(frozen=True)
class Tensor:
    """One parameter: its path and dimensions in the model, its dimensions and name in the checkpoint.

    `ours` has a letter per dimension of the model's array (sppo_jax.sharding), without layers. `theirs` has a group of
    letters per dimension of the checkpoint's tensor: "HC D" is a matrix whose rows run over heads and channels.
    """

    path: str
    ours: str
    theirs: str
    name: str

    @property
    def stacked(self) -> bool:
        """Whether the model's array has a leading axis of layers."""
        return "{layer}" in self.name

    @property
    def letters(self) -> str:
        """The letters of the model's array, with L for a leading axis of layers."""
        return ("L" if self.stacked else "") + self.ours

    def shape(self, a: Architecture) -> tuple[int, ...]:
        """Return the shape of the model's array."""
        return tuple(a.size(letter) for letter in self.letters)

    def checkpoint_shape(self, a: Architecture) -> tuple[int, ...]:
        """Return the shape of one tensor of the checkpoint."""
        groups = self.theirs.split()
        return tuple(int(np.prod([a.size(letter) for letter in group])) for group in groups)

    def names(self, a: Architecture) -> list[str]:
        """Return the names of the checkpoint's tensors: one per layer, or a single one."""
        return [self.name.format(layer=i) for i in range(a.layers)] if self.stacked else [self.name]

    def read(self, x: Any, a: Architecture, index: tuple[slice, ...]) -> np.ndarray:
        """Return the part of a checkpoint's tensor at `index`, in the dimensions `ours`.

        `x` is a slice reader of safetensors, or an array. Of grouped dimensions only the first may be split: a device
        holds whole heads.
        """
        cut = dict(zip(self.ours, index, strict=True))
        rows: list[slice] = []
        lengths: dict[str, int] = {}
        for group in self.theirs.split():
            inner = int(np.prod([a.size(letter) for letter in group[1:]]))
            start, stop, _ = cut[group[0]].indices(a.size(group[0]))
            rows.append(slice(start * inner, stop * inner))
            lengths |= {letter: a.size(letter) for letter in group[1:]} | {group[0]: stop - start}
        flat = self.theirs.replace(" ", "")
        part = x[tuple(rows)].reshape([lengths[letter] for letter in flat])
        return part.transpose([flat.index(letter) for letter in self.ours])

    def write(self, x: jax.Array, a: Architecture, dtype: np.dtype, mesh: Mesh) -> np.ndarray:
        """Return the checkpoint's tensor, filled from the shards of one layer's parameter without a further copy.

        Where several processes hold the shards, all of them are needed (`take_part`).
        """
        flat = self.theirs.replace(" ", "")
        tensor = np.empty([a.size(letter) for letter in flat], dtype)
        ours = tensor.transpose([flat.index(letter) for letter in self.ours])
        if not x.is_fully_addressable:
            with np.errstate(over="ignore"):
                ours[...] = sharding.whole(x, mesh)
            return tensor.reshape(self.checkpoint_shape(a))
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                # Read through a handle of its own, because an array keeps every host copy made of it.
                with np.errstate(over="ignore"):  # `entries` raises for overflow, with the tensor's name
                    ours[shard.index] = np.asarray(shard.data.addressable_data(0))
        return tensor.reshape(self.checkpoint_shape(a))


LAYER = "model.layers.{layer}."
DECODER = (
    Tensor("embedding", "VD", "V D", EMBEDDING),
    Tensor("layers.attention_norm", "D", "D", LAYER + "input_layernorm.weight"),
    Tensor("layers.q", "DHC", "HC D", LAYER + "self_attn.q_proj.weight"),
    Tensor("layers.q_bias", "HC", "HC", LAYER + "self_attn.q_proj.bias"),
    Tensor("layers.q_norm", "C", "C", LAYER + "self_attn.q_norm.weight"),
    Tensor("layers.k", "DNC", "NC D", LAYER + "self_attn.k_proj.weight"),
    Tensor("layers.k_bias", "NC", "NC", LAYER + "self_attn.k_proj.bias"),
    Tensor("layers.k_norm", "C", "C", LAYER + "self_attn.k_norm.weight"),
    Tensor("layers.v", "DNC", "NC D", LAYER + "self_attn.v_proj.weight"),
    Tensor("layers.v_bias", "NC", "NC", LAYER + "self_attn.v_proj.bias"),
    Tensor("layers.o", "HCD", "D HC", LAYER + "self_attn.o_proj.weight"),
    Tensor("layers.o_bias", "D", "D", LAYER + "self_attn.o_proj.bias"),
    Tensor("layers.mlp_norm", "D", "D", LAYER + "post_attention_layernorm.weight"),
    Tensor("layers.gate", "DF", "F D", LAYER + "mlp.gate_proj.weight"),
    Tensor("layers.up", "DF", "F D", LAYER + "mlp.up_proj.weight"),
    Tensor("layers.down", "FD", "D F", LAYER + "mlp.down_proj.weight"),
    Tensor("norm", "D", "D", "model.norm.weight"),
    Tensor("head", "DV", "V D", HEAD),
)
# With norms on both sides of a block, "post_attention_layernorm" is the one after attention.
POST_NORMS = (
    Tensor("layers.attention_post_norm", "D", "D", LAYER + "post_attention_layernorm.weight"),
    Tensor("layers.mlp_norm", "D", "D", LAYER + "pre_feedforward_layernorm.weight"),
    Tensor("layers.mlp_post_norm", "D", "D", LAYER + "post_feedforward_layernorm.weight"),
)


def table(a: Architecture) -> tuple[Tensor, ...]:
    """Return the parameters of this architecture, in the checkpoint's order."""
    absent = {
        "head": a.tied,
        "layers.q_bias": not a.qkv_bias,
        "layers.k_bias": not a.qkv_bias,
        "layers.v_bias": not a.qkv_bias,
        "layers.o_bias": not a.o_bias,
        "layers.q_norm": not a.qk_norm,
        "layers.k_norm": not a.qk_norm,
        "layers.mlp_norm": a.post_norms,  # in POST_NORMS, under another name
    }
    return tuple(t for t in DECODER if not absent.get(t.path)) + (POST_NORMS if a.post_norms else ())


def abstract(a: Architecture, mesh: Mesh, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of every parameter, by path, without allocating any."""
    return {t.path: placeholder(t, a, mesh, dtype) for t in table(a)}


def placeholder(t: Tensor, a: Architecture, mesh: Mesh, dtype: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of one parameter."""
    return jax.ShapeDtypeStruct(t.shape(a), dtype, sharding=_placed(t, a, mesh))


def initialise(a: Architecture, key: jax.Array, mesh: Mesh, compute_dtype: Any = jnp.float32) -> Transformer:
    """Return a random model, initialised in its shards: norms 1, biases 0, matrices normal with deviation 0.02."""

    def initial(t: Tensor, key: jax.Array) -> jax.Array:
        if t.path.endswith("norm"):
            return jnp.full(t.shape(a), 0.0 if a.norm_offset else 1.0, jnp.float32)
        if t.path.endswith("bias"):
            return jnp.zeros(t.shape(a))
        return 0.02 * jax.random.normal(key, t.shape(a))

    def init(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(table(a)))
        return {t.path: initial(t, k) for t, k in zip(table(a), keys, strict=True)}

    shardings = {t.path: _placed(t, a, mesh) for t in table(a)}
    weights = jax.jit(init, out_shardings=shardings)(key)
    return Transformer(a, weights, compute_dtype, choose("auto", mesh, a, compute_dtype))


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: str = "auto",
) -> Transformer:
    """Load the model of a Hugging Face directory, sharded over `mesh` (default: one device).

    `dtype` is that of the matrix products, `param_dtype` that of the parameters, `attention` the kernel
    (models/attention.py). Host memory holds one device's piece of one stacked parameter at a time. The head is tied as
    `stored_architecture` finds it, and is read as the embedding where the files hold no other. Raises BadInput, before
    anything is compiled, for a kernel that does not support the model, and for a tensor that is missing, unknown, misshapen,
    quantised, or not finite in both dtypes.
    """
    directory = Path(path)
    if mesh is None:
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    architecture = stored_architecture(directory)
    kernel = choose(attention, mesh, architecture, dtype)
    files = readable(directory, architecture, tensor_files(weight_files(directory)))
    tensors = table(architecture)
    if architecture.tied and HEAD in files:  # alone: `readable` leaves it out beside an embedding
        tensors = tuple(replace(t, name=HEAD) if t.name == EMBEDDING else t for t in tensors)
    check_tensors(directory, tensors, architecture, files)
    weights = {
        t.path: read_sharded(t, architecture, mesh, files, jnp.dtype(param_dtype), jnp.dtype(dtype))
        for t in tensors
    }
    return Transformer(architecture, weights, dtype, kernel)


def save(model: Transformer, directory: str | Path, dtype: Any = jnp.float32) -> None:
    """Write a model as safetensors into an existing `directory`, tensor by tensor; beyond 5 GB, as files with an index.

    Where several processes hold the model, one of them calls this, and the others `take_part`. The product of an adapter is added to its matrix: the written checkpoint needs no adapter. Raises BadInput for a
    parameter that is not finite in `dtype`, and where the system refuses a write.
    """
    with disk.writing(Path(directory)):
        _save(model, Path(directory), np.dtype(dtype))


def take_part(model: Transformer, tensors: Sequence[Tensor] | None = None) -> None:
    """Give another process, which writes a model that several hold, this one's shards, tensor by tensor."""
    for t in table(model.architecture) if tensors is None else tensors:
        for layer in range(len(t.names(model.architecture))):
            sharding.whole(_merged(model, t, layer), _mesh(model))


def _save(model: Transformer, directory: Path, dtype: np.dtype) -> None:
    # Some readers would prefer the files of an earlier checkpoint.
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    files: list[list[Entry]] = [[]]
    filled = 0
    for entry in (e for t in table(model.architecture) for e in entries(model, t, dtype)):
        if files[-1] and filled + entry.size > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += entry.size
    index: dict[str, str] = {}
    for i, members in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(directory / file, members)
        index |= {entry.name: file for entry in members}
    if len(files) > 1:
        total = sum(entry.size for members in files for entry in members)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / INDEX).write_text(text, encoding="utf-8")


def _placed(t: Tensor, a: Architecture, mesh: Mesh) -> jax.sharding.NamedSharding:
    return sharding.named(t.letters, mesh, t.shape(a))


def check_tensors(
    directory: Path, tensors: Sequence[Tensor], a: Architecture, files: dict[str, Path]
) -> None:
    """Raise BadInput unless `files` hold exactly `tensors`, in the shapes of architecture `a` and as floats."""
    wanted = {name: t.checkpoint_shape(a) for t in tensors for name in t.names(a)}
    if missing := sorted(wanted.keys() - files.keys()):
        raise BadInput(f"{directory}: {len(missing)} tensors are missing, first {missing[0]}")
    if extra := sorted(files.keys() - wanted.keys()):
        raise BadInput(
            f"{directory}: {len(extra)} tensors are unknown to this architecture, first {extra[0]}"
        )
    for file in sorted(set(files.values())):
        with safe_open(file, "numpy") as opened:
            for name in sorted(wanted.keys() & set(opened.keys())):
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                if shape != wanted[name]:
                    raise BadInput(f"{file}: {name} has shape {shape}, config.json makes it {wanted[name]}")
                if header.get_dtype() not in FLOATS:
                    raise BadInput(
                        f"{file}: {name} is {header.get_dtype()}; give a checkpoint that is not quantised "
                        f"({', '.join(FLOATS)})"
                    )


def read_sharded(
    t: Tensor,
    a: Architecture,
    mesh: Mesh,
    files: dict[str, Path],
    dtype: np.dtype,
    compute_dtype: np.dtype | None = None,
) -> jax.Array:
    """Return a parameter on the mesh in `dtype`, reading only the pieces of this process's devices, one at a time.

    Raises BadInput where it is not finite in `dtype`, or in the `compute_dtype` to which it will be cast.
    """
    shape, placed = t.shape(a), _placed(t, a, mesh)
    holders: dict[str, list[jax.Device]] = {}
    where = placed.addressable_devices_indices_map(shape)
    for device, index in where.items():
        holders.setdefault(str(index), []).append(device)
    arrays = []
    for devices in holders.values():
        index = where[devices[0]]
        assert index is not None
        piece = aligned(placed.shard_shape(shape), dtype)
        for layer, name in enumerate(t.names(a)):
            with safe_open(files[name], "numpy") as opened:
                part = t.read(opened.get_slice(name), a, index[1:] if t.stacked else index)
            if part.dtype.itemsize == 2:  # NumPy tests and transposes these several times as slowly
                part = part.astype(np.float32)
            if not np.isfinite(part).all():
                raise BadInput(f"{files[name]}: {name} holds NaN or infinite values")
            for kept in (dtype, compute_dtype or dtype):
                if _overflows(part, kept):
                    raise BadInput(
                        f"{files[name]}: {name} holds values beyond the range of {kept}, in which it is kept or computed; "
                        "give the checkpoint as it was trained"
                    )
            piece[layer if t.stacked else ...] = part
        # On a CPU all holders share this one buffer; jax never writes into a buffer that it did not allocate.
        arrays += [jax.device_put(piece, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, placed, arrays)


def _overflows(x: np.ndarray, dtype: np.dtype) -> bool:
    """Return whether finite numbers become infinite in `dtype`."""
    limit = float(jnp.finfo(dtype).max)
    if float(jnp.finfo(x.dtype).max) <= limit or not x.size or max(float(x.max()), -float(x.min())) <= limit:
        return False
    with np.errstate(over="ignore"):
        return not np.isfinite(x.astype(dtype)).all()  # a number a little above the limit is rounded to it


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array on a 64-byte boundary, which jax on a CPU uses without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def entries(model: Transformer, t: Tensor, dtype: np.dtype) -> Iterator[Entry]:
    """Yield the tensors of a parameter to write; each is gathered from the mesh only when it is written."""
    a = model.architecture
    for layer, name in enumerate(t.names(a)):

        def read(layer: int = layer, name: str = name) -> np.ndarray:
            tensor = t.write(_merged(model, t, layer), a, dtype, _mesh(model))
            if not np.isfinite(tensor).all():
                raise BadInput(f"{name} is not finite, or not in {dtype}'s range; write another dtype")
            return tensor

        yield Entry(name, t.checkpoint_shape(a), dtype, read)


def _mesh(model: Transformer) -> Mesh:
    where = model.norm[...].sharding
    assert isinstance(where, jax.sharding.NamedSharding)
    mesh = where.mesh
    assert isinstance(mesh, Mesh)
    return mesh


def _merged(model: Transformer, t: Tensor, layer: int) -> jax.Array:
    """Return a parameter (of one layer if it is stacked), with its adapter's product added in float32 if it has one."""
    if not t.stacked:
        return getattr(model, t.path)[...]
    name = t.path.removeprefix("layers.")
    x = model.layers[name][...][layer]
    if f"{name}_lora_a" not in model.layers:
        return x
    low, high = (model.layers[f"{name}_lora_{side}"][...][layer] for side in "ab")
    return x.astype(jnp.float32) + LORA_SCALE * jnp.tensordot(low, high, 1)
