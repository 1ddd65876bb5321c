"""sppo_jax.play, and the blocks of docs/python.md and the cells of the notebook: they run as they stand."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import sppo_jax
from sppo_jax import config, config_file, main
from sppo_jax.errors import BadInput, Terminated
from tests.small_game import words

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/python.md").read_text()
NOTEBOOK = json.loads((ROOT / "examples/quickstart.ipynb").read_text())


@pytest.fixture
def asked(monkeypatch):
    """The configurations of the games that would be played."""
    found = []
    monkeypatch.setattr(main, "game", found.append)
    return found


def run(cells):
    """Run pieces of code one after the other, as a notebook does."""
    space = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), space)
    return space


def test_play_takes_a_name_and_knobs(asked, tmp_path):
    found = sppo_jax.play("quickstart", out=tmp_path / "o", fit__eta=3, model__template={"a": True})
    flags = [f"--out={tmp_path / 'o'}", "--fit.eta=3", "--model.template={a: true}"]
    assert asked == [config_file.load(["quickstart"], flags)]
    assert found.report == tmp_path / "o/report.html"


def test_play_takes_a_configuration_made_in_python(asked):
    made = dataclasses.replace(config.Config(), seed=5)
    sppo_jax.play(made)
    assert asked == [config_file.load([], ["--seed=5"])]
    with pytest.raises(TypeError, match="replace"):
        sppo_jax.play(made, seed=6)


@pytest.mark.parametrize("knobs", [{"fit__lr": 1}, {"fit__eta": -1}, {"fit__epochs": 1.5}, {"nothing": 1}])
def test_play_refuses_what_the_command_refuses(asked, knobs):
    with pytest.raises(BadInput):
        sppo_jax.play("quickstart", **knobs)
    assert not asked


def test_an_interrupted_game_is_a_keyboard_interrupt(monkeypatch):
    def interrupted(_):
        raise Terminated

    monkeypatch.setattr(main, "game", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resumes"):
        sppo_jax.play("quickstart")


def test_the_blocks_of_the_page_run(asked, played, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(played, tmp_path / "runs/python")
    space = run(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    assert asked == [config_file.load(["quickstart"], ["--out=runs/python", "--iterations=2"])]
    assert (tmp_path / "my_policy/model.safetensors").is_file()
    assert float(space["loss"]) == pytest.approx(float(((10 * (space["win_rate"][0] - 0.5)) ** 2).mean()))
    assert len(space["losses"]) > 1
    assert "loss: dpo" in capsys.readouterr().out


def test_the_notebook_plays_a_game(single_device, tmp_path, monkeypatch, capsys):
    """The game of its first cell is read as it is, and played as the small one, whose programs other tests have compiled."""
    monkeypatch.chdir(tmp_path)
    game, found = main.game, []

    def small(config):
        found.append(config)
        game(config_file.load([], words(config.out)))

    monkeypatch.setattr(main, "game", small)
    assert all(not cell.get("outputs") for cell in NOTEBOOK["cells"])
    space = run("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    assert [config.out for config in found] == ["runs/notebook"]
    assert space["run"].report.is_file()
    shown = capsys.readouterr().out
    assert re.search(r"iteration 1: win rate against the base, judge: 0\.\d+", shown)
    assert "update 0: loss" in shown
