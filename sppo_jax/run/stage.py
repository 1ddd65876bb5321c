"""One stage of a run: where it reads and writes, and the inputs of its files."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Record
from sppo_jax.run import pod
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics

LATE_SECONDS = 60  # in which a file that another process has written must be seen


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

    def earlier(self, name: str) -> dict[str, float]:
        """The numbers that an earlier start of the run has written of the stage `name` (`Metrics.earlier`)."""
        return self.metrics.earlier(self.iteration, name)

    def is_sign(self, name: str, values: Mapping[str, float], step: int = 0) -> bool:
        """Whether these scalars, once written, would print a warning (run/advice.py)."""
        return self.metrics.is_sign(self.iteration, name, step, **values)

    @contextmanager
    def progress(
        self, name: str, total: int, unit: str, *, done: int = 0, minor: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Show the progress of `name` in this iteration (`Metrics.progress`)."""
        with self.metrics.progress(self.label(name), total, unit, done=done, minor=minor) as advance:
            yield advance

    def kept(self, path: Path, kind: type[Record], make: Callable[[], list[Any]]) -> list[Record]:
        """Rows of `path`; where it does not exist, `make` them and write them first, unless a stop was requested.

        All processes of the run make them together; process 0 writes them. They are read back either way: a resumed run
        trains on the same bits. Raises BadInput if the file is damaged or was made from something else.
        """
        if not there(path):
            self.metrics.poll(together=True)
            rows = make()
            pod.written(path.name, lambda: records.replace(path, kind, rows, self.made_from))
        visible(path)
        return records.read(path, kind, self.made_from)


def there(path: Path) -> bool:
    """Whether process 0 sees `path`. All processes of the run call this together, and all of them get the same answer."""
    return pod.agreed(f"there {path.name}", lambda: files.exists(path))


def visible(path: Path) -> None:
    """Wait until this process sees `path`, which another one has written: network file systems show it late.

    Raises BadInput where it does not come.
    """
    deadline = time.monotonic() + LATE_SECONDS
    while pod.count() > 1 and not files.exists(path):
        if time.monotonic() > deadline:
            raise BadInput(
                f"{path}: another process of the run has written it, and this one cannot see it after {LATE_SECONDS} s; "
                "look at the file system, and run the same command again"
            )
        time.sleep(0.1)
        if files.is_dir(path.parent):
            files.entries(path.parent)  # a listing refreshes what the file system has cached
