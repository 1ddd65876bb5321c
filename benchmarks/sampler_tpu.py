"""The sampler's programs for Mistral-7B compiled ahead of time for TPU v5e on a CPU: what fits, and tokens per second.

pip install --target TPU --no-deps libtpu==0.0.42.1
PYTHONPATH=TPU python benchmarks/sampler_tpu.py [--json] [--topology v5e:4x4] [--slots 128 400] [--kernels ragged xla]

Replicas of four chips (tensor 4: one host of v5e), bfloat16, prompts and responses of 2,048 + 512 tokens at most. No TPU
is needed, and nothing is run. Memory is the compiler's figure. Time is an estimate, good to a factor of perhaps 1.5:
the compiler's cycles of each fusion, times how often its loop turns, at 1.5 GHz; plus what its cycles leave out, the
collectives' bytes over the links and the attention kernel's bytes at REACHED of the memory's speed.
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
import math
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.models import Architecture, Transformer, attention, hf
from sppo_jax.models.architecture import Rope
from sppo_jax.plan.hlo import Module
from sppo_jax.sampler import paged_attention
from sppo_jax.sampler.capacity import Shape
from sppo_jax.sampler.decoding import STEPS
from sppo_jax.sampler.paging import PAGE
from sppo_jax.sampler.programs import Programs
from sppo_jax.sampler.weights import abstract

MISTRAL = Architecture(
    vocab=32_000, model=4096, mlp=14_336, layers=32, heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5,
    rope=Rope(1e6), max_positions=32_768, window=None, tied=False,
)  # fmt: skip
TENSOR = 4
LONGEST = 2048 + 512  # columns of one response
LIVE = 600  # mean columns of a slot, halfway through prompts and responses
BUCKET = 512  # length bucket of the prefill that is reported
CLOCK = 1.5e9  # v5e's cycles per second: at this clock the compiler's cycles for a large product come to 90 % of its peak
PEAK, MEMORY = 197e12, 819e9  # operations and bytes per second
REACHED = 0.7  # the share of MEMORY that the attention kernel is taken to reach
LINKS, LATENCY = 90e9, 5e-6  # bytes per second out of a chip over two links; seconds to begin a collective
LIMIT = 15.75  # GiB of a chip that the compiler gives to a program
ROUNDS = 2  # further rounds of next_token's race at top_p .9, for the slowest of all slots
GIB = 2**30


def replicas(topology: str) -> Mesh:
    """The mesh of a slice of absent chips, with one host's chips as a replica."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    return sharding.mesh_in_order(ordered, -1, 1, TENSOR)


