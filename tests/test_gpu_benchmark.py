"""benchmarks/gpu.py runs on a GPU's machine at the first call: rehearsed here without the packages that may lack there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# As a site's own start-up file: these packages are not installed, for any process that is started.
ABSENT = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"grain", "tensorflow_datasets", "datasets", "draccus", "qwix", "tensorboard", "typeguard", "beartype"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def run(tmp_path, *words):
    """Run the script, on the CPU and without the packages that may lack."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ABSENT)
    path = os.pathsep.join([str(tmp_path / "site"), str(BENCHMARKS.parent)])
    variables = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "XLA_FLAGS": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, words)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=580)


# Several parts in one process, since most of a part's time here is its imports; in two, since tests run beside each other.
TOGETHER = {
    "results": ["machine", "kernels", "reference", "sampler", "judge", "judge_jax", "judge_torch"],
    "stages": ["decode", "decode_whole", "train", "adapters", "quickstart"],
}


def rehearsed(tmp_path, names):
    """Return {(part, figure): values} of these parts with small shapes."""
    done = run(tmp_path, "--rehearse", "--folder", tmp_path, "--part", *names)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    found = {(part, name): values for part, name, _, values in lines}
    assert {part for part, _ in found} == set(names)
    assert [key for key, values in found.items() if "error" in values] == []
    return found


def test_every_part_is_rehearsed(gpu):
    assert sorted(name for names in TOGETHER.values() for name in names) == sorted(gpu.PARTS)


def test_results_on_the_cpu_are_those_of_the_cpu(tmp_path):
    found = rehearsed(tmp_path, TOGETHER["results"])
    assert found["machine", "device"]["absent"] == [
        "grain",
        "datasets",
        "tensorflow_datasets",
        "qwix",
        "tensorboard",
    ]
    for (part, name), values in found.items():
        if part == "kernels" and "fine" in values:
            assert values["fine"]
            assert values["errors"]["values"] < 1e-2
        if part == "sampler":
            assert values.get("parted_at", []) == []
            assert values.get("largest_gap", 0) < 1e-4
            assert values.get("largest_gap_per_token", 0) < 0.02
        if part in ("judge", "judge_jax", "judge_torch"):
            assert values["spread"] > 0
            assert values["largest_difference"] < (
                1e-4 if part == "judge" and "float32" in name else values["spread"]
            )


def test_stages_run_with_small_shapes(tmp_path):
    found = rehearsed(tmp_path, TOGETHER["stages"])
    for (part, _), values in found.items():
        if part in ("train", "adapters"):
            assert values["finite"]
            assert 0 < values["mfu"] < values["plan_mfu"] < 1
            assert values["layers"] == 1
            first, *others = values["seconds"]
            assert max(others) < first / 4  # nothing is compiled again
        if part in ("decode", "decode_whole"):
            assert values["tokens_per_s"] > 0
    assert found["quickstart", "iteration 1"]["cpu_win_rate"]["oracle"] == pytest.approx(0.610, abs=5e-4)
    assert 0 < found["quickstart", "iteration 1"]["win_rate"]["oracle"] < 1
    assert found["quickstart", "seconds"]["stages"]["training"] > 0


WAITS = """
import json, os, sys, time
os.write(int(sys.argv[1]), (json.dumps(["kernels", "first", "the first figure", {"x": 1}]) + "\\n").encode())
print("a library's line")
if sys.argv[2] == "wait":
    time.sleep(60)
raise ValueError("of the second figure")
"""


@pytest.mark.parametrize(
    ("what", "error"), [("wait", "ended after 3 s, its limit"), ("fail", "ValueError: of the second figure")]
)
def test_a_part_that_hangs_or_fails_keeps_its_figures_and_costs_nothing_else(
    tmp_path, gpu, what, error, capsys
):
    found = gpu.Measurement(tmp_path, 60, rehearse=True, to=tmp_path / "gpu.json")
    running = found.start("kernels", lambda send: [sys.executable, "-c", WAITS, str(send), what])
    began = time.monotonic()
    found.finish(running, 3)
    assert time.monotonic() - began < 15
    assert running.process.poll() is not None
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"]["kernels"]["figures"] == {"first": {"x": 1}}
    assert written["parts"]["kernels"]["error"] == error
    assert written["failed"] == ["kernels"]
    told = capsys.readouterr().out
    assert "kernels: the first figure" in told
    assert f"kernels: FAILED: {error}" in told
    found.skip("train", "no time was left")
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["kernels", "train"]


def test_parts_share_the_time_that_is_left(tmp_path, gpu, monkeypatch):
    """The one that does not fit is not begun, and one that others wait for is ended with the others."""
    found = gpu.Measurement(tmp_path, 30, rehearse=True, to=None)
    begun = []
    monkeypatch.setattr(found, "start", lambda name: begun.append(name) or name)
    monkeypatch.setattr(found, "finish", lambda running, limit: 0)
    assert gpu.measure(found, ["machine", "adapters", "judge_jax"])
    assert begun == ["machine", "judge_jax"]
    assert found.parts["adapters"]["error"] == "no time was left"


def test_a_machine_without_a_gpu_is_told_so_in_one_line(tmp_path):
    """No figure of a CPU is ever taken for one of a GPU."""
    done = run(tmp_path, "--parts", "machine", "--to", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("no GPU: ")
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["machine"]["figures"] == {}
