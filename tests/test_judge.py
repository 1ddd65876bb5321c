"""Stage 2 beside stage 1: which prompts are judged when, what is on disk then, and what is judged again."""

import contextlib
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest

from sppo_jax import config, judge, respond
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.judges import CheckedJudge
from sppo_jax.pairrm.mesh_judge import JaxJudge
from sppo_jax.run import progress, shards
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics, read
from sppo_jax.run.stage import Stage
from sppo_jax.text import reading
from tests.stand_ins import PROMPTS, Counting, K, Pod, Streaming, answer


@pytest.fixture
def play(tmp_path):
    """Return a function that samples by a stand-in, judges beside it in a run directory, and returns the preferences."""

    def play(backend, name="run", sampler=None, beside=True, seed=0):
        run = RunDir(tmp_path / name)
        run.root.mkdir(exist_ok=True)
        sampler = sampler or Streaming()
        checked = CheckedJudge(backend, "judge.backend")
        alone = threading.current_thread() is threading.main_thread()
        with Metrics(run) as metrics, metrics.stopping_on_signals() if alone else contextlib.nullcontext():
            stage = Stage(run, 1, seed, shard_prompts=3, made_from={"policy": "p"}, metrics=metrics)
            with judge.Judging(stage, checked, config.Judge(), reading.as_it_is, len(PROMPTS)) as judging:
                if beside:
                    rows = respond.respond(PROMPTS, lambda: sampler, judging, stage)
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
def test_a_run_that_gets_sigterm_ends_with_the_chunk_or_the_pairs_at_hand(tmp_path, play, place):
    class Slow(Counting):
        """A judge that takes 20 seconds, unless the run stops."""

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
    assert pod.waits == [["preferences"]] * 2
    first, second = ([text for call in judge_.calls for text in call] for judge_ in judges)
    texts = [prompt.text for prompt in PROMPTS]
    assert first == (texts if on_mesh else texts[:3] + texts[6:])
    assert second == (texts if on_mesh else texts[3:6])
    assert whole(tmp_path / "run") == whole(tmp_path / "one")
    lines = read(RunDir(tmp_path / "run"))
    assert [line["step"] for line in lines if line["stage"] == "judge_shard"] == [0, 1, 2]


def test_progress_of_what_is_left_to_the_judge_counts_what_is_done(play, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
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
