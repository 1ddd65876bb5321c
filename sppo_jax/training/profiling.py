"""A trace of some updates for xprof, which shows where the devices spend their time."""

from pathlib import Path

import jax


class Profiler:
    """Records `count` updates for xprof, from the third on: the first two compile and warm up."""

    WARM = 2

    def __init__(self, directory: Path, count: int):
        self._directory, self._last, self._on = directory, self.WARM + count, False

    def turns(self, n: int) -> bool:
        """Whether the recording begins or ends before update n; if so, the caller first waits for the updates before n."""
        return n in (self.WARM, self._last)

    def step(self, n: int) -> None:
        """Start or end the recording if due. To be called before update n, counted from this process's first."""
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
