"""One stage of a run: where it reads and writes, and the inputs of its files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax import files, records
from sppo_jax.records import Record
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics


@dataclass(frozen=True)
class Stage:
    """The context that every stage of one iteration gets.

    A stage reads what is complete on disk and makes the rest. A file that was made from something else than
    `made_from` is refused.
    """

    run: RunDir
    iteration: int
    seed: int
    shard_prompts: int  # prompts of one shard
    made_from: dict[str, str]  # digests of the policy, the judge, the prompts and the configuration
    metrics: Metrics

    def label(self, name: str) -> str:
        """Return `name` as a log line of this iteration begins with it."""
        return f"iteration {self.iteration} {name}"

    def say(self, name: str, text: str) -> None:
        """Print one line for people, beginning with the iteration and `name`."""
        self.metrics.say(f"{self.label(name)}: {text}")

    def scalars(self, name: str, values: Mapping[str, float], step: int = 0) -> None:
        """Write scalars of this iteration under the stage's `name` (`Metrics.scalars`)."""
        self.metrics.scalars(self.iteration, name, step, **values)

    @contextmanager
    def progress(
        self, name: str, total: int, unit: str, *, done: int = 0, minor: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Show the progress of `name` in this iteration (`Metrics.progress`)."""
        with self.metrics.progress(self.label(name), total, unit, done=done, minor=minor) as advance:
            yield advance

    def kept(self, path: Path, kind: type[Record], make: Callable[[], list[Any]]) -> list[Record]:
        """Rows of `path`; where it does not exist, `make` them and write them first, unless a stop was requested.

        They are read back either way: a resumed run trains on the same bits. Raises BadInput if the file is damaged
        or was made from something else.
        """
        if not files.exists(path):
            self.metrics.poll()
            records.replace(path, kind, make(), self.made_from)
        return records.read(path, kind, self.made_from)
