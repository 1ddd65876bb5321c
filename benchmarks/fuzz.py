"""Counts how wrong input ends: thousands of damaged command lines, configurations, data, checkpoints and run directories.

python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--kind KIND ...] [--first 0] [--processes 1] [--every 100]
    [--minutes 0] [--json]

A case must end with exit code 0, or with code 2 and one line that says what is wrong, within a minute, and leave nothing
half-written. Cases run in worker processes up to the place where the game would begin; of the refused cases one in
`--every` runs again as a command of its own. A case that fails is printed with its seed and number, which make it again:
`--seed S --kind KIND --first NUMBER --cases 1`.
"""

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": str(ROOT),
}
MEMORY = (
    16 << 30
)  # most bytes of a worker's address space: a case that fills the memory is a fault of its own
SILENCE = 180.0  # seconds without a finished case after which a worker is replaced


def work(kind: str, seed: int, numbers: Sequence[int], every: int) -> Iterator[dict[str, Any]]:
    """Run cases in this process, and yield what became of each."""
    from tests import fuzz_cases, fuzz_run

    with fuzz_run.before_the_game():
        for number in numbers:
            with tempfile.TemporaryDirectory(prefix="fuzz-") as parent:
                directory = Path(parent).resolve()
                case = fuzz_cases.make(kind, seed, number, directory)
                found = fuzz_run.attempt(case, directory)
                faults, again = found.faults, False
                if every and number % every == 0 and found.code == 2 and case.module != "card":
                    again = True
                    faults = faults + [f"as a command: {fault}" for fault in _as_command(case, directory)]
            yield {
                "kind": kind, "seed": seed, "number": number, "about": case.about, "code": found.code,
                "seconds": found.seconds, "said": found.said[:700], "faults": faults, "command": again,
            }  # fmt: skip


def _as_command(case: Any, directory: Path) -> list[str]:
    """Run a case that was refused as a command of its own: what is wrong with it."""
    from tests import fuzz_run

    try:
        ended = subprocess.run(
            [sys.executable, "-m", case.module, *case.words],
            cwd=directory,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=fuzz_run.SECONDS,
        )
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {str(error)[:100]}"]
    faults = fuzz_run.judged(case, ended.returncode, ended.stderr.decode(errors="replace"), directory)
    return faults if ended.returncode else ["exit code 0, though it was refused before"]


class Worker:
    """A process that runs a list of cases, and is started again behind a case that ends it or hangs in it."""

    def __init__(self, kind: str, seed: int, numbers: Sequence[int], every: int):
        self._kind, self._seed, self._numbers, self._every = kind, seed, list(numbers), every

    def results(self) -> Iterator[dict[str, Any]]:
        """What became of each case, in order."""
        todo = self._numbers
        while todo:
            done = 0
            for found in self._process(todo):
                done += 1
                yield found
            if done < len(todo):
                fault = ["the process ended, or printed nothing for minutes"]
                yield {
                    "kind": self._kind, "seed": self._seed, "number": todo[done], "about": "", "code": None,
                    "seconds": SILENCE, "said": "", "faults": fault, "command": False,
                }  # fmt: skip
                done += 1
            todo = todo[done:]

    def _process(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        words = [self._kind, str(self._seed), str(self._every), ",".join(map(str, numbers))]
        with subprocess.Popen(
            [sys.executable, __file__, "--worker", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT,
        ) as process:
            assert process.stdout is not None
            timer = threading.Timer(SILENCE, process.kill)
            timer.start()
            try:
                for line in process.stdout:
                    timer.cancel()
                    yield json.loads(line)
                    timer = threading.Timer(SILENCE, process.kill)
                    timer.start()
            finally:
                timer.cancel()
                process.kill()


def play(args: argparse.Namespace, kinds: Sequence[str]) -> dict[str, Any]:
    """Run all cases, print each that fails, and return the counts."""
    start, lock, results = time.perf_counter(), threading.Lock(), []
    each = -(-args.cases // len(kinds))
    numbers = range(args.first, args.first + each)
    todo = [(kind, numbers[i : i + 250]) for i in range(0, each, 250) for kind in kinds]

    def serve() -> None:
        while True:
            with lock:
                if not todo:
                    return
                kind, part = todo.pop(0)
            for found in Worker(kind, args.seed, part, args.every).results():
                with lock:
                    results.append(found)
                    if found["faults"]:
                        _print(found)
                if args.minutes and time.perf_counter() - start > 60 * args.minutes:
                    return

    threads = [threading.Thread(target=serve) for _ in range(args.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _summary(results, time.perf_counter() - start, args.seed)


def _print(found: dict[str, Any]) -> None:
    where = f"--kind {found['kind']} --seed {found['seed']} --first {found['number']} --cases 1"
    print(
        f"{where}: {ascii(found['about'])[:300]}\n    {ascii('; '.join(found['faults']))[:600]}",
        file=sys.stderr,
        flush=True,
    )


def _summary(results: Sequence[dict[str, Any]], seconds: float, seed: int) -> dict[str, Any]:
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for found in results:
        end = "failed" if found["faults"] else "refused" if found["code"] == 2 else "accepted"
        kinds[found["kind"]] += collections.Counter({"cases": 1, end: 1, "commands": int(found["command"])})
    slowest = max(results, key=lambda found: found["seconds"])
    return {
        "seed": seed,
        "cases": len(results),
        "failed": sum(count["failed"] for count in kinds.values()),
        "kinds": {kind: dict(count) for kind, count in sorted(kinds.items())},
        "slowest": {key: slowest[key] for key in ("kind", "number", "seconds")},
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Print the counts; the exit code is 1 if a case failed."""
    if sys.argv[1:2] == ["--worker"]:
        kind, seed, every, numbers = sys.argv[2:]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        # Lines of libraries must not mix with the results.
        results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        for found in work(kind, int(seed), [int(n) for n in numbers.split(",")], int(every)):
            print(json.dumps(found), file=results, flush=True)
        return
    from tests.fuzz_cases import KINDS

    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--cases", type=int, default=10_000, help="number of cases over all kinds")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--kind", action="append", choices=list(KINDS), help="kinds of cases (default: all)")
    flags.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    flags.add_argument("--processes", type=int, default=1)
    flags.add_argument(
        "--every", type=int, default=100, help="one case in this many also runs as a command; 0: none"
    )
    flags.add_argument(
        "--minutes", type=float, default=0, help="end after so long with fewer cases; 0: never"
    )
    flags.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = flags.parse_args()
    found = play(args, args.kind or list(KINDS))
    if args.json:
        print(json.dumps(found))
    else:
        for kind, count in found["kinds"].items():
            print(f"{kind:14}", ", ".join(f"{name} {n}" for name, n in count.items()))
        print(f"{found['cases']} cases, {found['failed']} failed, in {found['seconds']:.0f} s")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
