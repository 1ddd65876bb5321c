"""What every `python -m sppo_jax.NAME` shares: flags, exit codes, and lines for people on standard error."""

import argparse
import contextlib
import difflib
import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

from sppo_jax import files
from sppo_jax.errors import BadInput, Elsewhere, Terminated, one_line

# Characters that `printable` escapes: escapes, carriage returns, changes of direction, halves of characters.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BAD_INPUT, SIGNALLED = 2, 128  # exit codes; the second has the signal's number added
LOST = 144  # exit code where another process of the run is gone
AGAIN_SECONDS = 0.05  # until a signal that was lost is sent again
LONGEST = 6000  # characters of an error line, more than the longest path
# Errors of the disk, the limits and the places that the user chose; any other error of the system is a fault of ours.
SYSTEM = frozenset(
    {*files.MEND, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ETXTBSY}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ENODEV, errno.EBUSY}
)
COMMANDS = {
    "main": "play the whole game: sample, judge, train, measure",
    "plan": "memory, time and cost on devices that are not here",
    "evaluate": "compare policies by a judge, and write the public benchmarks' files",
    "compare": "play several configurations with several seeds, and report them together",
    "judge": "rank the responses in a file",
    "chat": "talk to a policy",
    "export": "write a policy as a Hugging Face directory, or push it to the hub",
    "report": "write a run's report.html again",
    "interchange": "write an iteration's pairs in the official code's columns",
    "config": "print every knob as a table",
}
TRAIN = "train"  # what the console script calls main
MODULE = re.compile(r"python -m sppo_jax\.(\w+)")
LONG = re.compile(r"\S{300,}")  # more than the longest name of a file
MISSING = "the following arguments are required: "  # how argparse begins
NO_MEMORY = "RESOURCE_EXHAUSTED: Out of memory"
SMALLER = (
    "lower sampling.slots, fit.global_batch or eval.prompts, or cut the model over more devices (mesh.fsdp)"
)


class Flags(argparse.ArgumentParser):
    """A parser that raises BadInput instead of printing its usage.

    `command` is the module that `python -m` runs. Abbreviated flags are off: a new flag must not break old scripts.
    """

    def __init__(self, command: str, about: str, more: str = ""):
        super().__init__(
            prog=as_called(f"python -m {command}"),
            description=as_called(about),
            epilog=as_called(more),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=version(), help="print the version")

    def error(self, message: str) -> NoReturn:
        """Raise BadInput with argparse's message, and what each missing flag takes."""
        if message.startswith(MISSING):
            actions = [
                self._option_string_actions[flag] for flag in message.removeprefix(MISSING).split(", ")
            ]
            message = "give " + " and ".join(
                f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in actions
            )
        raise BadInput(f"{message}; see {self.prog} --help")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the parsed flags. Raises BadInput for words that are not valid flags."""
        known = list(self._option_string_actions)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if flag not in known:  # first, since argparse would rather miss the flag that was meant
                near = difflib.get_close_matches(flag, known, n=1)
                self.error(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else ""))
        return self.parse_args(list(words))


class Shown:
    """A text stream whose writes never raise: what cannot be shown must not cost work.

    A character that its encoding lacks is escaped. After the first error of the system the rest is dropped; `failed`
    keeps that error. All else is the stream's own.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failed: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, as far as the stream can show it, and return its length."""
        if self.failed is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                plain = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
                self._guarded(lambda: self._stream.write(plain))
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what was written."""
        if self.failed is None:
            self._guarded(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        """Keep the error, and let the stream's buffer run into nothing: Python writes it out at the end of the process."""
        self.failed = error if isinstance(error, OSError) else OSError(errno.EBADF, "closed")
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def shown(stream: TextIO) -> TextIO:
    """Return `stream` with writes that never raise."""
    return stream if isinstance(stream, Shown) else cast(TextIO, Shown(stream))


def printable(text: str) -> str:
    """Text from outside, safe for a terminal: control characters are escaped; line breaks and tabs stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print a line for people on standard error."""
    if sys.stderr is not None:
        print(text, file=shown(sys.stderr), flush=True)


def call(entry: Callable[[Sequence[str]], None], *, resumes: bool = True) -> None:
    """Run an entry point with the command line's words.

    `resumes`: what it has done lies on disk when a signal ends it, and the same command goes on from there.

    Exit codes: 0 done, 1 a fault of ours (traceback), 2 bad input, 130 after Ctrl-C, 143 after SIGTERM, 144 where another
    process of the run is gone. Output that cannot be shown ends nothing: the command does all its work, and then exits with
    2 and a line on standard error. Where the reader of a pipe has only closed it, as `head` does, it exits with 0.
    """
    open_streams()
    # Without a home, matplotlib warns of the folder of its list of fonts, and then goes on.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.stdout, sys.stderr = output, _ = shown(sys.stdout), shown(sys.stderr)
    code, line = _outcome(entry, resumes)
    output.flush()
    failed = cast(Shown, output).failed
    if code == 0 and failed is not None and failed.errno not in (errno.EPIPE, errno.ECONNRESET):
        reason = os.strerror(failed.errno or errno.EIO)
        code, line = BAD_INPUT, f"error: all is done, but standard output cannot be written: {reason}"
    if line:
        say(as_called(line))
    if code:
        sys.exit(code)


def version() -> str:
    """The line that --version prints."""
    from sppo_jax import __version__  # not yet there while the package imports this module

    return f"sppo_jax {__version__}"


