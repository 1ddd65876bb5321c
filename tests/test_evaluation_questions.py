"""Questions are read from the public benchmarks' own files by their columns, and no row is left out without a word."""

import json

import pytest

from sppo_jax.errors import BadInput
from sppo_jax.evaluation import questions


def read(tmp_path, rows, column="prompt", limit=None):
    path, lines = tmp_path / "rows.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = questions.read(f"jsonl:{path}", split="test", column=column, limit=limit, tell=lines.append)
    return found, lines


@pytest.mark.parametrize(
    ("row", "prompt", "category"),
    [
        ({"instruction": "Why?\n", "output": "x", "generator": "g", "dataset": "koala"}, "Why?\n", "koala"),
        (
            {"question_id": 81, "category": "writing", "turns": ["Compose.", "Again."]},
            "Compose.",
            "writing",
        ),
        ({"uid": "a", "category": "arena-hard-v0.1", "cluster": "Trees", "prompt": "Plant?"}, "Plant?", "arena-hard-v0.1"),
        ({"uid": "a", "category": "hard_prompt", "subcategory": "math", "prompt": "2?"}, "2?", "hard_prompt"),
        ({"question_id": "a", "category": "old", "turns": [{"content": "Old?"}]}, "Old?", "old"),
        ({"prompt": "Plain?"}, "Plain?", ""),
    ],
    ids=["alpaca_eval", "mt_bench", "arena-hard 0.1", "arena-hard 2.0", "arena-hard of 2024", "own"],
)  # fmt: skip
def test_a_benchmarks_row_is_known_by_its_columns(tmp_path, row, prompt, category):
    (question,), _ = read(tmp_path, [row])
    assert (question.prompt, question.category, question.row) == (prompt, category, row)


def test_a_named_column_comes_before_a_benchmarks(tmp_path):
    (question,), _ = read(tmp_path, [{"mine": "Mine?", "instruction": "Theirs?"}], column="mine")
    assert question.prompt == "Mine?"


def test_rows_that_are_left_out_are_counted_and_white_space_is_kept_and_told(tmp_path):
    rows = [{"prompt": "a "}, {"prompt": "b"}, {"prompt": "b"}, {"prompt": " \n"}, {"other": 1}]
    found, lines = read(tmp_path, rows)
    assert [question.prompt for question in found] == ["a ", "b"]
    assert "of 5 rows" in lines[0]
    assert all(reason in lines[0] for reason in ("(repeated)", "(empty)", "(no_text)"))
    assert "1 prompts have white space around them: it is kept" in lines[1]


def test_a_benchmarks_questions_are_told_apart_by_their_ids(tmp_path):
    rows = [{"question_id": n, "category": "math", "turns": ["Same?", "And?"]} for n in (81, 82, 81)]
    found, _ = read(tmp_path, rows)
    assert [question.row["question_id"] for question in found] == [81, 82]


def test_the_limit_counts_questions(tmp_path):
    found, lines = read(
        tmp_path, [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], limit=2
    )
    assert [question.prompt for question in found] == ["a", "b"]
    assert "of 3 rows 1 is repeated" in lines[0]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"text": "Where?"}], "leaves no questions: of 1 row 1 has no text in column 'prompt' .* --prompts.column"),
        ([{"instruction": "Sum up.", "input": "A text.", "output": ""}], "an input beside it"),
    ],
    ids=["another column", "an input beside the instruction"],
)  # fmt: skip
def test_a_source_without_questions_is_refused(tmp_path, rows, line):
    with pytest.raises(BadInput, match=line):
        read(tmp_path, rows)
