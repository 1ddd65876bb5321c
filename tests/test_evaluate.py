"""Measurements on held-out prompts: they never end the game that they measure."""

import contextlib
import json
import types

import numpy as np
import pytest

from sppo_jax import config_file, evaluate, main
from sppo_jax.judges import CheckedJudge
from sppo_jax.records import Responses
from sppo_jax.report import model_card, page
from sppo_jax.run.directory import RunDir
from sppo_jax.tiny import world
from tests.small_game import words


class Discrete:
    """A judge that prefers the longer response by `logit`, or nothing at all."""

    identity = "discrete"

    def __init__(self, logit):
        self.logit = logit

    def compare(self, prompts, responses, on_progress=None):
        lengths = np.array([[len(text) for text in texts] for texts in responses])
        return self.logit * np.sign(lengths[:, :, None] - lengths[:, None, :]).astype(float)


class Session:
    """What judge_probe reads of a session."""

    config = config_file.load()

    def __init__(self, logit):
        self.judge = CheckedJudge(Discrete(logit), "judge.backend")

    def reading(self, prompt, responses):
        return prompt, list(responses)

    def heldout_stage(self, t, *, policy):
        return types.SimpleNamespace(progress=lambda *_, **__: contextlib.nullcontext(lambda n=1: None))


def drawn(*texts):
    return [
        Responses(i, f"question {i}", [1], [[5 + k, 2] for k in range(len(row))], list(row), ["stop"] * len(row), [0.0] * len(row))
        for i, row in enumerate(texts)
    ]  # fmt: skip


SILENT = {
    "a judge without preferences": (0.0, [("a", "bb"), ("a", "b")]),
    "equal responses": (9.0, [("a", "a"), ("b", "b")]),
    "one prompt with equal responses": (9.0, [("a", "a")]),
    "nothing but empty responses": (9.0, [("", ""), ("", "")]),
    "empty responses preferred": (-9.0, [("", "a"), ("", "b")]),
}


@pytest.mark.parametrize("case", SILENT)
def test_without_a_preferred_held_out_response_the_divergence_is_measured_alone(case):
    logit, texts = SILENT[case]
    probe = evaluate.judge_probe(Session(logit), 1, drawn(*texts))
    assert [pair.response_ids for pair in probe] == [[[5, 2], [6, 2]]] * len(texts)
    probe = [evaluate.pairs.with_reference([pair], np.zeros((1, 2)))[0] for pair in probe]
    assert evaluate.log_ratios(probe, np.full((len(texts), 2), -1.0)) == {"kl_per_token": 0.5}


def test_prompts_without_a_signal_are_left_out_where_others_have_one():
    probe = evaluate.judge_probe(Session(9.0), 1, drawn(("a", "a"), ("a", "bb")))
    assert [pair.prompt_id for pair in probe] == [1]
    probe = evaluate.pairs.with_reference(probe, np.zeros((1, 2)))
    found = evaluate.log_ratios(probe, np.array([[2.0, -4.0]]))
    assert {key: found[key] for key in ("winners", "losers", "kl_per_token")} == {
        "winners": 2.0, "losers": -4.0, "kl_per_token": 0.5,
    }  # fmt: skip
    assert np.isnan([found["winners_stderr"], found["losers_stderr"]]).all()  # of one prompt


def test_responses_without_tokens_have_no_divergence_per_token():
    rows = [Responses(0, "q", [1], [[], []], ["", ""], ["stop"] * 2, [0.0] * 2)]
    probe = evaluate.pairs.with_reference(evaluate.judge_probe(Session(9.0), 1, rows), np.zeros((1, 2)))
    assert evaluate.log_ratios(probe, np.zeros((1, 2))) == {}


def test_one_prompt_has_a_win_rate_without_a_standard_error():
    (one,) = drawn(("a",))
    found = evaluate.win_probabilities(Discrete(9.0), [one], [one])
    assert evaluate._rate(found) == {"mean": 0.5, "stderr": None, "per_prompt": [0.5]}


def test_each_prompts_win_probability_is_kept_in_the_order_of_the_prompts():
    mine, theirs = drawn(("aa",), ("b",), ("c",)), drawn(("a",), ("b",), ("cc",))
    found = evaluate._rate(evaluate.win_probabilities(Discrete(2.0), mine, theirs))
    assert found["per_prompt"] == [0.8808, 0.5, 0.1192]
    assert found["mean"] == pytest.approx(0.5)


def test_features_are_of_first_responses_as_the_judge_reads_them():
    class Finder(Discrete):
        def features(self, prompt, response):
            return {"long": len(response) > 1} | ({"empty": 1} if not response else {})

    rows, read = (
        drawn(("aa", ""), ("b", "bb"), ("", "c"), ("dd!", "d")),
        lambda p, texts: (p, [x.strip("!") for x in texts]),
    )
    found = evaluate.features(CheckedJudge(Finder(0), "eval.oracle"), rows, read)
    assert {name: values.tolist() for name, values in found.items()} == {
        "long": [1, 0, 0, 1],
        "empty": [0, 0, 1, 0],
    }
    assert evaluate.features(CheckedJudge(Discrete(0), "eval.oracle"), rows, read) == {}


def test_a_features_change_is_the_mean_difference_on_the_same_prompts():
    before = {"kept": np.array([0.0, 1, 0, 1]), "gone": np.array([1.0, 1, 1, 1])}
    after = {"kept": np.array([1.0, 1, 1, 1]), "new": np.array([0.0, 2, 0, 2])}
    found = evaluate.changes(before, after)
    assert found["gone"] == {"mean": -1.0, "stderr": 0.0}
    # The differences are 1 0 1 0 and 0 2 0 2: standard deviations sqrt(1/3) and sqrt(4/3), of four prompts.
    assert found["kept"] == pytest.approx({"mean": 0.5, "stderr": (1 / 3) ** 0.5 / 2})
    assert found["new"] == pytest.approx({"mean": 1.0, "stderr": (4 / 3) ** 0.5 / 2})
    one = {"kept": np.array([1.0])}
    assert evaluate.changes({}, one) == {"kept": {"mean": 1.0, "stderr": None}}


@pytest.mark.usefixtures("single_device")
def test_a_game_goes_on_when_the_judge_prefers_no_held_out_response(tmp_path, monkeypatch, capsys):
    trained_on = {json.loads(line)["prompt"] for line in evaluate_prompts("train_1")}
    real = world.oracle()

    class Torn:
        identity = "torn"

        def compare(self, prompts, responses, on_progress=None):
            known = np.array([prompt in trained_on for prompt in prompts])
            return np.where(known[:, None, None], np.asarray(real.compare(prompts, responses)), 0.0)

    monkeypatch.setattr(world, "oracle", Torn)
    main.main(words(tmp_path / "run", eval__prompts=1))
    found = json.loads((tmp_path / "run/iter_1/eval.json").read_text())
    assert set(found["log_ratio"]) == {"kl_per_token"}
    assert found["win_rate"]["judge"]["base"] == {"mean": 0.5, "stderr": None, "per_prompt": [0.5]}
    *_, row, _note, _report = capsys.readouterr().out.strip().splitlines()
    assert row.split()[:4] == ["1", "0.500", "±", "-"]
    run = RunDir(tmp_path / "run")
    page.write(run)
    assert "Left out of this page" not in run.report.read_text()
    assert "0.500 ± -" in model_card.text(run, 1)


def evaluate_prompts(name):
    from sppo_jax.hub import names

    return names.path(f"prompts/{name}.jsonl").read_text().splitlines()
