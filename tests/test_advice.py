"""Signs that a run goes wrong: said in time, with their number and what to do, and not said of a healthy run."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sppo_jax import config_file, fit
from sppo_jax.config import Config, Fit
from sppo_jax.run import metrics
from sppo_jax.run.advice import RULES, SLOWER, Advice, Signs, found, grouped
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.training.batches import Batches
from sppo_jax.training.optimizer import make_optimizer
from tests.small_game import words
from tests.test_fit import pairs_of


def configured(**knobs):
    """The small game's configuration with these knobs."""
    return config_file.load([], words("out", **knobs))


def line(stage, step=0, t=1, **values):
    return {"iteration": t, "stage": stage, "step": step, "time": 1.0, **values}


def training(losses, ratios, t=1):
    rows = enumerate(zip(losses, ratios, strict=True))
    return [line("fit", step, t, loss=loss, max_log_ratio=ratio) for step, (loss, ratio) in rows]


# SmolLM2-135M, RMSProp at 5e-6, eta 10, six updates of 16 pairs; its log-ratios were not recorded: these would give such losses.
WENT_WRONG = training([5.4, 5.5, 6.2, 111, 139, 227], [0, 1, 3, 22, 26, 31])


def test_a_rate_that_is_too_high_is_said_at_the_fourth_update_and_once_with_the_rate_to_try():
    signs = Signs(configured(fit__learning_rate=5e-6))
    said = [signs.take(update) for update in WENT_WRONG]
    assert [len(new) for new in said] == [0, 0, 0, 1, 0, 0]
    (sign,) = said[3]
    assert (sign.iteration, sign.stage) == (1, "fit")
    assert "update 3 has a loss of 111 after 5.4" in sign.text
    assert "log-ratios of up to 22 nats, where targets lie within ±5" in sign.text
    assert "--fit.learning_rate 5e-07" in sign.text
    assert found(WENT_WRONG, configured(fit__learning_rate=5e-6)) == [sign]


@pytest.mark.parametrize(
    ("losses", "ratios", "knobs"),
    [
        ([6.8, 6.4, 4.8, 10.2, 6.7, 4.0], [0, 0.2, 1.8, 21, 14.9, 7.5], {"fit__eta": 10}),  # the quickstart
        ([1.21e5, 1.19e5, 1.23e5, 1.2e5], [0, 1, 5, 20], {"fit__eta": 1000}),  # the paper's setting
        ([0.6931, 0.69, 0.72, 0.6], [0, 10, 20, 40], {"fit__eta": 10, "fit__loss": "dpo"}),
        ([25, 26, 22, 19], [0, 4, 8, 12], {"fit__eta": 10, "fit__loss": "ipo"}),
        ([25, 41, 22, 19], [0, 9, 8, 12], {"fit__eta": 10, "fit__loss": "sppo_hard"}),
    ],
)
def test_a_healthy_training_is_no_sign(losses, ratios, knobs):
    assert found(training(losses, ratios), configured(**knobs)) == []


@pytest.mark.parametrize(
    ("losses", "ratios", "knobs"),
    [
        ([0.6931, 0.7, 4.0], [0, 2, 90], {"fit__loss": "dpo"}),
        ([25, 30, 90], [0, 8, 30], {"fit__loss": "ipo"}),
        ([25, 30, 80], [0, 8, 20], {"fit__loss": "sppo_hard"}),
        ([6, 6, 9], [0, 8, 52], {}),  # one response among many
        ([0.25, 0.3, 2.6], [0, 1, 4], {"largest": 1.2}),  # targets far smaller than eta allows
        ([6, None, 111], [0, None, 20], {}),  # a skipped update
    ],
)
def test_a_rate_that_is_too_high_is_said_whatever_the_loss(losses, ratios, knobs):
    largest = knobs.pop("largest", None)
    pairs = [] if largest is None else [line("pairs", kept=7.0, largest_target=largest)]
    for n in (len(losses) - 1, len(losses)):
        said = found([*pairs, *training(losses[:n], ratios[:n])], configured(fit__eta=10, **knobs))
        assert [sign.stage for sign in said] == ["fit"] * (n == len(losses))


def test_rmsprops_first_step_is_ten_times_the_rate():
    settings = Fit(learning_rate=1e-3, warmup=0.0, schedule_epochs=1000, epochs=1)
    optimizer, params = make_optimizer(settings, 1), jnp.ones(3)
    step, _ = optimizer.update(jnp.array([0.5, -2.0, 1e-3]), optimizer.init(params), params)
    np.testing.assert_allclose(np.abs(step), SLOWER * 1e-3, rtol=1e-3)
    adam = optax.adam(1e-3)
    step, _ = adam.update(jnp.array([0.5, -2.0, 1e-3]), adam.init(params), params)
    np.testing.assert_allclose(np.abs(step), 1e-3, rtol=1e-3)


