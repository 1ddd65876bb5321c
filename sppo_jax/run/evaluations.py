"""What a run directory's JSON says, checked: eval.json of each iteration, and counts of prompts in the manifest.

A figure is a finite number or None. A null, NaN or absent figure is None: nothing could be measured. A value of another
kind is reported and read as None as well, so that a page can be made of the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.run import intervals
from sppo_jax.run.directory import BASE, RunDir

LARGEST = 3.5e38  # float32's range: what a run measures lies within it
WHOLE = 2**53  # above it a number of JSON is no longer exact
HELD_OUT_OF = (
    "held_out_of_"  # begins the manifest's count of prompts that were held out of the source of a knob
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rate:
    """A win rate: mean over prompts, in [0, 1], its standard error, and each prompt's win probability if they were kept."""

    mean: float | None
    stderr: float | None
    per_prompt: Sequence[float] = ()

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, by the rule of `intervals`; None where the probabilities were not kept."""
        return intervals.interval(self.per_prompt) if self.per_prompt else None


@dataclass(frozen=True)
class Change:
    """The mean change of a feature, and its standard error over prompts."""

    mean: float | None
    stderr: float | None


@dataclass(frozen=True)
class Evaluation:
    """One eval.json: the policy after an iteration on the held-out prompts. None: not measured."""

    iteration: int
    prompts: int | None = None
    win_rate: Mapping[str, Mapping[str, Rate]] = field(
        default_factory=dict
    )  # of each judge, against each policy
    tokens: float | None = None  # mean length of responses
    words: float | None = None
    # Mean log-ratios of best and worst held-out responses, nats, with standard errors, and KL per token.
    winners: float | None = None
    winners_stderr: float | None = None
    losers: float | None = None
    losers_stderr: float | None = None
    kl_per_token: float | None = None
    # What the oracle finds in the responses: means, and their change from the base's on the same prompts.
    features: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)

    def against(self, judge: str, other: str) -> Rate | None:
        """The win rate that a judge gave against `other` ("base", "previous"); None where there is none."""
        found = self.win_rate.get(judge, {}).get(other)
        return found if found is not None and found.mean is not None else None


def refuse(line: str) -> NoReturn:
    """A `tell` that raises BadInput: for readers that accept nothing damaged."""
    both = (
        ", together with iter_1/eval.json," if line.startswith(f"iter_{BASE}/") else ""
    )  # measured together
    raise BadInput(f"{line}; delete it{both} and run again to make it anew")


def read(run: RunDir, t: int, tell: Tell = refuse) -> Evaluation | None:
    """eval.json of iteration t; None where it is missing or no object at all. `tell` gets a line about each damage."""
    path = run.evaluation(t)
    try:
        if not files.exists(path):
            return None
        raw = files.read_json(path)
    except BadInput as error:
        tell(_damaged(path, str(error)))
        return None
    return _evaluation(_Object(path, "", raw, tell), t)


def read_all(run: RunDir, tell: Tell = refuse) -> list[Evaluation]:
    """Return eval.json of the base and of every complete iteration, in order, without files that hold no JSON object."""
    found = [read(run, t, tell) for t in run.iterations()]
    return [evaluation for evaluation in found if evaluation is not None]


def number(value: Any, lowest: float = -LARGEST, highest: float = LARGEST) -> float | None:
    """A finite number of JSON within a range as a float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if lowest <= value <= highest else None


def whole(value: Any) -> int | None:
    """A whole number of JSON, not negative, as an int, else None."""
    return value if type(value) is int and 0 <= value <= WHOLE else None


def held_out(manifest: Mapping[str, Any]) -> tuple[int, str] | None:
    """The number of held-out prompts that were taken from the prompts or pairs to train on, and the knob that names these.

    None if the held-out prompts have a source of their own.
    """
    sets = manifest.get("prompts")
    counts = sets.get("heldout") if isinstance(sets, dict) else None
    for key, value in counts.items() if isinstance(counts, dict) else ():
        if key.startswith(HELD_OUT_OF) and (number := whole(value)) is not None:
            return number, key.removeprefix(HELD_OUT_OF).replace("_", ".", 1)
    return None


