"""Stage 2's end of the pipe: starts the PairRM sidecar, sends it texts, gets logits [n, K, K] back."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self, cast

import numpy as np

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import layout, wire

Progress = Callable[[int, int], None]

_REQUEST_PROMPTS = 1024  # bounds the sidecar's memory for token ids
_REQUEST_BYTES = wire.MAX_FRAME // 4
_CLOSE_SECONDS = 5.0


class SidecarJudge:
    """PairRM in a process of its own. Started by the constructor, asked for the first time by `identity` or `compare`.

    Not for use by two threads at once. Once closed, or once the sidecar has died, every call raises BadInput.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        """`path` is a directory in the PairRM-hf layout; raises BadInput, before anything is started, when it is not."""
        self.path = layout.read(path).directory.resolve()
        self._stderr = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (lives as long as the process)
        threads = threads or _available_cpus()
        command = [sys.executable, "-P", "-m", "sppo_jax.pairrm.sidecar"]
        command += ["--path", str(self.path), "--threads", str(threads)]
        # The kernel's notice comes when the *thread* that started the child ends, so only the main one may ask for it.
        if threading.current_thread() is threading.main_thread():
            command.append("--die-with-parent")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(threads),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
        self._stop = weakref.finalize(self, _stop, self._process, self._stderr)
        self._identity: str | None = None
        self._last_id = 0

    @property
    def identity(self) -> str:
        """Hash of the model's files. Waits until the sidecar has loaded; raises BadInput when it cannot."""
        if self._identity is None:
            self._identity = str(self._read()["identity"])
        return self._identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits, float32 [n, K, K]: [p, i, j] is that response i, shown first, beats j; the diagonal is 0.

        prompts [n] are raw instructions, responses [n][K] decoded text. `on_progress(done, total)` counts ordered pairs.
        Raises ValueError for shapes that do not fit, BadInput when the judge fails or dies.
        """
        n, k = len(prompts), len(responses[0]) if responses else 0
        if len(responses) != n or any(len(row) != k for row in responses):
            raise ValueError(f"{n} prompts need {n} rows of equally many responses")
        _ = self.identity
        logits = np.zeros((n, k, k), np.float32)
        for part in _requests(prompts, responses):
            before = part.start * k * (k - 1)

            def report(done: int, before: int = before) -> None:
                if on_progress is not None:
                    on_progress(before + done, n * k * (k - 1))

            logits[part] = self._ask(prompts[part], responses[part], report)
        return logits

    def close(self) -> None:
        """Close the pipe, which ends the sidecar; kill it when it has not ended after five seconds."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], report: Callable[[int], None]
    ) -> Any:
        self._last_id += 1
        name = self._last_id
        message = {"id": name, "prompts": list(prompts), "responses": [list(row) for row in responses]}
        try:
            frame = wire.encode(message)
        except wire.FrameError as error:
            raise BadInput(f"PairRM: a prompt and its responses are too long to judge: {error}") from None
        try:
            self._send(frame)
            while "logits" not in (answer := self._read()):
                report(int(answer["done"]))
        except BadInput:
            raise
        except BaseException:  # interrupted between or inside frames: the stream is out of step for good
            self.close()
            raise
        return answer["logits"]

    def _send(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: closed on our side
            self._fail("its pipe is closed")

    def _read(self) -> dict[str, Any]:
        try:
            message = wire.read_frame(cast(BinaryIO, self._process.stdout))
        except (wire.FrameError, ValueError) as error:
            self._fail(str(error))
        if message is None:
            self._fail("it closed its output")
        if "error" in message:
            raise BadInput(_one_line(f"PairRM: {message['error']}"))
        return message

    def _fail(self, what: str) -> NoReturn:
        if not self._stop.alive:
            raise BadInput("PairRM: this judge is closed; load it again")
        try:
            status = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        self.close()
        last = f"; its last words: {said[-1].strip()[:300]!r}" if said else ""
        raise BadInput(
            _one_line(
                f"PairRM's sidecar ended with exit status {status} ({what}){last}; run the same command again to resume"
            )
        )


def _requests(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Iterator[slice]:
    """Cut n prompts into requests of bounded number and size; a single prompt is never cut."""
    start = size = 0
    for n, (prompt, row) in enumerate(zip(prompts, responses, strict=True)):
        more = 6 * (len(prompt) + sum(map(len, row)))  # escaped in JSON: six bytes, twelve beyond U+FFFF
        if n > start and (n - start >= _REQUEST_PROMPTS or size + more > _REQUEST_BYTES):
            yield slice(start, n)
            start, size = n, 0
        size += more
    if len(prompts) > start:
        yield slice(start, len(prompts))


def _environment(threads: int) -> dict[str, str]:
    """Ours without what steers accelerators, with the place of this package, so that a source checkout works too.

    CUDA_VISIBLE_DEVICES is left as it is.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XLA_", "LIBTPU_", "JAX_"))}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    env["JAX_PLATFORMS"] = "cpu"
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    env["TOKENIZERS_PARALLELISM"] = "false"
    return env


def _available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stop(process: subprocess.Popen[bytes], stderr: BinaryIO) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if process.stdout is not None:
        process.stdout.close()
    try:
        process.wait(_CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stderr.close()
