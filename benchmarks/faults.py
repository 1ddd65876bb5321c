"""The small game on file systems in memory of several sizes, and under limits on file sizes: how it fails, and how it goes on.

python benchmarks/faults.py [--sizes 4k 24k 60k 300k 2m 5m 6m 10m 14m] [--limits 1 20 1500] [--json]

One run: the game of tests/small_game.py with OUT on a tmpfs of the size (or under `ulimit -f`, in units of 1024 bytes) until the system
refuses a write; then the same command with room. It holds if the refused run has exit code 2, one line on standard error, and ends within
10 seconds of its last output, and if the second one ends with the bits of a run that was never refused. Needs root, to mount.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.small_game import ONE_DEVICE, digest, words  # noqa: E402  (the root is on the path only now)

SIZES = ["4k", "24k", "60k", "300k", "2m", "5m", "6m", "10m", "14m"]
LIMITS = [1, 20, 1500]


def play(out: Path, limit: int | None = None) -> dict[str, Any]:
    """Play the game; returns its exit code, its lines on standard error, and the seconds from its last output to its end."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 1024, resource.RLIM_INFINITY))

    process = subprocess.Popen(
        [sys.executable, "-m", "sppo_jax.main", *words(out)], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ONE_DEVICE},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited,
    )  # fmt: skip
    last = time.monotonic()
    assert process.stdout is not None
    for _ in process.stdout:
        last = time.monotonic()
    errors = process.communicate()[1].splitlines()
    return {
        "code": process.returncode,
        "lines": errors[:5],
        "count": len(errors),
        "seconds": round(time.monotonic() - last, 1),
    }


def mount(directory: Path, *options: str) -> None:
    """Mount a file system in memory, or change its size."""
    subprocess.run(["mount", *options, str(directory)], check=True)


def measured(name: str, parent: Path, whole: Any) -> dict[str, Any]:
    """One row: the refused run, and the one after it. `name`: a size of tmpfs, or ulimit:N."""
    directory, limit = parent / name.replace(":", "_"), None
    directory.mkdir()
    if name.startswith("ulimit:"):
        limit = int(name.removeprefix("ulimit:"))
    else:
        mount(directory, "-t", "tmpfs", "-o", f"size={name}", "none")
    try:
        refused = play(directory / "out", limit)
        if limit is None:
            mount(directory, "-o", "remount,size=1g")
        again = play(directory / "out")
        equal = again["code"] == 0 and digest(directory / "out") == whole
    finally:
        if limit is None:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
    fine = refused["code"] == 0 or (refused["code"], refused["count"]) == (2, 1)
    return {"name": name, **refused, "equal": equal, "holds": fine and equal and refused["seconds"] < 10}


def main() -> None:
    """Print a row for each size and limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--limits", nargs="*", type=int, default=LIMITS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        play(Path(parent) / "whole")
        whole = digest(Path(parent) / "whole")
        for name in [*args.sizes, *(f"ulimit:{n}" for n in args.limits)]:
            rows.append(row := measured(name, Path(parent), whole))
            print(
                f"{name:>12}  code {row['code']}  lines {row['count']}  {row['seconds']:5.1f} s  equal {row['equal']}",
                flush=True,
            )
            print(f"{'':>12}  {(row['lines'] or [''])[0][:150]}", flush=True)
    if args.json:
        print(json.dumps({"rows": rows}))
    sys.exit(not all(row["holds"] for row in rows))


if __name__ == "__main__":
    main()