@dataclass(frozen=True)
class _Object:
    """A JSON object inside a file, whose values are checked as they are taken."""

    path: Path
    name: str
    raw: Mapping[str, Any]
    tell: Tell

    def _wrong(self, key: str, needed: str) -> None:
        self.tell(_damaged(self.path, f"{self.name}{key} is {_shown(self.raw[key])}, needed {needed}"))

    def figure(self, key: str, lowest: float = -LARGEST, highest: float = LARGEST) -> float | None:
        """The number at `key`; None, without a word, for null, NaN, infinities and absence."""
        value = self.raw.get(key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        found = number(value, lowest, highest)
        if found is None:
            needed = "a number" if highest == LARGEST else f"a number from {lowest:g} to {highest:g}"
            self._wrong(key, f"{needed}, 0 or above" if lowest == 0 and highest == LARGEST else needed)
        return found

    def count(self, key: str) -> int | None:
        """The whole number at `key`, or None."""
        value = self.raw.get(key)
        if value is not None and whole(value) is None:
            self._wrong(key, "a whole number")
        return whole(value)

    def probabilities(self, key: str) -> list[float]:
        """The list of numbers from 0 to 1 at `key`; empty where there is none."""
        values = self.raw.get(key)
        found = [number(value, 0, 1) for value in values] if isinstance(values, list) else [None]
        if values is not None and None in found:
            self._wrong(key, "a list of numbers from 0 to 1")
        return [p for p in found if p is not None] if None not in found else []

    def section(self, key: str, *, required: bool = False) -> "_Object":
        """The object at `key`; an empty one where there is none."""
        value = self.raw.get(key)
        if isinstance(value, dict):
            return _Object(self.path, f"{self.name}{key[:40]}.", value, self.tell)
        if value is not None:
            self._wrong(key, "an object")
        elif required:
            self.tell(_damaged(self.path, f"{self.name}{key} is missing"))
        return _Object(self.path, f"{self.name}{key}.", {}, self.tell)


def _evaluation(raw: _Object, t: int) -> Evaluation:
    if raw.raw.get("iteration", t) != t:
        raw._wrong("iteration", f"{t}")
    rates, length = raw.section("win_rate", required=True), raw.section("length", required=True)
    moved, found, changed = (raw.section(key) for key in ("log_ratio", "features", "features_change"))
    return Evaluation(
        iteration=t,
        prompts=raw.count("prompts"),
        win_rate={judge: _rates(rates.section(judge)) for judge in rates.raw},
        tokens=length.figure("tokens", 0),
        words=length.figure("words", 0),
        winners=moved.figure("winners"),
        winners_stderr=moved.figure("winners_stderr", 0),
        losers=moved.figure("losers"),
        losers_stderr=moved.figure("losers_stderr", 0),
        kl_per_token=moved.figure("kl_per_token"),
        features={name: value for name in found.raw if (value := found.figure(name)) is not None},
        changes={name: _change(changed.section(name)) for name in changed.raw},
    )


def _change(of: _Object) -> Change:
    return Change(of.figure("mean"), of.figure("stderr", 0))


def _rates(by: _Object) -> dict[str, Rate]:
    found = {other: by.section(other) for other in by.raw}
    return {
        other: Rate(
            measured.figure("mean", 0, 1), measured.figure("stderr", 0), measured.probabilities("per_prompt")
        )
        for other, measured in found.items()
    }


def _damaged(path: Path, reason: str) -> str:
    """The line about a damaged file, which names it once, by its place in the run."""
    return f"{path.parent.name}/{path.name}: damaged: {reason.removeprefix(f'{path}: ')}"


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