def check_module(words: Sequence[str]) -> None:
    """Exit with 2 and one line where `python -m` runs a module of the package that is not a command.

    `words`: the process's own command line, with the interpreter and its options. Such a module would run, print nothing
    and exit with 0. Modules of rooms are left alone: the embedded default and the judge's process have theirs. Where a
    command is asked for --version, prints it and exits with 0, before the command's imports.
    """
    module, rest = _module_of(words)
    package, _, name = module.partition(".")
    if package != "sppo_jax" or "." in name:
        return
    open_streams()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        say(
            f"error: {printable(module)} is not a command; "
            + (f"did you mean sppo_jax.{near[0]}? " if near else "")
            + f"commands are {', '.join(COMMANDS)}, as python -m sppo_jax.NAME"
        )
        sys.exit(BAD_INPUT)
    if "--version" in rest:
        print(version(), file=shown(sys.stdout), flush=True)
        sys.exit()


def _module_of(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The module that a command line of Python runs by -m, or an empty name, and the words after it."""
    for i, word in enumerate(words):
        if word == "-m":
            return "".join(words[i + 1 : i + 2]), words[i + 2 :]
        if word.startswith("-m"):
            return word[2:], words[i + 1 :]
    return "", []


def as_called(text: str) -> str:
    """`text` with `sppo_jax NAME` in the place of `python -m sppo_jax.NAME`, where the console script was called."""
    if os.path.basename("".join(sys.orig_argv[1:2])) != "sppo_jax":
        return text
    return MODULE.sub(lambda found: f"sppo_jax {TRAIN if found[1] == 'main' else found[1]}", text)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with `error`."""
    if isinstance(error, Elsewhere):
        return error.code
    if isinstance(error, Terminated):
        return SIGNALLED + error.number
    if isinstance(error, KeyboardInterrupt):
        return SIGNALLED + signal.SIGINT
    refused = isinstance(error, OSError) and error.errno in SYSTEM
    return BAD_INPUT if isinstance(error, BadInput) or refused or _no_memory(error) else 1


def _no_memory(error: BaseException) -> bool:
    """Whether the host's or a device's memory did not suffice. JAX's class is known by its name: most commands do not import jax."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "JaxRuntimeError" and NO_MEMORY in str(error)
    )


def _outcome(entry: Callable[[Sequence[str]], None], resumes: bool) -> tuple[int, str]:
    """Run `entry`; returns the exit code, and the line about what ended it. `resumes`: see `call`."""
    again = "; run the same command again to resume" if resumes else ""
    try:
        with _ended_by_sigterm():
            entry(sys.argv[1:])
    except BadInput as error:
        return BAD_INPUT, f"error: {_short(printable(one_line(error)))}"
    except SystemExit as stop:  # argparse, after --help
        if stop.code:
            raise
    except KeyboardInterrupt:
        _ending()
        return SIGNALLED + signal.SIGINT, f"interrupted{again}"
    except Terminated as stop:
        _ending()
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        return (
            SIGNALLED + stop.number,
            f"stopped by {name}{' with all work on disk' if resumes else ''}{again}",
        )
    except Elsewhere as end:
        _ending()
        return end.code, _short(printable(one_line(end)))
    except OSError as error:
        if error.errno not in SYSTEM:
            raise
        return BAD_INPUT, f"error: {printable(one_line(_refused(error)))}"
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        told = f" ({printable(one_line(error))[:300]})" if str(error) else ""
        return BAD_INPUT, f"error: out of memory{told}; {SMALLER}"
    return 0, ""


def _ending() -> None:
    """Ignore further signals: the process ends anyway, and an exception while Python takes itself apart would be printed."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into Terminated, as Python turns Ctrl-C into KeyboardInterrupt, so that what was begun is cleaned up."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    def again(number: int) -> None:
        if not over.is_set():
            os.kill(os.getpid(), number)

    def unraisable(dropped: Any) -> None:
        if number := {Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(dropped.exc_type):
            # Python has dropped it, in a destructor or a callback of the garbage collector. Here it would be dropped again.
            threading.Timer(AGAIN_SECONDS, again, (number,)).start()
        else:
            hook(dropped)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook, over = signal.signal(signal.SIGTERM, end), sys.unraisablehook, threading.Event()
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        over.set()
        sys.unraisablehook = hook
        # A process that has done all its work is not killed by a signal while it takes itself apart.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if before is signal.SIG_DFL else before)


def _short(text: str) -> str:
    """`text`, or its beginning and its end, where something from outside has made it longer than any screen."""
    text = LONG.sub(lambda word: f"{word[0][:80]}…{word[0][-40:]} ({len(word[0])} characters)", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1000]} … {text[-900:]}"


def _refused(error: OSError) -> BadInput:
    """Return the line about an error of the system that nothing nearer to its place has reported."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if files.working_directory_gone() and not os.path.isabs(path):
        return BadInput(
            "the working directory was deleted; go to another one, and run the same command again"
        )
    reason = os.strerror(error.errno or 0) if path else error.strerror or os.strerror(error.errno or 0)
    if "temporary directory" in reason:  # tempfile's own words, with an error number that says less
        return BadInput(f"{reason}; set TMPDIR to a directory that can be written")
    advice = files.MEND.get(error.errno or 0)
    return BadInput(
        ": ".join(filter(None, [path, reason]))
        + (f"; {advice}, and run the same command again" if advice else "")
    )


def open_streams() -> None:
    """Give standard input, output and error a stream where the caller has closed them.

    Otherwise the next file that is opened gets the number of a closed one, and what a library prints goes into it.
    A closed input is at its end; a closed output refuses the first line.
    """
    for number, mode, name in ((0, "r", "stdin"), (1, "w", "stdout"), (2, "w", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDONLY)
            with contextlib.suppress(OSError):  # open after all: something else has got the number already
                os.fstat(number)
                number = null
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))
