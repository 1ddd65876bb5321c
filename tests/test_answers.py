"""responses.source: responses that were made elsewhere are judged and trained on, through the stages of a run."""

import dataclasses
import json
import math
import random
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sppo_jax import config, config_file, main, pairs, prompts, records, respond
from sppo_jax.errors import BadInput
from sppo_jax.plan import workload
from sppo_jax.plan.lengths import Lengths
from sppo_jax.records import Responses
from sppo_jax.run import manifest
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.settings import words as command_line
from sppo_jax.text import answers, chat_template
from sppo_jax.tiny import world
from tests import kill_points
from tests.small_game import digest, words
from tests.stand_ins import PROMPTS, Pod, answer

EOS, K = (2,), 3


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def load(tmp_path, tokenizer, rows, *overrides, positions=200):
    """Return the prompts and the given responses of these rows."""
    source = write(tmp_path / "given.jsonl", rows)
    base = [f"--responses.source={source}", f"--sampling.responses={K}", "--iterations=1", *overrides]
    settings = config_file.load([], base)
    reader = answers.Answers(settings, tokenizer, EOS, positions)
    sets = prompts.load(settings, tokenizer, reader)
    return sets, reader.rows(sets.train)


def texts(n, k=K):
    return [
        {"prompt": f"Question number {i}?", "responses": [f"Answer {i}, {j}." for j in range(k)]}
        for i in range(n)
    ]


def test_ids_are_the_tokenizers_of_the_text_in_the_template_with_its_end(tmp_path, tokenizer):
    sets, (rows,) = load(
        tmp_path, tokenizer, [*texts(20), {"prompt": "Ends?", "responses": ["a </s>", "b", "c"]}]
    )
    assert [row.prompt_id for row in rows] == [prompt.prompt_id for prompt in sets.train[0]]
    for row, prompt in zip(rows, sets.train[0], strict=True):
        assert row.prompt_ids == prompt.ids
        assert row.response_ids == [chat_template.written_ids(tokenizer, text, EOS) for text in row.responses]
        assert all(ids[-1] == 2 and ids.count(2) == 1 for ids in row.response_ids)
        assert row.finish_reason == ["stop"] * K
        assert all(map(math.isnan, row.logprobs))


def test_rows_are_skipped_and_counted_by_what_can_be_used_of_their_responses(tmp_path, tokenizer):
    held_out = write(tmp_path / "heldout.jsonl", [{"prompt": "Held out?"}])
    given = [
        {"prompt": "Exactly?", "responses": ["a", "b", "c"]},
        {"prompt": "More?", "responses": ["a", "b", "c", "d", 7]},
        {"prompt": "Mixed?", "responses": ["a", None, " ", "\ud800", "b", 3, "c"]},
        {"prompt": "Long?", "responses": ["a", "x " * 300, "b", "c"]},
        {"prompt": "Few?", "responses": ["a", "b", None]},
        {"prompt": "Text?", "responses": "a, b and c"},
        {"prompt": "None?"},
        {"prompt": "Exactly?", "responses": ["x", "y", "z"]},
        {"prompt": "Held out?", "responses": ["a", "b", "c"]},
        {"prompt": "", "responses": ["a", "b", "c"]},
    ]
    sets, (rows,) = load(tmp_path, tokenizer, given, f"--prompts.heldout={held_out}")
    assert sorted(row.prompt for row in rows) == ["Exactly?", "Long?", "Mixed?", "More?"]
    assert all(row.responses == ["a", "b", "c"] for row in rows)
    assert sets.counts["train"] == {
        "rows": 10, "few_responses": 3, "more_responses": 1, "unusable_responses": 5, "repeated": 1,
        "in_heldout": 1, "empty": 1, "kept": 4,
    }  # fmt: skip


def test_the_held_out_prompts_are_those_of_prompts_source_and_never_trained_on(tmp_path, tokenizer):
    rows = texts(40)
    for row in rows[::7]:
        row["responses"] = row["responses"][:1]  # which changes nothing
    sets, given = load(tmp_path, tokenizer, rows)
    usual = config_file.load(
        [], [f"--prompts.source={write(tmp_path / 'texts.jsonl', rows)}", "--iterations=1"]
    )
    assert sets.heldout == prompts.load(usual, tokenizer).heldout
    assert len(sets.heldout) == 4
    assert not {row.prompt_id for row in given[0]} & sets.heldout_ids
    assert sets.counts["heldout"] == {"held_out_of_responses_source": 4, "kept": 4}


