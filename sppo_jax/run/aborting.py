"""The end of a process that JAX aborts because its connection to process 0 broke: one line and an exit code of ours.

The distributed runtime ends the process by SIGABRT from a thread of C++, where Python's own handlers are not called.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_code, _line = 1, ""
_coordinator = ""  # HOST:PORT; while it answers, an abort is a fault of this process
_stderr: int | None = None  # the true standard error, while `on` holds what is printed


@contextlib.contextmanager
def on(code: int, line: str) -> Iterator[None]:
    """From now on an abort ends the process with `code` and `line`. What C++ prints until the end of the block is held back.

    It is printed at the end, unless the process was aborted: the line is better than a stack trace.
    """
    global _stderr
    instead(code, line)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, _HANDLER]
    libc.signal(signal.SIGABRT, _handler)
    _stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(_stderr, 2)
            os.close(_stderr)
            _stderr = None
            held.seek(0)
            os.write(2, held.read())


def instead(code: int, line: str) -> None:
    """Set the code and the line of an abort."""
    global _code, _line
    _code, _line = code, line


def watch(coordinator: str) -> None:
    """While HOST:PORT `coordinator` answers, an abort is a fault of this process, and ends it as such."""
    global _coordinator
    _coordinator = coordinator


def off() -> None:
    """An abort is a fault of this process again."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


def end(code: int, line: str) -> None:
    """Print `line` and end the process at once: its threads may wait for processes that are gone."""
    text = f"{line}\n".encode(errors="replace")
    with contextlib.suppress(OSError):
        os.write(2 if _stderr is None else _stderr, text)
    os._exit(code)


def at_exit(code: int) -> None:
    """Let the process end with `code` before JAX waits for processes that are gone, once all is printed."""

    def at_once() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)

    atexit.register(at_once)


@_HANDLER
def _handler(_number: int) -> None:
    if _coordinator and _answers(_coordinator):
        off()
        os.kill(os.getpid(), signal.SIGABRT)
        return
    end(_code, _line)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False
