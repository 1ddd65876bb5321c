"""Whole games in processes of their own: stopped, on eight devices, with a judge that dies."""

import os
import signal
import time

import pyarrow.parquet as pq
import pytest

from tests import xla_flags
from tests.nursery import Nursery
from tests.small_game import words

ONE_DEVICE, EIGHT_DEVICES = xla_flags.devices(1), xla_flags.devices(8)


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as found:
        yield found


@pytest.fixture
def start(nursery, tmp_path):
    """A function that starts a game, with its output in `log`."""
    begun = []

    def start(words, flags=ONE_DEVICE):
        begun.append(nursery.start(words, tmp_path / "log", {"XLA_FLAGS": flags}))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()


def finish(process, tmp_path, code=0):
    log = tmp_path / "log"
    assert process.wait(300) == code, log.read_text()
    return log.read_text()


def wait_for(path, process, pattern=None):
    for _ in range(3000):
        if process.poll() is not None:
            return
        if path.exists() and (pattern is None or pattern in path.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_sigterm_and_ctrl_c_checkpoint_and_end_with_one_line(number, name, tmp_path, start):
    out = tmp_path / "run"
    options = {"fit__epochs": 60, "fit__schedule_epochs": 60, "fit__checkpoint_every": 1000}
    process = start(words(out, **options))
    wait_for(out / "metrics.jsonl", process, '"stage": "fit"')
    process.send_signal(number)
    last = finish(process, tmp_path, code=128 + number).splitlines()[-1]
    assert last == f"stopped by {name} with all work on disk; run the same command again to resume"
    saved = [int(p.name) for p in (out / "iter_1/checkpoints").iterdir() if p.name.isdigit()]
    assert saved
    assert saved[0] < 120


def test_eight_devices_give_the_same_greedy_responses_as_one(tmp_path, start):
    responses = []
    for name, flags, mesh in (
        ("one", ONE_DEVICE, {}),
        ("eight", EIGHT_DEVICES, {"mesh__fsdp": 4, "mesh__tensor": 2}),
    ):
        out = tmp_path / name
        options = mesh | {"sampling__temperature": 0, "sampling__responses": 2, "fit__global_batch": 4}
        # Greedy responses are all alike: there is nothing to train on, and the run ends with one line.
        log = finish(start(words(out, **options), flags), tmp_path, code=2)
        assert log.splitlines()[-1].startswith("error: iteration 1: no prompt has a preferred response")
        shards = sorted((out / "iter_1/responses").iterdir())
        responses.append([row["response_ids"] for path in shards for row in pq.read_table(path).to_pylist()])
    assert responses[0] == responses[1]


def test_a_judge_that_dies_in_the_middle_is_started_again_and_the_run_goes_on(tmp_path, start):
    out = tmp_path / "run"
    process = start(words(out, judge__backend="torch", sampling__shard_prompts=1))
    wait_for(out / "iter_1/responses/shard-00001-of-00007.parquet", process)
    child = next(
        int(pid) for pid in os.listdir("/proc")
        if pid.isdigit() and sidecar_of(pid) == process.pid
    )  # fmt: skip
    os.kill(child, signal.SIGKILL)
    log = finish(process, tmp_path)
    assert "PairRM: its process ended by signal 9; started again (1 of 5)" in log
    assert "report:" in log


def sidecar_of(pid):
    """Return the parent of a sidecar process, and None for another process."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            if "sppo_jax.pairrm.sidecar" not in file.read():
                return None
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None
