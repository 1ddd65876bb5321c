"""Checks and measures on one GPU what no CPU can, in at most nine minutes: a line for each figure, and one JSON object last.

python benchmarks/gpu.py [--minutes 9] [--to FILE] [--parts machine kernels ...] [--rehearse]

Each part is a process of its own with a limit of its own, in the order of their worth: one that fails or hangs costs nothing
else, and what is left of the time shortens the last ones. `--to` is written after every figure. `--rehearse` runs the same code
on the CPU with small shapes. It needs jax, flax, optax, orbax, torch and transformers, and neither grain nor datasets nor qwix
(docs/gpu.md). The exit code is 0 where every part came to its end, 1 where one did not, 2 where there is no GPU.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_parts import SEED, At

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3  # exit code of a part that finds none


@dataclass(frozen=True)
class Part:
    """A part: the function `gpu_parts.MODULE.FUNCTION`, its limit, and what it needs."""

    where: str
    seconds: float
    # With fewer left it is not begun.
    least: float = 15.0
    # Share of the card's memory that jax takes, by default as plans assume; PyTorch has the rest.
    memory: float = 0.92
    # The part, on the CPU beside the others, whose file this one reads.
    after: str | None = None
    on_cpu: bool = False
    # It starts a process of its own, to which it must leave the card: jax would take its share at once.
    starts_another: bool = False


# In the order of their worth. docs/gpu.md has what each is expected to take.
PARTS = {
    "machine": Part("card.machine", 60),
    "kernels": Part("kernels.kernels", 75),
    "sampler": Part("texts.sampler", 90, after="reference"),
    "decode": Part("decoding.decode", 150),
    "train": Part("updating.train", 140),
    "quickstart": Part("game.game", 160, least=40, memory=0.6, starts_another=True),
    "judge": Part("texts.judge", 60, memory=0.5, after="reference"),
    "judge_jax": Part("judging.jax_speed", 75),
    "judge_torch": Part("judging.torch_speed", 60),
    "adapters": Part("updating.adapters", 110, least=40),
    "decode_whole": Part("decoding.decode_whole", 150, least=60),
    "reference": Part("texts.reference", 120, on_cpu=True),
}


@dataclass
class Running:
    """A part's process, and what it has sent so far."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    figures: dict[str, Any] = field(default_factory=dict)
    reader: threading.Thread | None = None


class Measurement:
    """All parts of one call: what they found, on the screen and in the file."""

    def __init__(self, folder: Path, seconds: float, rehearse: bool, to: Path | None):
        self.folder, self.rehearse, self.to = folder, rehearse, to
        self.began, self.deadline = time.time(), time.monotonic() + seconds
        self.parts: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()  # the parts' readers write, too

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def start(self, name: str, command: Callable[[int], list[str]] | None = None) -> Running:
        """Start a part's process. Its figures come through a pipe of their own, since libraries print, too.

        `command`: another program instead, made from the number of the pipe's end.
        """
        part = PARTS[name]
        receive, send = os.pipe()
        small = ["--rehearse"] if self.rehearse else []
        own = [sys.executable, __file__, "--part", name, "--figures", str(send), "--folder", str(self.folder)]
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command(send) if command else [*own, *small],
                env=environment(part, self.folder, self.rehearse),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[send],
                start_new_session=True,
            )
        os.close(send)
        running = Running(name, process, log, time.monotonic())
        running.reader = threading.Thread(target=self._read, args=(running, receive), daemon=True)
        running.reader.start()
        return running

    def _read(self, running: Running, receive: int) -> None:
        """Print and keep each figure as it comes, until the process ends."""
        with os.fdopen(receive) as lines:
            for line in lines:
                if not line.endswith("\n"):  # cut by the end of the process
                    break
                _, name, told, values = json.loads(line)
                running.figures[name] = values
                self.say(running.name, told)
                self._keep(running, None)

    def finish(self, running: Running, limit: float) -> int | None:
        """Wait for a part until its limit in seconds, or the deadline; return its exit code, None where it was ended."""
        limit = min(limit, self.left)
        error, status = None, None
        try:
            status = running.process.wait(max(0.0, running.began + limit - time.monotonic()))
            if status:
                error = last_line(running.log) or f"exit code {status}"
        except subprocess.TimeoutExpired:
            error = f"ended after {time.monotonic() - running.began:.0f} s, its limit"
        finally:  # also after Ctrl-C
            kill(running.process)
        assert running.reader is not None
        running.reader.join(10)
        if error:
            self.say(running.name, f"FAILED: {error}")
        self._keep(running, error, ended=True)
        return status

    def skip(self, name: str, why: str) -> None:
        """Note a part that is not begun."""
        self.say(name, f"FAILED: {why}")
        with self._lock:
            self.parts[name] = {"figures": {}, "error": why}
            self.write()

    def _keep(self, running: Running, error: str | None, ended: bool = False) -> None:
        found: dict[str, Any] = {"figures": dict(running.figures), "error": error if ended else "not ended"}
        if ended:
            found["seconds"] = time.monotonic() - running.began
        with self._lock:
            self.parts[running.name] = found
            self.write()

    def say(self, name: str, line: str) -> None:
        """Print a line with the seconds so far."""
        print(f"{time.time() - self.began:5.0f} s  {name}: {line}", flush=True)

    def summary(self) -> dict[str, Any]:
        """The object that is printed last."""
        return {
            "rehearsal": self.rehearse,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "seconds": time.time() - self.began,
            "seed": SEED,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "device": self.parts.get("machine", {}).get("figures", {}).get("device"),
            "failed": sorted(name for name, part in self.parts.items() if failed(part)),
            "parts": self.parts,
        }

    def write(self) -> None:
        """Write what is there, whole: a call that is cut off leaves its last state."""
        if self.to is not None:
            part = self.to.with_name(f".{self.to.name}.part")
            part.write_text(json.dumps(self.summary(), indent=1) + "\n")
            part.replace(self.to)


