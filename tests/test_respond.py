"""Stage 1 around a sampler that streams: what is on disk when, what is sampled again, and what a run prints of it."""

import json

import jax
import pyarrow.parquet as pq
import pytest

from sppo_jax import respond
from sppo_jax.config import Config
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.run import progress, reused, shards
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from tests.stand_ins import PROMPTS, Pod, Streaming, answer

MADE_FROM = {"policy": "p", "configuration": "c"}


class Following:
    """A stand-in for the judge beside the sampler, which keeps finished prompts and raises `stop` after `after` of them."""

    def __init__(self, directory, stop=None, after=99):
        self.directory, self.taken, self.stop, self.after = directory, {}, stop, after
        self.whole = []  # shards on disk at each call

    def take(self, n, row):
        self.taken[n] = row
        self.whole.append({path.name[6:11] for path in self.directory.glob("*.parquet")})

    def progress(self):
        if len(self.taken) >= self.after:
            raise self.stop
        return {"judged": 2}


@pytest.fixture
def play(tmp_path):
    """Return a function that responds to the prompts in a run directory and returns rows, the sampler and the follower."""

    def play(
        name="run",
        sampler=None,
        stop=None,
        after=99,
        prompts=PROMPTS,
        shard_prompts=3,
        config=None,
        **made_from,
    ):
        run = RunDir(tmp_path / name)
        sampler = sampler or Streaming()
        follower = Following(run.iteration(1) / "responses", stop, after)

        def make():
            sampler.made += 1
            return sampler

        with Metrics(run, config) as metrics:
            stage = Stage(run, 1, 0, shard_prompts, MADE_FROM | made_from, metrics)
            rows = respond.respond(prompts, make, follower, stage)
        return rows, sampler, follower

    return play


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_responses_come_in_the_order_of_the_prompts_whatever_finishes_first(tmp_path, play):
    rows, sampler, follower = play()
    assert rows == [answer(prompt) for prompt in PROMPTS]
    assert sampler.asked == [[prompt.text for prompt in PROMPTS]]  # one stream, though there are three shards
    assert list(follower.taken) != sorted(follower.taken)
    directory = tmp_path / "run/iter_1/responses"
    assert sorted(files(directory)) == [f"shard-0000{i}-of-00003.parquet" for i in range(3)]
    assert pq.read_table(directory / "shard-00001-of-00003.parquet").num_rows == 3


def test_each_prompt_is_handed_on_at_once_and_its_shard_is_on_disk_with_its_last(play):
    _, _, follower = play()
    taken = list(follower.taken)
    for n in range(len(PROMPTS)):
        complete = {
            f"{i:05d}" for i in range(3) if set(range(3 * i, min(3 * i + 3, 7))) <= set(taken[: n + 1])
        }
        assert follower.whole[n] == complete
    assert any(follower.whole[:-1])


@pytest.mark.parametrize("after", [2, 4, 6])
def test_T16_killed_in_the_middle_of_a_shard_what_is_finished_is_not_sampled_again(
    tmp_path, play, capsys, after
):
    play("whole")
    with pytest.raises(Terminated):
        play(stop=Terminated, after=after)
    begun = tmp_path / "run/iter_1/responses"
    kept = "".join(path.read_text() for path in begun.glob(".*.jsonl"))
    finished = {p.text for p in PROMPTS if f'"{p.text}"' in kept}
    for path in begun.glob("*.parquet"):
        finished |= {row["prompt"] for row in pq.read_table(path).to_pylist()}
    capsys.readouterr()
    rows, sampler, follower = play()
    assert after <= len(finished) < 7
    assert sampler.asked == [[p.text for p in PROMPTS if p.text not in finished]]
    assert rows == [answer(prompt) for prompt in PROMPTS]
    assert follower.taken == dict(enumerate(rows))  # the prompts from before too
    assert files(begun) == files(tmp_path / "whole/iter_1/responses")
    assert "iteration 1 respond: 7/7 prompts in " in capsys.readouterr().out.splitlines()[-1]


def test_a_line_that_a_crash_has_cut_costs_its_own_prompt_alone(tmp_path, play):
    def begin(after):
        with pytest.raises(Terminated):
            play(stop=Terminated, after=after, shard_prompts=7)

    begin(after=2)
    lines = tmp_path / "run/iter_1/responses/.shard-00000-of-00001.partial.jsonl"
    lines.write_bytes(lines.read_bytes()[:-9])
    begin(after=4)  # appends to it: 1 from before, and 4
    rows, sampler, _ = play(shard_prompts=7)
    assert len(sampler.asked[0]) == 2
    assert rows == [answer(prompt) for prompt in PROMPTS]


