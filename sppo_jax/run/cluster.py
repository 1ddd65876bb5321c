"""Several processes that play one run: how they find each other, show signs of life, and end together.

They talk through the key-value store of JAX's coordination service, which lives in process 0. A thread of each process
looks into it twice a second.

jax is imported inside the functions: commands that only read a run's directory need it neither for --help nor for a wrong flag.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from sppo_jax import command
from sppo_jax.command import LOST, exit_code
from sppo_jax.config import Distributed
from sppo_jax.errors import BadInput, Elsewhere, Terminated, one_line
from sppo_jax.run import aborting
from sppo_jax.run.stopping import Stop

LOOK_SECONDS = 0.5  # between two looks of the thread
END_SECONDS = 4.0  # in which a process ends by itself once another one has failed
STOP_SECONDS = 10.0  # the same, once another one was stopped
OTHERS_SECONDS = 5.0  # in which process 0, which holds the store, waits for the others before it ends
JAX_SECONDS = 60  # after us, JAX itself takes a process for lost
NETWORK = re.compile(
    "gloo|connection|unavailable|deadline|aborted|nccl|peer|barrier|collective", re.IGNORECASE
)
AGAIN = "run the same command again to resume"


class Member:
    """This process among several: its number `index` from 0, their `count`, and the store that they share."""

    def __init__(self, settings: Distributed, client: Any, index: int, count: int):
        self.index, self.count = index, count
        self._client, self._heartbeat = client, settings.heartbeat_timeout
        self._stop: Stop | None = None  # set while the game is played
        self.calls: Counter[str] = Counter()  # of each agreement with the others (`sppo_jax.run.pod`)
        self.read: list[str] = []  # process 0: keys that all have read by the next meeting
        self._told = False  # whether the others know of our stop
        self._verdict: Elsewhere | Terminated | None = None
        # Process 0: each other process's last sign of life, and when it changed.
        self._seen: dict[str, tuple[str, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cluster", daemon=True)
        self._thread.start()

    def set(self, key: str, text: str) -> None:
        """Write `key`, which no process has written before."""
        self._client.key_value_set_bytes(f"sppo/{key}", text.encode())

    def get(self, key: str) -> str:
        """Wait for `key`. Raises Terminated or Elsewhere when another process has ended."""
        import jax

        while True:
            try:
                found: bytes = self._client.blocking_key_value_get_bytes(f"sppo/{key}", 200)
                return found.decode()
            except jax.errors.JaxRuntimeError as error:
                self.check()
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def entries(self, folder: str) -> dict[str, str]:
        """Return the keys below `folder`, without its name, and their texts."""
        found = self._client.key_value_dir_get_bytes(f"sppo/{folder}/")
        return {key.rpartition("/")[2]: text.decode() for key, text in found}

    def forget(self, key: str) -> None:
        """Delete `key`, and what lies below it."""
        self._client.key_value_delete(f"sppo/{key}")

    def check(self) -> None:
        """Raise Terminated or Elsewhere when another process has ended."""
        if self._verdict is not None:
            raise self._verdict

    @contextlib.contextmanager
    def following(self, stop: Stop) -> Iterator[None]:
        """Spread a stop that this process is asked for, and take over one of the others."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def ended(self, error: BaseException) -> BaseException:
        """Tell the others that this process ends with `error`. Returns what it is to report: the first process's error."""
        if not isinstance(error, BadInput | Terminated | KeyboardInterrupt | Elsewhere):
            error = self._cause() or error
        code = exit_code(error)
        with contextlib.suppress(Exception):
            self.set(f"left/{self.index}", json.dumps({"code": code, "line": self._line(error)}))
        self._over.set()
        if self.index == 0:
            deadline = time.monotonic() + OTHERS_SECONDS
            with contextlib.suppress(Exception):
                while len(self.entries("left")) < self.count and time.monotonic() < deadline:
                    time.sleep(0.05)
        aborting.at_exit(code)
        return error

    def ignore_signals(self) -> None:
        """Ignore SIGTERM and Ctrl-C until the process ends, which it is about to do."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def finish(self) -> None:
        """End together with the others, all of which have done everything."""
        import jax

        self._over.set()
        self._thread.join()
        jax.distributed.shutdown()
        aborting.off()

    def _line(self, error: BaseException) -> str:
        """What process 0 prints about our end."""
        if isinstance(error, Elsewhere):
            return str(error)
        if isinstance(error, Terminated | KeyboardInterrupt):
            return f"stopped by process {self.index}; {AGAIN}"
        if exit_code(error) == command.BAD_INPUT:
            return f"error: process {self.index}: {one_line(error)}"
        text = one_line(error)[:500]
        return (
            f"error: process {self.index}: {type(error).__name__}: {text} (the traceback is in its own log)"
        )

    def _cause(self) -> BaseException | None:
        """The end of another process that explains a fault here: a broken connection is noticed at once, its cause later."""
        seconds = self._heartbeat + 2 * LOOK_SECONDS if _of_network(sys.exception()) else 2 * LOOK_SECONDS
        deadline = time.monotonic() + seconds
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._verdict

    # What follows runs in the thread.

    def _watch(self) -> None:
        signs = 0
        while not self._over.wait(LOOK_SECONDS):
            signs += 1
            try:
                self._client.key_value_set(f"sppo/alive/{self.index}", str(signs), allow_overwrite=True)
                self._look()
            except Exception:  # process 0 is gone, or ends: JAX notices that as well
                continue
            if self._verdict is not None:
                self._end(self._verdict)

    def _look(self) -> None:
        stop = self._stop
        if stop is not None and stop.requested is not None and not self._told:
            self._told = True
            self._client.key_value_set("sppo/stop/all", str(stop.requested), allow_overwrite=True)
        if stop is not None and (asked := self.entries("stop")):
            self._told = True
            stop.request(int(asked["all"]))
        if self.index == 0:
            self._lost()
        for process, text in sorted(self.entries("left").items(), key=lambda item: int(item[0])):
            if process != str(self.index):
                said = json.loads(text)
                self._verdict = _verdict(said["code"], said["line"])
                aborting.instead(said["code"], said["line"])
                break

    def _lost(self) -> None:
        """Process 0: say of a process that shows no sign of life that it has left."""
        now = time.monotonic()
        signs = self.entries("alive")
        for process in map(str, range(1, self.count)):
            sign, since = self._seen.get(process, ("", now))
            if process not in self._seen or signs.get(process, "") != sign:
                self._seen[process] = signs.get(process, ""), now
            elif now - since > self._heartbeat:
                line = f"error: process {process} is gone: no sign of life for {self._heartbeat} s; {AGAIN}"
                self.set(f"left/{process}", json.dumps({"code": LOST, "line": line}))

    def _end(self, verdict: Elsewhere | Terminated) -> None:
        """End this process, unless it ends by itself soon."""
        stopped = isinstance(verdict, Terminated)
        if stopped and self._stop is None:
            os.kill(os.getpid(), signal.SIGTERM)  # no game is played yet: that ends it at once
        if self._over.wait(STOP_SECONDS if stopped else END_SECONDS):
            return
        code = exit_code(verdict)
        line = f"stopped; {AGAIN}" if stopped else str(verdict)
        with contextlib.suppress(Exception):
            self.set(f"left/{self.index}", json.dumps({"code": code, "line": line}))
        if self.index == 0:
            time.sleep(2 * LOOK_SECONDS)  # the others read it
        aborting.end(code, line)


_member: Member | None = None


def member() -> Member | None:
    """This process among several; None where there is one."""
    return _member


@contextlib.contextmanager
def joined(settings: Distributed) -> Iterator[None]:
    """Find the other processes of the run, if there are any, and end together with them.

    To be called before JAX is used. Raises BadInput for settings that cannot be; Elsewhere where another process has ended
    the run.
    """
    global _member
    with _Kept() as kept:
        from jax._src import distributed

        several = _initialised(settings, kept)
    if not several:
        kept.check()
        yield
        return
    state = distributed.global_state
    _member = Member(settings, state.client, state.process_id, state.num_processes)
    try:
        kept.check()
        yield
    except BaseException as error:
        shown = _member.ended(error)
        if shown is error:
            raise
        raise shown from None
    else:
        _member.finish()
    finally:
        _member = None


class _Kept:
    """A context in which SIGTERM and Ctrl-C wait until the others can be told: without a word from us they would wait for us."""

    def __init__(self) -> None:
        self._number = 0  # of the signal that has arrived
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second one: at once
        if not self._number:
            self._number, self._since = number, time.monotonic()

    def check(self, after: float = 0.0) -> None:
        """Raise Terminated if a signal has arrived, and so many seconds have passed since."""
        if self._number and time.monotonic() - self._since >= after:
            stop = Terminated()
            stop.number = self._number
            raise stop


def _initialised(settings: Distributed, kept: _Kept) -> bool:
    """Start jax.distributed where there are several processes, and return whether there are."""
    import jax
    from jax._src import xla_bridge

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    given = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    index = settings.process_id if settings.process_id >= 0 else None
    count = settings.num_processes or None
    if (index is not None or count is not None) and not given:
        raise BadInput(
            "distributed.process_id and distributed.num_processes need distributed.coordinator: give HOST:PORT of process 0"
        )
    _check(given, index, count)
    explicit = bool(given) and index is not None and count is not None
    if count == 1 or (not given and xla_bridge.backends_are_initialized()):  # a notebook, say, is one process
        return False
    where = given or "process 0"
    come = f"error: distributed.coordinator={where}: not all processes have come within {settings.initialization_timeout} s"
    advice = "start the others, open its port, or raise distributed.initialization_timeout"
    result: list[BaseException | None] = []

    def initialise() -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "\n*Kubernetes environment detected")
                jax.distributed.initialize(
                    given or None,
                    count,
                    index,
                    cluster_detection_method="deactivate" if explicit else None,
                    initialization_timeout=settings.initialization_timeout,
                    heartbeat_timeout_seconds=settings.heartbeat_timeout + JAX_SECONDS,
                    shutdown_timeout_seconds=max(60, settings.heartbeat_timeout),
                )
            result.append(None)
        except BaseException as error:
            result.append(error)

    with aborting.on(LOST, f"{come}; {advice}"):
        # In a thread, so that a signal ends the waiting, when the others have had time to come.
        thread = threading.Thread(target=initialise, name="initialise", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                kept.check(after=STOP_SECONDS)
        except BaseException as error:
            aborting.at_exit(exit_code(error))
            raise
    return _outcome(result[0], given)


def _outcome(error: BaseException | None, given: str) -> bool:
    """Whether several processes have found each other."""
    import jax
    from jax._src import distributed

    if error is None:
        if distributed.global_state.num_processes == 1:
            aborting.off()
            return False
        # Two collectives of CPUs at the same time may begin in another order in each process, and then wait for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        aborting.instead(LOST, f"error: process 0 is gone: its connection broke; {AGAIN}")
        aborting.watch(distributed.global_state.coordinator_address or "")
        return True
    aborting.off()
    if isinstance(error, ValueError) and not given and "coordinator_address" in str(error):
        return False
    if isinstance(error, ValueError) and given:
        raise BadInput(
            f"distributed.coordinator={given}: give distributed.process_id and distributed.num_processes too "
            f"({one_line(error)})"
        ) from None
    raise BadInput(
        f"distributed: the processes of the run cannot find each other ({one_line(error)[:300]}); give "
        "distributed.coordinator, distributed.process_id and distributed.num_processes"
    ) from None


def _check(coordinator: str, index: int | None, count: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise BadInput(
            f"distributed.coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535"
        )
    if index is not None and count is not None and index >= count:
        raise BadInput(
            f"distributed.process_id={index} must be below distributed.num_processes={count}: numbers begin with 0"
        )


def _verdict(code: int, line: str) -> Elsewhere | Terminated:
    if code in (command.SIGNALLED + signal.SIGTERM, command.SIGNALLED + signal.SIGINT):
        stop = Terminated()
        stop.number = code - command.SIGNALLED
        return stop
    return Elsewhere(code, line)


def _of_network(error: BaseException | None) -> bool:
    """Whether an error may come of a connection to another process that broke."""
    return isinstance(error, Exception) and NETWORK.search(str(error)) is not None
