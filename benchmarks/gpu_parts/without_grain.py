"""`python -m gpu_parts.without_grain ...` is `sppo_jax train ...`, also where grain is not installed.

Then the pairs of an epoch are shuffled by NumPy: another order than grain's, by which results move as with another seed.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np


class Rows:
    """What sppo_jax/training/batches.py uses of grain's MapDataset: rows by index, made when they are asked for."""

    def __init__(self, count: int, row: Callable[[int], Any]):
        self._count, self._row = count, row

    def __class_getitem__(cls, _: Any) -> type["Rows"]:
        """Itself: annotations name the rows' type."""
        return cls

    @staticmethod
    def source(rows: Sequence[Any]) -> "Rows":
        """The rows of a sequence."""
        return Rows(len(rows), rows.__getitem__)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            chosen = range(self._count)[index]
            return Rows(len(chosen), lambda i: self._row(chosen[i]))
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._row(index)

    def shuffle(self, seed: int) -> "Shuffled":
        """The rows in random orders."""
        return Shuffled(self, seed)

    def map(self, made: Callable[[Any], Any]) -> "Rows":
        """What a function makes of each row."""
        return Rows(self._count, lambda i: made(self._row(i)))

    def to_iter_dataset(self, options: Any = None) -> Iterator[Any]:
        """The rows in turn; nothing is prepared ahead."""
        return iter(self[i] for i in range(self._count))


class Shuffled:
    """Rows in an order of each epoch's own, in batches."""

    def __init__(self, rows: Rows, seed: int, size: int = 1):
        self._rows, self._seed, self._size = rows, seed, size

    def batch(self, size: int, batch_fn: Callable[[Any], Any] = list) -> "Shuffled":
        """The same in batches of `size` rows; an epoch's last one may have fewer."""
        return Shuffled(self._rows, self._seed, size)

    def repeat(self, epochs: int) -> list[list[Any]]:
        """The batches of all epochs."""
        count, batches = len(self._rows), []
        for epoch in range(epochs):
            order = np.random.default_rng((self._seed, epoch)).permutation(count).tolist()
            batches += [
                [self._rows[i] for i in order[at : at + self._size]] for at in range(0, count, self._size)
            ]
        return batches


def install() -> None:
    """Put the stand-in where `import grain` finds it."""
    module: Any = ModuleType("grain")
    module.MapDataset = module.IterDataset = Rows
    module.ReadOptions = lambda **_: None
    sys.modules["grain"] = module


def main() -> None:
    """Play the game of the command line."""
    if importlib.util.find_spec("grain") is None:
        print("grain is not installed: pairs are shuffled by NumPy, and results move as with another seed")
        install()
    from sppo_jax import command
    from sppo_jax import main as game

    command.call(game.main)


if __name__ == "__main__":
    main()
