"""The lock of a run in a bucket: an object that is made only where there is none, and renewed as a sign of life."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from sppo_jax import command
from sppo_jax.errors import BadInput
from sppo_jax.run.objects import Objects

LOCK = ".lock"
EVERY = 20.0  # seconds between two signs of life
STALE = 100.0  # seconds without one, after which a run counts as dead


class Lock:
    """The lock of one run, as held by the holder with the name `own`."""

    def __init__(self, objects: Objects, own: str):
        """`own`: a name that a later start on this machine has, too. It finds it in the lock, and need not wait."""
        self._objects, self._own = objects, own

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; `renew` is to be called every `EVERY` seconds. Raises BadInput if another run gives signs of life.

        A lock without a sign of life for `STALE` seconds is taken over, and at once where it has our own name. Two
        processes that do so in the same second may both go on, until `renew` ends one.
        """
        found = None if self._objects.create(LOCK, self._signed()) else self._read()
        if found is not None and found.get("own") != self._own:
            command.say(
                f"{self._objects.url} is locked by {_holder(found)}: waiting {STALE:g} s for a sign of life"
            )
            end = time.monotonic() + STALE
            while time.monotonic() < end:
                time.sleep(min(EVERY, STALE) / 4)
                if self._read() not in ({}, found):
                    raise BadInput(
                        f"--out {self._objects.url} is in use by {_holder(found)}; choose another, or stop that run"
                    )
        self._objects.write(LOCK, self._signed())
        try:
            yield
        finally:
            with contextlib.suppress(BadInput):  # it grows stale
                if self._read().get("own") == self._own:
                    self._objects.delete(LOCK)

    def renew(self) -> None:
        """Give a sign of life. Raises BadInput where another run has taken the lock over."""
        found = self._read()
        if found and found.get("own") != self._own:
            raise BadInput(
                f"{self._objects.url} was taken over by {_holder(found)}, as this run gave no sign of life for {STALE:g} s"
            )
        self._objects.write(LOCK, self._signed())

    def _signed(self) -> bytes:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "own": self._own, "time": time.time()}).encode()

    def _read(self) -> dict[str, Any]:
        """What the lock says; nothing where there is none."""
        try:
            found = json.loads(self._objects.read(LOCK) or b"{}")
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {"holder": "a lock that is damaged"}


def _holder(found: dict[str, Any]) -> str:
    return str(found.get("holder", "another run"))[:200]
