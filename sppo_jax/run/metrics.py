"""A run's outputs: scalars to metrics.jsonl and TensorBoard, lines for people, and progress (`sppo_jax.run.progress`)."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from sppo_jax import command, files
from sppo_jax.config import Config
from sppo_jax.run import cluster, evaluations, pod, progress
from sppo_jax.run.advice import Signs
from sppo_jax.run.directory import RunDir
from sppo_jax.run.stopping import Stop
from sppo_jax.run.trackers import Sample, Tracking

WARNING = (
    "warning: "  # begins the text of a line that --quiet leaves, after the name of its stage if it has one
)


class Metrics:
    """A run's outputs: metrics.jsonl, TensorBoard, log lines and progress. Close it, or use it as a context manager.

    Any thread may write scalars and lines; one progress is shown at a time.
    """

    def __init__(self, run: RunDir, config: Config | None = None, *, quiet: bool = False):
        """Process 0 writes and shows them; the other processes of a run only count. `quiet`: see `say`; no progress is shown.

        `config`: of a game, whose signs are printed as warnings and whose curves go to log.to. Raises BadInput where a
        tracker's package is missing.
        """
        self._run, self._silent, self._quiet = run, not pod.first(), quiet
        self._begun = False
        # A pipe or file has no width of its own: don't fold log lines at 80 columns. What cannot be shown is dropped.
        output = command.shown(sys.stdout) if sys.stdout is not None else None
        self._console = Console(file=output, soft_wrap=True, highlight=False, markup=False)
        self._stop = Stop()
        self._writing = threading.Lock()
        before = [] if self._silent or config is None else read(run)
        self._before = {(line["iteration"], line["stage"]): line for line in before if not line["step"]}
        self._signs = Signs(config, before) if config is not None else None
        self._tracking = None if self._silent else Tracking(run, config, self.say, before)

    def scalars(self, iteration: int, stage: str, step: int, **values: float) -> None:
        """Write one line of metrics.jsonl. Where a resumed run repeats (iteration, stage, step), the last line counts.

        Raises BadInput where the system refuses the write.
        """
        if self._tracking is None:
            return
        line = _finite(
            {"iteration": iteration, "stage": stage, "step": step, "time": round(time.time(), 3), **values}
        )
        with self._writing:
            # Made with the first scalar, so that a run that cannot begin leaves no files. A line cut by a crash must not
            # swallow the next.
            torn = not self._begun and self._is_torn()
            files.append(self._run.metrics, b"\n" * torn + json.dumps(line).encode() + b"\n")
            self._begun = True
            self._tracking.line(line)
            signs = self._signs.take(line) if self._signs is not None else []
        for sign in signs:
            self.say(f"iteration {iteration} {stage}: warning: {sign.text}")

    def earlier(self, iteration: int, stage: str) -> dict[str, float]:
        """The numbers that an earlier start has written of a stage as its step 0; empty where there is no such line."""
        line = self._before.get((iteration, stage), {})
        other = ("iteration", "stage", "step", "time")
        return {name: x for name, x in line.items() if name not in other and isinstance(x, float)}

    def is_sign(self, iteration: int, stage: str, step: int, **values: float) -> bool:
        """Whether these scalars, once written, would print a warning."""
        line = _finite({"iteration": iteration, "stage": stage, "step": step, **values})
        return self._signs is not None and not self._silent and bool(self._signs.seen(line))

    def samples(self, iteration: int, rows: Sequence[Sample]) -> None:
        """Pass held-out responses of an iteration's policy on to log.to."""
        if self._tracking is not None:
            with self._writing:
                self._tracking.samples(iteration, rows)

    def _is_torn(self) -> bool:
        """Whether metrics.jsonl ends in the middle of a line."""
        if not files.exists(self._run.metrics):
            return False
        with files.writing(self._run.metrics), self._run.metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            return file.read(1) not in (b"", b"\n")

    def say(self, text: str, *, always: bool = False) -> None:
        """Print a line for people. A quiet run prints warnings only, and what it `always` prints."""
        if not self._silent and (not self._quiet or always or WARNING in text):
            self._console.print(text)

    @contextlib.contextmanager
    def progress(
        self, label: str, total: int, unit: str, *, done: int = 0, minor: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Yield `advance(n, **facts)`, which adds n of `total` units; facts ("loss 0.1") are shown after the rate.

        The first of the facts are kept longest on a narrow terminal. `done` units were complete before: they count, except
        for the rate and the time left. A `minor` stage is printed to a plain log only if it takes more than 5 seconds.
        """
        count = progress.Count(label, total, unit, done)
        if self._silent or self._quiet:
            yield lambda *_, **__: None
        elif self._console.is_terminal:
            with progress.bar(self._console, count) as advance:
                yield advance
        else:
            with progress.lines(self.say, count, minor=minor) as advance:
                yield advance

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM into a request; `poll` raises Terminated at the next safe place (`Stop.on_signals`).

        One to any process of the run is a request to all of them.
        """
        member = cluster.member()
        with self._stop.on_signals(), member.following(self._stop) if member else contextlib.nullcontext():
            yield

    @property
    def stop_requested(self) -> bool:
        """Whether SIGTERM or Ctrl-C has arrived."""
        return self._stop.requested is not None

    def stop_agreed(self) -> bool:
        """Whether all processes of the run stop here: what process 0 knows. All of them call this together."""
        if not pod.agreed("stop", lambda: self.stop_requested):
            return False
        self._stop.request(signal.SIGTERM)
        return True

    def poll(self, *, together: bool = False) -> None:
        """Raise Terminated if SIGTERM or Ctrl-C has arrived at any process of the run.

        `together`: all processes call this, and all or none end. Needed wherever each waits for the others.
        """
        if not together or self.stop_agreed():
            self._stop.check()

    def chunks(
        self,
        advance: Callable[..., None],
        facts: Callable[[], dict[str, Any]] = dict,
        *,
        most: int = 0,
        together: bool = False,
    ) -> Callable[[int, int, int], None]:
        """Return a callback for the sampler, which passes each chunk's prompts, tokens and slots in use to `advance` and polls.

        Slots are shown while some are in use, and the result of `facts()` as well. `most`: the largest number of tokens that
        can be drawn, if it is known; with their rate it bounds the time left before a prompt is done. `together`: all
        processes of the run sample the same prompts.
        """
        start, tokens = time.monotonic(), 0

        def on_progress(prompts: int, new_tokens: int, slots_in_use: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            rate = tokens / max(time.monotonic() - start, 1e-9)
            slots = {"slots in use": slots_in_use} if slots_in_use else {}
            bound = {progress.AT_MOST: (most - tokens) / rate} if most > tokens > 0 else {}
            advance(prompts, **{"tokens/s": round(rate)}, **slots, **facts(), **bound)
            self.poll(together=together)

        return on_progress

    def close(self, failed: bool = False) -> None:
        """Pass on what was printed; scalars are on disk already. `failed`: the run ends with an error."""
        if self._tracking is not None:
            self._tracking.close(failed)
        self._console.file.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def from_totals(advance: Callable[..., None]) -> Callable[[int, int], None]:
    """Return a callback for (done so far, total) that reports the difference through `advance`."""
    before = 0

    def on_progress(done: int, _total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return on_progress


def read(run: RunDir, tell: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, the last one of each (iteration, stage, step), with numbers within float32's range or None.

    Lines without these three keys, such as one that a crash cut, are left out. `tell` gets a line about what is left
    out, also where the whole file is missing or cannot be read.
    """
    lines: dict[tuple[int, str, int], dict[str, Any]] = {}
    name, bad = run.metrics.name, 0
    try:
        text = run.metrics.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        tell(f"{name}: missing")
        return []
    except OSError as error:
        tell(f"{name}: {error.strerror}")
        return []
    for written in text.split("\n"):
        if (line := _line(written)) is not None:
            lines[line["iteration"], line["stage"], line["step"]] = line
        else:
            bad += bool(written.strip())
    if bad:
        tell(f"{name}: {bad} damaged lines")
    return sorted(lines.values(), key=lambda line: (line["iteration"], line["stage"], line["step"]))


def _line(text: str) -> dict[str, Any] | None:
    """Return the line's values, with None for a value that is not a number; None for a line without iteration, stage and step."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("stage"), str):
        return None
    place = {key: evaluations.whole(found.get(key)) for key in ("iteration", "step")}
    if None in place.values():
        return None
    return (
        {key: evaluations.number(value) for key, value in found.items()} | place | {"stage": found["stage"]}
    )


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    """`line` with None for NaN and infinities, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
