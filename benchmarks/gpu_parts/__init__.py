"""The parts of benchmarks/gpu.py: each is a generator of figures, which runs in a process of its own."""

from collections.abc import Callable, Iterator
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