def failed(part: dict[str, Any]) -> bool:
    """Whether a part, or one of its figures, has an error."""
    return bool(part["error"]) or any("error" in values for values in part["figures"].values())


def environment(part: Part, folder: Path, rehearse: bool) -> dict[str, str]:
    """The environment of a part's process: all parts share the programs that they compile."""
    # jax refuses two names for the one share.
    found = {key: value for key, value in os.environ.items() if key != "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    found["XLA_CLIENT_MEM_FRACTION"] = str(part.memory)
    found.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    found |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }
    if rehearse or part.on_cpu:
        found |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def measure(found: Measurement, names: list[str]) -> bool:
    """Run the parts in turn, and beside them the one on the CPU that others wait for. Returns whether there is a GPU."""
    beside = {
        name: found.start(name) for name in dict.fromkeys(PARTS[n].after for n in names) if name is not None
    }
    try:
        for name in names:
            after = PARTS[name].after
            if after in beside:
                found.finish(beside.pop(after), PARTS[after].seconds)
            if after and found.parts[after]["error"]:
                found.skip(name, f"the part {after} failed")
            elif found.left < PARTS[name].least:
                found.skip(name, "no time was left")
            elif found.finish(found.start(name), PARTS[name].seconds) == NO_GPU:
                return False
    finally:
        for running in beside.values():
            kill(running.process)
    return True


def run(names: list[str], at: At, figures: int) -> None:
    """Run parts in this process, and write their figures as lines to a file descriptor."""
    if not at.rehearse and not any(PARTS[name].on_cpu or PARTS[name].starts_another for name in names):
        import jax

        if jax.default_backend() != "gpu":
            print(f"jax finds no GPU, only {jax.devices()[0].device_kind}")
            sys.exit(NO_GPU)
    with os.fdopen(figures, "w") as lines:
        for name in names:
            module, function = PARTS[name].where.split(".")
            part = getattr(importlib.import_module(f"gpu_parts.{module}"), function)
            for figure in part(at):
                lines.write(json.dumps([name, figure.name, figure.line, figure.values]) + "\n")
                lines.flush()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, part in PARTS.items() if not part.on_cpu]
    parser.add_argument("--minutes", type=float, default=9, help="when all must have ended")
    parser.add_argument("--to", type=Path, help="file for the JSON object, written after every figure")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rehearse", action="store_true", help="small shapes on the CPU: does it run?")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run a part, or all of them."""
    args = arguments()
    if args.part:
        run(args.part, At(args.folder, args.rehearse), args.figures)
        return
    # Ended as by Ctrl-C, so that the parts end, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        found = Measurement(Path(folder), 60 * args.minutes, args.rehearse, args.to)
        there = measure(found, [name for name in PARTS if name in args.parts])
    if not there:
        print("no GPU: install jax for it (docs/gpu.md); --rehearse runs the same code on the CPU", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    summary = found.summary()
    print(json.dumps(summary))
    sys.exit(1 if summary["failed"] else 0)


if __name__ == "__main__":
    main()