def test_a_pool_is_divided_and_sets_by_iteration_are_kept_apart(tmp_path, tokenizer):
    sets, given = load(tmp_path, tokenizer, texts(30), "--iterations=2", "--prompts.per_iteration=9")
    assert [len(part) for part in given] == [9, 9]
    assert len({row.prompt_id for part in given for row in part}) == 18
    for t in (1, 2):
        write(
            tmp_path / f"set_{t}.jsonl", [row | {"prompt": row["prompt"] + str(t % 2)} for row in texts(20)]
        )
    source = f"--responses.source=jsonl:{tmp_path}/set_{{iteration}}.jsonl"
    sets, given = load(tmp_path, tokenizer, texts(1), source, "--iterations=2")
    assert [len(part) for part in given] == [18, 20]
    assert all(row.prompt.endswith("?0") for row in given[1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": f"Q {i}?", "responses": ["a"]} for i in range(20)], r"18 have too few responses .*lower sampling.responses=3"),
        ([{"prompt": f"Q {i}?", "answers": ["a"]} for i in range(20)], r"no column 'responses'; .*prompts.column and responses.column"),
    ],
)  # fmt: skip
def test_a_source_without_enough_responses_says_which_knob_helps(tmp_path, tokenizer, rows, said):
    with pytest.raises(BadInput, match=rf"^responses.source=jsonl:.*{said}"):
        load(tmp_path, tokenizer, rows)


@pytest.mark.parametrize("other", ["--prompts.source=jsonl:b", "--pairs.source=jsonl:b{iteration}"])
def test_a_second_source_to_train_on_is_refused(other):
    with pytest.raises(
        BadInput, match=r"^responses.source=jsonl:a .*is a second source to train on"
    ) as caught:
        config_file.load([], ["--responses.source=jsonl:a", other])
    assert "\n" not in str(caught.value)


def test_a_configuration_is_written_and_read_back_with_its_own_held_out_share(tmp_path):
    settings = config_file.load([], ["--responses.source=jsonl:a"])
    assert (settings.prompts.source, settings.prompts.heldout) == ("", "")
    (tmp_path / "config.yaml").write_text(config_file.dump(settings))
    assert config_file.load([tmp_path / "config.yaml"]) == settings
    own = ["--model.path=o/m", "--judge.path=o/j", "--responses.source=hf:a/b"]
    assert config_file.load([], own).prompts.source == ""


def test_the_documented_command_is_one_that_main_takes(monkeypatch):
    root = Path(__file__).parents[1]
    section = (root / "docs/prompts.md").read_text().split("## Responses made elsewhere")[1]
    command = re.search(r"```\n(python -m sppo_jax.main .*?)```", section, re.S)[1]
    monkeypatch.chdir(root)
    files, overrides = command_line.split(shlex.split(command.replace("\\\n", " "))[3:], {"--config": True})
    found = config_file.load([file for _, file in files], overrides)
    assert found.responses.column == "all_generated_responses"
    assert (found.prompts.source, found.iterations) == ("", 1)


def test_a_plan_samples_only_held_out_prompts_and_judges_all():
    lengths = Lengths()
    sampled = config_file.load(
        [], ["--prompts.per_iteration=100", "--eval.prompts=10", "--eval.probe_prompts=5"]
    )
    given = dataclasses.replace(sampled, responses=config.Responses(source="jsonl:a"))
    before, after = (workload.workload(c, lengths) for c in (sampled, given))
    assert after.ordered_pairs == before.ordered_pairs
    assert after.sampled_tokens / before.sampled_tokens == pytest.approx((10 + 25) / (500 + 10 + 25))


def test_runs_begun_before_the_section_existed_go_on(tmp_path):
    """Their files name the digest of the configuration: this one was computed before there were these knobs."""
    inputs = {"base_weights": "b", "judge": "j", "prompts_1": "p"}

    def of(settings):
        resolved = {"model.compute_dtype": "float32", "judge.strip": "none"}
        made_from = manifest.Provenance(RunDir(tmp_path), settings, resolved, inputs).made_from(
            0, "prompts_1"
        )
        return made_from["configuration"]

    assert of(config.Config()) == "6751d9230c5373ad984ccca9e1104b6425c9f0737987a5ac06b096259d13edb1"
    assert of(config.Config(responses=config.Responses(column="other"))) != of(config.Config())


def test_responses_without_log_probs_are_left_out_of_the_samplers_gap():
    drawn = [answer(prompt) for prompt in PROMPTS[:2]]
    drawn[0] = dataclasses.replace(drawn[0], logprobs=[float("nan")] * 3)
    chosen = [
        records.Pair([], [], 0.5, 0.5, 0.5, row.prompt_id, row.prompt_ids, row.response_ids[:2], [0.5] * 2, 0.5, [0.0] * 2, [-1.0] * 2)
        for row in drawn
    ]  # fmt: skip
    assert pairs.sampler_gap(chosen, drawn) == pairs.sampler_gap(chosen[1:], drawn[1:])
    assert pairs.sampler_gap(chosen[:1], drawn[:1]) == {}


