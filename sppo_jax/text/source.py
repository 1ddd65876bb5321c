"""A source of rows as the user named it, and what all kinds of sources share: its messages, columns and plain values."""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sppo_jax.errors import BadInput

PLACEHOLDER = "{iteration}"
NO_SPLIT = ("train", "test")  # the knobs' defaults, which a file ignores
ROWS = 1000  # rows read at a time
SHOWN = 300  # characters of a library's message
COLUMNS = 20  # names of columns in a message

Row = dict[str, Any]
Columns = Sequence[str] | None


@dataclass(frozen=True)
class Source:
    """A source of rows as the user named it, and the knob that named it, for messages."""

    knob: str
    name: str
    split: str

    def __str__(self) -> str:
        return f"{self.knob}={shown_name(self.name)}"

    @property
    def by_iteration(self) -> bool:
        """Whether the name or split depends on the iteration."""
        return PLACEHOLDER in self.name + self.split

    def at(self, iteration: int) -> "Source":
        """Return the source with the number of the iteration filled in."""
        name, split = (text.replace(PLACEHOLDER, str(iteration)) for text in (self.name, self.split))
        return dataclasses.replace(self, name=name, split=split)


def shown_name(name: str) -> str:
    """Return a name as messages show it: escaped if it cannot be printed, and cut in the middle if it is long."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= SHOWN else f"{name[: SHOWN // 2]}…{name[-SHOWN // 2 :]}"


class NoColumn(BadInput):
    """A wanted column that a source does not have; `near` is the column that may be meant, or ""."""

    def __init__(self, line: str, near: str):
        super().__init__(line)
        self.near = near


def check_columns(source: Source | str, columns: Columns, names: Collection[str]) -> None:
    """Raise NoColumn for a column that is not among `names`."""
    for column in columns or ():
        if column not in names:
            near = difflib.get_close_matches(column, names, 1)
            shown = ", ".join(map(shown_name, list(names)[:COLUMNS]))
            more = ", …" if len(names) > COLUMNS else ""
            raise NoColumn(
                f"{source}: no column {column!r}; there are {shown}{more}", near[0] if near else ""
            )


@contextlib.contextmanager
def named(source: Source) -> Iterator[None]:
    """Put the source in front of what BadInput says about its path."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {str(error).rpartition(': ')[2]}") from None


@contextlib.contextmanager
def as_bad_input(
    source: Source | str, advice: str | Callable[[Exception], str], *, reason: bool = True
) -> Iterator[None]:
    """Turn any exception of a library into BadInput with one line: its first line (if `reason`) and the advice."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        wrapped = type(error).__name__ == "DatasetGenerationError" and error.__cause__
        first, *_ = str(wrapped or error).strip().splitlines() or [type(error).__name__]
        if isinstance(wrapped or error, UnicodeDecodeError):
            advice = "a text in it is not UTF-8: write it anew"
        first = "".join(c if c.isprintable() else "?" for c in first[:SHOWN])
        cause = f"{first.rstrip('.')}; " if reason else ""
        raise BadInput(f"{source}: {cause}{advice if isinstance(advice, str) else advice(error)}") from None


def plain(value: Any) -> Any:
    """Return a value with bytes as text (invalid UTF-8 as lone surrogates, see is_unicode) and arrays as lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value
