"""Stage 2's end of the pipe: keeps a scoring process alive, sends it texts, gets logits [n, K, K] back.

Whatever befalls the process (it crashes, is killed, hangs, runs out of memory, writes garbage or scores that are no
numbers), it is ended, started again after a pause, and asked for what is missing; scores that have arrived are kept. When
that helps no more, it fails with one line that says why and names the prompts.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from sppo_jax import command
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, files, protocol
from sppo_jax.pairrm.child import Broken, Child
from sppo_jax.pairrm.format import Limits

Progress = Callable[[int, int], None]

_REQUEST_PROMPTS = 1024  # bounds the process's memory for token ids
_REQUEST_BYTES = protocol.MAX_FRAME // 4
_CELL_BYTES = 16  # of one that is named in a request
# After a failure without a score the next request is so many times smaller: five reach a single prompt.
_FEWER = 8
# Of a batch. When one killed its process, the next has half of what the program said or these, then half again.
_UNKNOWN_TOKENS = 4096
_FEWEST_TOKENS = 256
_CGROUP = Path("/sys/fs/cgroup")
_SHOWN = 80  # characters of a prompt in an error


@dataclass(frozen=True)
class Patience:
    """How long the client waits before it gives a process up, and how often it tries."""

    start: float = 300.0  # seconds without any sign of life while it loads: a cold disk may hold it up
    silence: float = 30.0  # the same afterwards
    stall: int = 900  # signs of life, one a second, without any score
    restarts: int = 5  # in a row without any new score
    pause: float = 0.1  # seconds before the first restart, then twice as long each time, at most
    longest_pause: float = 10.0


class SidecarJudge:
    """PairRM in a process of its own. The constructor starts it; it loads until it is first asked.

    Not for use by two threads at once. After an error or an interruption it can be asked again; once closed, every call
    raises BadInput.
    """

    def __init__(
        self,
        checkpoint: files.Checkpoint,
        *,
        threads: int | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        dtype: str = "auto",
        command: Sequence[str] | None = None,
        name: str = "PairRM",
        patience: Patience = Patience(),
        tell: Callable[[str], None] = command.say,
    ) -> None:
        """`command` runs another program that speaks as wire.py says; `checkpoint` then only says who judges.

        `threads`: CPU threads (default: all that this process may use). `dtype`: auto (bfloat16 on a GPU, else float32),
        float32 or bfloat16. `name` is its name in messages. `tell`, an attribute that may be replaced, hears of each
        restart and what the program has to say. Raises BadInput for limits that leave no room and a command that cannot
        be started.
        """
        limits.of(checkpoint.config)
        self.sources = checkpoint.sources
        self.cut: Counter[str] = Counter()  # "prompts", "responses" of which only a part was read
        self.tell = tell
        self._checkpoint, self._name, self._patience = checkpoint, name, patience
        threads = threads or _available_cpus()
        self._command = list(command or _sidecar(checkpoint, threads, limits, dtype))
        self._environment = _environment(threads)
        self._closed = self._ready = False
        self._child: Child | None = None
        self._last_id = 0
        self._own_tokens = _UNKNOWN_TOKENS  # of the program's batches
        self._tokens: int | None = None  # of a batch, once a process has died for lack of memory, perhaps
        self._luck = False  # a score has arrived since the last failure
        self._restarts = 0  # without one
        self._prompts = _REQUEST_PROMPTS  # of the next request, at most
        self._start()

    @cached_property
    def identity(self) -> str:
        """Hash of the model's files."""
        return self._checkpoint.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits, float32 [n, K, K]: [p, i, j] is that response i, shown first, beats j; the diagonal is 0.

        prompts [n] are raw instructions, responses [n][K] decoded text. `on_progress(done, total)` counts ordered pairs.
        Raises ValueError for shapes that do not fit, BadInput when the judge fails for good.
        """
        n, k = comparisons.shape(prompts, responses)
        if self._closed:
            raise BadInput(f"{self._name}: this judge is closed; load it again")
        scores = _Scores(n, k)
        try:
            while (missing := scores.missing()).size:
                asked = _request(missing[: self._prompts], prompts, responses)
                try:
                    self._ask(asked, prompts, responses, scores, on_progress)
                except Broken as broken:
                    self._start_again(broken, [prompts[i] for i in asked])
        except BaseException:  # an answer may be under way: the next request needs another process
            self._stop()
            raise
        return scores.logits

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        asked: Sequence[int],
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        scores: "_Scores",
        on_progress: Progress | None,
    ) -> None:
        """One request and its whole answer into `scores`. Raises Broken."""
        child = self._loaded()
        self._last_id += 1
        message = {
            "id": self._last_id,
            "prompts": [prompts[i] for i in asked],
            "responses": [list(responses[i]) for i in asked],
        }
        if scores.begun(asked):
            message["cells"] = scores.cells(asked)
        if self._tokens is not None:
            message["tokens"] = self._tokens
        try:
            child.send(protocol.encode(message))
        except protocol.FrameError as error:
            raise BadInput(
                f"{self._name}: a prompt and its responses are too long to judge: {error}"
            ) from None
        beats = 0
        while True:
            frame = child.receive(self._patience.silence)
            if self._is_sign_of_life(frame):
                beats += 1
                self._check_stall(beats)
                continue
            if frame.get("id") != self._last_id:
                raise Broken(f"wrote garbage (an answer to {str(frame.get('id'))[:20]!r})")
            if not {"cells", "end", "error"} & frame.keys():
                raise Broken("wrote garbage (an answer that is none)")
            if "error" in frame:
                raise Broken(f"could not go on ({_one_line(frame['error'])[:300]})")
            cut = _cut(frame)
            new = scores.take(frame, asked) if "cells" in frame else 0
            self.cut.update(cut)
            if new:
                beats = 0
                self._luck = True
                if on_progress is not None:
                    on_progress(scores.done, scores.total)
            if "end" in frame:
                break
        if open_ := len(scores.cells(asked)):
            raise Broken(f"wrote garbage (an answer without {open_} of its scores)")
        self._prompts = min(2 * self._prompts, _REQUEST_PROMPTS)

    def _loaded(self) -> Child:
        """The process, when it has said that it is ready. Raises Broken, and BadInput when it says that it never will be."""
        if self._child is None:
            self._start()
        assert self._child is not None
        beats = 0
        while not self._ready:
            frame = self._child.receive(self._patience.start)
            if "error" in frame:
                raise BadInput(_one_line(f"{self._name}: {frame['error']}"))
            beats += 1
            self._check_stall(beats)
            if self._is_sign_of_life(frame):
                continue
            tokens = frame.get("tokens", _UNKNOWN_TOKENS)
            if frame.get("ready") is not True or type(tokens) is not int or tokens < 1:
                raise Broken("wrote garbage (no word that it is ready)")
            self._ready, self._own_tokens = True, tokens
        return self._child

    def _is_sign_of_life(self, frame: dict[str, Any]) -> bool:
        """Whether that is all to it. What it has to say to people is passed on."""
        if "told" in frame:
            self.tell(f"{self._name}: {_one_line(frame['told'])[:300]}")
        return "alive" in frame or "told" in frame

    def _check_stall(self, beats: int) -> None:
        if beats > self._patience.stall:
            raise Broken(f"got nowhere for {self._patience.stall} s")

    def _start_again(self, broken: Broken, asked: Sequence[str]) -> None:
        """Another process after a pause, with smaller requests if this one scored nothing. BadInput when that is all."""
        said = self._child.last_words() if self._child is not None else ""
        at_work = self._ready
        self._stop()
        if self._luck:
            self._restarts, self._luck = 0, False
        elif at_work:
            self._prompts = max(1, min(self._prompts, len(asked)) // _FEWER)
            if broken.died:
                self._tokens = max(_FEWEST_TOKENS, (self._tokens or self._own_tokens) // 2)
        if self._restarts == self._patience.restarts:
            self._restarts, self._prompts, self._tokens = 0, _REQUEST_PROMPTS, None
            raise BadInput(
                f"{self._name}: {_shown(asked)} cannot be judged: its process {broken}"
                + ("" if at_work else " before it was ready")
                + (f", its last words {said!r}" if said else "")
                + f", and {self._patience.restarts} restarts did not help; run the same command again to resume"
            )
        time.sleep(min(self._patience.pause * 2**self._restarts, self._patience.longest_pause))
        self._restarts += 1
        self.tell(
            f"{self._name}: its process {broken}; started again ({self._restarts} of {self._patience.restarts})"
        )
        self._start()

    def _start(self) -> None:
        self._ready = False
        try:
            self._child = Child(self._command, self._environment)
        except BadInput as error:
            raise BadInput(f"{self._name}: {error}") from None

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Scores:
    """The logits of one comparison as they come in, and which of them are there."""

    def __init__(self, n: int, k: int) -> None:
        self.logits = np.zeros((n, k, k), np.float32)
        self._known = np.zeros((n, k, k), bool)
        self._known[:, np.arange(k), np.arange(k)] = True
        self.total = n * k * (k - 1)

    @property
    def done(self) -> int:
        return self.total - int((~self._known).sum())

    def missing(self) -> np.ndarray:
        """Prompts of which a cell is missing, in order."""
        return np.flatnonzero(~self._known.all(axis=(1, 2)))

    def begun(self, asked: Sequence[int]) -> bool:
        """Whether some but not all cells of one of these prompts are known."""
        known, k = self._known[list(asked)], self._known.shape[1]
        return bool((known.sum(axis=(1, 2)) > k).any())

    def cells(self, asked: Sequence[int]) -> list[list[int]]:
        """The missing ones, as [place in `asked`, i, j]."""
        return np.argwhere(~self._known[list(asked)]).tolist()

    def take(self, frame: dict[str, Any], asked: Sequence[int]) -> int:
        """Write a frame's scores where none is yet; returns how many. Raises Broken for what cannot be an answer."""
        cells, values = _array(frame, "cells", "iu"), _array(frame, "logits", "fiu")
        if values.size == 0 and cells.size == 0:
            return 0
        if cells.ndim != 2 or cells.shape[1] != 3 or values.shape != cells.shape[:1]:
            raise Broken("wrote garbage (cells and logits that do not belong together)")
        k = self._known.shape[1]
        p, i, j = cells.T
        if (cells < 0).any() or (p >= len(asked)).any() or (cells[:, 1:] >= k).any() or (i == j).any():
            raise Broken("wrote garbage (a score for a pair that there is not)")
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise Broken("gave a score that is not a finite number")
        place = np.asarray(asked)[p], i, j
        new = ~self._known[place]
        self.logits[tuple(axis[new] for axis in place)] = values[new]
        before = self.done
        self._known[place] = True
        return self.done - before


