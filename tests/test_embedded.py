"""The embedded policy, judge, prompts and oracle: the defaults beside each other, and never beside a user's own."""

import dataclasses
import os
import re
from types import SimpleNamespace

import pytest
import yaml

from sppo_jax import config, config_file, main
from sppo_jax.session import Session
from sppo_jax.settings import embedded
from tests.test_settings import from_text, refusal

OWN = ("--model.path=owner/model",)
MINE = ("--prompts.source=jsonl:mine.jsonl",)


@pytest.mark.parametrize(
    ("flags", "named", "others"),
    [
        (OWN, ("judge.path", "prompts.source"), ()),
        ((*OWN, "--config", "configs/quickstart.yaml"), ("judge.path", "prompts.source"), ()),
        ((*OWN, *MINE), ("judge.path",), ("prompts.source",)),
        ((*OWN, "--judge.path=owner/judge"), ("prompts.source",), ("judge.path",)),
        ((*OWN, "--judge.backend=my:judge"), ("prompts.source",), ("judge.path",)),
        ((*OWN, "--pairs.source=hf:a/b{iteration}"), ("judge.path",), ("prompts.source",)),
        (("--model.path=runs/x/iter_3/export",), ("judge.path", "prompts.source"), ()),
    ],
)
def test_a_model_of_ones_own_takes_no_embedded_part_silently_and_all_that_is_missing_is_named(
    monkeypatch, flags, named, others
):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    line = refusal(main.main, flags)
    assert all(f"--{key} " in line for key in named), line
    assert not any(f"--{key} " in line for key in others), line


@pytest.mark.parametrize(
    ("flags", "judge", "source", "heldout", "warned"),
    [
        ((), "embedded:pairrm", embedded.TRAINING, embedded.HELD_OUT, []),
        ((*OWN, *MINE, "--judge.path=o/j"), "o/j", "jsonl:mine.jsonl", "", []),
        (MINE, "embedded:pairrm", "jsonl:mine.jsonl", "", ["judge.path", "model.path"]),
        (("--prompts.heldout=hf:a/b",), "embedded:pairrm", embedded.TRAINING, "hf:a/b", ["judge.path", "model.path"]),
        ((*OWN, *MINE, "--judge.path=embedded:pairrm"), "embedded:pairrm", "jsonl:mine.jsonl", "", ["judge.path"]),
        (
            (*OWN, f"--prompts.source={embedded.TRAINING}", "--judge.path=o/j"),
            "o/j", embedded.TRAINING, embedded.HELD_OUT, ["prompts.heldout", "prompts.source"],
        ),
        ((*OWN, "--pairs.source=hf:a/b{iteration}", "--judge.path=o/j"), "o/j", embedded.TRAINING, "", []),
        ((*OWN, *MINE, "--judge.backend=my:judge"), "embedded:pairrm", "jsonl:mine.jsonl", "", []),
    ],
)  # fmt: skip
def test_what_is_named_is_taken_the_rest_is_filled_in_and_a_mixture_is_warned_of(
    tmp_path, flags, judge, source, heldout, warned
):
    loaded = config_file.load([], flags)
    assert (loaded.judge.path, loaded.prompts.source, loaded.prompts.heldout) == (judge, source, heldout)
    lines = embedded.notes(loaded)
    assert [re.match(r"warning: ([a-z.]+)=", line)[1] for line in lines] == warned
    # What a run writes down is read back as the same, and so a run goes on.
    assert from_text(tmp_path, config_file.dump(loaded)) == config.flat(loaded)


def test_the_configuration_of_a_run_that_was_begun_before_parts_had_to_be_named_is_the_same_now(tmp_path):
    """Such a run has all parts written down; the digest of its configuration is made from them."""
    written = dataclasses.replace(
        config.Config(),
        judge=config.Judge(path="embedded:pairrm"),
        prompts=config.Prompts(
            source="embedded:prompts/train_{iteration}.jsonl", heldout="embedded:prompts/heldout.jsonl"
        ),
    )
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(dataclasses.asdict(written), sort_keys=False))
    assert "embedded:pairrm" in (tmp_path / "old.yaml").read_text()
    assert config_file.load([tmp_path / "old.yaml"]) == written == config_file.load()
    (tmp_path / "own.yaml").write_text(
        config_file.dump(dataclasses.replace(written, model=config.Model(path="owner/model")))
    )
    assert config_file.load([tmp_path / "own.yaml"]).judge.path == "embedded:pairrm"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), ("judge.path", "prompts.source")),
        (MINE, ("judge.path",)),
        (("--judge.path=o/j", "--prompts.heldout=hf:a/b"), ("prompts.source",)),
    ],
)  # fmt: skip
def test_what_a_run_filled_in_is_not_named_when_its_configuration_is_used_for_another_model(
    tmp_path, flags, named
):
    before = config_file.load([], flags)
    (tmp_path / "config.yaml").write_text(config_file.dump(before))
    assert config_file.load([tmp_path / "config.yaml"]) == before
    line = refusal(config_file.load, [tmp_path / "config.yaml"], OWN)
    assert [key for key in ("judge.path", "prompts.source") if f"--{key} " in line] == list(named)


def test_embedded_parts_that_were_named_beside_a_model_of_ones_own_stay_named(tmp_path):
    flags = (*OWN, "--judge.path=embedded:pairrm", f"--prompts.source={embedded.TRAINING}")
    before = config_file.load([], flags)
    (tmp_path / "config.yaml").write_text(config_file.dump(before))
    assert config_file.load([tmp_path / "config.yaml"]) == before


@pytest.mark.parametrize("flags", [OWN, (*OWN, "--prompts.heldout=jsonl:mine.jsonl")])
def test_what_a_model_of_ones_own_needs_includes_the_flag_that_leaves_the_embedded_oracle_out(flags):
    quickstart = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs/quickstart.yaml")
    line = refusal(config_file.load, [quickstart], flags)
    assert "--eval.oracle= " in line
    loaded = config_file.load([quickstart], [*flags, "--eval.oracle=", "--judge.path=o/j", *MINE])
    assert loaded.eval.oracle == ""
    assert loaded.fit.epochs == 8


def test_the_embedded_oracle_beside_the_embedded_prompts_is_taken_and_for_another_model_warned_of():
    flags = [f"--eval.oracle={embedded.ORACLE}", "--judge.path=o/j"]
    assert embedded.notes(config_file.load([], flags)) == []
    lines = embedded.notes(config_file.load([], [*flags, *OWN, f"--prompts.source={embedded.TRAINING}"]))
    assert sum(line.startswith("warning: eval.oracle=") for line in lines) == 1


def test_a_mixture_is_warned_of_before_the_game_starts():
    mixed = config_file.load([], [*OWN, *MINE, "--judge.path=embedded:pairrm"])
    opened = SimpleNamespace(config=mixed, sets=SimpleNamespace(counts={}, notes=[]))
    assert any(line.startswith("warning: judge.path=embedded:pairrm") for line in Session.notes(opened))
