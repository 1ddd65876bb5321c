"""The judge's process ends with the process that started it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_sidecar import CHECKPOINT, PROGRAM, gone

ORPHAN = """
import sys, threading, time
from sppo_jax.pairrm import files
from sppo_jax.pairrm.process_judge import SidecarJudge
judge = []
def play():
    command = [sys.executable, *sys.argv[3:]] if len(sys.argv) > 3 else None
    judge.append(SidecarJudge(files.read(sys.argv[2]), threads=1, command=command))
    print(judge[0]._child.pid, flush=True)
    judge[0].compare(["x"], [["a", "b"]])
if sys.argv[1] == "main":
    play()
else:
    threading.Thread(target=play).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("program", ["stand-in", "real"])
def test_process_dies_with_its_parent_in_the_middle_of_a_batch(
    program: str, thread: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    plan.write_text('[["mute", 0]]')
    command = [sys.executable, "-c", ORPHAN, thread, str(CHECKPOINT.directory)]
    if program == "stand-in":
        command += [str(PROGRAM), str(plan), "stand-in"]
        # Two reasons to end: the kernel's signal, which only a main thread can request, and a heartbeat without a reader.
        command += ["60"] if thread == "main" else []
    root = Path(__file__).parents[1]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if program == "stand-in":
        while not Path(f"{plan}.fired").exists():
            assert parent.poll() is None
            time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)
