"""What orbax, tensorstore and their threads raise and print when a checkpoint fails, made into one error of the system."""

import contextlib
import errno
import gc
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Errors that mean that a part is missing or is something else. The others (no permission, a disk that fails) may be mended.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
CODE = re.compile(r"os_error_code='(\d+)'")  # as tensorstore writes it
STATUS = re.compile("[A-Z]+(_[A-Z]+)*: ")  # how tensorstore's other messages begin
# What libraries raise that ask a bucket, by their packages, and how they say that there is no answer.
NETWORK = ("aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3")
NO_ANSWER = re.compile("^(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED): |^Forbidden: ")
PATIENCE = 5.0  # seconds
LOGGERS = ("absl", "asyncio")


def of_system(error: BaseException) -> OSError | None:
    """The error of the system behind an exception, wherever it stands in its chain; None for a fault of another kind."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, OSError) and one.errno:
            return OSError(one.errno, one.strerror or os.strerror(one.errno))
        if found := CODE.search(str(one)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
    for one in chain:
        if isinstance(one, OSError) or (isinstance(one, ValueError) and STATUS.match(str(one))):
            return OSError(0, " ".join(str(one).split())[:200])
    if reason := unreachable(error):
        return OSError(0, reason)
    return None


def unreachable(error: BaseException) -> str:
    """The reason why a bucket could not be asked, if that is what is behind an exception; else ""."""
    for one in _chain(error):
        if (
            type(one).__module__.partition(".")[0] in NETWORK
            or isinstance(one, ConnectionError | TimeoutError)
            or NO_ANSWER.search(str(one))
        ):
            return " ".join(str(one).split())[:200] or type(one).__name__
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception, its causes, and their causes."""
    chain: list[BaseException] = []
    todo = [error]
    while todo:
        one = todo.pop(0)
        if one in chain:
            continue
        chain.append(one)
        todo += [e for e in (one.__cause__, one.__context__) if e is not None]
        todo += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return chain


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the host or of a device, did not suffice."""
    return isinstance(error, MemoryError) or bool(re.search("[Oo]ut of memory", str(error)))


def join_threads() -> None:
    """Wait for orbax's threads, which go on for a moment where one of them has failed."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # what it has raised
                thread.join(timeout=PATIENCE)


def drop_late_replies() -> None:
    """Keep tensorstore's threads from printing that nobody waits for what they have read, for as long as the process lives.

    A failed call closes the loop that its other parts reply to, and they reply when they are done, which may be much later.
    """
    before = sys.unraisablehook
    if getattr(before, "drops_late_replies", False):
        return

    def hook(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    hook.drops_late_replies = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


@contextlib.contextmanager
def silent_threads() -> Iterator[None]:
    """Keep orbax's threads from logging what is raised anyway."""

    def foreign(record: logging.LogRecord) -> bool:
        return record.name != "asyncio" and "orbax" not in record.pathname

    for name in LOGGERS:
        logging.getLogger(name).addFilter(foreign)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(foreign)


@contextlib.contextmanager
def silent() -> Iterator[Callable[[], object]]:
    """Keep one call of orbax, and the handling of what it raises, from printing.

    A failed call leaves coroutines that nothing has awaited, and these print when they are freed. Yields the function
    that frees them, to be called once the exception is gone.
    """
    before = sys.unraisablehook
    with silent_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        try:
            yield gc.collect
        finally:
            sys.unraisablehook = before