class Following:
    """A follower that keeps what it gets, and looks at the disk then."""

    def __init__(self, folder):
        self.folder, self.taken = folder, {}

    def take(self, n, row):
        assert (self.folder / f"shard-{n // 3:05d}-of-00003.parquet").exists()
        self.taken[n] = row

    def progress(self):
        return {}


def test_on_a_pod_each_process_writes_its_own_shards_and_reads_all(tmp_path, monkeypatch):
    rows = [dataclasses.replace(answer(prompt), logprobs=[float("nan")] * 3) for prompt in PROMPTS]

    def play(name):
        run = RunDir(tmp_path / name)
        run.root.mkdir(exist_ok=True)
        follower = Following(run.iteration(1) / "responses")
        with Metrics(run) as metrics:
            stage = Stage(run, 1, 0, shard_prompts=3, made_from={"policy": "p"}, metrics=metrics)
            return respond.given(rows, follower, stage), follower

    alone, follower = play("one")
    assert sorted(follower.taken) == list(range(7))
    shared = Pod(monkeypatch).run(lambda i: play("pod"))
    for (found, follower), own in zip(shared, ([0, 1, 2, 6], [3, 4, 5]), strict=True):
        assert sorted(follower.taken) == own
        assert records.digest(found) == records.digest(alone) == records.digest(rows)
    for path in (tmp_path / "one/iter_1/responses").iterdir():
        assert path.read_bytes() == (tmp_path / "pod/iter_1/responses" / path.name).read_bytes()


class Killed(BaseException):
    """Ends the game where a signal would."""


KILLS = [
    ("iter_1/responses/shard-00001-of-00002.parquet", "before"),
    ("iter_2/preferences/shard-00001-of-00002.parquet", "after"),
]


@pytest.mark.usefixtures("single_device")
def test_T16_a_game_on_given_responses_killed_and_resumed_has_the_same_bits(tmp_path, capsys):
    rng = random.Random(0)
    asked = sorted(world.questions())[:24]
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "all": [world.sample_response(text, rng) for _ in range(4)],
        }
        for text in asked
    ]
    rows[3]["all"] = rows[3]["all"][:1]
    source = write(tmp_path / "given.jsonl", rows)

    def game(name):
        return words(
            tmp_path / name, iterations=2, responses__source=source, responses__column="all", prompts__source="",
            prompts__heldout="", prompts__per_iteration=6,
        )  # fmt: skip

    main.main(game("whole"))
    said = capsys.readouterr().out
    whole = tmp_path / "whole"
    counts = json.loads((whole / "manifest.json").read_text())["prompts"]
    assert counts["train"]["more_responses"] == counts["train"]["kept"] == 12
    assert "sampler's log-probs" not in said
    drawn = [
        row for path in sorted(whole.glob("iter_1/responses/*")) for row in records.read(path, Responses)
    ]
    lists = {row["prompt"][0]["content"]: row["all"] for row in rows}
    assert [row.responses for row in drawn] == [lists[row.prompt][:3] for row in drawn]
    trained = {
        pair["prompt_id"]
        for t in (1, 2)
        for pair in pq.read_table(whole / f"iter_{t}/pairs.parquet").to_pylist()
    }
    held_out = pq.read_table(whole / "iter_0/heldout/responses.parquet").to_pylist()
    assert held_out
    assert trained
    assert not trained & {row["prompt_id"] for row in held_out}
    for pair in pq.read_table(whole / "iter_1/pairs.parquet").to_pylist():
        texts = lists[pair["chosen"][0]["content"]]
        assert pair["chosen"][1]["content"] in texts
        assert max(pair["ref_logprob"]) < 0

    for place, when in KILLS:

        def at(path, moment, place=place, when=when):
            if (path, moment) == (place, when):
                raise Killed

        end = kill_points.watch(tmp_path / "killed", at)
        try:
            with pytest.raises(Killed):
                main.main(game("killed"))
        finally:
            end()
    main.main(game("killed"))
    assert digest(tmp_path / "killed", 2) == digest(whole, 2)
    assert kill_points.contents(tmp_path / "killed") == kill_points.contents(whole)

    card = (whole / "iter_1/export/README.md").read_text()
    assert "A judge compares given responses to prompts" in card
    for row in rows:
        row["all"][0] += " Yes."
    (tmp_path / "killed/iter_2/eval.json").unlink()
    write(tmp_path / "given.jsonl", rows)
    with pytest.raises(BadInput, match=r"responses_[12].* differ from when it was begun"):
        main.main(game("killed"))
