"""Kills the small game at random moments, again and again, and compares each finished game with one that nobody killed.

python benchmarks/kill_loop.py [--kills 100] [--processes 1] [--devices 1] [--signal KILL] [--seed 0] [--uniform 0.25] [--json]

A game is started again until it is finished; then the next one begins, until so many signals have been delivered. Of the
moments a share of `--uniform` is uniform over the time that a whole game takes, from its start on; the others lie in a stage
that has had few signals so far, uniform over the time that the stage takes. The stage is read from OUT just before the
signal. With several processes KILL meets some of them, at random, and TERM meets one.

It holds if every finished game has the responses, preferences, pairs, evaluations and exported parameters of the game that
nobody killed, bit for bit; if after KILL the processes that were not meant end by themselves with code 144, within the
heartbeat's time-out and 5 seconds; and if after TERM all end with code 143 within 15 seconds.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.hosts import Hosts  # noqa: E402  (the root is on the path only now)
from tests.kill_points import contents  # noqa: E402
from tests.small_game import words  # noqa: E402

ITERATIONS, SHARDS = 2, 3
STAGES = ("loading", "sampling", "judging", "log-probs", "training", "export", "evaluation", "report")
HEARTBEAT = 5  # seconds
WITHIN = {"KILL": HEARTBEAT + 5.0, "TERM": 15.0}
CODE = {"KILL": 144, "TERM": 143}


def command(out: Path, processes: int, devices: int) -> list[str]:
    """The command line of a game that meets every stage, with several checkpoints."""
    alone = {} if processes == 1 else {"distributed__heartbeat_timeout": HEARTBEAT}
    return words(
        out, iterations=ITERATIONS, judge__backend="jax", fit__global_batch=max(1, processes * devices),
        fit__epochs=max(1, processes * devices), fit__schedule_epochs=max(1, processes * devices),
        fit__checkpoint_every=2, mesh__fsdp=-1, **alone,
    )  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """{path: sha256} of the files that must be equal."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(out).items()}


def place(out: Path, log: str, updates: int = 1) -> tuple[int, str]:
    """The iteration and the stage that a game is in, by its files and by what its process has printed since it began.

    `updates`: of one iteration.
    """
    if "prompts, iteration" not in log:
        return 0, "loading"
    for t in range(1, ITERATIONS + 1):
        at = out / f"iter_{t}"
        if (at / "eval.json").exists():
            continue
        saved = [int(path.name) for path in at.glob("checkpoints/*") if path.name.isdigit()]
        missing = {
            "sampling": len([*at.glob("responses/shard-*.parquet")]) < SHARDS,
            "judging": len([*at.glob("preferences/shard-*.parquet")]) < SHARDS,
            "log-probs": not ((at / "pairs.parquet").exists() and (at / "heldout/probe.parquet").exists()),
            "training": not (at / "export").exists() and max(saved, default=0) < updates,
            "export": not (at / "export").exists(),
            "evaluation": True,
        }
        return t, next(name for name, is_due in missing.items() if is_due)
    return ITERATIONS, "report"


