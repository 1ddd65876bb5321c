"""The messages between the judge stage (the client) and a scoring program: frames of JSON on a pipe.

A frame is its length in four big-endian bytes, then a JSON object. JSON and not pickle, so that neither side can make the
other run code; a pipe and not a port, so that no third process can connect. Non-ASCII text is escaped, which preserves even
a lone surrogate; a number keeps every bit of a float32. The program reads its standard input, writes to its original
standard output, and ends when its input ends:

    program → {"ready": true, "device": "cpu", "tokens": 1024}    once, when it has loaded; `device` is for people
            → {"error": "…"}                           instead: it cannot load, and another try would not help
    client  → {"id": 7, "prompts": [n], "responses": [n][K], "cells": [[p, i, j], …], "tokens": 4096}
    program → {"id": 7, "cells": [[p, i, j], …], "logits": […], "cut": {"prompts": 0, "responses": 1}}
                                                       as they are computed: response i of prompt p, shown first, against j
            → {"id": 7, "end": true, "cut": {…}}       every requested cell has been sent
            → {"id": 7, "error": "…", "cells": [[p, i, j], …]}    instead: these could not be scored, for this reason
            → {"alive": true}                          a heartbeat, every second while it loads or handles a request
            → {"told": "…"}                            at the same times: one line for people, which is a heartbeat too

`cells` of a request are the cells still needed (absent: all with i != j); further cells may be sent, and are ignored.
`tokens` in the ready frame is the most tokens of a batch (absent: unknown); in a request it limits the tokens of a batch
(absent: no limit; the program may ignore it). `cut` (may be absent) counts texts that are read only in part, among the
prompts whose last requested cell is in this frame; in the end frame, among the prompts not counted before. The id of a
request is greater than all earlier ones, and after its end no frame may carry another id.

The second half of this file is the program's end of the pipe. It needs only the standard library, so that a program in
another interpreter can load it as a file.
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

# Bytes. A greater length means a stream out of step, or a request that should be split.
MAX_FRAME = 64 * 2**20
# Environment variable: the process id of the client, with which the program should end.
PARENT = "SPPO_JAX_SIDECAR_PARENT"
BEAT_SECONDS = 1.0
_LENGTH = struct.Struct(">I")
_NOT_OUR_PARENT = (
    "its parent is another process: name the interpreter itself, not a wrapper, or the parent has ended"
)


class FrameError(Exception):
    """The stream holds something that is not a frame: too long, cut short, or not a JSON object."""


def encode(message: dict[str, Any]) -> bytes:
    """Return one frame, ready to write. Raises FrameError above MAX_FRAME bytes, ValueError for NaN or infinity."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body):,} bytes is over the limit of {MAX_FRAME:,}")
    return _LENGTH.pack(len(body)) + body


def take_frame(received: bytearray) -> dict[str, Any] | None:
    """Remove the first frame from `received` and return its object; None while it is incomplete.

    Raises FrameError for bytes that are not a frame.
    """
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
    """Return the next frame's object, or None at the end of the stream. Blocks.

    Raises FrameError for bytes that are not a frame.
    """
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
    """Writes the program's frames, each whole and one after the other, and a heartbeat every second while it works.

    A thread of its own writes the heartbeats: a stopped process or machine is noticed, and a long batch is not mistaken
    for one. The process ends as soon as the pipe has no reader.
    """

    def __init__(self, out: BinaryIO) -> None:
        """Start the heartbeats at once, because loading counts as work. `out` is unbuffered (`private_stdout`)."""
        self._out, self._lock = out, threading.Lock()
        self._working = threading.Event()
        self._working.set()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Write one frame. Raises BrokenPipeError when the pipe has no reader, and as `encode` does."""
        left = memoryview(encode(message))
        with self._lock:
            while left:
                left = left[self._out.write(left) :]

    def requests(self, stream: BinaryIO) -> Iterator[dict[str, Any]]:
        """Yield the requests that arrive. Between requests there are no heartbeats, because nobody would read them."""
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
        except OSError:  # the client is gone, perhaps in the middle of a batch
            os._exit(0)


def private_stdout() -> BinaryIO:
    """Return a private, unbuffered copy of standard output for frames, and redirect standard output to standard error.

    So a library's print cannot break the stream.
    """
    frames = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return frames  # type: ignore[return-value]


def stay_with_parent() -> None:
    """Ignore SIGTERM, and have Linux kill this process when the client named in the environment ends.

    A SIGTERM to the whole job is for the client, which needs this process until it has saved its work. Where the client
    is not our parent its end could go unnoticed: then this process ends with status 2 and a line with the reason.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":
        # With another C library, the end of the pipe has to be enough.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            print(_NOT_OUR_PARENT, file=sys.stderr, flush=True)
            os._exit(2)
