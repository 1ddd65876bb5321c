"""How commands fail: bad input from the user, a request to stop, and the end of another process of the same run."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType


class BadInput(Exception):
    """Input from outside (file, flag, checkpoint, prompt set) that cannot be used.

    The message is one line that says what is wrong and what to do. `command.call` prints it and exits with code 2.
    """


class Terminated(BaseException):
    """SIGTERM or Ctrl-C has arrived. This is raised only where all finished work is on disk."""

    number: int = signal.SIGTERM  # of the signal


class Elsewhere(BaseException):
    """Another process of the run has ended it: `code` is the exit code of all of them, the message the line to show."""

    def __init__(self, code: int, line: str):
        super().__init__(line)
        self.code = code


def one_line(error: BaseException) -> str:
    """The message of an exception with every run of white space as one space."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def about(place: str) -> Iterator[None]:
    """Put `place`, such as the knob that named an input, in front of what BadInput says."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{place}{error}") from None


def end_on_ctrl_c() -> None:
    """Make a Ctrl-C that nothing catches end the process with one line and exit code 130: one during a command's imports."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
            return
        if sys.stderr is not None:
            print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    sys.excepthook = end
