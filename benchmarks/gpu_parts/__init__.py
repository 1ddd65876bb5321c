"""The parts of benchmarks/gpu.py: each is a generator of figures, which runs in a process of its own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 0


@dataclass(frozen=True)
class At:
    """What a part is given."""

    folder: Path  # of this measurement; all its parts share it
    rehearse: bool  # small shapes, on the CPU


@dataclass(frozen=True)
class Figure:
    """One result: a line for people, and its numbers."""

    name: str
    line: str
    values: dict[str, Any]


Part = Callable[[At], Iterator[Figure]]


def each(tries: Iterable[tuple[str, Callable[[], Figure]]]) -> Iterator[Figure]:
    """The figures of these tries, by name; one that fails costs no other, and its figure holds the error."""
    for name, made in tries:
        try:
            yield made()
        except Exception as error:  # of any kind: a compiler's, a library's, ours
            told = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            yield Figure(name, f"{name}: FAILED: {told}", {"error": told})
