"""Responses per second of the sampler, Hugging Face `generate` and a static batch, on recorded lengths of responses.

python benchmarks/sampler.py [--prompts 32] [--slots 25] [--repetitions 3] [--threads 2] [--quick] [--json]

One run: the same random Mistral of 25M parameters in float32, the same prompts and lengths (benchmarks/traces), the same
threads, each contender in a process of its own, taking turns. K = 5 responses a prompt. A response ends where the trace
ends it, so its content does not matter. `generate` batches the prompts in their order and stops with the longest response
of a batch, whose length it is given; its batch size and cache are the fastest by an estimate from the times of its
prefills and steps. Its batches and the static ones are run once, in shares, one per repetition; the rest are medians.
Compilation and loading are timed apart. Slot efficiency is counted over the whole trace at 128 slots, with the real engine
and a model small enough. An accelerator has its own benchmark, sampler_device.py.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sampler_replay
from sampler_replay import SEED, K, Trace, say

MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 5, "intermediate_size": 1792,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = MODEL | {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
MOST_NEW = 2048  # max_new_tokens of the engine, which is not given the lengths
HF_ROWS = (5, 10, 20, 40, 80, 160)
CONTEXTS = (64, 1024)  # tokens before the steps that are timed to choose among them
EQUAL = 128  # tokens of each prompt and each response where all are equal


def make(folder: Path, sizes: dict[str, int]) -> None:
    """A random Mistral in Hugging Face's format, which all contenders load."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).save_pretrained(folder)


def useful(sizes: dict[str, int], trace: Trace, steps: int) -> tuple[float, float]:
    """The least (FLOPs, bytes) that a float32 model needs: each prompt once, then each token of its responses; in each
    decode step all matrices, and the keys and values of all live tokens."""
    d, h, n, c = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    layers = sizes["num_hidden_layers"]
    body = layers * (2 * d * c * (h + n) + 3 * d * sizes["intermediate_size"])
    head = d * sizes["vocab_size"]
    prompt = np.repeat(trace.prompts, K).astype(float)
    new = np.concatenate(trace.responses).astype(float)
    # Number of the cache's columns that are read, summed over all tokens drawn.
    columns = (new * prompt + new * (new + 1) / 2).sum()
    once = np.array(trace.prompts, float)
    flops = 2 * body * once.sum() + 2 * layers * h * c * (once**2).sum()
    flops += 2 * (body + head) * new.sum() + 4 * layers * h * c * columns
    return flops, 4 * steps * (body + head) + 4 * layers * 2 * n * c * columns


