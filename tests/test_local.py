"""launch/local.sh: several processes on this machine, which a stub of Python stands in for."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_stubs import executable, wait_for

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "launch/local.sh"

# Stands in for Python: writes down its words, and ends with its word of CODES, or as a signal asks where that is "wait".
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "4321 $OUT"; exit; fi
words="$*"
rest=${words##*--distributed.process_id }
p=${rest%% *}
printf '%s\\n' "$words" "JAX_PLATFORMS=${JAX_PLATFORMS:-}" "XLA_FLAGS=${XLA_FLAGS:-}" "IDS=${JAX_LOCAL_DEVICE_IDS:-}" >"$SEEN/$p"
echo "process $p speaks"
trap 'echo INT >>"$SEEN/$p.signals"; sleep 0.3; exit 130' INT
trap 'echo TERM >>"$SEEN/$p.signals"; sleep 0.3; exit 143' TERM
codes=($CODES)
touch "$SEEN/$p.ready"
while [ "${codes[p]}" = wait ]; do sleep 0.05; done
exit "${codes[p]}"
"""


@pytest.fixture
def local(tmp_path):
    """Returns a function that starts local.sh; `seen` is where the processes write down how they were called."""
    python = executable(tmp_path / "python", PYTHON)
    (tmp_path / "seen").mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}

    def start(codes, *words, **environment):
        variables = {"PYTHON": python, "OUT": tmp_path / "run/", "SEEN": tmp_path / "seen", "CODES": codes}
        count = len(codes.split())
        return subprocess.Popen(
            [LOCAL, str(count), *words],
            env=clean | {key: str(value) for key, value in (variables | environment).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    start.seen = tmp_path / "seen"
    start.logs = tmp_path / "run.logs"
    return start


def test_another_command_runs_in_several_processes_too(local):
    process = local("0 0", "--policy", "a", COMMAND="evaluate")
    assert process.wait(30) == 0
    assert (
        (local.seen / "1").read_text().startswith("-m sppo_jax.evaluate --policy a --distributed.coordinator")
    )


def refused(*words, **environment):
    """The line with which local.sh refuses a command line."""
    done = subprocess.run(
        [LOCAL, *words], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert not done.stdout
    return done.stderr


def test_local_starts_every_process_with_its_devices_and_its_log(local):
    process = local("0 0 0", "--config", "a file.yaml", "--out", "x", DEVICES="4", XLA_FLAGS="--of_mine")
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert shown == "process 0 speaks\n"
    for p in range(3):
        words, *variables = (local.seen / f"{p}").read_text().splitlines()
        assert words == (
            "-m sppo_jax.main --config a file.yaml --out x --distributed.coordinator 127.0.0.1:4321 "
            f"--distributed.process_id {p} --distributed.num_processes 3"
        )
        flags = "XLA_FLAGS=--of_mine --xla_force_host_platform_device_count=4"
        assert variables == ["JAX_PLATFORMS=cpu", flags, "IDS="]
        assert (local.logs / f"process-{p}.log").read_text() == f"process {p} speaks\n"


def test_local_without_devices_gives_each_process_one_gpu_and_appends_to_the_logs(local):
    for _ in range(2):
        assert local("0 0").wait(20) == 0
    for p in range(2):
        assert (local.seen / f"{p}").read_text().splitlines()[1:] == [
            "JAX_PLATFORMS=",
            "XLA_FLAGS=",
            f"IDS={p}",
        ]
        assert (local.logs / f"process-{p}.log").read_text() == f"process {p} speaks\n" * 2


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ("2 1 0", 2),
        ("137 1 0", 1),
        ("144 137 143", 137),
        ("144 143 0", 144),
        ("0 143 0", 143),
        ("0 130", 130),
    ],
)
def test_local_ends_with_the_worst_code(local, codes, worst):
    assert local(codes).wait(20) == worst


@pytest.mark.parametrize(
    ("sent", "name", "code"), [("INT", "INT", 130), ("TERM", "TERM", 143), ("HUP", "TERM", 143)]
)
def test_local_passes_a_signal_to_every_process_once_and_waits(local, sent, name, code):
    process = local("wait wait")
    wait_for(lambda: all((local.seen / f"{p}.ready").exists() for p in range(2)))
    os.killpg(process.pid, signal.Signals[f"SIG{sent}"])  # as a terminal does
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert [(local.seen / f"{p}.signals").read_text() for p in range(2)] == [f"{name}\n"] * 2
    assert shown == "process 0 speaks\n"


def test_local_refuses_bad_words_before_any_process_starts(tmp_path):
    assert "number of processes" in refused("two", "--config", "x")
    assert "number of processes" in refused("0")
    assert "DEVICES=many must be" in refused("2", DEVICES="many")
    assert refused().startswith("Plays one run in N processes")
    told = refused(
        "2",
        "--config",
        "configs/quickstart.yaml",
        "--fit.epoch",
        "3",
        "--out",
        f"{tmp_path}/run",
        PYTHON=sys.executable,
    )
    assert told.count("\n") == 1
    assert "unknown flag --fit.epoch" in told
    assert not list(tmp_path.iterdir())


def test_local_dry_run_prints_the_commands(tmp_path):
    words = ["--dry-run", "2", "--config", f"{ROOT}/configs/quickstart.yaml", "--out", f"{tmp_path}/a run/"]
    done = subprocess.run(
        [LOCAL, *words],
        env=os.environ | {"PYTHON": sys.executable, "DEVICES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [
        line.endswith(f"# log: {tmp_path}/a\\ run.logs/process-{p}.log") for p, line in enumerate(lines)
    ] == [True] * 2
    assert re.search(r"127\.0\.0\.1:\d+ --distributed.process_id 1 --distributed.num_processes 2", lines[1])
    assert not list(tmp_path.iterdir())


def test_local_help(tmp_path):
    assert "DEVICES" in subprocess.run([LOCAL, "--help"], capture_output=True, text=True, check=True).stdout
