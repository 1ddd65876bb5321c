"""Stage 2 as a run sees it: which judge is opened, what it is asked, and what is told about its answers."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sppo_jax import config, config_file, judge, main, preferences, respond
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.hub import names
from sppo_jax.pairrm import files
from sppo_jax.report import page
from sppo_jax.run import shards
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics, read
from tests.small_game import words
from tests.stand_ins import PROMPTS, Counting, K, Pod, Streaming, answer

DOCS = Path(__file__).parents[1] / "docs/judges.md"
EXAMPLES = {text.split(",")[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs in this process see one device."""
    import jax

    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: devices[:1])


def test_the_documented_conversion_is_the_one_that_errors_name():
    assert files.CONVERT in DOCS.read_text()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Write an example of docs/judges.md where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> None:
        (tmp_path / name).write_text(EXAMPLES[name])

    return write


def test_the_documented_rule_judges_a_whole_game(tmp_path, example):
    example("my_rule.py")
    main.main(words(tmp_path / "run", judge__backend="my_rule:judge"))
    import pyarrow.parquet as pq

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
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(
        AutoConfig.from_pretrained(names.path("policy"), num_labels=1, pad_token_id=0)
    )
    torch.nn.init.normal_(made.score.weight, std=3)
    made.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(names.path("policy")).save_pretrained(tmp_path / "reward")
    monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "reward"))
    example("my_reward_model.py")
    opened = judge.from_attribute("judge.backend", "my_reward_model:judge")
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
    """A judge of ours that reads little, and remembers what was asked of it."""

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
    from sppo_jax.tiny import world

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
    assert made[0].released >= 3  # before training, after the probe, after the measurement
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["judge"] == {"sources": {"owner/judge": "c" * 40}}


def test_a_game_judged_on_the_mesh_has_the_logits_of_the_process(tmp_path):
    import pyarrow.parquet as pq

    main.main(words(tmp_path / "run", judge__backend="jax"))
    rows = {}
    for kind in ("responses", "preferences"):
        shards = sorted((tmp_path / "run/iter_1" / kind).glob("*.parquet"))
        rows[kind] = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    opened = judge.open_judge(config_file.load().judge)
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
    import jax

    from sppo_jax.pairrm import mesh_judge

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(mesh_judge.JaxJudge, "_dispatch", full)
    settings = config_file.load(overrides=["--judge.backend", "jax"])
    with pytest.raises(BadInput, match=r"no room .* lower judge.total_tokens"):
        judge.open_judge(settings.judge).compare(["Who?"], [["I", "you"]])


def test_sharpness_reaches_the_win_rates():
    from sppo_jax.records import Responses

    row = Responses(1, "Who?", [1], [[2], [2], [2]], ["a", "b", "c"], ["stop"] * 3, [-1.0] * 3)
    for sharpness in (1.0, 2.0):
        settings = config.Judge(sharpness=sharpness)
        [found] = judge.prefer([row], Scripted(), settings, str)
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
    main.main(words(tmp_path / "run", **flags))
    assert asked == [("owner/judge", {}), ("owner/judge", {"owner/judge": "c" * 40})]


# --- beside the sampler -----------------------------------------------------------------------------------------------


@pytest.fixture
def play(tmp_path):
    """Sample by a stand-in and judge beside it, in a run directory; returns the preferences."""

    def play(backend, name="run", sampler=None, beside=True, seed=0):
        run = RunDir(tmp_path / name)
        run.root.mkdir(exist_ok=True)
        sampler = sampler or Streaming()
        shared = {"run": run, "iteration": 1, "shard_prompts": 3, "made_from": {"policy": "p"}}
        checked = judge.Checked(backend, "judge.backend")
        alone = threading.current_thread() is threading.main_thread()
        with Metrics(run) as metrics, metrics.stopping_on_sigterm() if alone else contextlib.nullcontext():
            judging = judge.Judging(
                checked, config.Judge(), str, prompts=len(PROMPTS), metrics=metrics, **shared
            )
            with judging:
                if beside:
                    rows = respond.respond(
                        PROMPTS, lambda: sampler, judging, seed=seed, metrics=metrics, **shared
                    )
                else:
                    rows = [answer(prompt, seed) for prompt in PROMPTS]
                return judging.finish(rows)

    yield play
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("judge")]


def whole(directory):
    return {path.name: path.read_bytes() for path in sorted((directory / "iter_1/preferences").iterdir())}


def test_a_prompt_is_judged_while_others_are_sampled(play, capsys):
    backend, judged = Counting(), threading.Event()
    compare = backend.compare
    backend.compare = lambda *words: (compare(*words), judged.set())[0]
    found = play(
        backend, sampler=Streaming(lambda chunk: chunk < 1 or judged.wait(20) or pytest.fail("waits"))
    )
    assert len(backend.calls) == 7
    assert [row.prompt_id for row in found] == [prompt.prompt_id for prompt in PROMPTS]
    assert "judged" in capsys.readouterr().out


