"""Pairs per second and peak memory of training, ours and TRL's DPOTrainer, on recorded lengths.

python benchmarks/fit.py --trl-python TRL [--pairs 64] [--global-batch 16] [--repetitions 3] [--threads 2] [--quick] [--json]

One run: the same random Mistral of 25M parameters in float32, the same pairs of random tokens with lengths from
benchmarks/traces, sppo_hard and RMSProp with the same numbers and no clipping, the same pairs in each update, each
contender in a process of its own, taking turns. Nothing is truncated. Both compute the reference's log-probs once, before
the first update, and that time counts. TRL is the setting of SETTINGS that needs the least time for the first update's
pairs; its loss is twice ours, which is halved where the two are compared. TRL has an environment of its own
(requirements-trl.txt); TRL_PYTHON may name its interpreter too. Imports, loading and compilation are timed apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fit_replay
import numpy as np
import sampler
from fit_replay import ETA, GRADIENTS, RATE, Data
from sampler_replay import SEED, Trace, say

# TRL's: pairs of a forward, gradient checkpointing, and whether an update's pairs are sorted by length beforehand, as
# group_by_length would over several updates.
DEFAULT = (8, True, False)
SETTINGS = (
    (1, False, False), (2, False, False), (2, False, True), (4, False, True), (8, False, True), (1, True, False), DEFAULT,
)  # fmt: skip
OURS, AS_OURS = {"pack": True, "remat": "attention"}, "packed, remat attention"
# Variants of ours, each over the first update alone.
ABLATIONS = {
    AS_OURS: OURS,
    "one sequence a row, remat layer": {"pack": False, "remat": "layer"},
    "packed, remat layer": {"pack": True, "remat": "layer"},
    "one sequence a row, remat attention": {"pack": False, "remat": "attention"},
}
TOLERANCE = 1e-3  # of gradients, and of the losses relative to their own


def useful(sizes: dict[str, int], data: Data) -> float:
    """FLOPs that reference and training need at least: a forward pass, then a forward and backward pass of the whole
    sequences, with the head at the responses alone."""
    d, h, n, c = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    layers = sizes["num_hidden_layers"]
    body = layers * (2 * d * c * (h + n) + 3 * d * sizes["intermediate_size"])
    every = np.array([data.lengths(i) for i in range(len(data.prompts))], float)
    said = sum(len(ids) for row in data.responses for ids in row)
    forward = 2 * body * every.sum() + 2 * d * sizes["vocab_size"] * said
    forward += 2 * layers * h * c * (every**2).sum()
    return 4 * forward


@dataclass(frozen=True)
class Run:
    """The settings of one run of the benchmark."""

    folder: Path  # holds the model, the pairs and the programs that XLA keeps
    trl_python: str
    threads: int
    repetitions: int
    pairs: int
    global_batch: int
    quick: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the model; one layer with --quick."""
        return sampler.MODEL | {"num_hidden_layers": 1} if self.quick else sampler.MODEL

    def prepare(self) -> Data:
        """Write the model and pairs.json, with the pairs of each update as our batches have them."""
        sampler.make(self.folder / "model", self.sizes)
        trace = Trace.of("lognormal", self.pairs, 16 if self.quick else 1)
        data = Data.of(trace, self.sizes["vocab_size"])
        batches = fit_replay.batches_of(data.pairs(), self.global_batch)
        order = [fit_replay.pairs_of(batches[step]) for step in range(len(batches))]
        # Within an update ours are sorted for packing, but TRL's must come in shuffled order.
        rng = np.random.default_rng(SEED)
        data = replace(data, order=[rng.permutation(step).tolist() for step in order])
        (self.folder / "pairs.json").write_text(json.dumps(asdict(data)))
        return data

    def measure(self, name: str, **task: Any) -> dict[str, Any]:
        """Return the result of a worker of fit_replay, run in a fresh process with `threads` cores."""
        variables = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / "huggingface"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        python = self.trl_python if name == "trl" else sys.executable
        command = [python, fit_replay.__file__, name, json.dumps({"threads": self.threads} | task)]
        done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def train(self, name: str, said: str, first_only: bool = False, **task: Any) -> dict[str, Any]:
        """Measure one contender over all updates, or over the first."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            shared = {"folder": str(self.folder), "output": output, "global_batch": self.global_batch}
            found = self.measure(name, **({"first_only": first_only, "gradients": ""} | shared | task))
        all_seconds = found["seconds"] + found["reference_seconds"]
        say(
            f"  {said}: {found['pairs']} pairs in {found['seconds']:.1f} s, reference {found['reference_seconds']:.1f} s; "
            f"{found['pairs'] / all_seconds:.3f} pairs/s; peak {found['peak_bytes'] / 2**30:.2f} GiB; "
            f"processors {found['cpu_seconds']:.1f} s; others {found['others']:.0%}"
        )
        return found

    def calibrated(self) -> list[dict[str, Any]]:
        """TRL's settings, the fastest first, with the measurements of the first update."""
        say("TRL: which setting")
        chosen = (SETTINGS[2], DEFAULT) if self.quick else SETTINGS
        estimates = []
        for per_device, checkpointing, by_length in chosen:
            setting = {"per_device": per_device, "checkpointing": checkpointing, "by_length": by_length}
            found = self.train("trl", named(setting), first_only=True, **setting)
            seconds = found["seconds"] + found["reference_seconds"]
            estimates.append(
                {
                    "setting": setting,
                    "pairs_per_s": found["pairs"] / seconds,
                    "real_token_share": found["tokens"] / found["computed_tokens"],
                    "peak_bytes": found["peak_bytes"],
                }
            )
        return sorted(estimates, key=lambda one: -one["pairs_per_s"])

    def gradients(self, best: dict[str, Any]) -> dict[str, Any]:
        """The first update's gradients, ours against half of TRL's."""
        say("gradients of the first update")
        for name, setting in (("ours", OURS), ("trl", best)):
            self.train(
                name, name, first_only=True, gradients=str(self.folder / f"gradients_{name}"), **setting
            )
        return errors(*(self.folder / f"gradients_{name}" / GRADIENTS for name in ("ours", "trl")))


