"""Configuration: refused input, the meaning of every enum value, and what is written."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest

from sppo_jax import config, config_file
from sppo_jax.errors import BadInput
from sppo_jax.losses import LOSSES
from sppo_jax.preferences import probability_matrix, win_rates
from sppo_jax.settings import resuming

CONFIGS = Path(__file__).parent.parent / "configs"


def from_text(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return config_file.load([tmp_path / "c.yaml"], overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit:\n  learning_rat: 1.0", r"unknown key 'fit.learning_rat'; did you mean 'fit.learning_rate'\?"),
        ("learning_rate: 1.0", r"unknown key 'learning_rate'; did you mean 'fit.learning_rate'\?"),
        ("fitt: {}", r"unknown key 'fitt'"),
        ("fit: 3", "fit is a section of keys, found '3'"),
        ("fit:\n  epochs: many", "fit.epochs.*many"),
        ("fit:\n  epochs: 1.5", "fit.epochs.*1.5"),
        ("fit:\n  epochs: true", "fit.epochs needs a whole number, found 'true'"),
        ("fit:\n  epochs: null", "fit.epochs needs a whole number, found 'null'"),
        ("fit:\n  epochs: [1]", "fit.epochs needs one value, found a list"),
        ("fit:\n  loss: spo", "fit.loss.*'spo'.*sppo"),
        ("fit:\n  baseline: log_part", "fit.baseline.*log_part"),
        ("judge:\n  estimator: borda", "judge.estimator.*borda"),
        ("pairs:\n  select: some", "pairs.select.*some"),
        ("- 1\n- 2", "expected sections and keys, found a list"),
        ("fit: {epochs: 1", "not YAML"),
    ],
)
def test_T22_unknown_keys_and_wrong_types_are_refused_and_named(tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as caught:
        from_text(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "--seed=-1", "--sampling.responses=1", "--sampling.top_p=0", "--sampling.temperature=-1", "--fit.warmup=1",
        "--fit.eta=0", "--fit.epochs=2", "--fit.baseline=3.0", "--fit.learning_rate=.nan", "--fit.learning_rate=.inf",
        "--iterations=0", "--eval.prompts=0", "--fit.max_grad_norm=-3", "--fit.max_grad_norm=.nan", "--fit.epochs=99999999999",
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_by_name(override):
    with pytest.raises(BadInput, match=override[2:].split("=")[0]):
        config_file.load([], [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--fit.warmup=1", "fit.warmup=1.0 must be at least 0 and below 1; the default is 0.1"),
        ("--sampling.top_p=0", "sampling.top_p=0.0 must be above 0 and at most 1; the default is 1.0"),
        ("--sampling.responses=1", "sampling.responses=1 must be at least 2; the default is 5"),
        ("--fit.eta=.nan", "fit.eta=nan must be above 0 and below 2147483648; the default is 1000.0"),
        (
            "--fit.epochs=99999999999",
            "fit.epochs=99999999999 must be at least 1 and below 2147483648; the default is 1",
        ),
        ("--fit.eta=-5", "fit.eta=-5.0 must be above 0; the default is 1000.0"),
        ("--sampling.temperature=-1", "sampling.temperature=-1.0 must be at least 0; the default is 1.0"),
        (
            "--judge.total_tokens=3",
            "judge.total_tokens=3 must be 0 (the checkpoint's number), or at least 4 and below 2147483648",
        ),
        ("--seed=4294967296", "seed=4294967296 must be at least 0 and below 4294967296; the default is 42"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range_and_the_default(override, message):
    with pytest.raises(BadInput) as caught:
        config_file.load([], [override])
    assert str(caught.value) == message


def test_every_number_but_the_mesh_has_a_range_or_a_check_of_its_own():
    bare = [knob.key for knob in config.knobs() if knob.kind in ("int", "float") and knob.range is None]
    own = [f"mesh.{axis}" for axis in ("data", "fsdp", "tensor")]
    own += [f"judge.{limit}_tokens" for limit in ("source", "candidate", "total")]
    assert bare == own


def test_losses_of_pairs_are_refused_for_all_k_and_other_baselines():
    with pytest.raises(BadInput, match=r"pairs\.select=all needs fit\.loss=sppo"):
        config_file.load([], ["--pairs.select", "all", "--fit.loss", "dpo"])
    with pytest.raises(BadInput, match=r"fit\.baseline"):
        config_file.load([], ["--fit.baseline", "0.4", "--fit.loss", "ipo"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fit.loss=dpo"], "judge.target=score needs fit.loss=sppo or difference: dpo reads no scores"),
        (["--fit.baseline=0.4"], "with judge.target=score the baseline is a score of 0: leave it at 0.5"),
        (["--pairs.source=jsonl:x"], "judge.target=score needs the judge's logits: use probability"),
    ],
)
def test_scores_are_refused_where_nothing_reads_them(flags, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        config_file.load([], ["--judge.target=score", "--iterations=1", *flags])


def test_flags_are_refused_and_help_is_printed_before_jax_is_imported():
    """jax takes a second to import; the losses' names and equations are there without it."""
    script = """if True:
        import sys
        from sppo_jax import config_file, main
        from sppo_jax.errors import BadInput
        for loss in ("sppo", "spo"):
            try:
                config_file.load([], ["--fit.loss", loss])
            except BadInput as error:
                print(error)
        main.main(["--help"])
        print("jax" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refused, *text, imported = done.stdout.splitlines()
    assert "'spo'" in refused
    assert all(loss.equation in " ".join(" ".join(text).split()) for loss in LOSSES.values())
    assert imported == "False"


def test_a_missing_file_is_named():
    with pytest.raises(BadInput, match=r"nowhere\.yaml: no such file"):
        config_file.load(["nowhere.yaml"])


@pytest.mark.parametrize("words", [["epochs", "3"], ["--fit.epochs"], ["--fit.epochs", "3", "stray"]])
def test_flags_that_cannot_be_read_are_refused(words):
    with pytest.raises(BadInput):
        config_file.load([], words)


def test_later_files_and_flags_override(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nfit: {eta: 5, learning_rate: 1e-6}")
    (tmp_path / "b.yaml").write_text("fit: {eta: 7}")
    loaded = config_file.load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["--seed", "9"])
    assert (loaded.seed, loaded.fit.eta, loaded.fit.learning_rate) == (9, 7.0, 1e-6)


def test_texts_on_the_command_line_are_taken_as_they_are():
    loaded = config_file.load([], ["--out", "007", "--judge.path", "x #y", "--eval.oracle", ""])
    assert (loaded.out, loaded.judge.path, loaded.eval.oracle) == ("007", "x #y", "")


def test_dump_loads_back_to_the_same(tmp_path):
    flags = ["--fit.baseline", "log_partition", "--fit.learning_rate", "3e-7", "--log.to", "[trackio, wandb]"]
    before = config_file.load([], flags)
    assert before.log.to == ["trackio", "wandb"]
    assert from_text(tmp_path, config_file.dump(before)) == before


def test_changed_keys_name_what_changes_results_only():
    before = config_file.load()
    after = config_file.load([], ["--fit.eta", "5", "--mesh.tensor", "2", "--iterations", "9", "--out", "x"])
    assert resuming.changed_keys(before, after) == ["fit.eta"]


def enums():
    for section in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(section.type):
            for field in dataclasses.fields(section.type):
                kinds = get_args(field.type) if get_origin(field.type) is not Literal else (field.type,)
                for kind in kinds:
                    if get_origin(kind) is Literal and get_origin(field.type) is not list:
                        yield from ((f"{section.name}.{field.name}", value) for value in get_args(kind))


RATES = {"pairwise": 0.6983, "pairwise_loo": 0.7974, "score": 0.7932}  # worked by hand
VALUES = {
    "sppo": 2.125,
    "sppo_single": 1.0,
    "sppo_hard": 25.0,
    "dpo": 0.6931,
    "ipo": 25.0,
    "difference": 2.25,
}


@pytest.mark.parametrize(("key", "value"), list(enums()))
def test_T26_every_enum_value_has_its_own_meaning(key, value):
    """Values that differ in a formula are compared by it here, the others end to end."""
    loaded = config_file.load([], [f"--{key}", str(value), "--fit.eta", "10"])
    assert config.flat(loaded)[key] == value
    if key == "fit.loss":
        zero = np.zeros((1, 2), np.float32)
        prompts = SimpleNamespace(
            ref_logprob=zero, payoff=np.float32([[0.7, 0.55]]), baseline=zero[:, 0] + 0.5, probability=zero[:, 0] + 0.6,
            real=np.array([True]),
        )  # fmt: skip
        found = LOSSES[loaded.fit.loss].compute(zero, prompts, loaded.fit.eta)
        assert float(found) == pytest.approx(VALUES[value], abs=1e-3)
    if key == "judge.estimator":
        logits = np.array([[0, 2.0, 0.5], [-1.0, 0, 0.5], [-2.0, 0, 0]])
        p = probability_matrix(logits, value)
        rates = win_rates(p, leave_one_out=value == "pairwise_loo")
        assert rates[0] == pytest.approx(RATES[value], abs=1e-3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path):
    config_file.load([CONFIGS / "quickstart.yaml", path])


def test_configs_readme_is_in_step_with_the_dataclasses():
    """If this fails: make config-docs."""
    assert (CONFIGS / "README.md").read_text() == config.markdown()


def test_shipped_configurations_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart = config_file.load([CONFIGS / "quickstart.yaml"])
    assert config_file.load(["quickstart"]) == config_file.load(["quickstart.yaml"]) == quickstart
    (tmp_path / "quickstart").mkdir()
    assert config_file.load(["quickstart"]) == quickstart


def test_a_file_wins_over_the_shipped_configuration_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("seed: 77\n")
    assert config_file.load(["quickstart"]).seed == 77
    (tmp_path / "lora.yaml").write_text("seed: 78\n")
    assert config_file.load(["lora.yaml"]).seed == 78


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"no shipped configuration of that name; did you mean quickstart\?$"):
        config_file.load(["quickstrat"])
    with pytest.raises(BadInput, match=r"there are gemma2_9b, .*, ultrafeedback$"):
        config_file.load(["xyz"])
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    for given, meant in (
        ("mien.yaml", "mine.yaml"),
        ("onw.yaml", "own"),
        (tmp_path / "mien.yaml", tmp_path / "mine.yaml"),
    ):
        with pytest.raises(BadInput, match=rf"no such file.*; did you mean {meant}\?$"):
            config_file.load([given])
