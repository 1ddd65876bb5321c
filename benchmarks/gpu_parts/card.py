"""The card: its data sheet, the speeds that it reaches, and the shapes that it computes."""

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from sampler_device import MISTRAL, SMALL, reached

from gpu_parts import At, Figure
from sppo_jax import sharding
from sppo_jax.models import Architecture
from sppo_jax.plan.chips import GPUS, Chip

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")
# Packages that a run needs and this measurement does not.
SPARED = ("grain", "datasets", "tensorflow_datasets", "qwix", "tensorboard")
# What jax's name of a device holds, and its entry in plan/chips.py; the first that fits counts.
NAMES = (
    ("GH200", None), ("H200", "h200"), ("H100", "h100"), ("B200", "b200"), ("A100.*40GB", "a100-40"), ("A100", "a100"), ("A10G", "a10g"),
    ("L40S", "l40s"), ("L4", "l4"), ("RTX 3090", "rtx3090"), ("RTX 4090", "rtx4090"), ("RTX 5090", "rtx5090"),
)  # fmt: skip
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"


def one_device() -> Any:
    """The mesh of the first device."""
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def sheet(at: At) -> Chip:
    """The data sheet of the card as plans have it; of an unknown card, the speeds that it reaches. In a rehearsal an H200's."""
    device = jax.devices()[0]
    kind = device.device_kind
    name = "h200" if at.rehearse else next((entry for text, entry in NAMES if re.search(text, kind)), None)
    if name is not None:
        return GPUS[name]
    flops, moved = reached(at.rehearse)
    limit = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    return Chip(flops, moved, limit / 2**30, 16e9, capability=str(getattr(device, "compute_capability", "")))


def architecture(at: At, layers: int = MISTRAL.layers) -> Architecture:
    """Mistral-7B's shapes with this many layers; small ones with a single layer in a rehearsal."""
    return replace(SMALL, layers=1) if at.rehearse else replace(MISTRAL, layers=layers)


def machine(at: At) -> Iterator[Figure]:
    """The device, its memory and driver, the versions of packages, and the speeds that a product and a copy reach."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    spared = [name for name in SPARED if importlib.util.find_spec(name) is None]
    driver = _nvidia_smi()
    yield Figure(
        "device",
        f"{device.device_kind}, {stats.get('bytes_limit', 0) / 2**30:.1f} GiB for jax; jax {jax.__version__}, Python "
        f"{platform.python_version()}; {driver or 'no nvidia-smi'}",
        {
            "kind": device.device_kind,
            "devices": jax.device_count(),
            "capability": str(getattr(device, "compute_capability", "")),
            "bytes_limit": stats.get("bytes_limit"),
            "nvidia_smi": driver,
            "cpu_cores": os.cpu_count(),
            "python": platform.python_version(),
            "versions": versions,
            "absent": spared,
        },
    )
    chip, (flops, moved) = sheet(at), reached(at.rehearse)
    yield Figure(
        "speed",
        f"a bfloat16 product reaches {flops / 1e12:.0f} TFLOP/s of {chip.flops / 1e12:.0f}, a copy {moved / 1e9:.0f} "
        f"GB/s of {chip.memory / 1e9:.0f}",
        {
            "flops_per_s": flops,
            "bytes_per_s": moved,
            "sheet_flops_per_s": chip.flops,
            "sheet_bytes_per_s": chip.memory,
        },
    )
    side = 128 if at.rehearse else 2048
    x, y = jax.random.normal(jax.random.key(1), (2, side, side))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(jnp.matmul)(x, y)
    error = float(jnp.linalg.norm(x @ y - exact) / jnp.linalg.norm(exact))
    yield Figure(
        "float32 products",
        f"a float32 product at jax's default precision is {error:.1e} off one at the highest (about 3e-4: TF32)",
        {"relative_error": error},
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """The first card's line of nvidia-smi, which only reads; None where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] or None
