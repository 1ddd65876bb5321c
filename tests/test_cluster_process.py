"""Two real processes find each other, agree, and end together: exit codes and lines. All scenarios run at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCENARIOS = ("agree", "bad", "fault", "lose 0", "lose 1", "stop", "early", "late", "alone")


def begun(scenario):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cluster_process", scenario, port, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(1 if scenario == "alone" else 2)
    ]


@pytest.fixture(scope="module")
def ends():
    """Exit code, output and last line of errors of each process, by scenario."""
    processes = {scenario: begun(scenario) for scenario in SCENARIOS}
    try:
        found = {}
        for scenario, pair in processes.items():
            texts = [process.communicate(timeout=90) for process in pair]
            found[scenario] = [
                (process.returncode, out, err.strip().splitlines()[-1:] or [""])
                for process, (out, err) in zip(pair, texts, strict=True)
            ]
        return found
    finally:
        for process in (process for pair in processes.values() for process in pair):
            process.kill()


def test_two_processes_agree(ends):
    assert [(code, out) for code, out, _ in ends["agree"]] == [(0, "0 [0, 1] ['a', 'b', 'c']\n")] * 2


@pytest.mark.parametrize(
    ("scenario", "codes", "line"),
    [
        ("bad", [2, 2], "error: process 1: no such model"),
        ("fault", [1, 1], "error: process 1: ZeroDivisionError: a fault"),
        ("lose 1", [144, -9], "error: process 1 is gone: no sign of life for 2 s"),
        ("alone", [144], "not all processes have come within 3 s"),
    ],
)
def test_process_0_names_the_process_that_has_failed(ends, scenario, codes, line):
    assert [code for code, _, _ in ends[scenario]] == codes
    assert line in ends[scenario][0][2][0]


def test_without_process_0_the_others_end(ends):
    assert [code for code, _, _ in ends["lose 0"]] == [-9, 144]
    assert "process 0 is gone" in ends["lose 0"][1][2][0]


@pytest.mark.parametrize("scenario", ["stop", "early"])
def test_a_stop_of_one_process_stops_both(ends, scenario):
    assert [code for code, _, _ in ends[scenario]] == [143, 143]


def test_a_signal_after_all_is_done_stops_nobody(ends):
    assert [code for code, _, _ in ends["late"]] == [0, 0]