SOUND = {
    "respond": {"responses": 640, "mean_tokens": 16.0, "truncated_share": 0.02},
    "judge": {"tie_share": 0.01, "entropy": 0.5, "longest_share": 0.25, "length_correlation": 0.1},
    "pairs": {"kept": 120.0, "no_signal": 6.0, "empty_chosen": 2.0, "largest_target": 3.5},
    "evaluate": {"win_rate_judge_base": 0.61, "win_rate_judge_base_stderr": 0.014, "kl_per_token": 0.02,
                 "tokens": 16.6, "tokens_before": 16.1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "values", "knobs", "said"),
    [
        ("respond", {"truncated_share": 45 / 84}, {"sampling__max_new_tokens": 24}, ["54% of the responses", "--sampling.max_new_tokens 48"]),
        ("judge", {"entropy": 0.689}, {}, ["entropy is 0.689 of at most 0.693", "docs/judges.md"]),
        ("judge", {"entropy": 0.6, "tie_share": 0.8}, {}, ["80% of the pairs tie", "--sampling.responses 10"]),
        ("judge", {"longest_share": 0.83}, {}, ["the longest one to 83% of the prompts (by chance 20%)"]),
        ("pairs", {"kept": 42.0, "no_signal": 54.0, "empty_chosen": 0.0}, {}, ["54 of 96 prompts", "--sampling.responses 10"]),
        ("pairs", {"kept": 42.0, "no_signal": 54.0}, {"sampling__temperature": 0}, ["--sampling.temperature 1"]),
        ("pairs", {"empty_chosen": 40.0}, {}, ["best response to 40 of 166 prompts is empty"]),
        ("evaluate", {"kl_per_token": 1.5}, {"fit__learning_rate": 1e-4}, ["1.5 nats per token", "--fit.learning_rate 1e-05"]),
        ("evaluate", {"tokens": 33.0}, {}, ["grown from 16.1 to 33.0 tokens"]),
        ("evaluate", {"tokens": 8.0}, {}, ["shrunk from 16.1 to 8.0 tokens"]),
        ("evaluate", {"win_rate_judge_base": 0.507}, {}, ["0.507 ± 0.014, their length 16.1 → 16.6 tokens", "more prompts"]),
        ("evaluate", {"win_rate_judge_base": 0.507, "kl_per_token": 1e-4}, {"fit__learning_rate": 1e-6},
         ["hardly moved (0.0001 nats", "--fit.learning_rate 3e-06"]),
        ("evaluate", {"win_rate_judge_base": 0.42}, {"fit__learning_rate": 1e-4}, ["0.420 ± 0.014", "become worse", "1e-05"]),
        ("evaluate", {"win_rate_judge_base": 0.517, "win_rate_judge_base_stderr": 0.09}, {}, ["0.517 ± 0.090", "too few prompts"]),
        ("evaluate", {"win_rate_judge_base": 0.389, "win_rate_judge_base_stderr": 0.012, "prompts": 2.0}, {}, ["too few prompts to tell"]),
        ("judge", {"entropy": 0.689}, {"judge__backend": "rule:judge"}, ["multiply its scores"]),
        ("evaluate", {"win_rate_judge_base_stderr": None}, {}, ["too few prompts to tell", "prompts.heldout"]),
    ],
)  # fmt: skip
def test_every_sign_has_its_number_and_what_to_do_and_a_sound_run_has_none(stage, values, knobs, said):
    config = configured(sampling__responses=5, **knobs)
    sound = [line(name, **numbers) for name, numbers in SOUND.items()]
    healthy = configured(sampling__responses=5)
    assert found([*sound, *training([6.7, 4.0], [0, 3])], healthy) == []
    damaged = [one | values if one["stage"] == stage else one for one in sound]
    (sign,) = found(damaged, config)
    assert sign.stage == stage
    for part in said:
        assert part in sign.text
    assert "\n" not in sign.text
    assert len(sign.text) < 400


@pytest.mark.parametrize(("k", "prompts", "share", "expected"), [
    (2, 8, 1.0, False),  # 8 coins all heads: one run in 256
    (2, 20, 0.9, True),
    (2, 1000, 0.7, False),  # longer is often better
    (5, 20, 0.55, False),
    (5, 20, 0.65, True),
])  # fmt: skip
def test_the_limit_of_the_longest_knows_k_and_the_number_of_prompts(k, prompts, share, expected):
    sound = [line("respond", responses=k * prompts), line("judge", longest_share=share)]
    assert bool(found(sound, configured(sampling__responses=k))) == expected


