"""A whole quickstart on the device, as its command plays it: its table and its seconds beside those of the CPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import SEED, At, Figure

BENCHMARKS = Path(__file__).parent.parent
# The CPU's table, by benchmarks/quickstart.py.
RECORDED = BENCHMARKS / "results" / "quickstart.json"
TINY = {
    "iterations": 1, "prompts.per_iteration": 4, "sampling.max_new_tokens": 8, "sampling.responses": 3, "sampling.slots": 6,
    "fit.global_batch": 2, "fit.warmup": 0, "fit.epochs": 1, "fit.schedule_epochs": 1, "fit.checkpoint_every": 1, "eval.prompts": 4, "eval.probe_prompts": 2,
    # The sidecar takes seconds to start, and the part "judge" has tried it.
    "judge.backend": "sppo_jax.tiny.world:oracle",
}  # fmt: skip


def game(at: At) -> Iterator[Figure]:
    """The win rates of each iteration when it is there, and the game's seconds at the end."""
    out = at.folder / "game"
    flags = [
        word for key, value in (TINY if at.rehearse else {}).items() for word in (f"--{key}", str(value))
    ]
    # Without curves: tensorboard may not be there.
    command = [sys.executable, "-m", "gpu_parts.without_grain", "--config", "quickstart", "--seed", str(SEED), "--out", str(out), "--log.to", "[]"]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    began, t = time.perf_counter(), 0
    with (at.folder / "game.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *flags], env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
        )
    expected = _recorded()
    while True:
        status = process.poll()
        while (file := out / f"iter_{t}" / "eval.json").exists():
            yield _iteration(t, json.loads(file.read_text()), expected, time.perf_counter() - began)
            t += 1
        if status is not None:
            break
        time.sleep(0.2)
    if status:
        told = (at.folder / "game.log").read_text(errors="replace").split("\n")
        raise RuntimeError(f"the game ended with exit code {status}: {' '.join(told[-3:]).strip()[:300]}")
    seconds = time.perf_counter() - began
    stages = _stages(out / "metrics.jsonl")
    yield Figure(
        "seconds",
        f"the game took {seconds:.0f} s, compiling included: "
        + ", ".join(f"{name} {s:.0f} s" for name, s in stages.items()),
        {"seconds": seconds, "stages": stages},
    )


def _iteration(t: int, found: dict[str, Any], expected: list[dict[str, Any]], seconds: float) -> Figure:
    def rate(row: dict[str, Any], by: str) -> float:
        return row["win_rate"][by]["base"]["mean"]

    values = {by: rate(found, by) for by in ("judge", "oracle")}
    cpu = {by: rate(expected[t], by) for by in values} if t < len(expected) else {}
    told = ", ".join(f"{by} {x:.3f}" + (f" (CPU {cpu[by]:.3f})" if cpu else "") for by, x in values.items())
    return Figure(
        f"iteration {t}",
        f"quickstart, iteration {t} after {seconds:.0f} s: win rate by {told}",
        {"win_rate": values, "cpu_win_rate": cpu, "seconds": seconds},
    )


def _recorded() -> list[dict[str, Any]]:
    """The iterations of the CPU's game with the same seed."""
    runs = json.loads(RECORDED.read_text())["runs"]
    return next(run["iterations"] for run in runs if run["seed"] == SEED)


def _stages(metrics: Path) -> dict[str, float]:
    """Seconds of each part of an iteration, summed over the iterations."""
    total: dict[str, float] = {}
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == "seconds":
            for name in row.keys() - {"iteration", "stage", "step", "time", "total"}:
                total[name] = total.get(name, 0.0) + row[name]
    return total