@dataclass(frozen=True)
class Run:
    """The settings of one run of the benchmark, and its measurements."""

    folder: Path  # holds the models, and the programs that XLA keeps
    threads: int
    repetitions: int
    prompts: int
    slots: int
    cache_tokens: int
    quick: bool

    def measure(self, name: str, **task: Any) -> dict[str, Any]:
        """The result of a worker of sampler_replay, run in a fresh process with `threads` cores."""
        variables = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        task = {"threads": self.threads, "folder": str(self.folder / "model")} | task
        command = [sys.executable, sampler_replay.__file__, name, json.dumps(task)]
        done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def trace(self, name: str, count: int | None = None) -> tuple[str, int, int]:
        """The arguments of Trace.of for this run."""
        shrink = 16 if self.quick and name == "lognormal" else 1
        return name, 16 if self.quick else count or self.prompts, shrink

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the model; one layer with --quick."""
        return MODEL | {"num_hidden_layers": 1} if self.quick else MODEL

    def slot_efficiency(self) -> dict[str, Any]:
        """Slot efficiency over a trace, with a very small model."""
        say("slot efficiency: the whole trace at 128 slots, a very small model")
        folder, slots = str(self.folder / "small"), 16 if self.quick else 128
        trace = ("lognormal", 100, 16) if self.quick else ("lognormal", 1000, 1)
        found = self.replay("ours", folder=folder, trace=trace, slots=slots, most=MOST_NEW)
        found["slot_efficiency"] = found["tokens"] / found["slot_steps"]
        say(f"  slot efficiency {found['slot_efficiency']:.3f} in {found['steps']} steps")
        return found

    def calibrated(self) -> list[dict[str, Any]]:
        """Hugging Face's batch sizes and caches, fastest estimate first."""
        say("Hugging Face generate: which batch size and cache")
        rows = (5, 10) if self.quick else HF_ROWS
        contexts = (16, 32) if self.quick else CONTEXTS
        return self.measure("calibrate", trace=self.trace("lognormal"), rows=rows, contexts=contexts)[
            "estimates"
        ]

    def lognormal(self, best: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Ours, hf and static in turns: ours over the whole of its prompts each time, the other two over a share of
        their batches, which are independent, so that all have run once in the end."""
        trace = self.trace("lognormal")
        engine = {"trace": trace, "slots": self.slots, "most": MOST_NEW, "cache_tokens": self.cache_tokens}
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "hf": [], "static": []}
        for i in range(self.repetitions):
            share = i, self.repetitions
            found["ours"].append(self.replay("ours", **engine))
            found["hf"].append(self.measure("hf", trace=trace, share=share, **best))
            self.report("hf", found["hf"][-1])
            found["static"].append(self.replay("static", share=share, **engine))
        return found

    def replay(self, name: str, **task: Any) -> dict[str, Any]:
        """Run our engine over a trace; `name` is "ours", or "static" where the engine is drained after each batch."""
        task = {"cache_tokens": 0, "share": (0, 1), "drain": name == "static"} | task
        found = self.measure("ours", **task)
        self.report(name, found)
        return found

    @staticmethod
    def report(name: str, found: dict[str, Any]) -> None:
        """Print the speed of one contender to standard error."""
        rate, others = found["tokens"] / found["seconds"], found["others"]
        say(
            f"  {name}: {found['tokens']} tokens in {found['seconds']:.1f} s, {rate:.0f}/s; others {others:.0%}"
        )

    def equal(self, rows: set[int]) -> dict[str, dict[str, float]]:
        """Decode steps per second by rows: medians of ours, hf, and their ratio."""
        say(f"equal lengths: {sorted(rows)} rows")
        task: dict[str, Any] = {"rows": sorted(rows), "equal": 64 if self.quick else EQUAL}
        runs = [
            (self.measure("equal_ours", **task), self.measure("equal_hf", **task))
            for _ in range(self.repetitions)
        ]
        found = {}
        for n in map(str, sorted(rows)):
            mine, theirs = (statistics.median(run[i]["steps_per_s"][n] for run in runs) for i in (0, 1))
            found[n] = {"ours": mine, "hf": theirs, "ratio": mine / theirs}
            say(f"  {n} rows: {mine:.1f} steps/s, hf {theirs:.1f}")
        return found

    def quickstart(self) -> dict[str, list[dict[str, Any]]]:
        """The embedded policy at the quickstart's own lengths and slots."""
        from sppo_jax.config import Sampling

        say("the quickstart's lengths")
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "static": []}
        sampling, trace = Sampling(), self.trace("quickstart", 128)
        engine = {"trace": trace, "slots": sampling.slots, "most": sampling.max_new_tokens}
        for _, name in itertools.product(range(self.repetitions), found):
            found[name].append(self.replay(name, folder="embedded", **engine))
        return found


def merged(runs: list[dict[str, Any]], trace: Trace) -> dict[str, Any]:
    """Merge repetitions into one result: medians, or sums if each was a share; maxima of memory, warm-up and disturbances."""
    shares = sum(run["tokens"] for run in runs) == trace.tokens
    joined = sum if shares else statistics.median
    seconds, steps, slot_steps = (
        joined(run[key] for run in runs) for key in ("seconds", "steps", "slot_steps")
    )
    largest = ("new_compilations", "peak_bytes", "others", "warm_seconds")
    return runs[-1] | {
        "seconds": seconds,
        "every_seconds": [run["seconds"] for run in runs],
        "every_peak_bytes": [run["peak_bytes"] for run in runs],
        "steps": steps,
        "tokens": trace.tokens,
        "slot_efficiency": trace.tokens / slot_steps,
        "responses_per_s": K * len(trace.prompts) / seconds,
        "tokens_per_s": trace.tokens / seconds,
        **{key: max(run[key] for run in runs) for key in largest if key in runs[0]},
    }


