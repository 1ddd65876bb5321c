"""Processes of `python -m sppo_jax.main` that begin with its imports done: forked by a process that has done them once.

`python -m tests.nursery` is that process. It takes a line of JSON for each process to start or to look at, and ends all of
its children with itself.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from jax._src import compiler, lru_cache

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = [
    "sppo_jax.main", "sppo_jax.compilation", "sppo_jax.session", "sppo_jax.selfplay", "sppo_jax.tiny.world", "tests.kill_points",
    "jax.experimental.multihost_utils", "matplotlib.pyplot", "mistral_common.tokens.tokenizers.mistral", "torch", "transformers",
]  # fmt: skip


class Nursery:
    """Starts processes as subprocess.Popen does. A context manager: none outlives it."""

    def __init__(self):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._turn = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._process:
            self._process.stdin.close()

    def ask(self, **said):
        """Return the answer to one request."""
        with self._turn:
            self._process.stdin.write(json.dumps(said) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(self, words, log, environment=(), prepare=()):
        """Start `python -m sppo_jax.main WORDS`, with its output in the file `log`.

        `environment`: variables that differ. `prepare`: "module:function" and its arguments, called before main is.
        """
        asked = {
            "words": list(words), "log": str(log), "environment": dict(environment), "prepare": list(prepare),
        }  # fmt: skip
        return Child(self, self.ask(**asked))


class Child:
    """A process of a nursery, with the methods of subprocess.Popen that tests use."""

    def __init__(self, nursery, pid):
        self._nursery, self.pid, self.returncode = nursery, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self._nursery.ask(pid=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve():
    """Answer requests until there are no more, and then kill what is left."""
    for name in IMPORTS:
        importlib.import_module(name)
    keep_programs_of_all()
    warnings.simplefilter(
        "ignore", RuntimeWarning
    )  # JAX's of os.fork, though no device has been started here
    answers, children, ended = os.dup(1), set(), {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "words" in asked:
            pid = os.fork()
            if not pid:
                os.close(answers)
                become(asked)
            children.add(pid)
            answer = pid
        else:
            pid = asked["pid"]
            if pid in children and (status := os.waitpid(pid, os.WNOHANG))[0]:
                children.remove(pid)
                ended[pid] = os.waitstatus_to_exitcode(status[1])
            answer = ended.get(pid)
        os.write(answers, f"{json.dumps(answer)}\n".encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def keep_programs_of_all():
    """Let every process of a run write into JAX's cache of programs, each entry whole; JAX itself has process 0 alone write."""
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    lru_cache.LRUCache.put = put


def put(cache, key, value):
    path = Path(cache.path) / f"{key}{lru_cache._CACHE_SUFFIX}"
    if not path.exists():
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)


def become(asked):
    """Turn this process, just forked, into the command."""
    code = 1
    try:
        null, log = (
            os.open(os.devnull, os.O_RDONLY),
            os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        )
        for number, file in ((0, null), (1, log), (2, log)):
            os.dup2(file, number)
        os.environ.update(asked["environment"])
        if asked["prepare"]:
            name, *arguments = asked["prepare"]
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
        sys.argv = ["sppo_jax.main", *asked["words"]]
        del sys.modules["sppo_jax.main"]
        runpy.run_module("sppo_jax.main", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(BaseException):  # what the interpreter does at its end
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
