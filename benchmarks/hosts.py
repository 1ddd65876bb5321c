"""What several processes cost beside what they compute, and whether a run may change their number in its middle.

python benchmarks/hosts.py [--part overhead meshes quickstart] [--json]

overhead: the small game, with the embedded policy, 12 tokens and a rule as judge, on 1, 2 and 4 processes of one device with the
same number of prompts each. For the second iteration it prints the share of the time in which a process agrees with others
(from the moment at which the last one comes to an agreement until it goes on), and the share in which it waits for another,
which computes or writes. It holds if the share of agreeing grows by less than a tenth of the time from 1 to 4 processes.

meshes: a game begun by 2 processes of 4 devices is stopped in sampling, in judging and in training, and ended by 1 x 8, 1 x 2 and
4 x 2. It holds if the responses are those of a game that nobody stops, the numbers equal to rounding, no file from before the
stop is written again, and training goes on at the update where it stopped.

quickstart: the first iteration of configs/quickstart.yaml by launch/local.sh in 2 x 4, 4 x 2 and 4 x 1 processes and devices, beside one
process with 8 devices. It holds if all leave the same files, the same responses, and parameters within 1e-5.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests import agreements  # noqa: E402  (the root is on the path only now)
from tests.hosts import Hosts  # noqa: E402
from tests.nursery import Nursery  # noqa: E402
from tests.small_game import words  # noqa: E402

PROCESSES = (1, 2, 4)
ENDS = ((1, 8), (1, 2), (4, 2))  # processes x devices
PARTS = ["overhead", "meshes", "quickstart"]
SHAPES = ((1, 8), (2, 4), (4, 2), (4, 1))  # of the quickstart
STOPS = {
    "sampling": "iter_1/responses/shard-00000-of-00006.parquet",
    "judging": "iter_1/preferences/shard-00000-of-00006.parquet",
    "training": "iter_1/checkpoints/3",
}


class Games:
    """Games below one directory, started by a nursery."""

    def __init__(self, nursery: Nursery, parent: Path):
        self._nursery, self.parent, self._count = nursery, parent, 0

    def play(
        self, name: str, processes: int, devices: int, *, code: int = 0,
        prepare: Callable[[int], Any] = lambda rank: (), **options: Any,
    ) -> str:  # fmt: skip
        """Play in the directory `name`; returns process 0's log. Ends the benchmark where the exit codes are others."""
        self._count += 1
        line, logs = words(self.parent / name, **options), self.parent / f"logs-{self._count}"
        with Hosts(line, logs, processes, devices, self._nursery.start, prepare=prepare) as hosts:
            if hosts.codes(600) != [code] * processes:
                raise SystemExit(f"{name}: {hosts.codes(0)}: {hosts.log()[-3000:]}")
            return hosts.log()


def overhead(games: Games, processes: int) -> dict[str, Any]:
    """Play with a fixed load for each process; returns its row."""
    load = {
        "iterations": 2, "mesh__fsdp": -1, "prompts__per_iteration": 24 * processes, "eval__prompts": 12 * processes,
        "eval__probe_prompts": 8 * processes, "fit__global_batch": 4 * processes, "judge__backend": games_rule(),
    }  # fmt: skip
    games.play(f"first-{processes}", processes, 1, **load)  # compiles
    name = f"timed-{processes}"
    paths = [games.parent / f"{name}-{rank}.jsonl" for rank in range(processes)]
    games.play(name, processes, 1, prepare=lambda rank: ("tests.agreements:log", str(paths[rank])), **load)
    begin, end = ((games.parent / name / f"iter_{t}/eval.json").stat().st_mtime for t in (1, 2))
    agreeing, waiting = agreements.shares([agreements.read(path) for path in paths], begin, end)
    return {
        "processes": processes, "seconds": round(end - begin, 2), "agreeing": round(agreeing, 4),
        "waiting": round(waiting, 4), "agreements": len(agreements.read(paths[0])),
    }  # fmt: skip


def games_rule() -> str:
    """The judge that is a rule."""
    from tests.small_game import ORACLE

    return ORACLE


def meshes(games: Games) -> list[dict[str, Any]]:
    """Stop a game in each stage, and end it on each mesh; returns a row for each."""
    load = {
        "mesh__fsdp": -1, "prompts__per_iteration": 18, "judge__backend": "jax", "fit__global_batch": 8, "fit__epochs": 2,
        "fit__schedule_epochs": 2, "fit__checkpoint_every": 1, "distributed__heartbeat_timeout": 20,
    }  # fmt: skip
    games.play("whole", 2, 4, **load)
    rows = []
    for stage, path in STOPS.items():
        begun = games.parent / f"begun-{stage}"

        def stop(rank: int, begun: Path = begun, path: str = path) -> tuple[Any, ...]:
            return (
                () if rank else ("tests.kill_points:kill_at", str(begun), path, "after", int(signal.SIGTERM))
            )

        games.play(begun.name, 2, 4, code=143, prepare=stop, **load)
        for processes, devices in ENDS:
            name = f"{stage}-{processes}x{devices}"
            shutil.copytree(begun, games.parent / name)  # with the times of its files
            before = made(games.parent / name)
            log = games.play(name, processes, devices, **load)
            rows.append(
                {"stopped_in": stage, "ended_on": f"{processes} x {devices}"}
                | compared(games, name, before, log)
            )
    return rows


