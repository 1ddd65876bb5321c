"""Pairs per second and peak memory of training, ours and TRL's DPOTrainer, on recorded lengths.

python benchmarks/fit.py --trl-python TRL [--pairs 64] [--global-batch 16] [--repetitions 3] [--search 8] [--threads 2]
    [--model DIR] [--lengths lognormal] [--quick] [--json]

One run: the same model in float32, a random Mistral of 25M parameters or the one in DIR (SmolLM2-135M-Instruct, which
benchmarks/smollm2.py --to DIR makes, has --lengths smollm2), the same pairs of random tokens with lengths from
benchmarks/traces, sppo_hard and RMSProp with the same numbers and no clipping, the same pairs in each update, each
contender in a process of its own, taking turns. Nothing is truncated. Both compute the reference's log-probs once, before
the first update, and that time counts. TRL is the setting of SETTINGS that needs the least time for --search of the first
update's pairs; its padding_free is disabled in this version. Its loss is twice ours, which is halved where the two are compared. TRL has an environment of its own
(requirements-trl.txt); TRL_PYTHON may name its interpreter too. Imports, loading and compilation are timed apart.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fit_replay
import numpy as np
import sampler
from fit_figures import errors, merged, ratios, useful
from fit_replay import ETA, GRADIENTS, RATE, Data
from sampler_replay import SEED, Trace, say

# TRL's: pairs of a forward, gradient checkpointing, and whether an update's pairs are sorted by length beforehand, as
# group_by_length would over several updates.
DEFAULT = (8, True, False)
SETTINGS = (
    (1, False, False), (2, False, True), (4, False, True), (8, False, True),
    (1, True, False), (2, True, True), (4, True, True), (8, True, True), DEFAULT,
)  # fmt: skip
OURS, AS_OURS = {"pack": True, "shared": True, "remat": "attention"}, "as it is"
# Variants of ours, each over the pairs of TRL's search; of a --model the first alone.
ABLATIONS = {
    AS_OURS: OURS,
    "a copy of the prompt for each response": OURS | {"shared": False},
    "one sequence a row": OURS | {"shared": False, "pack": False},
    "remat layer": OURS | {"remat": "layer"},
}
TOLERANCE = 1e-3  # of gradients, and of the losses relative to their own


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
    search: int  # pairs of the first update for TRL's settings, and for variants of ours
    model: Path | None
    lengths: str

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the model; of the random one with --quick, one layer."""
        if self.model:
            return json.loads((self.model / "config.json").read_text())
        return sampler.MODEL | {"num_hidden_layers": 1} if self.quick else sampler.MODEL

    def prepare(self) -> Data:
        """Write the model and pairs.json, with the pairs of each update as our batches have them."""
        if self.model:
            (self.folder / "model").symlink_to(self.model.resolve())
        else:
            sampler.make(self.folder / "model", self.sizes)
        trace = Trace.of(self.lengths, self.pairs, 16 if self.quick else 1)
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

    def train(self, name: str, said: str, first: int = 0, **task: Any) -> dict[str, Any]:
        """Measure one contender over all updates, or over the `first` pairs of the first."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            shared = {
                "folder": str(self.folder),
                "output": output,
                "global_batch": first or self.global_batch,
            }
            found = self.measure(name, **({"first": first, "gradients": ""} | shared | task))
        all_seconds = found["seconds"] + found["reference_seconds"]
        say(
            f"  {said}: {found['pairs']} pairs in {found['seconds']:.1f} s, reference {found['reference_seconds']:.1f} s; "
            f"{found['pairs'] / all_seconds:.3f} pairs/s; peak {found['peak_bytes'] / 2**30:.2f} GiB; "
            f"processors {found['cpu_seconds']:.1f} s; others {found['others']:.0%}"
        )
        return found

    def calibrated(self) -> list[dict[str, Any]]:
        """TRL's settings, the fastest first, with their measurements."""
        say("TRL: which setting")
        chosen = (SETTINGS[1], DEFAULT) if self.quick else SETTINGS
        estimates = []
        for per_device, checkpointing, by_length in chosen:
            setting = {"per_device": per_device, "checkpointing": checkpointing, "by_length": by_length}
            found = self.train("trl", named(setting), first=self.search, **setting)
            seconds = found["seconds"] + found["reference_seconds"]
            estimates.append(
                {
                    "setting": setting,
                    "pairs_per_s": found["pairs"] / seconds,
                    "real_token_share": found["real_tokens"] / found["computed_tokens"],
                    "peak_bytes": found["peak_bytes"],
                }
            )
        return sorted(estimates, key=lambda one: -one["pairs_per_s"])

    def gradients(self, best: dict[str, Any]) -> dict[str, Any]:
        """The first update's gradients, ours against half of TRL's."""
        say("gradients of the first update")
        for name, setting in (("ours", OURS), ("trl", best)):
            folder = str(self.folder / f"gradients_{name}")
            self.train(name, name, first=self.global_batch, gradients=folder, **setting)
        return errors(*(self.folder / f"gradients_{name}" / GRADIENTS for name in ("ours", "trl")))


def named(setting: dict[str, Any]) -> str:
    """A setting of TRL in words."""
    return (
        f"TRL, {setting['per_device']} pairs a forward{', by length' * setting['by_length']}"
        f"{', checkpointing' * setting['checkpointing']}"
    )


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
        name: merged([run.train("ours", name, first=run.search, **setting)])
        for name, setting in ABLATIONS.items()
        if name == AS_OURS or not run.model
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
        "search_pairs": run.search,
        "lengths": run.lengths,
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
    print(f"\n| {s['search_pairs']} pairs | pairs/s | real tokens | peak GiB |\n|---|---|---|---|")
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
    parser.add_argument(
        "--search",
        type=int,
        default=8,
        help="pairs of the first update for each of TRL's settings, a multiple of 8",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model instead of the random one")
    parser.add_argument("--lengths", default="lognormal", help="a trace of benchmarks/traces")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--quick", action="store_true", help="everything once and short: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if not args.trl_python:
        parser.error(
            "--trl-python is needed: an interpreter of an environment made as requirements-trl.txt says"
        )
    if args.global_batch % 8 or args.search % 8 or args.pairs % args.global_batch:
        parser.error("--global-batch and --search must be multiples of 8, and --pairs one of --global-batch")
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
            Run(
                Path(folder),
                args.trl_python,
                args.threads,
                repetitions,
                pairs,
                batch,
                args.quick,
                min(args.search, batch),
                args.model,
                args.lengths,
            )
        )
    report(summary)
    if args.json:
        print(json.dumps(summary))
    if max(summary["max_grad_error"], *summary["loss_errors"]) > TOLERANCE:
        sys.exit(f"gradients or losses differ from TRL's by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
