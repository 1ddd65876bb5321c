"""Ctrl-C and SIGTERM: the first is a request to stop at the next safe place, a second Ctrl-C stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from sppo_jax.errors import Terminated

AT_ONCE = "interrupted; run the same command again to resume\n"
ON_THE_WAY = "stopping after the work in hand; Ctrl-C again stops at once\n"


class Stop:
    """Whether a signal has asked the process to stop."""

    def __init__(self) -> None:
        self.requested: int | None = None  # the number of the first signal

    def request(self, number: int) -> None:
        """Ask for a stop as signal `number` would, from any thread."""
        self.requested = self.requested or number

    def check(self) -> None:
        """Raise Terminated if a signal has arrived."""
        if self.requested is not None:
            raise _terminated(self.requested)

    @contextlib.contextmanager
    def on_signals(self, end: Callable[[int], None] = os._exit) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a request, and print that at once. A Ctrl-C after it calls `end` with the exit code 130.

        That works at any moment, in the compiler too: a thread waits for it, since Python's own handlers wait for the
        interpreter's turn. Nothing is lost, as every file is whole or absent. Does nothing outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        watch = threading.Thread(target=self._watch, args=(read, end), name="signals", daemon=True)
        watch.start()
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Terminated as stop:  # of a place that does not know which signal it was
            stop.number = self.requested or stop.number
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            watch.join()
            os.close(read)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.request(number)

    def _watch(self, read: int, end: Callable[[int], None]) -> None:
        """Wait for signals' numbers until the other end of the pipe is closed."""
        arrived = 0
        while received := os.read(read, 64):
            for number in received:
                if number == signal.SIGINT and arrived:
                    _write(AT_ONCE)
                    end(128 + signal.SIGINT)
                elif not arrived and number in (signal.SIGINT, signal.SIGTERM):
                    _write(ON_THE_WAY)
                arrived += number in (signal.SIGINT, signal.SIGTERM)


def _terminated(number: int) -> Terminated:
    stop = Terminated()
    stop.number = number
    return stop


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