def test_beside_the_sampler_or_after_it_the_bits_are_the_same(tmp_path, play):
    beside, after = Counting(), Counting()
    found = play(beside)
    assert play(after, "after", beside=False) == found
    assert whole(tmp_path / "run") == whole(tmp_path / "after")
    assert [len(call) for call in after.calls] == [1] * 7  # one prompt at a time, whatever waits
    assert sorted(beside.calls) == sorted(after.calls)
    assert beside.calls != after.calls


def test_a_shard_of_preferences_comes_after_its_responses(tmp_path, play, monkeypatch):
    def write(self, i, rows, *also_from):
        if self._kind.__name__ == "Preferences":
            assert (tmp_path / f"run/iter_1/responses/shard-{i:05d}-of-00003.parquet").exists()
            written.append(i)
        real(self, i, rows, *also_from)

    real, written = shards.Shards.write, []
    monkeypatch.setattr(shards.Shards, "write", write)
    play(Counting())
    assert sorted(written) == [0, 1, 2]


@pytest.mark.parametrize("after", [1, 5])
def test_T16_killed_in_the_middle_what_is_judged_is_not_judged_again(tmp_path, play, after):
    class Dying(Counting):
        def compare(self, prompts, responses, on_progress=None):
            if len(self.calls) == after:
                raise KeyboardInterrupt
            return super().compare(prompts, responses, on_progress)

    play(Counting(), "whole")
    before, again = Dying(), Counting()
    with pytest.raises(KeyboardInterrupt):
        play(before)
    sampler = Streaming()
    play(again, sampler=sampler)
    assert len(before.calls) == after
    assert sorted(before.calls + again.calls) == sorted([prompt.text] for prompt in PROMPTS)
    assert whole(tmp_path / "run") == whole(tmp_path / "whole")
    shard_lines = [
        [line for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
         if line["stage"] == "judge_shard"] for name in ("run", "whole")
    ]  # fmt: skip
    for line in (line for lines in shard_lines for line in lines):
        del line["time"], line["pairs_per_second"]
    ours, theirs = ({line["step"]: line for line in lines} for lines in shard_lines)
    assert ours == theirs


def test_what_is_kept_of_other_responses_is_judged_again(tmp_path, play):
    class Dying(Counting):
        def compare(self, prompts, responses, on_progress=None):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().compare(prompts, responses, on_progress)

    with pytest.raises(KeyboardInterrupt):
        play(Dying())
    play(other := Counting(), beside=False, seed=1)
    assert len(other.calls) == 7


def test_an_error_of_the_judge_ends_sampling_at_the_next_chunk(tmp_path, play):
    class Failing(Counting):
        def compare(self, prompts, responses, on_progress=None):
            self.calls.append(list(prompts))
            failing.set()
            return np.full((1, K, K), np.nan)

    def chunk(i):
        chunks.append(i)
        if i:
            assert failing.wait(20)
            time.sleep(0.1)

    backend, failing, chunks = Failing(), threading.Event(), []
    with pytest.raises(BadInput, match=r"judge\.backend: a score of prompt 'Question"):
        play(backend, sampler=Streaming(chunk))
    assert len(backend.calls) == 1  # the next would fail likewise
    assert chunks == [0, 1]
    assert not list((tmp_path / "run/iter_1/preferences").glob("*"))
    assert not list((tmp_path / "run").rglob("*.part"))
    found = play(Counting(), sampler=(again := Streaming()))
    assert len(found) == 7
    assert len(again.asked[0]) < 7


@pytest.mark.parametrize("place", ["sampler", "judge"])
def test_a_run_that_is_told_to_stop_ends_with_the_chunk_or_the_pairs_at_hand(tmp_path, play, place):
    class Slow(Counting):
        """Once told to stop, the judge is too."""

        def compare(self, prompts, responses, on_progress=None):
            if place == "judge":
                os.kill(os.getpid(), signal.SIGTERM)
            slow.set()
            for _ in range(2000):
                on_progress(1, 6)
                time.sleep(0.01)
            raise AssertionError("went on")

    def chunk(i):
        chunks.append(i)
        if i:
            assert slow.wait(20)
        if i and place == "sampler":
            os.kill(os.getpid(), signal.SIGTERM)

    slow, chunks = threading.Event(), []
    start = time.monotonic()
    with pytest.raises(Terminated):
        play(Slow(), sampler=Streaming(chunk))
    assert time.monotonic() - start < 10
    assert chunks == [0, 1]
    assert not list((tmp_path / "run").rglob("*.part"))
    assert len(play(Counting())) == 7


def test_a_judge_that_reports_nothing_is_stopped_between_prompts(tmp_path, play, monkeypatch):
    class Silent(Counting):
        def compare(self, prompts, responses, on_progress=None):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            return super().compare(prompts, responses)

    monkeypatch.setattr(judge, "POLL_SECONDS", 0.01)
    with pytest.raises(Terminated):
        play(backend := Silent(), beside=False)
    assert len(backend.calls) < 3
    play(again := Counting(), beside=False)
    assert len(again.calls) == 7 - len(backend.calls)


