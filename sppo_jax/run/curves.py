"""Lines of metrics.jsonl become named curves: over the updates of all iterations, and over iterations.

Where a number means what TRL and transformers mean by it, it has their name (docs/running.md).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

UPDATES, ITERATIONS = "train/global_step", "iteration"  # the curves' axes
PLACE = ("iteration", "stage", "step", "time")  # of a line, beside its numbers
# Name in a fit line, name of its curve, and whether it is divided by eta: TRL's rewards are beta log-ratio, beta = 1/eta.
TRAINING = (
    ("loss", "train/loss", False),
    ("grad_norm", "train/grad_norm", False),
    ("learning_rate", "train/learning_rate", False),
    ("log_ratio_chosen", "train/rewards/chosen", True),
    ("log_ratio_rejected", "train/rewards/rejected", True),
    ("margin", "train/rewards/margins", True),
    ("accuracy", "train/rewards/accuracies", False),
    ("logprob_chosen", "train/logps/chosen", False),
    ("logprob_rejected", "train/logps/rejected", False),
    ("log_ratio_chosen", "train/log_ratio/chosen", False),
    ("log_ratio_rejected", "train/log_ratio/rejected", False),
    ("margin", "train/log_ratio/margins", False),
    ("max_log_ratio", "train/log_ratio/max", False),
)
SAMPLING = {
    "mean_tokens": "train/completions/mean_length",
    "truncated_share": "train/completions/clipped_ratio",
}


class Points(NamedTuple):
    """One point of each of several curves, {name: value}, at `step` of their axis."""

    values: dict[str, float]
    step: int
    axis: str


class Curves:
    """The curves of a run. Updates are numbered from 0 through all iterations."""

    def __init__(self, eta: float, before: Iterable[Mapping[str, Any]] = ()):
        """`before`: the lines of earlier starts, from which the numbers of the updates go on."""
        self._eta = eta
        self._updates: dict[int, int] = {}  # of each iteration
        for line in before:
            self._count(line)

    def of(self, line: Mapping[str, Any]) -> list[Points]:
        """Return the points of a line; empty for a shard's line, whose numbers are parts of its stage's. None is left out."""
        self._count(line)
        t, stage = line["iteration"], line["stage"]
        numbers = {name: float(x) for name, x in line.items() if name not in PLACE and x is not None}
        start = sum(n for i, n in self._updates.items() if i < t)
        if stage == "fit":
            values = {
                curve: numbers[name] / (self._eta if rewards else 1)
                for name, curve, rewards in TRAINING
                if name in numbers
            }
            return [Points(values, start + line["step"], UPDATES)]
        if stage.endswith("_shard"):
            return []
        found = [Points({f"{stage}/{name}": x for name, x in numbers.items()}, t, ITERATIONS)]
        if stage == "respond":
            named = {curve: numbers[name] for name, curve in SAMPLING.items() if name in numbers}
            found.append(Points(named, start, UPDATES))
        return found

    def _count(self, line: Mapping[str, Any]) -> None:
        if line["stage"] == "fit":
            t = line["iteration"]
            self._updates[t] = max(self._updates.get(t, 0), line["step"] + 1)
