"""How commands fail: bad input from the user, and a request to stop."""

import signal


class BadInput(Exception):
    """Input from outside (file, flag, checkpoint, prompt set) that cannot be used.

    The message is one line that says what is wrong and what to do. `command.call` prints it and exits with code 2.
    """


class Terminated(BaseException):
    """SIGTERM or Ctrl-C has arrived. This is raised only where all finished work is on disk."""

    number: int = signal.SIGTERM  # of the signal


def one_line(error: BaseException) -> str:
    """The message of an exception with every run of white space as one space."""
    return " ".join(str(error).split())
