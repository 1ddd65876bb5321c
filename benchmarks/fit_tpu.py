"""An update of full sequences, compiled ahead of time for TPU slices on a CPU: memory, cycles, model FLOPs utilisation.

pip install --target TPU --no-deps libtpu==0.0.42.1
PYTHONPATH=TPU python benchmarks/fit_tpu.py [--json] [--config configs/mistral_7b.yaml] [--slices v5e:4x4/1 v5e:8x8/1 v5e:2x4/4]

64 prompts with two sequences of 1,024 tokens each, without padding; SLICE/M means M microbatches. All weights are trained, with
float32 masters and RMSProp, on a mesh of `fsdp` alone. No TPU is needed, and nothing is run: memory and cycles are the
compiler's. Cycles become seconds at the clock of sppo_jax/plan/chips.py, to which the seconds of collectives that no
computation overlaps are added, at the speed of the links. The compiler gives no cycles for attention kernels: their seconds
stand apart, at the share of the peak that sppo_jax/plan/stages.py assumes for them.
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
from importlib.metadata import version
from typing import Any

import jax.numpy as jnp
from jax.experimental import topologies

from sppo_jax import config_file, sharding
from sppo_jax.config import Config
from sppo_jax.plan import compiled, stages, target
from sppo_jax.plan.chips import TPUS
from sppo_jax.plan.cost import GIB
from sppo_jax.training import memory
from sppo_jax.training.packing import Layout

PROMPTS, WIDTH = 64, 1024


def measured(c: Config, name: str, microbatches: int) -> dict[str, Any]:
    """Figures of an update on one slice: sums over its programs, and the peak of the program that needs most."""
    a, chip = target.architecture(c), TPUS[name.split(":")[0]]
    if PROMPTS % microbatches or c.model.lora_rank:
        raise SystemExit(
            f"microbatches must divide {PROMPTS} prompts, and model.lora_rank must be 0: not {microbatches} and {c.model.lora_rank}"
        )
    mesh = sharding.make_mesh(devices=list(topologies.get_topology_desc(name, platform="tpu").devices))
    prompts = PROMPTS // microbatches
    at = Layout(microbatches, prompts, 2 * prompts, WIDTH, 1, 1.0)
    found = compiled.compile_update(c, a, mesh, jnp.bfloat16, at)
    runs = [(found.forward, microbatches), (found.backward, 1), (found.update, 1)]
    runs += [(found.accumulate, microbatches - 1)] if found.accumulate else []
    seconds = sum(times * one.cost.cycles for one, times in runs) / chip.cycles
    waited = sum(
        times * (one.cost.waited / chip.links + one.cost.collectives * chip.latency) for one, times in runs
    )
    tokens = 2 * PROMPTS * WIDTH
    flops = 6 * memory.parameters(a) * tokens / mesh.size
    scores = 2 * 2 * PROMPTS * WIDTH**2 * a.layers * a.heads * a.head_dim / mesh.size
    # Forward, forward again with remat=layer, and a backward pass of 2.5 times as much.
    passes = 4.5 if c.fit.remat == "layer" else 3.5
    kernels = passes * scores / (stages.KERNEL * chip.flops)
    return {
        "slice": name,
        "microbatches": microbatches,
        "peak_gib": found.peak / GIB,
        "limit_gib": chip.gib,
        "memory_gib": {kind: size / GIB for kind, size in found.memory.items()},
        "gigacycles": seconds * chip.cycles / 1e9,
        "seconds_compiler": seconds,
        "seconds_collectives": waited,
        "seconds_kernels": kernels,
        "sent_gb": sum(times * one.cost.sent for one, times in runs) / 1e9,
        "mfu_compiler": flops / chip.flops / seconds,
        "mfu_collectives": flops / chip.flops / (seconds + waited),
        "mfu_all": flops / chip.flops / (seconds + waited + kernels),
        "compile_seconds": sum(one.seconds for one, _ in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/mistral_7b.yaml")
    parser.add_argument("--slices", nargs="+", default=["v5e:4x4/1", "v5e:8x8/1", "v5e:2x4/4"])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    c = config_file.load([options.config])
    rows = []
    for one in options.slices:
        name, _, microbatches = one.partition("/")
        row = measured(c, name, int(microbatches or 1))
        rows.append(row)
        print(
            f"{one}: peak {row['peak_gib']:.2f} of {row['limit_gib']} GiB; {row['gigacycles']:.3f}e9 cycles = "
            f"{row['seconds_compiler']:.2f} s, collectives {row['seconds_collectives']:.2f} s, kernels "
            f"{row['seconds_kernels']:.2f} s; MFU {row['mfu_compiler']:.1%} by cycles, {row['mfu_collectives']:.1%} with collectives, "
            f"{row['mfu_all']:.1%} with kernels too",
            flush=True,
        )
    if options.json:
        versions = {name: version(name) for name in ("jax", "libtpu")}
        print(json.dumps({"config": options.config, "versions": versions, "slices": rows}))


if __name__ == "__main__":
    main()