def made(out: Path) -> dict[str, Any]:
    """What a stopped game has: its files with their times, the number of responses in it, and the last checkpoint."""
    files = [*out.glob("iter_*/*/*.parquet"), *out.glob("iter_*/*.parquet")]
    saved = [int(path.name) for path in out.glob("iter_1/checkpoints/*") if path.name.isdigit()]
    return {"files": {path: path.stat().st_mtime_ns for path in files}, "updates": max(saved, default=0)}


def compared(games: Games, name: str, before: dict[str, Any], log: str) -> dict[str, Any]:
    """Compare the end of a game with the one that nobody stopped."""
    out, whole = games.parent / name, games.parent / "whole"
    again = [path.name for path, time in before["files"].items() if path.stat().st_mtime_ns != time]
    ours, its = (responses(path) for path in (out, whole))
    a, b = (load_file(path / "iter_1/export/model.safetensors") for path in (out, whole))
    resumed = f"fit: resumes at update {before['updates']} of" in log
    return {
        "kept_files": len(before["files"]), "written_again": again, "updates_before": before["updates"],
        "training_went_on": resumed if before["updates"] else "fit: resumes" not in log,
        "responses_equal": [row["response_ids"] for row in ours] == [row["response_ids"] for row in its],
        "preferences": difference(preferences(out), preferences(whole)),
        "parameters": max(difference(a[key], b[key]) for key in b),
    }  # fmt: skip


def quickstart(parent: Path) -> list[dict[str, Any]]:
    """Play the first iteration of the quickstart in each shape; returns a row for each, compared with the first shape's."""
    rows = []
    for processes, devices in SHAPES:
        out, began = parent / f"quickstart-{processes}x{devices}", time.monotonic()
        subprocess.run(
            [ROOT / "launch/local.sh", str(processes), "--config", ROOT / "configs/quickstart.yaml", "--iterations", "1", "--out", out],
            env=os.environ | {"DEVICES": str(devices), "PYTHON": sys.executable}, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        first = parent / "quickstart-{}x{}".format(*SHAPES[0])
        ours, its = responses(out), responses(first)
        a, b = (load_file(path / "iter_1/export/model.safetensors") for path in (out, first))
        rows.append(
            {"processes": processes, "devices": devices, "seconds": round(time.monotonic() - began, 1)}
            | {"same_files": names_of(out) == names_of(first), "files": len(names_of(out))}
            | {"responses": sum(len(row["response_ids"]) for row in ours)}
            | {
                "responses_equal": [row["response_ids"] for row in ours]
                == [row["response_ids"] for row in its]
            }
            | {"parameters": max(difference(a[key], b[key]) for key in b)}
        )
    return rows


def names_of(out: Path) -> set[str]:
    """The files of a run, but for those inside checkpoints and TensorBoard's, whose names hold times and processes."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in found if "checkpoints/" not in name and not name.startswith("tensorboard")}


def responses(out: Path) -> list[dict[str, Any]]:
    """Rows of all shards of responses."""
    return [
        row
        for path in sorted(out.glob("iter_1/responses/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def preferences(out: Path) -> np.ndarray:
    """All numbers of all shards of preferences, in order."""
    tables = [pq.read_table(path).to_pylist() for path in sorted(out.glob("iter_1/preferences/*.parquet"))]
    return np.array([x for rows in tables for row in rows for x in flat(row)])


def flat(value: Any) -> list[float]:
    """The floats in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for part in value for x in flat(part)]
    return [value] if isinstance(value, float) else []


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays of the same shape."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def main() -> None:
    """Print a row for each measurement; the exit code is 1 if one does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON in the last line")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    holds = True
    with tempfile.TemporaryDirectory() as parent, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
        with Nursery() as nursery:
            games = Games(nursery, Path(parent))
            if "overhead" in args.part:
                result["overhead"] = []
                for processes in PROCESSES:
                    result["overhead"].append(row := overhead(games, processes))
                    print(json.dumps(row), flush=True)
                holds &= result["overhead"][-1]["agreeing"] - result["overhead"][0]["agreeing"] < 0.1
            if "meshes" in args.part:
                result["meshes"] = meshes(games)
                for row in result["meshes"]:
                    print(json.dumps(row), flush=True)
                    holds &= row["responses_equal"] and row["training_went_on"] and not row["written_again"]
                    holds &= row["parameters"] < 1e-5
        if "quickstart" in args.part:
            result["quickstart"] = quickstart(Path(parent))
            for row in result["quickstart"]:
                print(json.dumps(row), flush=True)
                holds &= row["same_files"] and row["responses_equal"] and row["parameters"] < 1e-5
    if args.json:
        print(json.dumps(result))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
