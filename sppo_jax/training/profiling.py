"""A trace of some updates for xprof, which shows where the devices spend their time."""

from pathlib import Path

import jax


class Profiler:
    """Records `count` updates for xprof, from the third on: the first two compile and warm up."""

    WARM = 2

    def __init__(self, directory: Path, count: int):
        self._directory, self._last, self._on = directory, self.WARM + count, False

    def turns(self, n: int) -> bool:
        """Does the recording begin or end before update n? Then wait for the updates before it."""
        return n in (self.WARM, self._last)

    def step(self, n: int) -> None:
        """Call this before update n, counted from the first one of this process: it starts or ends the recording."""
        if n == self.WARM and self._last > self.WARM:
            jax.profiler.start_trace(str(self._directory))
            self._on = True
        elif n == self._last:
            self.close()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the recording, if one is on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
