"""How the judge stage and the sidecar talk: frames of JSON, each behind its length in four big-endian bytes.

JSON and not pickle, so that neither side can make the other run anything; a pipe and not a port, so that nobody else
can join in. Non-ASCII text travels escaped, which carries even a lone surrogate unharmed.
"""

import json
import struct
from typing import Any, BinaryIO

MAX_FRAME = (
    64 * 2**20
)  # bytes; a length above it means a stream out of step, or a request that should be split
_LENGTH = struct.Struct(">I")


class FrameError(Exception):
    """The stream holds something that is not a frame: too long, cut short, or not a JSON object."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame, ready to write. Raises FrameError above MAX_FRAME bytes, ValueError for NaN or infinity."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body):,} bytes is over the limit of {MAX_FRAME:,}")
    return _LENGTH.pack(len(body)) + body


def write_frame(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write one frame and flush it."""
    stream.write(encode(message))
    stream.flush()


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None at the end of the stream. Blocks; raises FrameError when the bytes are no frame."""
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise FrameError("the stream ends inside the length of a frame")
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise FrameError(f"a frame announces {length:,} bytes, over the limit of {MAX_FRAME:,}")
    body = stream.read(length)
    if len(body) < length:
        raise FrameError(f"the stream ends after {len(body):,} of the {length:,} bytes of a frame")
    try:
        message = json.loads(body)
    except ValueError as error:
        raise FrameError(f"a frame is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError(f"a frame holds a {type(message).__name__}, not an object")
    return message