class Loop:
    """Games in a directory, and what has become of the signals."""

    def __init__(self, parent: Path, args: argparse.Namespace):
        self._parent, self._args, self._random = parent, args, random.Random(args.seed)
        self.rows: list[dict[str, Any]] = []  # one for each signal
        self.faults: list[str] = []
        self.games = self.starts = 0
        self._updates = 1  # of an iteration, until a game has been played

    def undisturbed(self) -> None:
        """Play once to compile the programs, and once more for the times of its stages and for its files."""
        for name in ("first", "whole"):
            out, begin = self._parent / name, time.monotonic()
            seen: list[tuple[float, str]] = []
            with self._start(out) as hosts:
                while hosts.alive():
                    stage = self._place(out, hosts.log())[1]
                    if not seen or seen[-1][1] != stage:
                        seen.append((time.monotonic(), stage))
                    time.sleep(0.005)
                end = time.monotonic()
                if any(codes := hosts.codes()):
                    raise SystemExit(f"the game that nobody kills ended with {codes}: {hosts.log()[-2000:]}")
        self.seconds, self.takes = end - begin, Counter[str]()
        for (moment, stage), (after, _) in zip(seen, [*seen[1:], (end, "")], strict=True):
            self.takes[stage] += after - moment
        self.expected = digests(out)
        self._updates = max(
            int(path.name) for path in out.glob("iter_1/checkpoints/*") if path.name.isdigit()
        )
        if digests(self._parent / "first") != self.expected:
            raise SystemExit("two games that nobody kills differ")

    def play(self) -> None:
        """Begin games until all signals are delivered, and finish each of them."""
        while len(self.rows) < self._args.kills:
            out, first = self._parent / f"game-{self.games}", len(self.rows)
            self.games += 1
            while self._disturb(out):
                pass
            found = digests(out)
            changed = [name for name in self.expected | found if found.get(name) != self.expected.get(name)]
            for row in self.rows[first:]:
                row["equal"] = not changed
            if changed:
                self._fault(f"game {self.games - 1} differs in {', '.join(changed)}")

    def _place(self, out: Path, log: str) -> tuple[int, str]:
        return place(out, log, self._updates)

    def _start(self, out: Path) -> Hosts:
        self.starts += 1
        at = self._args
        return Hosts(
            command(out, at.processes, at.devices), out.with_suffix(".logs"), at.processes, at.devices
        )

    def _disturb(self, out: Path) -> bool:
        """Start the game once; returns whether it has to be started again."""
        with self._start(out) as hosts:
            if len(self.rows) < self._args.kills and self._moment(out, hosts):
                return self._signal(out, hosts)
            if any(codes := hosts.codes(300)):
                self._fault(f"a start after the last signal ended with {codes}: {hosts.log()[-500:]}")
        return False

    def _moment(self, out: Path, hosts: Hosts) -> bool:
        """Wait for a moment; returns whether the game was still being played then."""
        had, last = Counter(row["stage"] for row in self.rows), self._place(out, "prompts, iteration")
        # The last iteration's stages come again; the first one's only if they are still to come.
        left = STAGES if last[0] < ITERATIONS else ("loading", *STAGES[STAGES.index(last[1]) :])
        stage = min(left, key=lambda name: (had[name], self._random.random()))
        if had[stage] > min(had[name] for name in STAGES) + 1:
            return False  # this stage has had enough signals; the next game is for the others
        seconds = self.takes[stage] / (1 if stage in ("loading", "report") else ITERATIONS)
        if self._random.random() < self._args.uniform:
            stage, seconds = "loading", self.seconds
        order = STAGES.index(stage)

        def reached() -> bool:
            t, now = self._place(out, hosts.log())
            return now == stage or (t == ITERATIONS and STAGES.index(now) >= order)

        if not hosts.wait_for(reached, 300):
            return False
        hosts.codes(self._random.uniform(0, seconds))
        return len(hosts.alive()) == len(hosts.processes)

    def _signal(self, out: Path, hosts: Hosts) -> bool:
        """Send the signal, and look at how the processes end; returns whether the game has to be started again."""
        kind, ranks = self._args.signal, list(range(self._args.processes))
        few = 1 if kind == "TERM" else self._random.randint(1, len(ranks))
        meant = sorted(self._random.sample(ranks, few))
        t, stage = self._place(out, hosts.log())
        sent = time.monotonic()
        hosts.send(getattr(signal, f"SIG{kind}"), meant)
        codes = hosts.codes(WITHIN[kind])
        seconds = time.monotonic() - sent
        row = {
            "stage": stage,
            "iteration": t,
            "processes": meant,
            "codes": codes,
            "seconds": round(seconds, 2),
        }
        self.rows.append(row)
        wanted = [-signal.SIGKILL if kind == "KILL" and rank in meant else CODE[kind] for rank in ranks]
        # A process that had nothing left to do but to end is done, whatever has become of the others.
        done = stage == "report" and (out / "report.html").exists()
        row["held"] = all(a == b or (done and a == 0) for a, b in zip(codes, wanted, strict=True))
        if not row["held"]:
            self._fault(f"{row} instead of {wanted}: {' | '.join(hosts.log(r)[-300:] for r in ranks)}")
        print(
            f"{len(self.rows):4} {stage:10} {t} {meant} {codes} {seconds:5.1f} s", file=sys.stderr, flush=True
        )
        return any(code != 0 for code in codes)  # None: still running, and killed at the end

    def _fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"fault: {text}", file=sys.stderr, flush=True)

    def table(self) -> list[dict[str, Any]]:
        """One row for each stage."""
        rows = []
        for stage in STAGES:
            of = [row for row in self.rows if row["stage"] == stage]
            rows.append({
                "stage": stage, "kills": len(of), "equal": sum(row["equal"] for row in of),
                "ended_as_promised": sum(row["held"] for row in of),
                "slowest_end_seconds": max((row["seconds"] for row in of), default=0.0),
            })  # fmt: skip
        return rows


def main() -> None:
    """Print a row for each stage; the exit code is 1 if anything did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="number of signals")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--signal", choices=list(CODE), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--uniform", type=float, default=0.25, help="share of moments uniform over a whole game"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as parent, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
        loop = Loop(Path(parent), args)
        loop.undisturbed()
        loop.play()
    table = loop.table()
    print(f"{'stage':12}{'kills':>6}{'equal':>7}{'as promised':>13}{'slowest end':>13}")
    for row in table:
        print(
            f"{row['stage']:12}{row['kills']:6}{row['equal']:7}{row['ended_as_promised']:13}{row['slowest_end_seconds']:11.1f} s"
        )
    result = {
        "kills": len(loop.rows), "processes": args.processes, "devices": args.devices, "signal": args.signal,
        "seed": args.seed, "games": loop.games, "starts": loop.starts,
        "undisturbed_seconds": round(loop.seconds, 1), "seconds": round(time.monotonic() - begin, 1),
        "stages": table, "faults": loop.faults,
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
    sys.exit(bool(loop.faults))


if __name__ == "__main__":
    main()
