"""The command of a finished run prints its table at once, unless something that the run was made from has changed."""

import json
import os
import shutil

import pytest

from sppo_jax import main
from sppo_jax.run import finished
from tests.run_directory import measured


class Opened(Exception):
    """The run is opened, with jax and all of its inputs."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of an own model, prompts and judge, and their files beside it."""

    def joined(_settings):
        raise Opened

    monkeypatch.setattr("sppo_jax.run.cluster.joined", joined)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Who?"}) + "\n")
    (tmp_path / "a_rule.py").write_text("def judge():\n    raise AssertionError\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    own = ["--model.path=model", "--prompts.source=jsonl:prompts.jsonl", "--judge.backend=a_rule:judge"]
    run = measured(tmp_path, "--iterations=1", *own)
    run.report.write_text("a report")
    return run


def words(run, *more):
    return ["--config", str(run.config), *more]


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_the_table_is_printed_without_opening_any_input(quiet, run, capsys):
    main.main(words(run, *quiet))
    head, *_, last = capsys.readouterr().out.splitlines()
    assert head.startswith("iter     win, judge")
    assert last == f"report: {run.report}"


CHANGES = {
    "other prompts": lambda run: (run.root.parent / "prompts.jsonl").write_text("{}"),
    "older prompts put in their place": lambda run: (
        (new := run.root.parent / "new").write_text("{}"),
        os.utime(new, (1, 1)),
        new.replace(run.root.parent / "prompts.jsonl"),
    ),
    "another rule": lambda run: (run.root.parent / "a_rule.py").write_text("judge = None\n"),
    "another model": lambda run: (run.root.parent / "model/config.json").write_text("{ }"),
    "no prompts": lambda run: (run.root.parent / "prompts.jsonl").unlink(),
    "no report": lambda run: run.report.unlink(),
    "no evaluation": lambda run: run.evaluation(1).unlink(),
    "another evaluation": lambda run: run.evaluation(1).touch(),
    "an export without its card": lambda run: run.export(1).mkdir(),
    "no manifest": lambda run: run.manifest.unlink(),
    "nothing": lambda run: shutil.rmtree(run.root),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_which_something_has_changed_is_opened(change, run):
    config = main.read(words(run))[0]
    assert finished.unchanged(config)
    CHANGES[change](run)
    assert not finished.unchanged(config)


@pytest.mark.parametrize("more", [["--fit.eta=5"], ["--iterations=2"]])
def test_a_run_of_another_configuration_is_opened(more, run):
    with pytest.raises(Opened):
        main.main(words(run, *more))


def test_rows_that_may_change_elsewhere_are_read_again(run):
    assert not finished.unchanged(main.read(words(run, "--prompts.heldout=hf:owner/name"))[0])
