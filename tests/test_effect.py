"""Settings under which nothing would be trained are refused, as early as that can be known, with values that train."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from sppo_jax import config_file, fit, main, models, pairs
from sppo_jax.config import Config, Fit
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.training import effect
from sppo_jax.training.optimizer import schedule
from sppo_jax.training.trainer import Trainer
from tests import test_fit, test_pairs
from tests.small_game import words

CONFIGS = Path(__file__).parents[1] / "configs"


def given(flags):
    """The settings that a message's flags make of the defaults."""
    found = re.findall(r"--fit\.(\w+) (\d+)", flags)
    assert found
    return {name: int(value) for name, value in found}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 63, 64])
@pytest.mark.parametrize("warmup", [0.01, 0.1, 0.9])
def test_one_update_whose_rate_is_0_is_refused_with_values_that_train(count, warmup):
    settings = Fit(warmup=warmup)
    with pytest.raises(
        BadInput, match=r"^iteration 2: its pairs .*fit\.global_batch=64 .*fit\.warmup"
    ) as refused:
        effect.check(settings, count, 2)
    better = dataclasses.replace(settings, **given(str(refused.value)))
    effect.check(better, count, 2)
    rate = schedule(better, -(-count // better.global_batch))
    updates = -(-count // better.global_batch) * better.epochs
    assert sum(float(rate(step)) > 0 for step in range(updates)) > 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rate": 1e-46}, "fit.learning_rate=1e-46 is too small"),
        ({"learning_rate": 1e-39}, "fit.learning_rate=1e-39 is too small"),
        ({"learning_rate": 1e-20}, "fit.learning_rate=1e-20 is too small"),
        ({"eta": 1e-320}, "fit.eta=9.99989e-321 is 0 in float32"),
        ({"eta": 1e-46}, "fit.eta=1e-46 is 0 in float32"),
        ({"max_grad_norm": 1e-300}, "fit.max_grad_norm=1e-300 is 0 in float32"),
    ],
)
def test_numbers_that_are_0_on_the_devices_are_refused_by_name(settings, named):
    with pytest.raises(BadInput, match=re.escape(named)):
        effect.check(Fit(**settings), 1000, 1)


def test_one_update_without_warm_up_trains_and_two_with_it_do_too_but_a_line_says_how_few_these_are():
    for settings, count in ((Fit(warmup=0.0), 8), (Fit(), 65), (Fit(epochs=2, schedule_epochs=2), 8)):
        effect.check(settings, count, 1)
        line = effect.warning(settings, count)
        assert line.startswith(f"warning: {count} pairs at fit.global_batch=64 make ")
        better = dataclasses.replace(settings, **given(line))
        assert effect.warning(better, count) is None


OVERLAYS = ("lora", "iterative_dpo", "iterative_ipo", "sppo_hard", "gpo", "online_ipo", "inpo")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_train(path):
    base = [CONFIGS / "quickstart.yaml"] if path.stem in OVERLAYS else []
    config = config_file.load([*base, path])
    effect.check(config.fit, config.prompts.per_iteration, 1)
    if config.prompts.per_iteration > 64:
        assert (
            config.prompts.per_iteration == 128
            or effect.warning(config.fit, config.prompts.per_iteration) is None
        )


@pytest.mark.usefixtures("single_device")
@pytest.mark.parametrize("options", [{"prompts__per_iteration": 4}, {"fit__global_batch": 100}])
def test_a_game_in_which_nothing_could_be_trained_is_refused_before_it_begins(options, tmp_path):
    with pytest.raises(BadInput, match=r"iteration 1: its pairs \(at most \d\) make one update"):
        main.main(words(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_an_iteration_whose_pairs_turn_out_to_be_too_few_leaves_the_policy_as_it_is_and_that_is_said(
    tmp_path, one_device
):
    settings = dataclasses.replace(test_fit.SETTINGS, epochs=1, schedule_epochs=1)
    line = effect.warning(settings, 4)
    assert "make one update, whose rate is 0: nothing is trained in this iteration" in line
    effect.check(dataclasses.replace(settings, **given(line)), 4, 1)
    model = test_fit.train(tmp_path, test_fit.pairs_of(4), settings, one_device)
    base = models.load(names.path("policy"), mesh=one_device)
    for a, b in zip(test_fit.leaves(model), test_fit.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fit_says_how_few_updates_there_are(tmp_path, one_device, monkeypatch):
    settings = dataclasses.replace(test_fit.SETTINGS, epochs=1, schedule_epochs=1)
    said = []
    monkeypatch.setattr(fit, "train", lambda model, *_, **__: model)
    with Metrics(RunDir(tmp_path)) as metrics:
        monkeypatch.setattr(metrics, "say", said.append)
        stage = Stage(RunDir(tmp_path), 1, 0, 1, {}, metrics)
        config = Config(fit=settings)
        model = models.load(names.path("policy"), mesh=one_device)
        trainer = Trainer(config, model.architecture, one_device, model.compute_dtype)
        for count in (4, 8, 40):
            fit.fit(lambda: model, test_fit.pairs_of(count), trainer, stage)
    assert [line[:40] for line in said] == [
        "iteration 1 fit: warning: 4 pairs at fit",
        "iteration 1 fit: warning: 8 pairs at fit",
    ]


@pytest.mark.parametrize("norm", [1e-30, 2e-38])
def test_a_training_that_changes_no_weight_ends_in_a_line_and_leaves_no_last_checkpoint(
    norm, tmp_path, one_device
):
    settings = dataclasses.replace(test_fit.SETTINGS, max_grad_norm=norm)
    with pytest.raises(
        BadInput, match=rf"no weight has changed in 4 updates.* or fit.max_grad_norm={norm:g}"
    ):
        test_fit.train(tmp_path, test_fit.pairs_of(8), settings, one_device)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "settings", [{}, {"eta": 1e-8}, {"eta": 1e-8, "loss": "ipo"}, {"loss": "sppo_single"}]
)
def test_targets_of_0_are_refused_since_updates_would_follow_rounding_errors(settings, tmp_path, one_device):
    rows = test_fit.pairs_of(8)
    if "eta" not in settings:
        rows = [dataclasses.replace(row, win_rate=[0.5, 0.5], chosen_probs=0.5) for row in rows]
    with pytest.raises(BadInput, match="before the first update: all targets are 0"):
        test_fit.train(tmp_path, rows, dataclasses.replace(test_fit.SETTINGS, **settings), one_device)


@pytest.mark.parametrize(
    ("texts", "temperature", "said"),
    [
        (["a", "a"], 0.0, "3 have equal win rates .* sampling.temperature=0 .*: set it to 1"),
        (["a", "a"], 1.0, "3 have equal win rates .*use more than sampling.responses=5"),
        (["", "b"], 1.0, "of 3, 3 have an empty response as their best one"),
    ],
)
def test_pairs_without_signal_are_a_line_with_what_was_found_and_what_to_do(
    texts, temperature, said, tmp_path
):
    ties = texts[0] == texts[1]
    rows = [
        test_pairs.judged(np.zeros((2, 2)) if ties else test_pairs.ladder(1, 0), texts, prompt=f"p{i}")
        for i in range(3)
    ]
    config = Config()
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, temperature=temperature)
    )
    with Metrics(RunDir(tmp_path)) as metrics, pytest.raises(BadInput, match=said) as refused:
        stage = Stage(RunDir(tmp_path), 1, 0, 1, {}, metrics)
        pairs.from_preferences(*zip(*rows, strict=True), lambda _: None, stage, config)
    assert str(refused.value).startswith("iteration 1: no prompt has a preferred response")
