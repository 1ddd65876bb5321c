"""The files of a checkpoint: which hold weights, which tensors they hold, and which of these may stay unread.

Nothing is left unread in silence: a tensor that the model does not take equals what is computed, or a line says so, or it
is refused (`hf.check_tensors`).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sppo_jax.command import say
from sppo_jax.errors import BadInput
from sppo_jax.files import exists, is_file, read_json
from sppo_jax.hub import adapters, repositories
from sppo_jax.models.architecture import Architecture, read_architecture
from sppo_jax.models.transformer import frequencies

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that very old exports keep for each layer.
FREQUENCIES = re.compile(r"(.*\.)?inv_freq")
# Dtypes of tensors that are weights without further decoding.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
ROWS = 1024  # rows of two matrices that are compared at a time


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, as its index names them. Raises BadInput where one is absent."""
    single, index = directory / "model.safetensors", directory / INDEX
    if is_file(single):  # first, as in transformers
        return [single]
    if not exists(index):
        raise BadInput(f"{directory}: no model.safetensors; give a Hugging Face directory with safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{index}: weight_map is not an object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index}: weight_map names {name!r}, which is not a safetensors file beside it")
        if not is_file(directory / name):
            raise BadInput(f"{directory}: {name} is missing, though the index names it; download it again")
    return [directory / name for name in names]


def stored_dtypes(directory: Path) -> set[str]:
    """Return the names of the dtypes of a checkpoint's tensors, such as bfloat16."""
    found = set()
    files = weight_files(directory)
    tensor_files(files)  # raises for a damaged one
    for file in files:
        with safe_open(file, "numpy") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  not a dict
    return {FLOATS.get(name, name) for name in found}


def tensor_files(files: Sequence[Path]) -> dict[str, Path]:
    """Return {tensor name: file} from the files' headers. Raises BadInput for a damaged file or a repeated name."""
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "numpy") as tensors:
                names = list(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: {repositories.unreadable(file, error)}") from None
        if twice := found.keys() & set(names):
            raise BadInput(f"{file}: tensor {min(twice)} is also in {found[min(twice)].name}")
        found |= dict.fromkeys(names, file)
    return found


def stored_architecture(directory: Path, tell: Callable[[str], None] | None = None) -> Architecture:
    """Return the architecture of a checkpoint: that of config.json, with a head of its own where the files hold one.

    A config.json may tie the head to the embedding although the files hold another head. Then both are used, as in
    transformers, and a line says so. Without weights config.json alone decides. `tell` is `read_architecture`'s. Raises
    BadInput as `read_architecture` and `weight_files` do.
    """
    a = read_architecture(directory, tell)
    if not a.tied or not any(exists(directory / name) for name in ("model.safetensors", INDEX)):
        return a
    files = tensor_files(weight_files(directory))
    if HEAD not in files or EMBEDDING not in files or _equal(files, HEAD, EMBEDDING):
        return a
    _say_once(
        f"{directory}: config.json ties the head to the embedding, but {HEAD} differs from {EMBEDDING}; both are used, as in "
        "transformers, and an export says so in its config.json"
    )
    return dataclasses.replace(a, tied=False)


def readable(directory: Path, a: Architecture, files: dict[str, Path]) -> dict[str, Path]:
    """Return `files` ({tensor: file}) without the tensors that repeat what is computed from config.json.

    They are a tied head beside the embedding, which `stored_architecture` has compared, and the frequencies of rotary
    embeddings, of which a line says where they differ. A line also says that an adapter beside the weights is not read.
    """
    spare = {HEAD} if a.tied and EMBEDDING in files else set()
    other = []
    for name in sorted(files):
        if FREQUENCIES.fullmatch(name):
            spare.add(name)
            found = _read(files, name)
            # Only now: the sizes in config.json have not been compared with the tensors' yet, and may be absurd.
            expected = (
                frequencies(rope, a.head_dim)
                for rope in (dataclasses.replace(a.rope, kind="default", factor=1.0), a.rope)
                if 2 * found.size == a.head_dim
            )
            # Half precision rounds them, and the slowest to a multiple of 6e-8.
            if not any(
                found.shape == e.shape and np.allclose(found, e, rtol=0.01, atol=1e-7) for e in expected
            ):
                other.append(name)
    if other:
        _say_once(
            f"{directory}: {other[0]} differs from the frequencies that config.json gives (rope_theta {a.rope.theta:g}), which "
            f"are used, as in transformers{f' (and so for {len(other) - 1} more)' if other[1:] else ''}"
        )
    if exists(directory / adapters.CONFIG):
        _say_once(
            f"{directory}: the adapter beside the weights is not read; to use it, merge it with PEFT first"
        )
    return {name: file for name, file in files.items() if name not in spare}


def _equal(files: dict[str, Path], one: str, other: str) -> bool:
    """Return whether two matrices are equal in shape and values, reading as few rows as that takes."""
    with safe_open(files[one], "numpy") as a, safe_open(files[other], "numpy") as b:
        x, y = a.get_slice(one), b.get_slice(other)
        shape = x.get_shape()
        if shape != y.get_shape() or not {x.get_dtype(), y.get_dtype()} <= FLOATS.keys():
            return False
        return all(
            np.array_equal(*(part[i : min(i + ROWS, shape[0])].astype(np.float64) for part in (x, y)))
            for i in range(0, shape[0], ROWS)
        )


def _read(files: dict[str, Path], name: str) -> np.ndarray:
    """Return a small tensor in float64; an empty one for a dtype that is not a float."""
    with safe_open(files[name], "numpy") as opened:
        known = opened.get_slice(name).get_dtype() in FLOATS
        return opened.get_tensor(name).astype(np.float64) if known else np.empty(0)


@functools.cache
def _say_once(line: str) -> None:
    """Print a line for people, once in a process, however often a checkpoint is loaded."""
    say(f"note: {line}")
