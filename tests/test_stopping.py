"""Ctrl-C and SIGTERM: a request to stop, and an end at once."""

import hashlib
import os
import signal
import threading
import time

import pytest

from sppo_jax.errors import Terminated
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stopping import Stop


def until(true):
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_or_sigterm_is_a_request_that_the_next_safe_place_obeys(number, tmp_path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with (
        Metrics(RunDir(tmp_path)) as metrics,
        pytest.raises(Terminated) as ended,
        metrics.stopping_on_signals(),
    ):
        metrics.poll()
        os.kill(os.getpid(), number)
        until(lambda: metrics.stop_requested)
        metrics.poll()
    assert ended.value.number == number
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_a_place_that_does_not_know_the_signal_gets_its_number(number):
    stop = Stop()
    with pytest.raises(Terminated) as ended, stop.on_signals():
        os.kill(os.getpid(), number)
        until(lambda: stop.requested)
        raise Terminated
    assert ended.value.number == number


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_the_process_at_once_with_one_line(first, capfd):
    codes, stop = [], Stop()
    with stop.on_signals(codes.append):
        os.kill(os.getpid(), first)
        until(lambda: stop.requested)
        os.kill(os.getpid(), signal.SIGTERM)  # repeated by a scheduler
        time.sleep(0.05)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: codes)
    assert codes == [130]
    assert capfd.readouterr().err.splitlines() == [
        "stopping after the work in hand; Ctrl-C again stops at once",
        "interrupted; run the same command again to resume",
    ]


def test_the_request_is_printed_at_once_and_not_only_after_the_work_in_hand(capfd):
    stop, seen = Stop(), []

    def press():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(500):
            if seen or not working.is_set():
                return
            time.sleep(0.01)
            seen.extend(capfd.readouterr().err.splitlines())

    working = threading.Event()
    working.set()
    with stop.on_signals():
        pressing = threading.Thread(target=press)
        pressing.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # Python's own handlers wait for its end
        working.clear()
        pressing.join()
    assert seen == ["stopping after the work in hand; Ctrl-C again stops at once"]


def test_a_second_ctrl_c_does_not_wait_for_a_library_that_computes(capfd):
    ended, stop = [], Stop()

    def press_twice():
        for _ in range(2):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    with stop.on_signals(lambda code: ended.append(time.monotonic())):
        pressing = threading.Thread(target=press_twice)
        pressing.start()
        # As a compiler does, this leaves the interpreter, whose handlers wait for its return.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
        returned = time.monotonic()
        pressing.join()
        until(lambda: ended)
    assert ended[0] < returned - 0.1


def test_outside_of_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)

    def run():
        with Stop().on_signals():
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