def _array(frame: dict[str, Any], key: str, kinds: str) -> np.ndarray:
    try:
        array = np.asarray(frame.get(key))
    except (ValueError, OverflowError):  # ragged
        array = np.asarray(None)
    if array.size and array.dtype.kind not in kinds:
        raise Broken(f"wrote garbage ({key} that are no numbers)")
    return array


def _cut(frame: dict[str, Any]) -> dict[str, int]:
    cut = frame.get("cut", {})
    if not isinstance(cut, dict) or not all(isinstance(count, int) and count >= 0 for count in cut.values()):
        raise Broken("wrote garbage (a cut that counts nothing)")
    return {key: cut[key] for key in ("prompts", "responses") if cut.get(key)}


def _request(
    missing: Sequence[int] | np.ndarray, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[int]:
    """The first of the `missing` prompts that fit into one frame; a single one always does."""
    asked: list[int] = []
    size = 0
    for i in map(int, missing):
        # Escaped in JSON: six bytes, twelve beyond U+FFFF.
        size += 6 * (len(prompts[i]) + sum(map(len, responses[i]))) + _CELL_BYTES * len(responses[i]) ** 2
        if asked and size > _REQUEST_BYTES:
            break
        asked.append(i)
    return asked


def _sidecar(checkpoint: files.Checkpoint, threads: int, limits: Limits, dtype: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "sppo_jax.pairrm.sidecar"]
    command += ["--path", str(checkpoint.directory.resolve()), "--threads", str(threads), "--dtype", dtype]
    command += ["--source", str(limits.source), "--candidate", str(limits.candidate)]
    command += ["--total", str(limits.total)]
    if checkpoint.backbone is not None:
        command += ["--backbone", str(checkpoint.backbone.resolve())]
    return command


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
    # Threads that wait give their core up soon: where another process wants it, spinning for long costs a factor of ten.
    env.setdefault("GOMP_SPINCOUNT", "1000")
    return env


def _available_cpus() -> int:
    """Those that we may run on, or as many as a container's share of time is worth, if that is less."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for parts in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max", which is no number
            quota, period = map(int, " ".join((_CGROUP / file).read_text() for file in parts).split())
            if quota > 0:
                ours = min(ours, -(-quota // period))
    return ours


def _shown(asked: Sequence[str]) -> str:
    first = f"the prompt {_one_line(asked[0])[:_SHOWN]!r}"
    return first if len(asked) == 1 else f"{first} and {len(asked) - 1} more"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