def test_numbers_that_are_missing_or_none_are_no_sign():
    for empty in (None, math.nan, "x"):
        names = {name for numbers in SOUND.values() for name in numbers} - {"win_rate_judge_base_stderr"}
        rows = [line(stage, **dict.fromkeys(names, empty)) for stage in (*RULES, "seconds")]
        assert found(rows, Config()) == []
    assert found([], Config()) == found([line(stage) for stage in RULES], Config()) == []


def test_a_run_from_before_the_errors_were_written_is_no_sign():
    assert found([line("evaluate", win_rate_judge_base=0.52)], Config()) == []
    assert (
        len(found([line("evaluate", win_rate_judge_base=0.52, win_rate_judge_base_stderr=None)], Config()))
        == 1
    )


def test_signs_are_by_iteration_and_a_later_start_does_not_repeat_them():
    second = [dict(update, iteration=2) for update in WENT_WRONG]
    config = configured()
    assert [sign.iteration for sign in found([*WENT_WRONG, *second], config)] == [1, 2]
    assert [sign.iteration for sign in found([*WENT_WRONG, *second], config, 2)] == [2]
    signs = Signs(config, before=WENT_WRONG[:5])
    assert signs.take(WENT_WRONG[5]) == []
    # The first update was written by the earlier start.
    signs = Signs(config, before=[*WENT_WRONG, *second[:3]])
    assert [len(signs.take(update)) for update in second[3:]] == [1, 0, 0]


def test_the_run_prints_a_sign_once_and_other_processes_print_nothing(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(configured(), out=str(tmp_path))
    run = RunDir(tmp_path)
    with Metrics(run, config) as shown:
        stage = Stage(run, 1, 0, 1, {}, shown)
        for update in WENT_WRONG:
            values = {name: update[name] for name in ("loss", "max_log_ratio")}
            assert stage.is_sign("fit", values, step=update["step"]) == (update["step"] == 3)
            stage.scalars("fit", values, step=update["step"])
    warnings = [text for text in capsys.readouterr().out.splitlines() if "warning" in text]
    assert len(warnings) == 1
    assert warnings[0].startswith("iteration 1 fit: warning: update 3 has a loss of 111 after 5.4")
    (sign,) = found(metrics.read(run), config)
    assert warnings[0].endswith(sign.text)
    monkeypatch.setattr("sppo_jax.run.pod.first", lambda: False)
    with Metrics(run, config) as other:
        assert not other.is_sign(1, "fit", 3, loss=1e9, max_log_ratio=1e9)
        other.scalars(1, "fit", 3, loss=1e9, max_log_ratio=1e9)
    assert capsys.readouterr().out == ""


def test_an_update_that_is_a_sign_is_written_and_said_at_once_between_the_lines_of_log_every(
    tmp_path, capsys
):
    config = config_file.load([], words(tmp_path, log__every=50))
    batches = Batches(pairs_of(6), global_batch=1, epochs=1, seed=0, iteration=1)
    run, said = RunDir(tmp_path), []

    def advance(_n, **_facts):
        said.append("warning" in capsys.readouterr().out)

    with Metrics(run, config) as written:
        log = fit._Log(Stage(run, 1, 0, 1, {}, written), advance, config, batches)
        for update in WENT_WRONG:
            names = {
                "loss": update["loss"],
                "max_log_ratio": update["max_log_ratio"],
                "grad_norm": 1.0,
                "margin": 0.0,
            }
            log.add(update["step"], {name: jnp.asarray(x) for name, x in names.items()})
        log.flush()
    assert said == [False, False, False, True, False, False]
    assert [update["step"] for update in metrics.read(run)] == [0, 3, 5]


def test_the_same_sign_of_several_iterations_is_one_with_the_numbers_of_the_last():
    shares = {1: 0.4, 2: 0.52, 3: 0.6, 5: 0.123}
    rows = [line("respond", t=t, truncated_share=share) for t, share in shares.items()]
    second = [dict(update, iteration=2) for update in WENT_WRONG]
    signs = found([*rows, *second], configured(sampling__max_new_tokens=24))
    assert len(signs) == 5
    cut, rate = grouped(signs)
    assert (cut.iterations, cut.several, cut.stage) == ("1 to 3, 5", True, "respond")
    assert cut.text.startswith("12% of the responses")
    assert (rate.iterations, rate.several, rate.stage) == ("2", False, "fit")
    other = [Advice(1, "fit", "a 1e-05"), Advice(2, "fit", "a 5e-7"), Advice(3, "fit", "b 5e-7")]
    assert [sign.iterations for sign in grouped(other)] == ["1 to 2", "3"]
