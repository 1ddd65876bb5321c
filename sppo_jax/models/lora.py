"""Low-rank adapters (LoRA, arXiv:2106.09685) beside a frozen model's matrices, stored in PEFT's file format.

A matrix W of a layer acts as W + LORA_SCALE A B. Initially A [in, R] is uniform in +-1/sqrt(in), and B [R, out] is 0.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sppo_jax.errors import BadInput
from sppo_jax.files import read_json
from sppo_jax.models import hf
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.hf import Tensor
from sppo_jax.models.safetensors_file import write_safetensors
from sppo_jax.models.transformer import LORA_SCALE, Adapter, Transformer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Name in the model: (input dimensions, output dimensions, module in the checkpoint).
MATRICES = {
    "q": ("D", "HC", "self_attn.q_proj"),
    "k": ("D", "NC", "self_attn.k_proj"),
    "v": ("D", "NC", "self_attn.v_proj"),
    "o": ("HC", "D", "self_attn.o_proj"),
    "gate": ("D", "F", "mlp.gate_proj"),
    "up": ("D", "F", "mlp.up_proj"),
    "down": ("F", "D", "mlp.down_proj"),
}


def table() -> tuple[Tensor, ...]:
    """Return the adapters' parameters: A and B of every matrix of a layer."""
    found = []
    for name, (ins, outs, module) in MATRICES.items():
        prefix = f"base_model.model.{hf.LAYER}{module}"
        found.append(Tensor(f"layers.{name}_lora_a", ins + "R", f"R {ins}", f"{prefix}.lora_A.weight"))
        found.append(Tensor(f"layers.{name}_lora_b", "R" + outs, f"{outs} R", f"{prefix}.lora_B.weight"))
    return tuple(found)


def abstract(a: Architecture, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of every factor, by path; empty if the architecture has no adapters."""
    return {t.path: hf.placeholder(t, a, mesh, jnp.float32) for t in table()} if a.lora_rank else {}


def attach(model: Transformer, rank: int, key: jax.Array, mesh: Mesh) -> Transformer:
    """Return `model` with new adapters of rank `rank`, which do not change its outputs until they are trained."""
    a = dataclasses.replace(model.architecture, lora_rank=rank)

    def initial(t: Tensor, key: jax.Array) -> jax.Array:
        if t.path.endswith("_lora_b"):
            return jnp.zeros(t.shape(a))
        bound = 1 / math.sqrt(math.prod(t.shape(a)[1:-1]))
        return jax.random.uniform(key, t.shape(a), minval=-bound, maxval=bound)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(table()))
        return {t.path: initial(t, k) for t, k in zip(table(), keys, strict=True)}

    placed = {path: x.sharding for path, x in abstract(a, mesh).items()}
    return beside(model, a, jax.jit(init, out_shardings=placed)(key))


def save(model: Transformer, directory: Path, base: str, revision: str | None = None) -> None:
    """Write the adapters in PEFT's format into an existing `directory`; `base` and `revision` name the frozen model.

    Where several processes hold them, one of them calls this, and the others `hf.take_part` with `table()`.
    """
    a = model.architecture
    entries = [entry for t in table() for entry in hf.entries(model, t, np.dtype(np.float32))]
    write_safetensors(directory / WEIGHTS, entries)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": a.lora_rank,
        "lora_alpha": LORA_SCALE * a.lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module.rsplit(".", 1)[-1] for *_, module in MATRICES.values()),
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model: Transformer, directory: Path, mesh: Mesh) -> Transformer:
    """Return `model` with the adapters that `save` wrote. Raises BadInput if they are damaged or scaled differently."""
    config = read_json(directory / CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or alpha != LORA_SCALE * rank:
        raise BadInput(
            f"{directory}: r is {rank!r} and lora_alpha {alpha!r}; needed lora_alpha = {LORA_SCALE} r"
        )
    a = dataclasses.replace(model.architecture, lora_rank=rank)
    files = hf.tensor_files([directory / WEIGHTS])
    hf.check_tensors(directory, table(), a, files)
    weights = {t.path: hf.read_sharded(t, a, mesh, files, np.dtype(np.float32)) for t in table()}
    return beside(model, a, weights)


def beside(model: Transformer, a: Architecture, adapters: dict[str, Any]) -> Transformer:
    """Return `model` with these adapters (arrays, or placeholders); `a` is its architecture with their rank."""
    weights: dict[str, Any] = {"embedding": model.embedding[...], "norm": model.norm[...]}
    weights |= {} if model.head is None else {"head": model.head[...]}
    weights |= {
        f"layers.{name}": param[...] for name, param in model.layers.items() if not isinstance(param, Adapter)
    }
    return Transformer(a, weights | adapters, model.compute_dtype, model.kernel)
