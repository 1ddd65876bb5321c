"""Stage 2, between judge and sidecar: one child process, the pipe to it, and the signs that it must be replaced."""

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, cast

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import protocol

_CHUNK = 2**16
_LAST_WORDS = 300  # characters


class Broken(Exception):
    """The scoring process failed and must be replaced. The message continues a sentence that begins with the process.

    `died` is True when a signal ended it, as the system does when memory runs out.
    """

    def __init__(self, what: str, died: bool = False) -> None:
        super().__init__(what)
        self.died = died


class Child:
    """A running program that exchanges frames with us. No call blocks for longer than the seconds that it is given."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the program in a session of its own, so that a Ctrl-C in the terminal reaches the parent alone.

        Raises BadInput where it cannot be started.
        """
        environment = dict(environment)
        # The kernel ends the child when the *thread* that started it ends, so only the main thread may ask for that.
        if threading.current_thread() is threading.main_thread():
            environment[protocol.PARENT] = str(os.getpid())
        self._stderr = _hidden_file()
        try:
            self._selector = selectors.DefaultSelector()
            self._process = subprocess.Popen(
                list(command),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: NUL in a name
            self._stderr.close()
            raise BadInput(
                f"{command[0]!r} cannot be started: {getattr(error, 'strerror', None) or error}"
            ) from None
        self._received, self._unsent = bytearray(), bytearray()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        self._selector.register(cast(BinaryIO, self._process.stdout), selectors.EVENT_READ)
        self._end = weakref.finalize(self, _end, self._process, self._stderr, self._selector)

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self._process.pid

    def send(self, frame: bytes) -> None:
        """Queue a frame; it is written while `receive` waits."""
        stdin = cast(BinaryIO, self._process.stdin)
        if not stdin.closed and not self._unsent:
            self._selector.register(stdin, selectors.EVENT_WRITE)
        self._unsent += frame

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next frame. Raises Broken when the stream ends or is garbage, or after `seconds` without a frame.

        Writing to the program restarts the clock. Reading does not: its bytes may belong to a frame that never ends.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = protocol.take_frame(self._received)
            except protocol.FrameError as error:
                raise Broken(f"wrote garbage ({error})") from None
            if message is not None:
                return message
            # Look for arrived bytes before looking at the clock: this process itself may have been stopped meanwhile.
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                what = "did not end the frame that it began" if self._received else "gave no sign of life"
                raise Broken(f"{what} for {seconds:g} s")
            for key, _ in ready:
                if key.fileobj is self._process.stdin:
                    self._write()
                    deadline = time.monotonic() + seconds
                else:
                    self._read()

    def last_words(self) -> str:
        """Return the last line that the program wrote to standard error, at most 300 characters; "" if there is none."""
        with contextlib.suppress(ValueError):  # closed
            self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2**14))
            lines = self._stderr.read().decode(errors="replace").splitlines()
            return next((line.strip()[:_LAST_WORDS] for line in reversed(lines) if line.strip()), "")
        return ""

    def kill(self) -> None:
        """End the program and all its children at once. It has nothing to save, and may not react to a request."""
        self._end()

    def _read(self) -> None:
        data = os.read(cast(BinaryIO, self._process.stdout).fileno(), _CHUNK)
        if not data:
            raise self._ended()
        self._received += data

    def _write(self) -> None:
        stdin = cast(BinaryIO, self._process.stdin)
        try:
            del self._unsent[: os.write(stdin.fileno(), self._unsent[:_CHUNK])]
        except BrokenPipeError:  # it no longer reads, but what it wrote before is worth reading
            self._unsent.clear()
        if not self._unsent:
            self._selector.unregister(stdin)

    def _ended(self) -> Broken:
        """Return the failure of a program that has closed its output."""
        try:
            status = self._process.wait(1)  # its output closes shortly before it ends
        except subprocess.TimeoutExpired:
            return Broken("closed its output")
        if status < 0:
            return Broken(f"ended by signal {-status}", died=True)
        return Broken(f"ended with exit status {status}")


def _hidden_file() -> BinaryIO:
    """Return a file without a name: on disk, or in memory where no temporary directory can be written."""
    try:
        return cast(BinaryIO, tempfile.TemporaryFile())  # lives as long as the process
    except OSError as error:
        if not hasattr(os, "memfd_create"):
            raise BadInput(f"no temporary directory: {error.strerror}; set TMPDIR to one") from None
        return os.fdopen(os.memfd_create("stderr"), "w+b")


def _end(process: subprocess.Popen[bytes], stderr: BinaryIO, selector: selectors.BaseSelector) -> None:
    # After a successful wait its id may belong to another process, and everyone has closed its output.
    if process.returncode is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    for stream in (selector, process.stdin, process.stdout, stderr):
        with contextlib.suppress(OSError):
            cast(BinaryIO, stream).close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # busy inside a driver: the kernel will end it
        process.wait(5)