def named(setting: dict[str, Any]) -> str:
    """A setting of TRL in words."""
    return (
        f"TRL, {setting['per_device']} pairs a forward{', by length' * setting['by_length']}"
        f"{', checkpointing' * setting['checkpointing']}"
    )


def errors(ours: Path, theirs: Path) -> dict[str, Any]:
    """Each parameter's error is the largest |ours - TRL's / 2| over the largest |TRL's / 2|. Return the largest error, its
    parameter, and the error of all parameters together in norms."""
    from safetensors.numpy import load_file

    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys(), sorted(mine.keys() ^ other.keys())
    found, square, whole = {}, 0.0, 0.0
    for name, x in mine.items():
        half = other[name].astype(np.float64) / 2
        difference = np.abs(x - half)
        found[name] = float(difference.max() / np.abs(half).max())
        square, whole = square + float((difference**2).sum()), whole + float((half**2).sum())
    worst = max(found, key=lambda name: found[name])
    return {
        "max_grad_error": found[worst],
        "of": worst,
        "norm_error": (square / whole) ** 0.5,
        "norm": whole**0.5,
        "parameters": len(found),
    }


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge repetitions into one result: medians, but maxima of the figures that must stay small."""
    middle = (
        "seconds",
        "reference_seconds",
        "import_seconds",
        "load_seconds",
        "warm_seconds",
        "cpu_seconds",
        "peak_bytes",
    )
    one = runs[-1] | {key: statistics.median(run[key] for run in runs) for key in middle}
    one |= {
        f"every_{key}": [run[key] for run in runs] for key in ("seconds", "reference_seconds", "peak_bytes")
    }
    # The first process compiles; later ones find its programs.
    one["warm_seconds"] = max(run["warm_seconds"] for run in runs)
    one["others"] = max(run["others"] for run in runs)
    seconds = one["seconds"] + one["reference_seconds"]
    return one | {
        "pairs_per_s": one["pairs"] / seconds,
        "pairs_per_s_without_reference": one["pairs"] / one["seconds"],
        "tokens_per_s": one["tokens"] / seconds,
        "real_token_share": one["tokens"] / one["computed_tokens"],
    }


def ratios(
    mine: dict[str, Any], theirs: dict[str, Any], alone: dict[str, Any], default: dict[str, Any]
) -> dict[str, float]:
    """Ours over TRL's. `alone` and `default` are ours and TRL's default over the first update alone."""
    return {
        "vs_trl_pairs_per_s": mine["pairs_per_s"] / theirs["pairs_per_s"],
        "vs_trl_peak_memory": mine["peak_bytes"] / theirs["peak_bytes"],
        "vs_trl_pairs_per_s_without_reference": mine["pairs_per_s_without_reference"]
        / theirs["pairs_per_s_without_reference"],
        # The first process compiles; later ones find its programs on disk.
        "vs_trl_peak_memory_compiled_before": min(mine["every_peak_bytes"]) / theirs["peak_bytes"],
        "vs_trl_default_pairs_per_s": alone["pairs_per_s"] / default["pairs_per_s"],
        "vs_trl_default_peak_memory": alone["peak_bytes"] / default["peak_bytes"],
    }


def compare(run: Run) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    from importlib.metadata import version

    data = run.prepare()
    say("the machine's peaks")
    peak = run.measure("peaks", side=1024 if run.quick else 4096, length=2**22 if run.quick else 2**27)
    estimates = run.calibrated()
    best = estimates[0]["setting"]
    gradients = run.gradients(best)
    say(f"{run.pairs} pairs, {run.repetitions} times")
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(run.repetitions):
        runs["ours"].append(run.train("ours", "ours", **OURS))
        runs["trl"].append(run.train("trl", named(best), **best))
    say("ours, otherwise")
    ablations = {
        name: merged([run.train("ours", name, first_only=True, **setting)])
        for name, setting in ABLATIONS.items()
    }
    found = {name: merged(each) for name, each in runs.items()}
    mine, theirs = found["ours"], found["trl"]
    versions = {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")}
    versions |= theirs.pop("versions")
    for one in found.values():
        one["flops_share"] = (
            useful(run.sizes, data) / (one["seconds"] + one["reference_seconds"]) / peak["flops_per_s"]
        )
    losses, margins = (np.array([one[key] for one in (mine, theirs)]) for key in ("losses", "margins"))
    reference = np.array(mine.pop("reference")) - np.array(theirs.pop("reference"))
    for one in ablations.values():
        one.pop("reference")
    relative = np.abs(losses[0] - losses[1] / 2) / (losses[1] / 2)
    default = next(e for e in estimates if tuple(e["setting"].values()) == DEFAULT)
    return ratios(mine, theirs, ablations[AS_OURS], default) | {
        "real_token_share": mine["real_token_share"],
        "max_grad_error": gradients["max_grad_error"],
        "gradients": gradients,
        "loss_errors": relative.tolist(),
        "margin_errors_nats": np.abs(margins[0] - margins[1]).tolist(),
        "max_reference_difference_nats": float(np.abs(reference).max()),
        "contenders": found,
        "ablations": ablations,
        "trl_setting": best,
        "trl_estimates": estimates,
        "peak": peak,
        "pairs": run.pairs,
        "global_batch": run.global_batch,
        "updates": len(data.order),
        "tokens": data.tokens,
        "eta": ETA,
        "learning_rate": RATE,
        "repetitions": run.repetitions,
        "threads": run.threads,
        "model": run.sizes,
        "seed": SEED,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": versions,
    }


def report(s: dict[str, Any]) -> None:
    """Print the tables."""
    print(
        f"\n{s['pairs']} pairs, {s['updates']} updates, sequences of {s['tokens'] / 2 / s['pairs']:.0f} tokens, "
        f"{s['threads']} threads, medians of {s['repetitions']}; this machine: "
        f"{s['peak']['flops_per_s'] / 1e9:.0f} GFLOP/s\n"
    )
    columns = (
        "pairs/s", "without reference", "tokens/s", "real tokens", "useful FLOP/s, of peak", "peak GiB", "import s",
        "load s", "warm-up s", "others",
    )  # fmt: skip
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, one in s["contenders"].items():
        said = named(s["trl_setting"]) if name == "trl" else name
        print(
            f"| {said} | {one['pairs_per_s']:.3f} | {one['pairs_per_s_without_reference']:.3f} | "
            f"{one['tokens_per_s']:.0f} | {one['real_token_share']:.3f} | {one['flops_share']:.2f} | "
            f"{one['peak_bytes'] / 2**30:.2f} | {one['import_seconds']:.1f} | {one['load_seconds']:.1f} | "
            f"{one['warm_seconds']:.1f} | {one['others']:.0%} |"
        )
    print("\n| first update alone | pairs/s | real tokens | peak GiB |\n|---|---|---|---|")
    alone = {f"ours, {name}": one for name, one in s["ablations"].items()}
    for name, one in (alone | {named(one["setting"]): one for one in s["trl_estimates"]}).items():
        print(
            f"| {name} | {one['pairs_per_s']:.3f} | {one['real_token_share']:.3f} | "
            f"{one['peak_bytes'] / 2**30:.2f} |"
        )
    print(
        f"\n{s['vs_trl_pairs_per_s']:.2f} x TRL's pairs/s ({s['vs_trl_pairs_per_s_without_reference']:.2f} x without "
        f"reference), peak memory {s['vs_trl_peak_memory']:.2f} x TRL's ({s['vs_trl_peak_memory_compiled_before']:.2f} x "
        f"with programs on disk)\n{s['vs_trl_default_pairs_per_s']:.2f} x the pairs/s of TRL's default, peak memory "
        f"{s['vs_trl_default_peak_memory']:.2f} x\ngradients of the first update: {s['max_grad_error']:.1e} of a parameter's largest at most "
        f"({s['gradients']['of']}), {s['gradients']['norm_error']:.1e} of the norm; losses apart by "
        + ", ".join(f"{error:.1e}" for error in s["loss_errors"])
        + "; margins by "
        + ", ".join(f"{error:.1e}" for error in s["margin_errors_nats"])
        + f" nats; reference by {s['max_reference_difference_nats']:.1e} nats at most"
    )
    noisy = max(one["others"] for one in s["contenders"].values())
    if noisy > 0.05:
        print(f"other processes had up to {noisy:.0%} of the cores: figures are not to be kept")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl-python",
        default=os.environ.get("TRL_PYTHON"),
        help="interpreter with requirements-trl.txt; default: TRL_PYTHON",
    )
    parser.add_argument("--pairs", type=int, default=64, help="of the trace")
    parser.add_argument("--global-batch", type=int, default=16, help="pairs of an update, a multiple of 8")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--quick", action="store_true", help="everything once and short: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if not args.trl_python:
        parser.error(
            "--trl-python is needed: an interpreter of an environment made as requirements-trl.txt says"
        )
    if args.global_batch % 8 or args.pairs % args.global_batch:
        parser.error("--global-batch must be a multiple of 8, and --pairs a multiple of it")
    return args


def main() -> None:
    """Run the benchmark and print its tables, or one JSON object."""
    args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, which happens here too
    pairs, batch, repetitions = (
        (16, 8, 1) if args.quick else (args.pairs, args.global_batch, args.repetitions)
    )
    with tempfile.TemporaryDirectory(prefix="fit-") as folder:
        summary = compare(
            Run(Path(folder), args.trl_python, args.threads, repetitions, pairs, batch, args.quick)
        )
    report(summary)
    if args.json:
        print(json.dumps(summary))
    if max(summary["max_grad_error"], *summary["loss_errors"]) > TOLERANCE:
        sys.exit(f"gradients or losses differ from TRL's by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
