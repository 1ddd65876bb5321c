"""What every `python -m sppo_jax.NAME` shares: flags, exit codes, and lines for people on standard error."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sppo_jax.errors import BadInput, Terminated

# Characters that `printable` escapes: escapes, carriage returns, changes of direction, halves of characters.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes


class Flags(argparse.ArgumentParser):
    """A parser that raises BadInput instead of printing its usage.

    `command` is the module that `python -m` runs. Abbreviated flags are off: a new flag must not break old scripts.
    """

    def __init__(self, command: str, about: str, more: str = ""):
        super().__init__(
            prog=f"python -m {command}",
            description=about,
            epilog=more,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise BadInput with argparse's message."""
        raise BadInput(f"{message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the parsed flags. Raises BadInput for words that are not valid flags."""
        return self.parse_args(list(words))


def printable(text: str) -> str:
    """Text from outside, safe for a terminal: control characters are escaped; line breaks and tabs stay."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print a line for people on standard error."""
    print(text, file=sys.stderr, flush=True)


def call(entry: Callable[[Sequence[str]], None]) -> None:
    """Run an entry point with the command line's words.

    Exit codes: 0 done, 1 a fault of ours (traceback), 2 bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        entry(sys.argv[1:])
    except BadInput as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Terminated:
        print(
            "stopped by SIGTERM with all work on disk; run the same command again to resume", file=sys.stderr
        )
        sys.exit(TERMINATED)
