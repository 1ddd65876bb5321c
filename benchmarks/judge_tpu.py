"""The judge compiled ahead of time for TPU v5e on a CPU: bytes that a layer moves in each form, memory, seconds of compiling.

pip install --target TPU --no-deps libtpu==0.0.42.1
PYTHONPATH=TPU python benchmarks/judge_tpu.py [--json] [--topology v5e:4x4] [--lengths 512 1024 2048] [--skip-whole]

jax 0.10.2 pins libtpu 0.0.42; in a folder of its own it makes no other program look for a TPU. No TPU is needed, and nothing
is run: the figures are the compiler's. It does not count the Pallas kernel's reads and writes of main memory, which are
computed from its block shapes. Sizes are DeBERTa-v3-large's, 4096 tokens per chip, bfloat16.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

import argparse
import json
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.pairrm import deberta_attention
from sppo_jax.pairrm.jax_model import Deberta, PairRM, shapes
from sppo_jax.pairrm.mesh_judge import forward

LARGE = Deberta(
    vocab=128_005, model=1024, heads=16, mlp=4096, layers=24, buckets=256, farthest=512, norm_eps=1e-7
)
# Per chip.
TOKENS = 4096
FORMS = ("gather", "shift", "pallas")
GB = 1e9


def v5e(topology: str) -> Mesh:
    """Return the mesh of an absent slice."""
    described = topologies.get_topology_desc(topology, platform="tpu")
    sizes = (1, len(described.devices), 1)
    placed = mesh_utils.create_device_mesh(sizes, devices=described.devices, allow_split_physical_axes=True)
    return sharding.make_mesh(*sizes, devices=list(placed.flat))


def compiled(mesh: Mesh, d: Deberta, length: int, form: str, dtype: Any) -> dict[str, Any]:
    """Compile the forward of `d`, and return the compiler's figures of it, per chip."""
    whole, spread = sharding.replicated(mesh), sharding.spread(mesh)
    network, weights = nnx.split(PairRM(d, shapes(d, jnp.dtype(dtype)), dtype, form))

    def like(x: Any, placed: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    weights = jax.tree.map(lambda x: like(x, whole), weights)
    batch = mesh.size * (TOKENS // length)
    shapes_of = ((batch, length), (batch,), (batch, 3))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread) for shape in shapes_of]
    started = time.perf_counter()
    program = forward(network, mesh).lower(weights, *inputs).compile()
    seconds = time.perf_counter() - started
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "bytes": cost["bytes accessed"],
        "peak_bytes": memory.peak_memory_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def kernel_bytes(d: Deberta, length: int, width: int) -> int:
    """Bytes of a chip's main memory that the Pallas kernel reads and writes in one layer, `width` bytes a number.

    q, k, v and the result move once, and so do a head's two spread tables: their block stays the same from text to text.
    """
    return width * (4 * TOKENS * d.model + 2 * 2 * length * d.model)


def per_layer(mesh: Mesh, length: int, form: str, dtype: Any) -> dict[str, Any]:
    """Figures of one layer. The compiler counts the body of a loop once, so programs of one and no layer are compared."""
    found = compiled(mesh, replace(LARGE, layers=1), length, form, dtype)
    none = compiled(mesh, replace(LARGE, layers=0), length, form, dtype)
    found["layer_bytes"] = found.pop("bytes") - none["bytes"]
    if form == "pallas":
        found["kernel_bytes"] = kernel_bytes(LARGE, length, jnp.dtype(dtype).itemsize)
    return found | {"length": length, "form": form, "dtype": dtype}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=sorted(deberta_attention.FORMS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--skip-whole", action="store_true", help="leave out the network of 24 layers")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    mesh = v5e(options.topology)
    report: dict[str, Any] = {
        "topology": options.topology,
        "tokens_per_chip": TOKENS,
        "versions": {"jax": jax.__version__, "libtpu": _libtpu()},
        "one_layer": [],
        "whole": [],
    }
    for dtype in options.dtypes:
        for length in options.lengths:
            for form in options.forms:
                row = per_layer(mesh, length, form, dtype)
                report["one_layer"].append(row)
                extra = f" + {row['kernel_bytes'] / GB:.2f} in the kernel" if "kernel_bytes" in row else ""
                print(
                    f"{TOKENS // length} x {length:4} {dtype} {form:7} {row['layer_bytes'] / GB:7.2f} GB{extra}, "
                    f"temporary {row['temporary_bytes'] / GB:.2f} GB, compiled in {row['compile_seconds']:.0f} s",
                    flush=True,
                )
    if not options.skip_whole:
        for length in options.lengths:
            row = compiled(mesh, LARGE, length, "pallas", "bfloat16")
            row = {"length": length, "layers": LARGE.layers} | row
            del row["bytes"]  # counts the scan's body once
            report["whole"].append(row)
            print(
                f"{LARGE.layers} layers, {TOKENS // length} x {length:4} bfloat16 pallas: peak "
                f"{row['peak_bytes'] / GB:.2f} GB per chip, compiled in {row['compile_seconds']:.0f} s",
                flush=True,
            )
    if options.json:
        print(json.dumps(report))


def _libtpu() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
