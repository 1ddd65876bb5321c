"""How a command ends otherwise than well: the user's error to mend, and the request to stop."""

import sys
from collections.abc import Callable, Sequence

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes


class BadInput(Exception):
    """Input from outside (file, flag, checkpoint, prompt set) that cannot be used.

    The message is one line that says what is wrong and what to do. `call` prints it and exits with code 2.
    """


class Terminated(BaseException):
    """SIGTERM arrived; raised at a place where all that is done is on disk."""


def call(entry: Callable[[Sequence[str]], None]) -> None:
    """Call an entry point with the command line; exit 0 done, 2 bad input, 143 after SIGTERM (1: a fault of ours)."""
    try:
        entry(sys.argv[1:])
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Terminated:
        print(
            "stopped by SIGTERM with all work on disk; run the same command again to resume", file=sys.stderr
        )
        sys.exit(TERMINATED)
