"""One case of fuzz_cases.py, run through the entry point of its command up to the place where the game would begin."""

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo_jax import command, config_file, pairrm, selfplay
from sppo_jax.run.directory import RunDir
from sppo_jax.settings import resuming
from tests.fuzz_cases import Case

SECONDS = 60.0  # most seconds of a case
LONGEST = 1000  # most characters of the line, in which the words of the command line count as one each
NOTES = ("note: ", "warning: ")  # lines that may stand before the one of the error
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Hang(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Outcome:
    """The exit code of a case (None after an exception), its seconds, what it printed for people, and what is wrong."""

    code: int | None
    seconds: float
    said: str
    faults: list[str]


class Stub:
    """A judge in the place of PairRM, whose process would take seconds to start."""

    identity = "stub"

    def compare(self, prompts: Any, responses: Any, on_progress: Any = None) -> Any:
        return np.zeros((len(prompts), len(responses[0]), len(responses[0])))


@contextlib.contextmanager
def before_the_game() -> Iterator[None]:
    """Within this, `sppo_jax.main` ends where the game would begin: all its input is checked and OUT is claimed."""
    play, load = selfplay.play, pairrm.load

    def opened(path: str, backend: str, **settings: Any) -> Any:
        return load(path, backend, **settings) if backend == "jax" else Stub()

    selfplay.play, pairrm.load = lambda run: None, opened
    try:
        yield
    finally:
        selfplay.play, pairrm.load = play, load


def attempt(case: Case, work: Path) -> Outcome:
    """Run a case in this process, in its directory `work`. Use it within `before_the_game`."""
    here, argv, stdin = os.getcwd(), sys.argv, sys.stdin
    out, err, code, start = io.StringIO(), io.StringIO(), 0, time.monotonic()
    faults: list[str] = []
    before = signal.signal(signal.SIGALRM, _hang)
    os.chdir(work)
    sys.argv, sys.stdin = [case.module, *case.words], io.StringIO("")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("default")
            command.call(_entry(case.module))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        code = None
        faults.append(_described(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)
        sys.argv, sys.stdin = argv, stdin
    faults += [f"warning: {w.category.__name__}: {w.message}" for w in warned]
    if code is not None:
        faults += judged(case, code, err.getvalue(), work)
    return Outcome(code, time.monotonic() - start, err.getvalue(), faults)


def judged(case: Case, code: int, said: str, work: Path) -> list[str]:
    """What is wrong with a command's exit code, with its lines on standard error, or with what it left on disk."""
    faults = []
    if code not in (0, 2):
        faults.append(f"exit code {code}")
    if "Traceback" in said:
        faults.append("a traceback on standard error")
    if code == 2:
        lines = [line for line in said.splitlines() if not line.startswith(NOTES)]
        if len(lines) != 1 or not lines[0].startswith("error: "):
            faults.append(f"{len(said.splitlines())} lines on standard error: {said[:300]!r}")
        elif len(line := _without_words(lines[0], case, work)) > LONGEST:
            faults.append(f"a line of {len(line)} characters: {line[:300]!r}")
        elif CONTROL.search(lines[0]):
            faults.append(f"control characters: {lines[0][:300]!r}")
        elif len(lines[0]) < 20:
            faults.append(f"nearly empty: {lines[0]!r}")
        if case.out is not None and os.path.lexists(case.out):
            faults.append(
                f"OUT exists: {sorted(os.listdir(case.out)) if case.out.is_dir() else 'no directory'}"
            )
    if code == 0 and case.module == "sppo_jax.main" and case.out is not None and case.out.is_dir():
        faults += _resumable(case)
    left = [
        str(p.relative_to(work))
        for p in work.rglob("*")
        if p.name.endswith(".part") and p.name.startswith(".")
    ]
    return faults + ([f"left behind: {left}"] if left else [])


def _resumable(case: Case) -> list[str]:
    """Whether the configuration that was written is the one that was given."""
    paths, rest = [], list(case.words)
    while "--config" in rest:
        at = rest.index("--config")
        paths.append(rest[at + 1])
        del rest[at : at + 2]
    written = config_file.load([RunDir(case.out or "").config])
    given = config_file.load(paths, rest)
    differs = resuming.changed_keys(written, given)
    return [f"config.yaml differs in {differs}"] if differs else []


def _without_words(line: str, case: Case, work: Path) -> str:
    for word in sorted((str(work), *case.words), key=len, reverse=True):
        if len(word) > 40:
            line = line.replace(word, "WORD")
    return line


def _entry(module: str) -> Callable[[Sequence[str]], None]:
    if module == "card":
        return _card
    return importlib.import_module("sppo_jax.report.__main__" if module == "sppo_jax.report" else module).main


def _card(words: Sequence[str]) -> None:
    """The model card of iteration 1 of `--run OUT`, for which no small command exists."""
    from sppo_jax.report import model_card

    model_card.text(RunDir(words[1]), 1)


def _described(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "sppo_jax" in f.filename]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]!r}{at}"


def _hang(_signal: int, _frame: Any) -> None:
    raise Hang(f"longer than {SECONDS:.0f} s")
