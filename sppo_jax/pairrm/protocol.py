"""How the judge stage and a program that scores talk: frames of JSON, each behind its length in four big-endian bytes.

JSON and not pickle, so that neither side can make the other run anything; a pipe and not a port, so that nobody else
can join in. Non-ASCII text travels escaped, which carries even a lone surrogate unharmed. A number keeps every bit of a
float32. The program reads its standard input, writes what was its standard output, and ends when the first does:

    program → {"ready": true, "device": "cpu", "tokens": 1024}    once, when it has loaded; `device` is for people
            → {"error": "…"}                           instead: it cannot load, and would not when tried again
    asker   → {"id": 7, "prompts": [n], "responses": [n][K], "cells": [[p, i, j], …], "tokens": 4096}
    program → {"id": 7, "cells": [[p, i, j], …], "logits": […], "cut": {"prompts": 0, "responses": 1}}
                                                       as they come: response i of prompt p, shown first, against j
            → {"id": 7, "end": true, "cut": {…}}       every cell that was asked for has been sent
            → {"id": 7, "error": "…", "cells": [[p, i, j], …]}    instead: these could not be scored, for this reason
            → {"alive": true}                          once a second while it loads or has a request, whatever it computes
            → {"told": "…"}                            at such times: one line for people, and as much a sign of life

`cells` of a request: those that are still needed (absent: all with i != j); others may be answered too, and are not
looked at. `tokens` when ready: how many a batch of the program has at most (absent: nobody knows); of a request: no
more than so many in one batch (absent: as the program likes; it may be ignored). `cut` (may be absent): texts of which
only a part is read, among the prompts whose last asked cell this frame brings; at the end, among those not counted
before. A request's id is greater than any before it, and nothing of another id may follow its end.

The second half of this file is the program's end of the pipe. It needs nothing but the standard library, so that a
program of another interpreter can load it as a file.
"""

import contextlib
import ctypes
import json
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_FRAME = 64 * 2**20  # bytes; more means a stream out of step, or a request that should be split
# In the environment: process id of an asker whose end should be the program's.
PARENT = "SPPO_JAX_SIDECAR_PARENT"
BEAT_SECONDS = 1.0
_LENGTH = struct.Struct(">I")
_NOT_OUR_PARENT = (
    "its parent is another process: name the interpreter itself, not a wrapper, or the parent has ended"
)


class FrameError(Exception):
    """The stream holds something that is not a frame: too long, cut short, or not a JSON object."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame, ready to write. Raises FrameError above MAX_FRAME bytes, ValueError for NaN or infinity."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body):,} bytes is over the limit of {MAX_FRAME:,}")
    return _LENGTH.pack(len(body)) + body


def take_frame(received: bytearray) -> dict[str, Any] | None:
    """Remove the first frame from `received`; None while it is incomplete. Raises FrameError when it is no frame."""
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > MAX_FRAME:
        raise FrameError(f"a frame announces {length:,} bytes, over the limit of {MAX_FRAME:,}")
    end = _LENGTH.size + length
    if len(received) < end:
        return None
    body = bytes(received[_LENGTH.size : end])
    del received[:end]
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError(f"a frame holds a {type(message).__name__}, not an object")
    return message


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None at the end of the stream. Blocks; raises FrameError when the bytes are no frame."""
    received = bytearray(stream.read(_LENGTH.size))
    if not received:
        return None
    if len(received) == _LENGTH.size:
        (length,) = _LENGTH.unpack(received)
        if length <= MAX_FRAME:
            received += stream.read(length)
    message = take_frame(received)
    if message is None:
        raise FrameError(f"the stream ends after {len(received):,} bytes of a frame")
    return message


class Replies:
    """The program's frames, written whole and in turn, with a sign of life each second while there is work.

    The sign comes from a thread of its own: a stopped process or machine is noticed, a long batch is not mistaken for
    one. The process ends as soon as nobody reads.
    """

    def __init__(self, out: BinaryIO) -> None:
        """`out` is unbuffered (`private_stdout`). Loading counts as work: the signs of life begin at once."""
        self._out, self._lock = out, threading.Lock()
        self._working = threading.Event()
        self._working.set()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Write one frame. Raises BrokenPipeError when nobody reads, and as `encode` does."""
        left = memoryview(encode(message))
        with self._lock:
            while left:
                left = left[self._out.write(left) :]

    def requests(self, stream: BinaryIO) -> Iterator[dict[str, Any]]:
        """The frames that arrive. Between requests there are no signs of life, which nobody would read."""
        self._working.clear()
        while (message := read_frame(stream)) is not None:
            self._working.set()
            yield message
            self._working.clear()

    def _beat(self) -> None:
        never = threading.Event()
        try:
            while self._working.wait():
                self.send({"alive": True})
                never.wait(BEAT_SECONDS)
        except OSError:  # whoever asked is gone, in the middle of a batch perhaps
            os._exit(0)


def private_stdout() -> BinaryIO:
    """A private, unbuffered copy of standard output for frames; the public one then leads to standard error, so that a
    library's print cannot break the stream."""
    frames = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return frames  # type: ignore[return-value]


def stay_with_parent() -> None:
    """Outlive neither the asker nor its interruptions: where it wants so, Linux kills this process when it ends.

    A SIGTERM to the whole job is for the asker, which still needs us until it has saved its work. Where the asker is not
    our parent, its end could go unnoticed: the process ends with status 2 and a line that says so.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: the pipe's end has to do
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            print(_NOT_OUR_PARENT, file=sys.stderr, flush=True)
            os._exit(2)