def programs(
    mesh: Mesh, slots: int, tokens: int, kernel: paged_attention.Kernel, a: Architecture = MISTRAL
) -> Programs:
    """The sampler's programs for `slots` and a pool of `tokens` on each replica."""
    model = Transformer(
        a, dict(hf.abstract(a, mesh)), jnp.bfloat16, attention.choose("auto", mesh, a, jnp.bfloat16)
    )
    graph, weights = abstract(model, mesh)
    count = sharding.batch_shards(mesh)
    shape = Shape(
        slots=slots * count,
        pages=tokens // PAGE * count,
        width=-(-LONGEST // PAGE),
        eos=(2,),
        temperature=0.7,
        top_p=0.9,
        top_k=0,
    )
    return Programs(graph, weights, mesh, shape, kernel)


def compiled(lowered: Any) -> tuple[Any, dict[str, float]]:
    """A program of the sampler, compiled, and the compiler's figures of its memory."""
    started = time.perf_counter()
    program = lowered.compile()
    memory = program.memory_analysis()
    return program, {
        "peak_gib": memory.peak_memory_in_bytes / GIB,
        "temporary_gib": memory.temp_size_in_bytes / GIB,
        "compile_seconds": time.perf_counter() - started,
    }


def decoding(p: Programs) -> dict[str, Any]:
    """A step of the decode program at LIVE columns a slot, in milliseconds by cause, and the tokens per second."""
    program, found = compiled(p.lower_decode())
    a, slots = p.model.architecture, p.shape.slots // p.replicas
    turns = {
        r"^jit\(decode\)/while$": STEPS,
        "live_pages": math.ceil(slots * (LIVE / PAGE + 0.5) / paged_attention.GROUP),
        "while/body": ROUNDS,
    }
    cost = Module(program.as_text(), turns).cost()
    weights = sum(_local(x) for x in jax.tree.leaves(p.weights)) / MEMORY
    found["cycles_ms"] = 1e3 * cost.cycles / STEPS / CLOCK
    found["weights_ms"] = 1e3 * weights
    found["links_ms"] = 1e3 * (cost.sent / LINKS + cost.collectives * LATENCY) / STEPS
    found["attention_ms"] = 0.0  # the XLA kernel's time is in the cycles
    if p.kernel == "ragged":  # reads whole blocks
        columns = slots * (LIVE + paged_attention.PAGES_PER_BLOCK * PAGE / 2)
        found["attention_ms"] = 1e3 * columns * a.layers * _column(p) / MEMORY / REACHED
    # Weights are fetched while products run, so the slower of the two counts.
    step = max(found["cycles_ms"], found["weights_ms"]) + found["links_ms"] + found["attention_ms"]
    return found | {
        "step_ms": step,
        "tokens_per_second_per_chip": slots / step * 1e3 / TENSOR,
        "copies_in_loops_mib": cost.copies,
    }


def filling(p: Programs) -> dict[str, Any]:
    """The prefill of prompts of BUCKET tokens, and prompt tokens per second and chip of a replica."""
    program, found = compiled(p.lower_prefill(BUCKET))
    cost = Module(program.as_text(), {}).cost()
    seconds = cost.cycles / CLOCK + cost.sent / LINKS + cost.collectives * LATENCY
    tokens = p.rows(BUCKET) * BUCKET
    layers = jax.tree.leaves(p.weights["layers"])
    flops = 2 * sum(math.prod(x.sharding.shard_shape(x.shape)) for x in layers) * tokens
    return found | {
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "tokens_per_second_per_chip": tokens / seconds / TENSOR,
        "share_of_peak": flops / PEAK / seconds,
    }


def _column(p: Programs) -> int:
    """Bytes of one column's keys and values in one layer on one chip."""
    return sum(map(_local, jax.tree.leaves(p.pages[0]))) // (p.shape.pages // p.replicas * PAGE)


def _local(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--slots", type=int, nargs="+", default=[128, 400], help="of one replica")
    parser.add_argument("--kernels", nargs="+", default=["ragged", "xla"], choices=["ragged", "xla"])
    parser.add_argument("--tokens", type=int, default=128 * LONGEST, help="of one replica's pool")
    parser.add_argument("--layers", type=int, default=MISTRAL.layers)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    mesh = replicas(options.topology)
    a = replace(MISTRAL, layers=options.layers)
    report: dict[str, Any] = {
        "topology": options.topology,
        "chips_per_replica": TENSOR,
        "live_columns": LIVE,
        "pool_tokens": options.tokens,
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
        "decode": [],
    }
    for kernel in options.kernels:
        for slots in options.slots:
            p = programs(mesh, slots, options.tokens, kernel, a)
            row = {"kernel": kernel, "slots": slots} | decoding(p)
            report["decode"].append(row)
            print(
                f"{kernel:6} {slots:4} slots: {row['tokens_per_second_per_chip']:5.0f} tokens/s per chip; step "
                f"{row['step_ms']:.1f} ms (cycles {row['cycles_ms']:.1f}, weights {row['weights_ms']:.1f}, attention "
                f"{row['attention_ms']:.1f}, links {row['links_ms']:.1f}); peak {row['peak_gib']:.2f} GiB, "
                f"compiled in {row['compile_seconds']:.0f} s; copies {row['copies_in_loops_mib']}",
                flush=True,
            )
    report["prefill"] = filling(p)
    row = report["prefill"]
    print(
        f"prefill of {row['tokens']} tokens: {row['tokens_per_second_per_chip']:.0f} tokens/s per chip, "
        f"{row['share_of_peak']:.0%} of the peak; peak {row['peak_gib']:.2f} GiB",
        flush=True,
    )
    peak = max(x["peak_gib"] for x in [*report["decode"], row])
    room = (LIMIT - peak) * GIB / (a.layers * _column(p))
    report["pool_that_fits"] = options.tokens + int(room) // PAGE * PAGE
    print(
        f"{report['pool_that_fits']} tokens of pool fit a replica: {report['pool_that_fits'] // LONGEST} slots of "
        f"{LONGEST}, {report['pool_that_fits'] // (LIVE + PAGE // 2)} of {LIVE} on average"
    )
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
