"""Where the time of an iteration goes, and how long the rest of the run will take."""

import contextlib
import time
from collections.abc import Iterator

from sppo_jax.errors import BadInput
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.progress import duration

# What an iteration does, in its order. The judge works beside the sampler: its own time is what is left after that.
PARTS = ("sampling", "judging", "scoring", "training", "exporting", "evaluating")
SAID = {"scoring": "reference log-probs"}  # what lines for people call a part, where it is not its name


class Clock:
    """Wall seconds of the iterations that this process plays, by what was done."""

    def __init__(self, metrics: Metrics, iterations: int):
        self._metrics, self._iterations = metrics, iterations
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._within = False
        self._whole: float | None = None  # seconds of the last iteration that was played from its beginning

    @contextlib.contextmanager
    def doing(self, part: str) -> Iterator[None]:
        """Count the seconds of this context for `part`, unless it lies within another one's."""
        if self._within:
            yield
            return
        self._within, start = True, time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - start
            self._within = False

    @contextlib.contextmanager
    def iteration(self, t: int, *, begun: bool) -> Iterator[None]:
        """Print that iteration t begins, and at its end its seconds and those left; write them to metrics.jsonl.

        `begun`: an earlier process has done some of it, so that its time is no measure of the others'. The seconds that it
        has written are added to this one's, and what ends an iteration early writes those until then.
        """
        self._metrics.say(f"iteration {t} of {self._iterations}")
        self._seconds, start = dict.fromkeys(PARTS, 0.0), time.monotonic()
        before = self._metrics.earlier(t, "seconds") if begun else {}

        def write() -> float:
            total = time.monotonic() - start
            found = {**self._seconds, "total": total}
            self._metrics.scalars(
                t, "seconds", 0, **{name: x + before.get(name, 0.0) for name, x in found.items()}
            )
            return total

        try:
            yield
        except BaseException:
            with contextlib.suppress(BadInput):  # a full disk, perhaps, which is what ends it
                write()
            raise
        total = write()
        self._whole = self._whole if begun else total
        parts = ", ".join(
            f"{SAID.get(part, part)} {duration(n)}" for part, n in self._seconds.items() if round(n)
        )
        self._metrics.say(
            f"iteration {t} of {self._iterations} took {duration(total)}{': ' * bool(parts)}{parts}{self._left(t)}"
        )

    def _left(self, t: int) -> str:
        """The end of the line about iteration t: the time that those after it will take, where that is known."""
        rest = self._iterations - t
        return f"; about {duration(rest * self._whole)} left" if rest and self._whole is not None else ""
