"""The trial of a judge at the start of a run, and what a run keeps when its judge is repaired."""

import json
import shutil
import sys

import numpy as np
import pytest

from sppo_jax import judges, main, records
from sppo_jax.errors import BadInput
from sppo_jax.judges.own import OwnJudge
from sppo_jax.records import Preferences, Responses
from tests.small_game import words
from tests.stand_ins import PROMPTS, answer

LOGITS = [[0, 2, -1], [-2, 0, 3], [1, -3, 0]]


def tried(compare, responses, **members):
    """Try a judge with this `compare` and these members on two prompts."""
    kind = type("Mine", (), {"identity": "mine-1", "compare": lambda self, *words: compare(*words)} | members)
    judge = judges.CheckedJudge(
        OwnJudge(kind(), "judge.backend=mine:judge", "mine"), "judge.backend=mine:judge"
    )
    judges.try_out(judge, ["Who?", "What?"], responses)


def test_a_judge_is_tried_as_the_game_asks_it():
    asked, released = [], []

    def compare(prompts, responses, on_progress):
        asked.append((prompts, [len(row) for row in responses]))
        on_progress(1, 2)
        return np.zeros((len(prompts), len(responses[0]), len(responses[0])))

    tried(compare, 5, release=lambda self: released.append(len(asked)))
    assert asked == [(["Who?"], [5]), (["Who?", "What?"], [2, 2])]
    assert released == [2]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda prompts, k: np.zeros((1, k, k)),  # one prompt at a time only
        lambda prompts, k: np.squeeze(np.zeros((len(prompts), k, k))),
        lambda prompts, k: np.zeros((len(prompts), 3, 3)),  # three responses only
        lambda prompts, k: np.full((len(prompts), k, k), np.nan if k == 2 else 0.0),
    ],
)
def test_a_judge_that_fails_for_some_numbers_of_prompts_or_responses_fails_its_trial(wrong):
    with pytest.raises(BadInput, match=r"^judge\.backend=mine:judge: "):
        tried(lambda prompts, responses, _: wrong(prompts, len(responses[0])), 4)


def test_responses_do_not_depend_on_the_judge_and_preferences_do(tmp_path):
    rows = [answer(prompt) for prompt in PROMPTS]
    judged = [Preferences(row.prompt_id, LOGITS, LOGITS, [0.5] * 3, "pairwise") for row in rows]
    begun, now = ({"policy": "p", "judge": name} for name in ("old", "new"))
    records.write(tmp_path / "responses", Responses, rows, begun)
    records.write(tmp_path / "preferences", Preferences, judged, begun)
    assert records.read(tmp_path / "responses", Responses, now) == rows
    with pytest.raises(BadInput, match="was made from another judge"):
        records.read(tmp_path / "preferences", Preferences, now)
    with pytest.raises(BadInput, match="was made from another policy"):
        records.read(tmp_path / "responses", Responses, now | {"policy": "q"})


BROKEN = """
import numpy as np


class Judge:
    identity = "{identity}"

    def compare(self, prompts, responses, on_progress=None):
        if not set(responses[0]) <= {{"one", "another"}}:
            {fault}
        words = np.array([[len(text.split()) for text in row] for row in responses])
        return 0.1 * (words[:, None, :] - words[:, :, None])
"""


def test_a_run_goes_on_with_a_repaired_judge_where_nothing_was_judged(tmp_path, monkeypatch, single_device):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    out = tmp_path / "run"
    game = words(out, judge__backend="repaired:Judge", prompts__per_iteration=4, fit__global_batch=2)

    def play(identity, fault):
        (tmp_path / "repaired.py").write_text(BROKEN.format(identity=identity, fault=fault))
        sys.modules.pop("repaired", None)
        main.main(game)

    said = r"judge.backend=repaired:Judge: compare raised OSError: no answer \(line 10 of repaired\)"
    with pytest.raises(BadInput, match=said):
        play("first", "raise OSError('no answer')")
    assert json.loads((out / "manifest.json").read_text())["sha256"]["judge"] == "first"
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert kept
    play("second", "pass")
    assert json.loads((out / "manifest.json").read_text())["sha256"]["judge"] == "second"
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    fresh = shutil.move(out, tmp_path / "repaired-run") and out
    play("second", "pass")
    for name in ("pairs.parquet", "heldout/probe.parquet"):
        assert (fresh / "iter_1" / name).read_bytes() == (
            tmp_path / "repaired-run/iter_1" / name
        ).read_bytes()

    # All is judged now: a third judge is refused, and one that fails is not even tried where it is the same.
    with pytest.raises(BadInput, match=r"judge differ .*iter_0/eval\.json is by the judge of then"):
        play("third", "pass")
    (tmp_path / "repaired.py").write_text(
        "class Judge:\n    identity = 'second'\n    def compare(self): pass\n"
    )
    sys.modules.pop("repaired", None)
    main.main(game)
