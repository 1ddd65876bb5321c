"""docs/evaluation.md: its commands are ones that `evaluate` takes, and its tables say what the code does."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from sppo_jax.evaluation import flags, formats, presets

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = re.findall(r"^python -m sppo_jax\.evaluate (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_taken(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in re.findall(r"(runs/\w+)@\d", line):
        Path(run).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "configs/mistral_7b.yaml", Path(run) / "config.yaml")
    asked = flags.read(shlex.split(line))
    if asked.write:
        assert asked.write[0] in formats.FORMATS
    if asked.preset:
        assert asked.preset in presets.PRESETS


def test_every_format_and_preset_has_its_row():
    for name in (*formats.FORMATS, *presets.PRESETS):
        assert re.search(rf"^\| .*`{name}`.* \|", PAGE, re.MULTILINE), name
    for name, size in (("v0.1", 500), ("v2.0", 750)):
        assert f"{name}, {size} questions" in PAGE


def test_each_benchmark_has_a_command():
    written = {re.search(r"--write (\w+)", line)[1] for line in COMMANDS if "--write" in line}
    assert written >= {"alpaca_eval", "mt_bench", "arena_hard"}


def test_lm_evals_six_tasks_are_those_of_the_installed_group():
    yaml = pytest.importorskip("yaml")
    tasks = pytest.importorskip("lm_eval.tasks")
    text = (Path(tasks.__file__).parent / "benchmarks/openllm.yaml").read_text()
    group = {task["task"]: task["num_fewshot"] for task in yaml.safe_load(text)["task"]}
    group["truthfulqa_mc2"] = group.pop("truthfulqa")  # the group has its other tasks beside it
    section = PAGE.split("### Open LLM Leaderboard")[1]
    assert {
        name: int(n) for name, n in re.findall(r"^\| `(\w+)` \| (\d+) \|", section, re.MULTILINE)
    } == group
