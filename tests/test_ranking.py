"""`python -m sppo_jax.judge`: rows of prompts and responses get the numbers of a run, in their order, however often it is killed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sppo_jax import command, config, judge, main, pairrm, records
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.evaluation import ranked_rows, ranking
from sppo_jax.judges import CheckedJudge
from sppo_jax.records import Preferences, Responses
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.text import reading
from tests.small_game import words

DOCS = (Path(__file__).parents[1] / "docs/judges.md").read_text()
SCORES = ("logits", "probability", "win_rate")
LENGTHS = """
import os, signal
import numpy as np

calls, seen = [], []
end = {}  # after so many calls: a function


class Lengths:
    identity = "lengths"

    def compare(self, prompts, responses, on_progress=None):
        if len(calls) in end:
            end.pop(len(calls))()
        calls.append([len(row) for row in responses])
        seen.extend(prompts)
        lengths = np.array([[len(text) for text in row] for row in responses])
        logits = (lengths[:, :, None] - lengths[:, None, :]) / 7
        on_progress(1, 2)
        return logits


class OnMesh(Lengths):
    on_mesh = True
"""
CONVERSATION = [
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "Cold."},
    {"role": "user", "content": "And big?"},
]
ROWS = [
    {"prompt": "Who?", "responses": ["I", "You and I", "We"]},
    {"prompt": CONVERSATION, "responses": ["small", "tiny"]},
    {"prompt": "Alone?", "responses": ["yes"]},
    {"prompt": "Who?", "responses": ["aa", "bb", "c", "d", "eee"]},
]


@pytest.fixture
def lengths(tmp_path, monkeypatch):
    """The module of a judge that prefers longer responses, which Python finds as `lengths`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "lengths.py").write_text(LENGTHS)
    sys.modules.pop("lengths", None)
    import lengths

    return lengths


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def rank(*flags, backend="lengths:Lengths", source="in.jsonl", out="out.jsonl"):
    ranking.main([f"--in={source}", f"--out={out}", f"--judge.backend={backend}", *flags])
    lines = Path(out).read_text().splitlines() if out.endswith("jsonl") else []
    return [json.loads(line) for line in lines] or pq.read_table(out).to_pylist()


DONE = [".out.jsonl.made_from", "in.jsonl", "out.jsonl"]


def files_here():
    return sorted(path.name for path in Path().iterdir() if not path.name.startswith("lengths"))


def test_each_row_gets_scores_and_ranks_in_the_order_of_the_rows(lengths, tmp_path):
    write(tmp_path / "in.jsonl", ROWS)
    found = rank()
    assert [(row["prompt"], row["responses"]) for row in found] == [
        (row["prompt"], row["responses"]) for row in ROWS
    ]
    assert [row["rank"] for row in found] == [[3, 1, 2], [1, 2], [1], [2, 2, 4, 4, 1]]
    assert found[2] | {"prompt": "", "responses": []} == {
        "prompt": "", "responses": [], "logits": [[0.0]], "probability": [[0.5]], "win_rate": [0.5], "rank": [1],
    }  # fmt: skip
    np.testing.assert_allclose(found[1]["logits"], [[0, 1 / 7], [-1 / 7, 0]])
    np.testing.assert_allclose(found[1]["probability"][0][1], 1 / (1 + np.exp(-1 / 7)))
    assert lengths.calls == [[3], [2], [5]]
    assert files_here() == DONE


