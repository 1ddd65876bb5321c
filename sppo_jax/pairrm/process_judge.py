"""PairRM in a process of its own: stage 2's end of the pipe. Texts are sent, logits [n, K, K] come back.

When the process fails (it crashes, is killed, hangs, runs out of memory, or writes garbage or scores that are not finite),
it is ended, started again after a pause, and asked for the missing scores; scores that have arrived are kept. When restarts
do not help, the judge fails with one line that gives the reason and names the prompts.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from sppo_jax.command import say
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, files, launch, protocol
from sppo_jax.pairrm.child import Broken, Child
from sppo_jax.pairrm.format import Limits

Progress = Callable[[int, int], None]

_REQUEST_PROMPTS = 1024  # bounds the process's memory for token ids
_REQUEST_BYTES = protocol.MAX_FRAME // 4
_CELL_BYTES = 16  # bytes that one cell takes in a request
# After a failure without any score, the next request is this many times smaller: five failures reach a single prompt.
_SHRINK = 8
# Most tokens of a batch: the number assumed of a program that sends none, and the lowest limit that we set. When a process
# dies, the next one is limited to half of its tokens, then to half of that.
_UNKNOWN_TOKENS = 4096
_FEWEST_TOKENS = 256
_SHOWN = 80  # characters of a prompt in an error


@dataclass(frozen=True)
class Patience:
    """How long the judge waits before it gives up a process, and how often it starts another."""

    start: float = 300.0  # seconds without a heartbeat while the process loads: a cold disk may delay it
    heartbeat_timeout: float = 30.0  # seconds without a heartbeat once it is loaded
    stall: int = 900  # heartbeats, one a second, without any score
    restarts: int = 5  # restarts in a row without any new score
    pause: float = 0.1  # seconds before the first restart; doubled each time, up to `longest_pause`
    longest_pause: float = 10.0


class SidecarJudge:
    """PairRM in a process of its own. The constructor starts the process, which loads in the background.

    Not for use by two threads at once. After an error or an interruption `compare` can be called again; once the judge is
    closed, it raises BadInput.
    """

    on_mesh = False

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
        tell: Callable[[str], None] = say,
    ) -> None:
        """Start the process.

        `command` starts another program that follows protocol.py; then only the identity is taken from `checkpoint`.
        `threads` is the number of CPU threads (default: all that this process may use), `dtype` auto (bfloat16 on a GPU,
        else float32), float32 or bfloat16, `name` the name in messages. `tell`, an attribute that may be replaced,
        receives a line for each restart and the program's own lines. Raises BadInput for limits that leave no room, and
        for a command that cannot be started.
        """
        limits.of(checkpoint.config)
        self.sources = checkpoint.sources
        self.cut: Counter[str] = Counter()  # "prompts", "responses" that were read only in part
        self.tell = tell
        self._checkpoint, self._name, self._patience = checkpoint, name, patience
        threads = threads or launch.available_cpus()
        self._command = list(command or launch.sidecar_command(checkpoint, threads, limits, dtype))
        self._environment = launch.environment(threads)
        self._closed = self._ready = False
        self._child: Child | None = None
        self._last_id = 0
        self._default_tokens = _UNKNOWN_TOKENS  # most tokens of the program's batches
        # A lower limit, after a process died (perhaps for lack of memory).
        self._token_limit: int | None = None
        self._progressed = False  # whether a score has arrived since the last failure
        self._restarts = 0  # restarts since the last score
        self._request_prompts = _REQUEST_PROMPTS  # most prompts of the next request
        self._start()

    @cached_property
    def identity(self) -> str:
        """Hash of the files that determine the scores."""
        return self._checkpoint.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Return logits, float32 [n, K, K]: [p, i, j] is the logit that response i, shown first, beats j; diagonal 0.

        `prompts` [n] are raw instructions, `responses` [n][K] decoded texts. `on_progress(done, total)` counts ordered
        pairs. Raises ValueError for shapes that do not fit, and BadInput when restarts of the process do not help.
        """
        n, k = comparisons.shape(prompts, responses)
        if self._closed:
            raise BadInput(f"{self._name}: this judge is closed; load it again")
        scores = _Scores(n, k)
        try:
            while (missing := scores.missing()).size:
                indices = _request(missing[: self._request_prompts], prompts, responses)
                try:
                    self._ask(indices, prompts, responses, scores, on_progress)
                except Broken as broken:
                    self._start_again(broken, [prompts[i] for i in indices])
        except BaseException:  # a reply may be under way: the next request needs another process
            self._stop()
            raise
        return scores.logits

    def release(self) -> None:
        """Do nothing: this judge holds no device of the mesh."""

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        indices: Sequence[int],
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        scores: "_Scores",
        on_progress: Progress | None,
    ) -> None:
        """Send one request and write its replies into `scores`. Raises Broken."""
        child = self._loaded()
        self._last_id += 1
        message = {
            "id": self._last_id,
            "prompts": [prompts[i] for i in indices],
            "responses": [list(responses[i]) for i in indices],
        }
        if scores.begun(indices):
            message["cells"] = scores.cells(indices)
        if self._token_limit is not None:
            message["tokens"] = self._token_limit
        try:
            child.send(protocol.encode(message))
        except protocol.FrameError as error:
            raise BadInput(
                f"{self._name}: a prompt and its responses are too long to judge: {error}"
            ) from None
        beats = 0
        while True:
            frame = child.receive(self._patience.heartbeat_timeout)
            if self._is_sign_of_life(frame):
                beats += 1
                self._check_stall(beats)
                continue
            if frame.get("id") != self._last_id:
                raise Broken(f"wrote garbage (a reply to {str(frame.get('id'))[:20]!r})")
            if not {"cells", "end", "error"} & frame.keys():
                raise Broken("wrote garbage (a reply without cells, end or error)")
            if "error" in frame:
                raise Broken(f"could not go on ({_one_line(frame['error'])[:300]})")
            cut = _cut_counts(frame)
            new = scores.take(frame, indices) if "cells" in frame else 0
            self.cut.update(cut)
            if new:
                beats = 0
                self._progressed = True
                if on_progress is not None:
                    on_progress(scores.done, scores.total)
            if "end" in frame:
                break
        if open_ := len(scores.cells(indices)):
            raise Broken(f"wrote garbage (a reply without {open_} of its scores)")
        self._request_prompts = min(2 * self._request_prompts, _REQUEST_PROMPTS)

    def _loaded(self) -> Child:
        """Return the process once it is ready. Raises Broken, and BadInput when it reports that it cannot load."""
        if self._child is None:
            self._start()
        assert self._child is not None
        beats = 0
        while not self._ready:
            frame = self._child.receive(self._patience.start)
            if "error" in frame:
                raise BadInput(f"{self._name}: {_one_line(frame['error']).removeprefix(f'{self._name}: ')}")
            beats += 1
            self._check_stall(beats)
            if self._is_sign_of_life(frame):
                continue
            tokens = frame.get("tokens", _UNKNOWN_TOKENS)
            if frame.get("ready") is not True or type(tokens) is not int or tokens < 1:
                raise Broken("wrote garbage (no frame that it is ready)")
            self._ready, self._default_tokens = True, tokens
        return self._child

    def _is_sign_of_life(self, frame: dict[str, Any]) -> bool:
        """Return whether a frame only shows that the process is alive. A line for people in it goes to `tell`."""
        if "told" in frame:
            self.tell(f"{self._name}: {_one_line(frame['told'])[:300]}")
        return "alive" in frame or "told" in frame

    def _check_stall(self, beats: int) -> None:
        if beats > self._patience.stall:
            raise Broken(f"got nowhere for {self._patience.stall} s")

    def _start_again(self, broken: Broken, failed: Sequence[str]) -> None:
        """Start another process after a pause, with smaller requests if this one scored nothing.

        Raises BadInput when the last restart allowed has failed.
        """
        last_words = self._child.last_words() if self._child is not None else ""
        was_ready = self._ready
        self._stop()
        if self._progressed:
            self._restarts, self._progressed = 0, False
        elif was_ready:
            self._request_prompts = max(1, min(self._request_prompts, len(failed)) // _SHRINK)
            if broken.died:
                self._token_limit = max(_FEWEST_TOKENS, (self._token_limit or self._default_tokens) // 2)
        if self._restarts == self._patience.restarts:
            self._restarts, self._request_prompts, self._token_limit = 0, _REQUEST_PROMPTS, None
            raise BadInput(
                f"{self._name}: {_named(failed)} cannot be judged: its process {broken}"
                + ("" if was_ready else " before it was ready")
                + (f", its last words {last_words!r}" if last_words else "")
                + f", and {self._patience.restarts} restarts did not help; "
                + ("" if was_ready else f"repair {self._command[0]!r}, which starts it, and ")
                + "run the same command again to resume"
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
    """The logits of one call of `compare` as they arrive, and which of them have arrived."""

    def __init__(self, n: int, k: int) -> None:
        self.logits = np.zeros((n, k, k), np.float32)
        self._known = np.zeros((n, k, k), bool)
        self._known[:, np.arange(k), np.arange(k)] = True
        self.total = n * k * (k - 1)

    @property
    def done(self) -> int:
        """Number of ordered pairs i != j whose logit has arrived."""
        return self.total - int((~self._known).sum())

    def missing(self) -> np.ndarray:
        """Return the indices of prompts with a missing logit, in ascending order."""
        return np.flatnonzero(~self._known.all(axis=(1, 2)))

    def begun(self, indices: Sequence[int]) -> bool:
        """Return whether one of these prompts has some but not all of its logits."""
        known, k = self._known[list(indices)], self._known.shape[1]
        return bool((known.sum(axis=(1, 2)) > k).any())

    def cells(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the missing cells, each as [position in `indices`, i, j]."""
        return np.argwhere(~self._known[list(indices)]).tolist()

    def take(self, frame: dict[str, Any], indices: Sequence[int]) -> int:
        """Write a frame's scores into cells that have none; return their number. Raises Broken for a malformed frame."""
        cells, values = _array(frame, "cells", "iu"), _array(frame, "logits", "fiu")
        if values.size == 0 and cells.size == 0:
            return 0
        if cells.ndim != 2 or cells.shape[1] != 3 or values.shape != cells.shape[:1]:
            raise Broken("wrote garbage (cells and logits that do not belong together)")
        k = self._known.shape[1]
        p, i, j = cells.T
        if (cells < 0).any() or (p >= len(indices)).any() or (cells[:, 1:] >= k).any() or (i == j).any():
            raise Broken("wrote garbage (a score for a pair that does not exist)")
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise Broken("gave a score that is not a finite number")
        place = np.asarray(indices)[p], i, j
        new = ~self._known[place]
        self.logits[tuple(axis[new] for axis in place)] = values[new]
        before = self.done
        self._known[place] = True
        return self.done - before


def _array(frame: dict[str, Any], key: str, kinds: str) -> np.ndarray:
    """Return a field of a frame as an array of one of NumPy's `kinds`. Raises Broken for another kind."""
    try:
        array = np.asarray(frame.get(key))
    except (ValueError, OverflowError):  # ragged
        array = np.asarray(None)
    if array.size and array.dtype.kind not in kinds:
        raise Broken(f"wrote garbage ({key} that are not numbers)")
    return array


def _cut_counts(frame: dict[str, Any]) -> dict[str, int]:
    """Return how many prompts and responses a frame reports as read only in part. Raises Broken for other values."""
    cut = frame.get("cut", {})
    if not isinstance(cut, dict) or not all(isinstance(count, int) and count >= 0 for count in cut.values()):
        raise Broken("wrote garbage (a cut that counts nothing)")
    return {key: cut[key] for key in ("prompts", "responses") if cut.get(key)}


def _request(
    missing: Sequence[int] | np.ndarray, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[int]:
    """Return the first of the `missing` prompts that fit into one frame together; at least one."""
    indices: list[int] = []
    size = 0
    for i in map(int, missing):
        # A character escaped in JSON has six bytes, beyond U+FFFF twelve.
        size += 6 * (len(prompts[i]) + sum(map(len, responses[i]))) + _CELL_BYTES * len(responses[i]) ** 2
        if indices and size > _REQUEST_BYTES:
            break
        indices.append(i)
    return indices


def _named(prompts: Sequence[str]) -> str:
    """Return words for these prompts: the beginning of the first, and how many more there are."""
    first = f"the prompt {_one_line(prompts[0])[:_SHOWN]!r}"
    return first if len(prompts) == 1 else f"{first} and {len(prompts) - 1} more"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
