"""Several processes of one run on this machine, as hosts of a pod; or one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests import xla_flags

ROOT = Path(__file__).resolve().parents[1]


def start(words, log, environment=(), prepare=()):
    """Start a command with its output in the file `log`, as tests.nursery does in less time; it prepares nothing."""
    assert not prepare
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | dict(environment)
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "sppo_jax.main", *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        )  # fmt: skip


def free_port():
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Hosts:
    """The processes of one command, begun at once. A context manager: none outlives it."""

    def __init__(
        self, words, logs, processes=2, devices=1, start=start, own=lambda rank: {}, prepare=lambda rank: ()
    ):
        """`words`: the command line; `logs`: a directory for one log each; `devices`: of each process, on the CPU.

        `start` starts a process; `own(rank)`: more words of one process, by their knobs; `prepare(rank)`: as the nursery's.
        """
        logs.mkdir(parents=True, exist_ok=True)
        shared = {"coordinator": f"127.0.0.1:{free_port()}", "num_processes": processes}
        environment = {"XLA_FLAGS": xla_flags.devices(devices)}
        self._logs = [logs / f"process-{rank}.log" for rank in range(processes)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            named = shared | {"process_id": rank} if processes > 1 else {}
            knobs = {f"distributed.{key}": value for key, value in named.items()} | own(rank)
            more = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
            self.processes.append(start([*words, *more], log, environment, prepare(rank)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank=0):
        """Return what a process has printed."""
        return self._logs[rank].read_text(errors="replace")

    def alive(self):
        """Return the numbers of the processes that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def send(self, number, ranks):
        """Send a signal to these processes."""
        for rank in ranks:
            self.processes[rank].send_signal(number)

    def kill(self, *ranks):
        """Kill these processes."""
        self.send(signal.SIGKILL, ranks)

    def codes(self, seconds=120):
        """Wait until all have ended, for so many seconds in all, and return their exit codes; None for one that has not."""
        end = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        return [process.poll() for process in self.processes]

    def wait_for(self, true, seconds=120):
        """Wait until `true()`, or until a process has ended. Returns whether it came true."""
        end = time.monotonic() + seconds
        while not true():
            if len(self.alive()) < len(self.processes):
                return true()
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s; {self.log()[-2000:]}")
            time.sleep(0.005)
        return True