def compare(run: Run) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    from importlib.metadata import version

    make(run.folder / "model", run.sizes)
    make(run.folder / "small", SMALL)
    say("the machine's peaks")
    peak = run.measure("peaks", side=1024 if run.quick else 4096, length=2**22 if run.quick else 2**27)
    full = run.slot_efficiency()
    estimates = run.calibrated()
    say(f"{run.trace('lognormal')[1]} prompts of the trace, {run.repetitions} times")
    best = {key: estimates[0][key] for key in ("cache", "rows")}
    runs = run.lognormal(best)
    equal = run.equal({best["rows"], run.slots // K * K})
    quick = run.quickstart()

    trace = Trace.of(*run.trace("lognormal"))
    found = {name: merged(each, trace) for name, each in runs.items()}
    found["hf"] |= best
    for one in found.values():
        flops, moved = useful(run.sizes, trace, one["steps"])
        one["flops_share"] = flops / one["seconds"] / peak["flops_per_s"]
        one["bytes_share"] = moved / one["seconds"] / peak["bytes_per_s"]
        one["roofline_share"] = max(one["flops_share"], one["bytes_share"])
    short = Trace.of(*run.trace("quickstart", 128))
    small = {name: merged(each, short) for name, each in quick.items()}
    mine = found["ours"]
    everything = [full, *(one for kind in (runs, quick) for each in kind.values() for one in each)]
    return {
        "slot_efficiency": full["slot_efficiency"],
        "new_compilations": sum(one.get("new_compilations", 0) for one in everything),
        "responses_per_s": mine["responses_per_s"],
        "vs_hf_generate": mine["responses_per_s"] / found["hf"]["responses_per_s"],
        "vs_static": mine["responses_per_s"] / found["static"]["responses_per_s"],
        "peak_memory_ratio": mine["peak_bytes"] / found["hf"]["peak_bytes"],
        # The first process compiles; later ones find its programs on disk.
        "peak_memory_ratio_compiled_before": min(mine["every_peak_bytes"]) / found["hf"]["peak_bytes"],
        "equal_steps_ratio": {rows: one["ratio"] for rows, one in equal.items()},
        "quickstart_vs_static": small["ours"]["responses_per_s"] / small["static"]["responses_per_s"],
        "contenders": found,
        "quickstart": small,
        "equal_steps_per_s": equal,
        "slots": run.slots,
        "cache_tokens": run.cache_tokens,
        "whole_trace": full,
        "hf_estimates": estimates,
        "peak": peak,
        "prompts": len(trace.prompts),
        "responses": K * len(trace.prompts),
        "tokens": trace.tokens,
        "repetitions": run.repetitions,
        "threads": run.threads,
        "model": run.sizes,
        "seed": SEED,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
    }  # fmt: skip


def report(s: dict[str, Any]) -> None:
    """Print the tables."""
    full, best = s["whole_trace"], s["contenders"]["hf"]
    print(
        f"\nWhole trace at 128 slots: slot efficiency {s['slot_efficiency']:.3f} in {full['steps']} steps; "
        f"{full['programs']} programs, {s['new_compilations']} compiled after the warm-up\n\n"
        f"{s['responses']} responses of {s['tokens'] / s['responses']:.0f} tokens, {s['threads']} threads, medians of "
        f"{s['repetitions']}; this machine: {s['peak']['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"{s['peak']['bytes_per_s'] / 1e9:.0f} GB/s\n"
    )
    names = {
        "ours": f"ours, {s['slots']} slots",
        "hf": f"Hugging Face, {best['rows']} rows, {best['cache']} cache",
        "static": f"our static batch, {s['slots']} rows",
    }
    columns = (
        "responses/s",
        "tokens/s",
        "steps",
        "slot efficiency",
        "peak GiB",
        "FLOP/s, of peak",
        "bytes/s, of peak",
    )
    print("| | " + " | ".join((*columns, "warm-up s", "others")) + " |\n|" + "---|" * 10)
    for name, one in s["contenders"].items():
        print(
            f"| {names[name]} | {one['responses_per_s']:.2f} | {one['tokens_per_s']:.0f} | {one['steps']} | "
            f"{one['slot_efficiency']:.3f} | {one['peak_bytes'] / 2**30:.2f} | {one['flops_share']:.2f} | "
            f"{one['bytes_share']:.2f} | {one['warm_seconds']:.1f} | {one['others']:.0%} |"
        )
    for name, one in s["quickstart"].items():
        print(
            f"| quickstart, {name} | {one['responses_per_s']:.1f} | {one['tokens_per_s']:.0f} | {one['steps']} | "
            f"{one['slot_efficiency']:.3f} | {one['peak_bytes'] / 2**30:.2f} | | | {one['warm_seconds']:.1f} | "
            f"{one['others']:.0%} |"
        )
    print(
        f"\n{s['vs_hf_generate']:.2f} x Hugging Face generate, {s['vs_static']:.2f} x our static batch, peak memory "
        f"{s['peak_memory_ratio']:.2f} x Hugging Face's ({s['peak_memory_ratio_compiled_before']:.2f} x with programs on disk); quickstart {s['quickstart_vs_static']:.2f} x static"
    )
    for rows, one in s["equal_steps_per_s"].items():
        print(
            f"equal lengths, {rows} rows: {one['ours']:.1f} steps/s, {one['hf']:.1f} by Hugging Face: {one['ratio']:.2f} x"
        )
    noisy = max(one["others"] for kind in ("contenders", "quickstart") for one in s[kind].values())
    if noisy > 0.05:
        print(f"other processes had up to {noisy:.0%} of the cores: figures are not to be kept")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=32, help=f"of the trace, {K} responses each")
    parser.add_argument("--slots", type=int, default=25)
    parser.add_argument(
        "--cache-tokens", type=int, default=16384, help="sampling.cache_tokens; 0: what slots can need"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--quick", action="store_true", help="everything once and short: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its tables, or one JSON object."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="sampler-") as folder:
        slots, repetitions = (10, 1) if args.quick else (args.slots, args.repetitions)
        summary = compare(
            Run(Path(folder), args.threads, repetitions, args.prompts, slots, args.cache_tokens, args.quick)
        )
    report(summary)
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
