"""Runs the quickstart over seeds and prints wall clock, peak memory of all its processes, and the table of EXPERIMENTS.md.

python benchmarks/quickstart.py [--seeds 0 1 2] [--to DIR] [--json] [--section.key value ...]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def run(seed: int, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the quickstart in a process of its own: seconds, peak GiB, and each iteration's eval.json."""
    main = [sys.executable, "-m", "sppo_jax.main", "--config", str(CONFIG)]
    command = [*main, "--seed", str(seed), "--out", str(out)]
    start = time.monotonic()
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen([*command, *overrides], stdout=log, stderr=subprocess.STDOUT)
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process.pid, peak))
        watcher.start()
        status = process.wait()
    seconds = time.monotonic() - start
    watcher.join()
    if status:
        sys.exit((out.parent / f"{out.name}.log").read_text())
    last = max(int(path.name.removeprefix("iter_")) for path in out.glob("iter_*"))
    found = [json.loads((out / f"iter_{t}" / "eval.json").read_text()) for t in range(last + 1)]
    return {"seed": seed, "seconds": seconds, "peak_gib": peak[0] / 2**30, "iterations": found}


def watch(pid: int, peak: list[int]) -> None:
    """Write into `peak` the highest sum of the process tree's proportional set sizes, sampled four times a second."""
    while psutil.pid_exists(pid):
        try:
            root = psutil.Process(pid)
            tree = [root, *root.children(recursive=True)]
            peak[0] = max(peak[0], sum(p.memory_full_info().pss for p in tree))
        except psutil.Error:
            pass
        time.sleep(0.25)


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table: win rates against the base by the true preference and by the judge, log-ratios, lengths, cost."""
    lines = [
        "| seed | win rate, true preference, iterations 0-3 | win rate, judge | winners, iterations 1-3 | losers | "
        "tokens | seconds | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        trained = r["iterations"][1:]
        rates = [" ".join(f"{x:.3f}" for x in win_rates(r, name)) for name in ("oracle", "judge")]
        moves = [" ".join(f"{e['log_ratio'][key]:+.2f}" for e in trained) for key in ("winners", "losers")]
        length = " ".join(f"{e['length']['tokens']:.1f}" for e in r["iterations"])
        cells = [str(r["seed"]), *rates, *moves, length, f"{r['seconds']:.0f}", f"{r['peak_gib']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def win_rates(r: dict[str, Any], name: str) -> list[float]:
    """Win rates against the base after each iteration, by the oracle or the judge."""
    return [e["win_rate"][name]["base"]["mean"] for e in r["iterations"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--to", type=Path, default=None, help="keep the runs here (default: a temporary directory)"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options, overrides = parser.parse_known_args()
    to = options.to or Path(tempfile.mkdtemp(prefix="quickstart-"))
    to.mkdir(parents=True, exist_ok=True)
    runs = [run(seed, to / f"seed_{seed}", overrides) for seed in options.seeds]
    final = [win_rates(r, "oracle")[-1] for r in runs]
    print(table(runs))
    print(f"\nmean of the last: {statistics.mean(final):.3f}, least {min(final):.3f}")
    if options.json:
        summary = {
            "mean_win_rate": statistics.mean(final),
            "least_win_rate": min(final),
            "seconds": [r["seconds"] for r in runs],
            "peak_gib": max(r["peak_gib"] for r in runs),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "runs": runs,
        }
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