def test_a_judge_on_the_mesh_waits_for_the_sampler_and_takes_whole_shards(play, capsys):
    backend, during = Counting(on_mesh=True), []
    play(backend, sampler=Streaming(lambda chunk: during.append(len(backend.calls))))
    assert during == [0, 0, 0, 0]
    texts = [prompt.text for prompt in PROMPTS]
    assert backend.calls == [texts[:3], texts[3:6], texts[6:]]
    assert "judged" not in capsys.readouterr().out
    from sppo_jax.pairrm.mesh_judge import JaxJudge

    assert JaxJudge.on_mesh


def test_a_judge_on_the_mesh_that_was_killed_takes_whole_shards_again(tmp_path, play):
    class Dying(Counting):
        def compare(self, prompts, responses, on_progress=None):
            if len(self.calls) == 1:
                raise KeyboardInterrupt
            return super().compare(prompts, responses, on_progress)

    play(Counting(on_mesh=True), "whole")
    with pytest.raises(KeyboardInterrupt):
        play(Dying(on_mesh=True))
    play(again := Counting(on_mesh=True))
    assert [len(call) for call in again.calls] == [3, 1]
    assert whole(tmp_path / "run") == whole(tmp_path / "whole")


@pytest.mark.parametrize("on_mesh", [False, True])
def test_on_a_pod_each_process_judges_its_shards_but_on_the_mesh_all_do(tmp_path, play, monkeypatch, on_mesh):
    play(Counting(on_mesh), "one", beside=False)
    judges, pod = [Counting(on_mesh), Counting(on_mesh)], Pod(monkeypatch)
    found, same = pod.run(lambda i: play(judges[i], beside=False))
    assert found == same
    assert pod.waits == [["iteration 1 judge"] * 2] * 2
    first, second = ([text for call in judge_.calls for text in call] for judge_ in judges)
    texts = [prompt.text for prompt in PROMPTS]
    assert first == (texts if on_mesh else texts[:3] + texts[6:])
    assert second == (texts if on_mesh else texts[3:6])
    assert whole(tmp_path / "run") == whole(tmp_path / "one")
    lines = read(RunDir(tmp_path / "run"))
    assert [line["step"] for line in lines if line["stage"] == "judge_shard"] == [0, 1, 2]


def test_progress_of_what_is_left_to_the_judge_counts_what_is_done(play, capsys, monkeypatch):
    from sppo_jax.run import metrics as metrics_

    monkeypatch.setattr(metrics_, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(judge, "POLL_SECONDS", 0.01)
    release = threading.Event()

    class Waiting(Counting):
        def compare(self, prompts, responses, on_progress=None):
            if len(self.calls) == 3:
                release.wait(20)
            return super().compare(prompts, responses, on_progress)

    def say(self, text):
        told.append(text)
        if "iteration 1 judge" in text:
            release.set()

    told = []
    monkeypatch.setattr(Metrics, "say", say)
    play(Waiting())
    lines = [text for text in told if re.match(r"iteration 1 judge: \d", text)]
    done = [int(text.split()[3].split("/")[0]) for text in lines]
    assert done[0] in range(19)
    assert done == sorted(done)
    assert lines[-1].startswith("iteration 1 judge: 42/42 pairs, ")


def entropy(logit: float) -> float:
    p = 1 / (1 + np.exp(-logit))
    return float(-p * np.log(p) - (1 - p) * np.log(1 - p))


def test_a_report_of_a_run_without_judgements_has_no_table_of_them():
    assert page.judged_rows([{"stage": "fit", "iteration": 1, "step": 0}]) == []


def test_a_resumed_run_asks_for_the_commits_that_it_was_begun_with(tmp_path, monkeypatch):
    from sppo_jax.report import model_card

    run = RunDir(tmp_path)
    assert model_card.judge_sources(run) == {}
    run.manifest.write_text(json.dumps({"judge": {"sources": {"owner/judge": "c" * 40}}}))
    assert model_card.judge_sources(run) == {"owner/judge": "c" * 40}
    run.manifest.write_text(json.dumps({"judge": ["not", "an", "object"]}))
    with pytest.raises(BadInput, match="damaged"):
        model_card.judge_sources(run)


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
        (["--judge.backend", "my:rule", "--judge.total_tokens", "99"], "not heard by judge.backend=my:rule"),
        (
            ["--judge.backend", "my:rule", "--judge.compute_dtype", "float32"],
            "compute_dtype=float32 is PairRM's",
        ),
    ],
)
def test_settings_that_no_judge_would_hear_are_refused(flags, complaint):
    with pytest.raises(BadInput, match=complaint):
        config_file.load(overrides=flags)


def test_limits_reach_the_judge_and_change_what_it_reads():
    def logits(**limits):
        settings = config_file.load(
            overrides=[w for k, v in limits.items() for w in (f"--judge.{k}", str(v))]
        )
        opened = judge.open_judge(settings.judge)
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
