"""How far a stage is, in one line: a bar on a terminal, which fits its width, or now and then a line of a log.

The important numbers come first: units done, their rate, the time left, then the facts that the stage reports.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

AT_MOST = "at most"  # a fact: the seconds that are left at most, shown before the first unit is done
PLAIN_SECONDS = 5.0  # between plain lines of one stage
LEAST_LABEL = 10  # columns that a label keeps; the numbers give way then
REFRESHES = 4  # of a bar in a second
BESIDE_BAR = 60  # columns that a line needs before half of the others go to the bar
BAR = (8, 40)  # columns of the bar, at least and at most


class Count:
    """Units done of a total. `done` units were complete before: they count, except for the rate and the time left."""

    def __init__(self, label: str, total: int, unit: str, done: int):
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.start, self._before = time.monotonic(), done
        self._facts: dict[str, Any] = {}

    def add(self, n: int, facts: dict[str, Any]) -> None:
        """Count n more units, and keep the facts that came with them."""
        self.done, self._facts = self.done + n, facts

    @property
    def finished(self) -> bool:
        """Whether all units are done."""
        return self.done >= self.total

    def parts(self) -> tuple[list[str], list[str]]:
        """The parts of a line, the most important first: units done, rate and time left; and the facts.

        A finished stage has the seconds that it took, and no time left. Before its first unit is done a stage has no rate,
        and of the time left the largest one that was given with `AT_MOST`.
        """
        seconds = time.monotonic() - self.start
        rate = (self.done - self._before) / max(seconds, 1e-9)
        done = f"{self.done}/{self.total} {self.unit}"
        facts = {name: value for name, value in self._facts.items() if name != AT_MOST}
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()]
        if self.finished:
            return [f"{done} in {duration(seconds)}", speed(rate)], shown
        if rate:
            return [done, speed(rate), f"{duration((self.total - self.done) / rate)} left"], shown
        most = self._facts.get(AT_MOST)
        return [done, *([] if most is None else [f"at most {duration(most)} left"])], shown

    def line(self) -> str:
        """The whole line of a log."""
        numbers, facts = self.parts()
        return f"{self.label}: {', '.join([*numbers, *facts])}"

    def fitted(self, width: int) -> tuple[str, str]:
        """The label and the parts that fit into `width` columns, with one column between them.

        The facts are dropped first, from the last on, then the unit; then the label loses its beginning, and in the end the
        time left and the rate are dropped.
        """
        numbers, facts = self.parts()
        while facts and self._columns([*numbers, *facts]) > width:
            facts.pop()
        parts = [*numbers, *facts]
        if self._columns(parts) > width:
            parts = [parts[0].replace(f" {self.unit}", ""), *parts[1:]]
        least = min(LEAST_LABEL, cell_len(self.label))
        while len(parts) > 1 and cell_len(", ".join(parts)) + 1 + least > width:
            parts.pop()
        text = ", ".join(parts)
        return ending(self.label, width - 1 - cell_len(text)), text

    def _columns(self, parts: list[str]) -> int:
        return cell_len(self.label) + 1 + cell_len(", ".join(parts))


class Line:
    """A count as one line of a terminal, never wider than it; on a wide one with a bar."""

    def __init__(self, count: Count):
        self.count = count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last column stays empty: some terminals begin a new line when it is written.
        count, width = self.count, options.max_width - 1
        least, most = BAR
        bar = 0 if count.finished else min((width - BESIDE_BAR) // 2, most)
        if bar < least:
            between = ": " if count.finished else " "
            label, numbers = count.fitted(width + 1 - len(between))
            yield Text(f"{label}{between}{numbers}"[: max(width, 0)], no_wrap=True, end="")
            return
        label, numbers = count.fitted(width - bar - 1)
        yield Text(f"{label} ", no_wrap=True, end="")
        drawn = list(console.render(ProgressBar(total=count.total, completed=count.done, width=bar), options))
        yield from drawn
        gap = bar - Segment.get_line_length(drawn)  # without colours what is left is not drawn
        yield Text(f"{' ' * gap} {numbers}", no_wrap=True, end="")


@contextlib.contextmanager
def bar(console: Console, count: Count) -> Iterator[Callable[..., None]]:
    """Show `count` at the foot of a terminal, and leave its last line there. Yields `advance(n, **facts)`."""
    if count.finished:
        yield lambda *_, **__: None
        return
    with Live(Line(count), console=console, refresh_per_second=REFRESHES):
        yield lambda n=1, **facts: count.add(n, facts)


@contextlib.contextmanager
def lines(say: Callable[[str], None], count: Count, *, minor: bool) -> Iterator[Callable[..., None]]:
    """Print a line of `count` every few seconds, and at its end. Yields `advance(n, **facts)`.

    A `minor` stage is printed only if it takes more than these few seconds.
    """
    shown = count.start

    def advance(n: int = 1, **facts: Any) -> None:
        nonlocal shown
        if n == 0 and count.finished:
            return
        count.add(n, facts)
        now = time.monotonic()
        if (not count.finished or (minor and shown == count.start)) and now - shown < PLAIN_SECONDS:
            return
        shown = now
        say(count.line())

    yield advance


def speed(rate: float) -> str:
    """Units a second as people read them; of less than one the time that each takes: 12.3/s, 3.4s each, 2m05s each."""
    if rate >= 1 or not rate:
        return f"{rate:.1f}/s" if rate < 100 else f"{rate:.0f}/s"
    return f"{1 / rate:.1f}s each" if rate > 1 / 60 else f"{duration(1 / rate)} each"


def duration(seconds: float) -> str:
    """Seconds as people read them: 21s, 3m05s, 2h40m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def ending(text: str, columns: int) -> str:
    """The end of a text that has at most `columns` columns, from a word on, after an ellipsis where its beginning is cut."""
    if cell_len(text) <= columns:
        return text
    while text and cell_len(text) >= columns:
        text = text[1:]
    return f"…{text.partition(' ')[2] or text}"[: max(columns, 0)]
