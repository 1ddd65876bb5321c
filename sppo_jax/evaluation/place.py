"""The directory of evaluations: responses and comparisons, each in a folder that is named by what it is made from.

So the same command finds its work again after a kill, and another one shares what is equal: the responses of a policy, and the
comparisons of two policies' responses.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.run import directory, pod
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage

NAME = 16  # hexadecimal digits of a folder's name
SHARD = 64  # prompts of one file of responses


class Folder(RunDir):
    """The paths of one folder, in which there are no iterations."""

    def iteration(self, t: int) -> Path:
        """The folder itself, whatever the iteration."""
        return self.root


@dataclass(frozen=True)
class Task(Stage):
    """A stage outside of a run. Its figures are part of the result, so it writes no metrics."""

    title: str = ""

    def label(self, name: str) -> str:
        """Return `name` as a log line of this task begins with it."""
        return f"{self.title}: {name}"

    def scalars(self, name: str, values: Mapping[str, float], step: int = 0) -> None:
        """Write nothing."""


@dataclass(frozen=True)
class Place:
    """Evaluations in `root`, shown by `metrics`."""

    root: Path
    metrics: Metrics

    def task(
        self, kind: str, title: str, made_from: dict[str, str], *, seed: int = 0, iteration: int = 0
    ) -> Task:
        """The stage of one folder of `kind` (policies, comparisons), named by the digest of `made_from`."""
        key = files.sha256_text(json.dumps(made_from, sort_keys=True))[:NAME]
        return Task(
            Folder(self.root / kind / key), iteration, seed, SHARD, made_from, self.metrics, title=title
        )


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Place]:
    """Hold the directory of evaluations, made where it is missing. Raises BadInput where another process holds it."""
    if pod.first():
        with files.writing(root):
            root.mkdir(parents=True, exist_ok=True)
        if RunDir(root).config.exists():
            raise BadInput(f"--out {root} is a run directory; choose another one for evaluations")
    pod.meet("evaluations")
    with contextlib.ExitStack() as stack:
        if pod.first():
            with files.writing(root):
                lock = (root / directory.LOCK).open("a+b", buffering=0)
            stack.enter_context(directory.held(lock))
        metrics = stack.enter_context(Metrics(Folder(root)))
        yield Place(root, metrics)