def test_all_rows_of_a_shard_kept_but_the_shard_not_written_asks_for_nothing(tmp_path, play, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", full)
        with pytest.raises(OSError, match="full"):
            play(prompts=PROMPTS[:3])
    assert not list((tmp_path / "run/iter_1/responses").glob("*.parquet"))
    rows, sampler, _ = play(prompts=PROMPTS[:3])
    assert rows == [answer(prompt) for prompt in PROMPTS[:3]]
    assert sampler.made == 0


def test_lines_that_outlived_their_shard_are_cleared_away(tmp_path, play):
    play()
    left = tmp_path / "run/iter_1/responses/.shard-00001-of-00003.partial.jsonl"
    left.write_text("{")
    play()
    assert not left.exists()


def test_T14_a_begun_shard_of_another_policy_is_refused(tmp_path, play):
    with pytest.raises(Terminated):
        play(stop=Terminated, after=2)
    with pytest.raises(BadInput, match=r"partial.jsonl: was made from another policy; choose another --out"):
        play(policy="q")


def test_whole_shards_are_looked_at_before_anything_is_sampled(tmp_path, play):
    play()
    (tmp_path / "run/iter_1/responses/shard-00002-of-00003.parquet").unlink()
    other = [*PROMPTS[:2], answer(PROMPTS[5]), *PROMPTS[3:]]
    sampler = Streaming()
    with pytest.raises(BadInput, match="belongs to other prompts than asked"):
        play(sampler=sampler, prompts=other)
    assert sampler.asked == []


def test_on_a_pod_each_process_makes_its_own_shards_and_reads_all(tmp_path, play, monkeypatch):
    play("one")
    pod = Pod(monkeypatch)
    made = pod.run(lambda i: play())
    assert pod.waits == [["responses"]] * 2
    for (rows, sampler, follower), own in zip(made, ([0, 1, 2, 6], [3, 4, 5]), strict=True):
        assert sampler.asked == [[PROMPTS[n].text for n in own]]
        assert sorted(follower.taken) == own
        assert rows == [answer(prompt) for prompt in PROMPTS]
    assert files(tmp_path / "run/iter_1/responses") == files(tmp_path / "one/iter_1/responses")


def test_a_process_with_nothing_to_do_still_makes_its_sampler_with_the_others(tmp_path, play, monkeypatch):
    play()
    (tmp_path / "run/iter_1/responses/shard-00001-of-00003.parquet").unlink()
    samplers = [Streaming(), Streaming()]
    Pod(monkeypatch).run(lambda i: play(sampler=samplers[i]))
    assert [sampler.made for sampler in samplers] == [1, 1]
    assert [len(sampler.asked) for sampler in samplers] == [1, 0]


def test_where_a_sampler_needs_the_whole_pod_all_sample_the_same_and_the_first_writes(
    tmp_path, play, monkeypatch
):
    play("one")
    with pytest.raises(Terminated):
        play(stop=Terminated, after=4)
    assert list((tmp_path / "run").rglob(".*.jsonl"))
    writers, write = set(), shards.Shards.write

    def spy(self, i, *words):
        writers.add(jax.process_index())
        write(self, i, *words)

    pod = Pod(monkeypatch)
    monkeypatch.setattr(shards.Shards, "write", spy)
    (rows, first, _), (same, second, follower) = pod.run(lambda i: play(sampler=Streaming(alone=False)))
    assert first.asked == second.asked
    assert 0 < len(first.asked[0]) < 5
    on_disk = [prompt.text for prompt in PROMPTS[:3]]  # the judge gets these in every process
    assert sorted(row.prompt for row in follower.taken.values()) == sorted([*on_disk, *second.asked[0]])
    assert rows == same == [answer(prompt) for prompt in PROMPTS]
    assert writers == {0}
    assert files(tmp_path / "run/iter_1/responses") == files(tmp_path / "one/iter_1/responses")


def test_progress_and_metrics_show_tokens_slots_and_the_judge(tmp_path, play, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    rows, _, _ = play()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert "iteration 1 respond: 2/7 prompts, " in shown[0]
    assert " left, tokens/s " in shown[0]
    assert ", slots in use 6, judged 2" in shown[0]
    assert shown[-1].startswith("iteration 1 respond: 7/7 prompts in ")
    [line] = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    tokens = sum(len(ids) for row in rows for ids in row.response_ids)
    assert line["stage"] == "respond"
    assert (line["responses"], line["mean_tokens"]) == (21, tokens / 21)
    assert line["tokens_per_second"] == pytest.approx(tokens / line["seconds"])
    assert line["slot_efficiency"] == pytest.approx(tokens / (4 * 9 * 6))


def test_a_resumed_iteration_keeps_the_speed_of_the_sampling_that_it_does_not_do_again(tmp_path, play):
    play(config=Config())
    play(config=Config())
    first, again = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first.pop("time")
    assert again.pop("time")
    assert first == again
    assert first["tokens_per_second"] > 0


def test_what_is_on_disk_of_an_iteration_is_one_line(tmp_path, play):
    run = RunDir(tmp_path / "run")
    assert reused.line(run, 1, 7, 3) == ""
    with pytest.raises(Terminated):
        play(stop=Terminated, after=4)
    rows = [len(p.read_text().strip().splitlines()) for p in run.iteration(1).rglob(".*.jsonl")]
    whole = len(list(run.iteration(1).rglob("*.parquet")))
    done = sum(rows) + 3 * whole
    assert 4 <= done < 7
    said = "iteration 1 goes on: on disk already, and not made again: "
    assert reused.line(run, 1, 7, 3) == f"{said}responses of {done} of 7 prompts"
    play()
    run.pairs(1).touch()
    (run.checkpoints(1) / "3").mkdir(parents=True)
    (run.checkpoints(1) / "4.orbax-checkpoint-tmp").mkdir()
    assert reused.line(run, 1, 7, 3) == f"{said}responses, pairs and a checkpoint after 3 updates"
    run.export(1).mkdir()
    assert reused.line(run, 1, 7, 3) == f"{said}responses, pairs and the trained policy"


def test_scalars_of_two_threads_are_whole_lines(tmp_path):
    import threading

    def write(metrics, stage):
        for step in range(200):
            metrics.scalars(1, stage, step, value=step / 3)

    with Metrics(RunDir(tmp_path)) as metrics:
        threads = [threading.Thread(target=write, args=(metrics, name)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "a"] == list(range(200))
    assert len(lines) == 400
