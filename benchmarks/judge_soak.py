"""The judge under faults: its process suffers 200 random faults while 2,000 prompts are judged; the results must not differ.

python benchmarks/judge_soak.py [--prompts 2000] [--faults 200] [--seed 0] [--exec] [--json]

Each process is forked from this one, which has PyTorch imported, so that a restart takes a fraction of a second; it is
otherwise the sidecar, and everything on this side of the pipe is as always. `--exec` starts each from nothing (seconds).
"""

import argparse
import collections
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sppo_jax.hub import names
from sppo_jax.pairrm import child, files
from sppo_jax.pairrm.process_judge import Patience, SidecarJudge

ROOT = Path(__file__).resolve().parents[1]
K = 5
SHARD = 250  # prompts of one comparison, as in a run
BATCH_TOKENS = 1024  # small, so that a fault occurs after a few prompts
BATCHES = 20  # most batches between two faults
SILENCE = 3.0  # seconds after which a stopped process is replaced
TOLERANCE = 1e-5  # largest difference of a logit: batches are composed differently after a restart
KINDS = {
    "kill -9": ["kill"],
    "crash": ["crash", "exit"],
    "hang": ["stop"],
    "garbage": [
        "torn",
        "length",
        "json",
        "list",
        "bytes",
        "id",
        "early",
        "none",
        "range",
        "diagonal",
        "ragged",
    ],
    "no number": ["nan", "NaN", "Infinity"],
    "out of memory": ["cuda", "cpu", "memory"],
}


class Forked:
    """The part of subprocess.Popen that `child.Child` uses, for a forked sidecar, which need not import anything."""

    def __init__(self, command: Sequence[str], stderr: BinaryIO, env: Mapping[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        requests, stdin = os.pipe()
        stdout, answers = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                for ours, theirs in ((requests, 0), (answers, 1), (stderr.fileno(), 2)):
                    os.dup2(ours, theirs)
                os.closerange(3, 256)  # also closes the pipes of other judges
                os.environ.update(env)
                os._exit(_faulty().real(_faulty().Faults(command[2]), list(command[4:])))
            finally:
                os._exit(70)
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("sidecar", timeout)
            else:
                time.sleep(0.001)
        return self.returncode


def _faulty() -> Any:
    if sys.path[0] != str(ROOT):  # before the tests of any other package
        sys.path.insert(0, str(ROOT))
    from tests import faulty_sidecar

    return faulty_sidecar


def texts(rng: random.Random, prompts: int) -> tuple[list[str], list[list[str]]]:
    """Return random texts of random length with some odd words; one response in eight equals another."""
    letters = "abcdefghijklmnopqrstuvwxyz" * 3 + "éß…½שع😀日 \n"

    def text(most: int) -> str:
        words = ["".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(rng.randint(0, most))]
        return " ".join(words)

    def row() -> list[str]:
        found = [text(12) for _ in range(K)]
        return [rng.choice(found) if rng.random() < 1 / 8 else one for one in found]

    return [f"{n} {text(8)}" for n in range(prompts)], [row() for _ in range(prompts)]


def plan(rng: random.Random, faults: int) -> list[tuple[str, int]]:
    """Return [(fault, batches before it)], with every kind equally often, in random order."""
    kinds = [list(KINDS.values())[n % len(KINDS)] for n in range(faults)]
    rng.shuffle(kinds)
    return [(rng.choice(kind), rng.randint(0, BATCHES)) for kind in kinds]


def judged(
    prompts: list[str], responses: list[list[str]], faults: list[tuple[str, int]]
) -> tuple[list[list[np.ndarray]], list[str], list[str], float]:
    """Return results of each prompt [n][times], lines about restarts, faults that occurred, and seconds."""
    told: list[str] = []
    results: list[list[np.ndarray]] = [[] for _ in prompts]
    checkpoint = files.read(names.path("pairrm"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan"
        file.write_text(json.dumps(faults))
        program = Path(_faulty().__file__)
        command = [sys.executable, str(program), str(file), "real", "--path", str(checkpoint.directory)]
        command += ["--threads", "1", "--dtype", "float32", "--batch-tokens", str(BATCH_TOKENS)]
        patience = Patience(heartbeat_timeout=SILENCE, pause=0.01)
        with SidecarJudge(
            checkpoint,
            command=command,
            threads=1,
            patience=patience,
            tell=lambda line: told.append(line) if "started again" in line else None,
        ) as judge:
            for start in range(0, len(prompts), SHARD):
                part = slice(start, start + SHARD)
                logits = judge.compare(prompts[part], responses[part])
                for n, matrix in enumerate(logits, start):
                    results[n].append(matrix)
                print(f"{start + len(logits)} prompts, {len(told)} restarts", file=sys.stderr, flush=True)
        fired = Path(f"{file}.fired")
        came = [line.split()[0] for line in fired.read_text().splitlines()] if fired.exists() else []
    return results, told, came, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exec", action="store_true", help="start each process from nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.exec:
        import torch  # noqa: F401

        from sppo_jax.pairrm import torch_model  # noqa: F401

        replaced = {name: getattr(subprocess, name) for name in ("PIPE", "TimeoutExpired")}
        child.subprocess = types.SimpleNamespace(Popen=Forked, **replaced)  # type: ignore[assignment]
    rng = random.Random(args.seed)
    prompts, responses = texts(rng, args.prompts)
    undisturbed, told, _, quiet = judged(prompts, responses, [])
    assert not told
    results, told, came, seconds = judged(prompts, responses, plan(rng, args.faults))
    once = all(len(found) == 1 for found in results)
    differences = [float(np.abs(a[0] - b[0]).max()) for a, b in zip(undisturbed, results, strict=True)]
    names = {fault: name for name, faults in KINDS.items() for fault in faults}
    summary = {
        "faults": dict(collections.Counter(names[kind] for kind in came)),
        "restarts": len(told),
        "prompts": len(prompts),
        "pairs": len(prompts) * K * (K - 1),
        "one_result_each": once,
        "equal": once and len(came) == args.faults and max(differences) <= TOLERANCE,
        "largest_difference": max(differences),
        "bit_equal_prompts": sum(not difference for difference in differences),
        "seconds": seconds,
        "seconds_undisturbed": quiet,
        "seed": args.seed,
        "restart": "exec" if args.exec else "fork",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    for name, count in sorted(summary["faults"].items()):  # type: ignore[attr-defined]
        print(f"{name:16} {count:4}")
    print(f"{'all faults':16} {len(came):4}   {len(told)} restarts")
    print(f"{len(prompts)} prompts in {seconds:.0f} s, undisturbed {quiet:.0f} s; one result each: {once}")
    print(f"largest difference {max(differences):.1e}, equal: {summary['equal']}")
    if args.json:
        print(json.dumps(summary))
    sys.exit(not summary["equal"])


if __name__ == "__main__":
    main()
