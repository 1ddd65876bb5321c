"""Which judge a run opens, what it is asked, and what a run reports of its scores."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sppo_jax import config, config_file, judges, main, preferences
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.pairrm import files, mesh_judge
from sppo_jax.records import Responses
from sppo_jax.report import tables
from sppo_jax.run import manifest
from sppo_jax.run.directory import RunDir
from sppo_jax.text import reading
from sppo_jax.tiny import world
from tests.small_game import words

DOCS = Path(__file__).parents[1] / "docs/judges.md"
EXAMPLES = {text.split(",")[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)}  # fmt: skip


pytestmark = pytest.mark.usefixtures("single_device")


def test_the_documented_conversion_is_the_one_that_errors_name():
    assert files.CONVERT in DOCS.read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Return a function that writes an example of docs/judges.md where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> None:
        (tmp_path / name).write_text(EXAMPLES[name])

    return write


def test_the_documented_rule_judges_a_whole_game(tmp_path, example):
    example("my_rule.py")
    main.main(words(tmp_path / "run", judge__backend="my_rule:judge"))
    shards = sorted((tmp_path / "run/iter_1/preferences").glob("*.parquet"))
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    answers = sorted((tmp_path / "run/iter_1/responses").glob("*.parquet"))
    responses = [row["responses"] for shard in answers for row in pq.read_table(shard).to_pylist()]
    assert len(rows) == len(responses) == 7
    for row, texts in zip(rows, responses, strict=True):
        lengths = np.array([len(text.split()) for text in texts])
        assert (np.array(row["win_rate"])[lengths == lengths.min()] >= 0.5).all()
        np.testing.assert_allclose(row["logits"], 0.1 * (lengths[None, :] - lengths[:, None]))
    assert len({tuple(np.ravel(row["logits"])) for row in rows}) > 1


def test_the_documented_reward_model_gives_bradley_terry_matrices(tmp_path, example, monkeypatch, tokenizer):
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(names.path("policy"), num_labels=1, pad_token_id=0)
    )
    torch.nn.init.normal_(made.score.weight, std=3)
    made.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(names.path("policy")).save_pretrained(tmp_path / "reward")
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "reward"))
    example("my_reward_model.py")
    opened = judges.from_attribute("judge.backend", "my_reward_model:judge")
    seen = []
    logits = opened.compare(
        ["Who?", "What?"], [["I", "you", "the moon"], ["a", "b", "b"]], lambda *s: seen.append(s)
    )
    assert opened.identity == str(tmp_path / "reward")
    assert seen == [(6, 12), (12, 12)]
    assert np.abs(logits[0][~np.eye(3, dtype=bool)]).min() > 1e-3
    np.testing.assert_allclose(
        logits[:, 0, 1] + logits[:, 1, 2], logits[:, 0, 2], atol=1e-6
    )  # one score each
    p = preferences.probability_matrix(logits)
    np.testing.assert_allclose(p[0, 0, 1], 1 / (1 + np.exp(-logits[0, 0, 1])))
    assert p[1, 1, 2] == 0.5


class Scripted:
    """A judge that reads the beginning of each text, finds a cycle everywhere, and counts its releases."""

    identity = "scripted"

    def __init__(self):
        self.cut, self.released, self.sources = Counter(), 0, {"owner/judge": "c" * 40}

    def compare(self, prompts, responses, on_progress=None):
        self.cut += Counter(prompts=len(prompts), responses=2)
        if len(responses[0]) == 2:
            return np.zeros((len(prompts), 2, 2))
        logits = np.array([[0.0, 3, -1], [-1, 0, 2], [2, -1, 0]])  # 0 beats 1 beats 2 beats 0
        return np.broadcast_to(logits, (len(prompts), 3, 3))

    def release(self):
        self.released += 1


def test_diagnostics_of_every_shard_and_of_the_run_are_in_metrics_and_report(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(world, "oracle", lambda: made.append(Scripted()) or made[-1])
    main.main(words(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    shards = [line for line in lines if line["stage"] == "judge_shard"]
    assert [line["step"] for line in shards] == [0, 1, 2]
    assert [line["cut_prompts"] for line in shards] == [3, 3, 1]
    assert [line["cut_responses"] for line in shards] == [6, 6, 2]
    assert all(line["pairs_per_second"] > 0 for line in shards)
    [whole] = [line for line in lines if line["stage"] == "judge"]
    for line in (*shards, whole):
        assert line["cycle_share"] == 1
        assert line["tie_share"] == 0
        assert line["position_bias"] == pytest.approx((2 + 1 + 1) / 3)
        assert line["entropy"] == pytest.approx((entropy(2) + 2 * entropy(1.5)) / 3)
        assert -1 <= line["length_correlation"] <= 1
    printed = capsys.readouterr().out
    assert "reads only the beginning of 7 prompts and 14 responses" in printed
    assert "prompts with a cycle 100.0%, ties 0.0%, position bias +1.33" in printed
    page = (tmp_path / "run/report.html").read_text()
    row = re.search(r"<h2>What the judge's matrices hold.*?</table>", page, re.S)
    assert row is not None
    cells = re.findall(r"<td>(.*?)</td>", row[0])
    assert cells[:4] == ["1", "100.0%", "0.0%", "+1.33"]
    assert cells[-2:] == ["7", "14"]
    assert made[0].released == 3  # after the trial, after responses and probe, and after the measurement
    written = json.loads((tmp_path / "run/manifest.json").read_text())
    assert written["judge"] == {"sources": {"owner/judge": "c" * 40}}


def test_a_game_judged_on_the_mesh_has_the_logits_of_the_process(tmp_path):
    main.main(words(tmp_path / "run", judge__backend="jax"))
    rows = {}
    for kind in ("responses", "preferences"):
        shards = sorted((tmp_path / "run/iter_1" / kind).glob("*.parquet"))
        rows[kind] = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    opened = judges.open_judge(config_file.load().judge)
    try:
        expected = opened.compare(
            [row["prompt"] for row in rows["responses"]], [row["responses"] for row in rows["responses"]]
        )
    finally:
        opened.close()
    found = np.array([row["logits"] for row in rows["preferences"]])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_devices_without_room_for_the_judge_are_one_line(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(mesh_judge.JaxJudge, "_dispatch", full)
    settings = config_file.load(overrides=["--judge.backend", "jax"])
    with pytest.raises(BadInput, match=r"no room .* lower judge.total_tokens"):
        judges.open_judge(settings.judge).compare(["Who?"], [["I", "you"]])


def test_sharpness_reaches_the_win_rates():
    row = Responses(1, "Who?", [1], [[2], [2], [2]], ["a", "b", "c"], ["stop"] * 3, [-1.0] * 3)
    for sharpness in (1.0, 2.0):
        settings = config.Judge(sharpness=sharpness)
        [found] = judges.prefer([row], Scripted(), settings, reading.as_it_is)
        np.testing.assert_allclose(found.probability[0][1], 1 / (1 + np.exp(-sharpness * 2)))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_judge_of_the_hub_keeps_its_commit_though_main_moves_on(backend, tmp_path, monkeypatch):
    asked = []

    def fetch(name, *, pinned, tell):
        asked.append((name, dict(pinned)))
        return dataclasses.replace(files.read(names.path("pairrm")), sources={"owner/judge": "c" * 40})

    monkeypatch.setattr(files, "fetch", fetch)
    flags = {"judge__backend": backend, "judge__path": "owner/judge", "iterations": 1}
    main.main(words(tmp_path / "run", **flags))
    assert json.loads((tmp_path / "run/manifest.json").read_text())["judge"]["sources"] == {
        "owner/judge": "c" * 40
    }
    main.main(words(tmp_path / "run", **flags))  # finished: nobody is asked
    main.main(words(tmp_path / "run", **flags | {"iterations": 2}))
    assert asked == [("owner/judge", {}), ("owner/judge", {"owner/judge": "c" * 40})]


def entropy(logit: float) -> float:
    p = 1 / (1 + np.exp(-logit))
    return float(-p * np.log(p) - (1 - p) * np.log(1 - p))


def test_a_report_of_a_run_without_judgements_has_no_table_of_them():
    assert tables.judged([{"stage": "fit", "iteration": 1, "step": 0}]) == []


def test_a_resumed_run_asks_for_the_commits_that_it_was_begun_with(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    assert manifest.pinned_judge(run) == {}
    run.config.touch()
    run.manifest.write_text(json.dumps({"judge": {"sources": {"owner/judge": "c" * 40}}}))
    assert manifest.pinned_judge(run) == {"owner/judge": "c" * 40}
    run.manifest.write_text(json.dumps({"judge": ["not", "an", "object"]}))
    with pytest.raises(BadInput, match="damaged"):
        manifest.pinned_judge(run)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--judge.source_tokens", "3"], r"judge.source_tokens=3 must be 0 .* or at least 4"),
        (["--judge.total_tokens", "-1"], r"judge.total_tokens=-1 must be 0"),
        (["--judge.backend", "llm_blender"], r"needs judge.python, .*requirements-llm-blender.txt"),
        (["--judge.python", "/usr/bin/python3"], r"read by judge.backend=llm_blender only"),
        (
            ["--judge.backend", "llm_blender", "--judge.python", "p", "--judge.compute_dtype", "bfloat16"],
            "leave it at auto",
        ),
        (["--judge.backend", "my:rule", "--judge.total_tokens", "99"], "ignored by judge.backend=my:rule"),
        (
            ["--judge.backend", "my:rule", "--judge.compute_dtype", "float32"],
            "compute_dtype=float32 is PairRM's",
        ),
    ],
)
def test_settings_that_no_judge_reads_are_refused(flags, complaint):
    with pytest.raises(BadInput, match=complaint):
        config_file.load(overrides=flags)


def test_limits_reach_the_judge_and_change_what_it_reads():
    def logits(**limits):
        settings = config_file.load(
            overrides=[w for k, v in limits.items() for w in (f"--judge.{k}", str(v))]
        )
        opened = judges.open_judge(settings.judge)
        try:
            long = "the moon is far away and the sun is farther " * 4
            return opened.compare(["Who?"], [[long, "the moon"]]), opened.cut
        finally:
            opened.close()

    whole, nothing = logits()
    short, cut = logits(source_tokens=16, candidate_tokens=8)
    assert not nothing
    assert cut == {"responses": 1}
    assert not np.allclose(whole, short, atol=1e-3)
    with pytest.raises(BadInput, match="total"):
        logits(source_tokens=16, candidate_tokens=8, total_tokens=20)