def test_equal_rows_are_judged_once(lengths, tmp_path, capsys):
    write(tmp_path / "in.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    found = rank()
    assert found[0] == found[2]
    assert lengths.calls == [[3], [2]]
    assert "judge: 14/14 pairs" in capsys.readouterr().out


def test_parquet_in_and_out_gives_the_same(lengths, tmp_path):
    write(tmp_path / "in.jsonl", ROWS)
    expected = rank()
    found = rank(out="out.parquet")
    for row, other in zip(found, expected, strict=True):
        assert {key: row[key] for key in (*SCORES, "rank", "responses")} == {
            key: other[key] for key in (*SCORES, "rank", "responses")
        }
    assert found[1]["prompt"] == CONVERSATION
    assert found[0]["prompt"] == [{"role": "user", "content": "Who?"}]  # one type for the column
    assert rank(source="parquet:out.parquet", out="again.jsonl")[3] == expected[3]
    write(tmp_path / "texts.jsonl", ROWS[:1])
    assert rank(source="texts.jsonl", out="texts.parquet")[0]["prompt"] == "Who?"


def test_a_judge_on_the_mesh_gets_the_rows_of_a_shard_at_once_by_their_number_of_responses(
    lengths, tmp_path, monkeypatch
):
    write(tmp_path / "in.jsonl", [*ROWS, ROWS[0] | {"prompt": "Whom?"}])
    monkeypatch.setattr(ranked_rows, "TOGETHER", 4)
    found = rank(backend="lengths:OnMesh")
    assert lengths.calls == [[3], [2], [5], [3]]
    monkeypatch.setattr(ranked_rows, "TOGETHER", 5)
    assert rank(backend="lengths:OnMesh", out="again.jsonl") == found
    assert lengths.calls[4:] == [[3, 3], [2], [5]]


@pytest.mark.parametrize("backend", ["Lengths", "OnMesh"])
def test_T16_killed_in_the_middle_it_goes_on_from_what_is_judged(lengths, tmp_path, backend, monkeypatch):
    monkeypatch.setattr(ranked_rows, "TOGETHER", 1)
    write(tmp_path / "in.jsonl", ROWS)
    expected = rank(out="whole.jsonl", backend=f"lengths:{backend}")

    def end():
        raise KeyboardInterrupt

    lengths.calls.clear()
    lengths.end[2] = end
    with pytest.raises(KeyboardInterrupt):
        rank(backend=f"lengths:{backend}")
    assert files_here() == [".out.jsonl.partial.jsonl", ".whole.jsonl.made_from", "in.jsonl", "whole.jsonl"]
    with Path(".out.jsonl.partial.jsonl").open("a") as file:
        file.write('\n{"key": "torn')  # by a crash
    assert rank(backend=f"lengths:{backend}") == expected
    assert lengths.calls == [[3], [2], [5]]
    assert files_here() == [DONE[0], ".whole.jsonl.made_from", *DONE[1:], "whole.jsonl"]


def test_scores_of_another_judge_or_of_other_rows_are_not_taken(lengths, tmp_path):
    write(tmp_path / "in.jsonl", ROWS)

    def kill(after):
        def end():
            raise KeyboardInterrupt

        lengths.calls.clear()
        lengths.end[after] = end
        with pytest.raises(KeyboardInterrupt):
            rank()

    kill(2)
    lengths.Lengths.identity = "other"
    kill(1)
    lengths.calls.clear()
    rank("--judge.estimator=score")
    assert lengths.calls == [[3], [2], [5]]
    Path("out.jsonl").unlink()
    kill(2)
    write(tmp_path / "in.jsonl", [ROWS[0] | {"prompt": "Whom?"}, *ROWS[1:]])
    lengths.calls.clear()
    rank()
    assert lengths.calls == [[3], [5]]  # of the second row they are


def test_killed_between_the_last_file_and_the_end_it_only_cleans_up(lengths, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", ROWS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ranked_rows.Kept, "forget", lambda self: signal.raise_signal(signal.SIGINT) or [][0])
        try:
            rank()
        except IndexError:
            raise KeyboardInterrupt from None
    written = Path("out.jsonl").read_bytes()
    rank()
    assert len(lengths.calls) == 3
    assert (Path("out.jsonl").read_bytes(), files_here()) == (written, DONE)


def test_the_command_of_a_finished_file_prints_its_line_again_and_refuses_another_judge_rows_and_file(
    lengths, tmp_path, capsys
):
    write(tmp_path / "in.jsonl", ROWS)
    first = rank()
    lengths.calls.clear()
    capsys.readouterr()
    assert rank() == first
    assert capsys.readouterr().out.endswith("4 rows written to out.jsonl\n")
    assert lengths.calls == []
    refused = r"--out out.jsonl: the file exists, and is not replaced"
    with pytest.raises(BadInput, match=refused):
        rank("--judge.estimator=score")
    lengths.Lengths.identity = "other"
    with pytest.raises(BadInput, match=refused):
        rank()
    lengths.Lengths.identity = "lengths"
    write(tmp_path / "in.jsonl", ROWS[:3])
    with pytest.raises(BadInput, match=refused):
        rank()
    write(tmp_path / "in.jsonl", ROWS)
    Path("out.jsonl").write_text("notes\n")
    with pytest.raises(BadInput, match=refused):
        rank()
    assert lengths.calls == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code_and_what_is_judged_on_disk(lengths, tmp_path, number, code, capsys):
    write(tmp_path / "in.jsonl", ROWS)
    lengths.end[1] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Terminated) as stop:
        rank()
    assert command.exit_code(stop.value) == code
    lengths.calls.clear()
    rank()
    assert lengths.calls == [[2], [5]]


def test_few_unusable_rows_keep_their_places_and_many_are_refused_by_number(lengths, tmp_path, capsys):
    good = [{"prompt": f"Question {i}?", "responses": ["a", "bb"]} for i in range(300)]
    bad = [{"prompt": "Nothing?", "responses": []}, {"prompt": None, "responses": ["a"]}, "{torn\n"]
    write(tmp_path / "in.jsonl", [*good[:7], bad[0], *good[7:20], *bad[1:], *good[20:]])
    found = rank()
    assert len(found) == 303
    empty = dict.fromkeys((*SCORES, "rank"))
    assert found[7] == {"prompt": "Nothing?", "responses": None} | empty
    assert found[21] == {"prompt": None, "responses": ["a"]} | empty
    assert found[22] == {"prompt": None, "responses": None} | empty
    assert all(row["rank"] == [2, 1] for i, row in enumerate(found) if i not in (7, 21, 22))
    said = capsys.readouterr().out
    assert "row 8 and others cannot be ranked, and have no scores: of 303 rows 1 " in said
    assert rank(out="out.parquet")[7] == found[7]
    write(tmp_path / "in.jsonl", [*good[:7], *bad])
    with pytest.raises(BadInput, match=r"in.jsonl: row 8 cannot be ranked: of 10 rows 1 .*no_responses"):
        rank(out="more.jsonl")


def test_a_models_template_renders_the_prompts(lengths, tmp_path):
    write(tmp_path / "in.jsonl", ROWS[:2])
    rank("--judge.prompt=chat", "--template=embedded:policy")
    assert lengths.seen[0] == "<s>[INST] Who? [/INST]"
    assert lengths.seen[1].endswith("[INST] And big? [/INST]")


UNUSABLE = {
    "no_responses": [
        {"responses": ["a"][:0]},
        {"responses": None},
        {"responses": "a text"},
        {"responses": {}},
    ],
    "not_texts": [{"responses": ["a", 3]}, {"responses": ["a", None]}],
    "not_unicode": [{"responses": ["a", "\ud800"]}, {"prompt": "\ud800"}],
    "empty": [{"prompt": " \n"}, {"prompt": [{"role": "user", "content": ""}]}],
    "no_text": [{"prompt": None}, {"prompt": 7}],
    "ends_with_assistant": [{"prompt": CONVERSATION[:2]}],
    "unknown_role": [{"prompt": [{"role": "tool", "content": "x"}]}],
    "not_only_text": [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_row_that_cannot_be_ranked_is_named(lengths, tmp_path, reason):
    for change in UNUSABLE[reason]:
        write(tmp_path / "in.jsonl", [{"prompt": "Who?", "responses": ["a", "b"]} | change])
        with pytest.raises(BadInput, match=rf"row 1 cannot be ranked: of 1 row 1 .* \({reason}\)"):
            rank()
    assert not lengths.calls


FLAGS = {
    "--in FILE is missing": ["--out=o.jsonl"],
    "--out FILE is missing": ["--in=in.jsonl"],
    "--in none.jsonl: no such file": ["--in=none.jsonl", "--out=o.jsonl"],
    "rows are written as .jsonl or .parquet": ["--in=in.jsonl", "--out=o.csv"],
    "a directory; name a file in it": ["--in=in.jsonl", "--out=."],
    "the file exists, and is not replaced": ["--in=in.jsonl", "--out=in.jsonl"],
    "not a place on this machine": ["--in=in.jsonl", "--out=gs://bucket/o.jsonl"],
    "--fit.eta is not read by this command, which reads --judge.KEY, --prompts.column": ["--in=in.jsonl", "--out=o.jsonl", "--fit.eta=3"],
    "--judge.path is missing": ["--in=in.jsonl", "--out=o.jsonl"],
    "name that model with --template": ["--in=in.jsonl", "--out=o.jsonl", "--judge.path=embedded:pairrm", "--judge.prompt=chat"],
    "no column 'answers'; there are prompt, responses; .*responses.column": ["--in=in.jsonl", "--out=o.jsonl", "--judge.path=embedded:pairrm", "--responses.column=answers"],
    "did you mean '--in'": ["--inn=in.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("said", FLAGS)
def test_a_mistake_on_the_command_line_is_one_line(lengths, tmp_path, said):
    write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(BadInput, match=said) as caught:
        ranking.main(FLAGS[said])
    assert "\n" not in str(caught.value)
    assert files_here() == ["in.jsonl"]


def test_the_command_refuses_a_mistake_without_jax(tmp_path):
    """What it imports is counted, since times depend on the machine."""
    script = (
        "import runpy, sys; sys.argv = ['judge', *sys.argv[1:]]\n"
        "try: runpy.run_module('sppo_jax.judge', run_name='__main__')\n"
        "finally: print('jax' in sys.modules, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    write(tmp_path / "in.jsonl", [{"prompt": "", "responses": ["a", "b"]}])
    words = ["--in", "in.jsonl", "--out", "o.jsonl", "--judge.path", "embedded:pairrm"]
    for flags, code, said in ((words, 2, "row 1 cannot be ranked"), (["--help"], 0, "")):
        done = subprocess.run(
            [sys.executable, "-c", script, *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "False False False"), done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == bool(said)
        assert ("--judge.path" in done.stdout and "Example:" in done.stdout) == (flags == ["--help"])


def test_the_documented_commands_rank(tmp_path, monkeypatch):
    block = re.search(r"## Only ranking.*?```\n(.*?)```", DOCS, re.S)[1].splitlines()
    rule = re.search(r"```python\n(# my_rule.py.*?)```", DOCS, re.S)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rule.py").write_text(rule)
    echo, *commands = block
    Path("answers.jsonl").write_text(shlex.split(echo)[1] + "\n")
    assert len(commands) == 2
    for line in commands:
        python, dash, module, *flags = shlex.split(line.replace("llm-blender/PairRM-hf", "embedded:pairrm"))
        assert (python, dash, module) == ("python", "-m", "sppo_jax.judge")
        ranking.main(flags)
    (by_pairrm,) = map(json.loads, Path("ranked.jsonl").read_text().splitlines())
    assert by_pairrm["rank"][0] == 1
    (by_rule,) = pq.read_table("ranked.parquet").to_pylist()
    assert by_rule["rank"] == [1, 3, 1]


@pytest.mark.usefixtures("single_device")
def test_the_numbers_are_those_of_a_run_bit_for_bit(tmp_path, monkeypatch):
    """By PairRM in its process in a small game, and on the mesh in the judge stage."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "run")
    main.main(words(run.root, judge__backend="torch"))

    def shards(kind, name):
        paths = sorted((run.iteration(1) / name).glob("*.parquet"))
        return [row for path in paths for row in records.read(path, kind)]

    responses, judged = shards(Responses, "responses"), shards(Preferences, "preferences")
    assert len(responses) == 7
    write(tmp_path / "in.jsonl", [{"prompt": row.prompt, "responses": row.responses} for row in responses])
    found = rank("--judge.path=embedded:pairrm", backend="torch")
    assert [[row[key] for key in SCORES] for row in found] == [
        [getattr(row, key) for key in SCORES] for row in judged
    ]

    monkeypatch.setattr(ranked_rows, "TOGETHER", 3)
    found = rank("--judge.path=embedded:pairrm", backend="jax", out="jax.parquet")
    other = RunDir(tmp_path / "other")
    other.root.mkdir()
    checked = CheckedJudge(pairrm.load("embedded:pairrm", "jax"), "judge.backend=jax")
    with Metrics(other) as metrics:
        stage = Stage(other, 1, 0, shard_prompts=3, made_from={}, metrics=metrics)
        with judge.Judging(stage, checked, config.Judge(), reading.joined, len(responses)) as judging:
            judged = judging.finish(responses)
    assert [[row[key] for key in SCORES] for row in found] == [
        [getattr(row, key) for key in SCORES] for row in judged
    ]
    checked.close()
