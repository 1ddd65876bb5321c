"""How a command ends otherwise than well: the user's error to mend, and the request to stop."""

import os
import re
import sys
from collections.abc import Callable, Sequence

# Escapes, carriage returns, changes of direction, halves of characters.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes


class BadInput(Exception):
    """Input from outside (file, flag, checkpoint, prompt set) that cannot be used.

    The message is one line that says what is wrong and what to do. `call` prints it and exits with code 2.
    """


class Terminated(BaseException):
    """SIGTERM arrived; raised at a place where all that is done is on disk."""


def printable(text: str) -> str:
    """Text from outside for a terminal: characters that would command it are spelled out; line breaks and tabs stay."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def call(entry: Callable[[Sequence[str]], None]) -> None:
    """Call an entry point with the command line; exit 0 done, 2 bad input, 143 after SIGTERM (1: a fault of ours)."""
    try:
        entry(sys.argv[1:])
    except BadInput as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Terminated:
        print(
            "stopped by SIGTERM with all work on disk; run the same command again to resume", file=sys.stderr
        )
        sys.exit(TERMINATED)
