"""A trace of some updates for xprof: where the time goes on the devices."""

from pathlib import Path

import jax


class Profiler:
    """Records `count` updates for xprof, from the third on: the first two compile and warm up."""

    WARM = 2

    def __init__(self, directory: Path, count: int):
        self._directory, self._last, self._on = directory, self.WARM + count, False

    def step(self, n: int) -> None:
        """Before update n, counted from where this process began."""
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
        """Write what has been recorded."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
