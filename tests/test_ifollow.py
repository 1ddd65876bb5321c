"""examples/ifollow.py: what the rule keeps and breaks, what is held out, and how often the judge is wrong."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import ifollow

TASK = "Describe the sea."


@pytest.mark.parametrize(
    ("constraint", "kept", "broken"),
    [
        ("Use exactly 2 sentences.", "The sea is wide. It is blue!", "The sea is 2.5 miles away."),
        ("Answer with exactly 2 lines that each begin with '- '.", "- a wide sea\n\n- blue", "The sea:\n- wide\n- blue"),
        (
            "Answer with nothing but a JSON object that has the keys title and text.",
            '{"title": "sea", "text": "It is blue."}',
            'Here: {"title": "sea", "text": "It is blue."}',
        ),
        ("Use the word 'light'.", "Light falls on the sea.", "The lightest sea."),
        ("Do not use the word 'the'.", "A sea, there and then.", "The sea."),
        ("Write in lower case letters only.", "the sea, 3 miles.", "the Sea"),
        ("Do not use commas.", "The sea.", "The sea, wide."),
        ("Begin with the words 'In short'.", " In short, the sea is wide.", "The sea, in short, is wide."),
        ("End with the words 'The end.'", "The sea is wide. The end.\n", "The end. The sea."),
        ("Use at most 15 words.", "The sea.", "sea " * 16),
        ("Use at least 30 words.", "sea " * 30, "sea " * 29),
    ],
)  # fmt: skip
def test_each_kind_is_read_off_the_prompt_and_kept_or_broken(constraint, kept, broken):
    prompt = f"{TASK} {constraint}"
    assert list(ifollow.checked(prompt, kept).values()) == [1.0]
    ((kind, value),) = ifollow.checked(prompt, broken).items()
    assert 0 <= value < 1
    assert ifollow.oracle().features(prompt, broken)[f"broken: {kind}"] == 1
    assert ifollow.score(prompt, kept) > ifollow.score(prompt, broken) > ifollow.score(prompt, "") == 0


def test_every_kind_has_a_case_above_and_every_prompt_names_its_kinds():
    for name, kind in ifollow.KINDS.items():
        for value in kind.values:
            assert list(ifollow.checked(f"{TASK} {kind.text.format(value)}", "x")) == [name]


def test_topics_and_combinations_are_held_out(tmp_path):
    ifollow.main(["--to", str(tmp_path / "a")])
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "a").glob("*.jsonl"))
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "heldout": 320, "train_1": 160, "train_2": 160, "train_3": 160,
    }  # fmt: skip
    kinds = {
        name: {tuple(ifollow.checked(row["prompt"], "x")) for row in found} for name, found in rows.items()
    }
    texts = [row["prompt"] for found in rows.values() for row in found]
    assert len(set(texts)) == len(texts)
    trained = set().union(*(kinds[f"train_{t}"] for t in (1, 2, 3)))
    new = {
        tuple(ifollow.checked(row["prompt"], "x"))
        for row in rows["heldout"]
        if row["category"] == "new topics and combinations"
    }
    assert new
    assert not new & trained
    assert not any(
        topic in row["prompt"]
        for t in (1, 2, 3)
        for row in rows[f"train_{t}"]
        for topic in ifollow.NEW_TOPICS
    )
    hard = {name for name, kind in ifollow.KINDS.items() if kind.hard}
    assert hard
    assert not hard & {name for found in kinds.values() for names in found for name in names}
    assert hard <= {name for found in ifollow.combinations(hard=True) for names in found for name in names}
    with pytest.raises(SystemExit):
        ifollow.main(["--to", str(tmp_path / "a")])  # nothing is overwritten
    again = tmp_path / "b"
    ifollow.write(again)
    assert (again / "train_1.jsonl").read_bytes() == (tmp_path / "a/train_1.jsonl").read_bytes()


def test_the_judge_is_wrong_about_its_share_and_the_oracle_never():
    prompt = f"{TASK} Use at most 15 words."
    texts = ["sea " * n for n in range(1, 61)]
    judge, oracle = (made.compare([prompt], [texts])[0] for made in (ifollow.judge(), ifollow.oracle()))
    np.testing.assert_array_equal(judge, -judge.T)
    different = np.triu(oracle != 0)
    wrong = (judge != oracle)[different]
    assert ifollow.NOISE - 0.03 < wrong.mean() < ifollow.NOISE + 0.03
    np.testing.assert_array_equal(np.abs(judge), np.abs(oracle))
    scores = [ifollow.score(prompt, text) for text in texts]
    np.testing.assert_allclose(oracle[0, 40], ifollow.SHARPNESS * (scores[0] - scores[40]))
    assert ifollow.judge().identity != ifollow.oracle().identity


def test_a_run_is_measured_against_its_base_over_the_same_prompts(tmp_path, capsys):
    rows = [f"Describe the sea. Do not use the word '{word}'." for word in ("the", "and", "is", "it")]
    texts = {0: [["the and is it sea", "a wide sea"]] * 4, 1: [["a wide sea"]] * 3 + [["it"]]}
    for t, responses in texts.items():
        folder = tmp_path / f"iter_{t}" / "heldout"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"prompt": rows, "responses": responses}), folder / "responses.parquet")
    ifollow.main(["--run", str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "iteration 0: constraints met 0.500"
    assert shown[3] == "iteration 1: constraints met 0.750, +0.250 +- 0.490"  # 1.96 x .5 / 2
    with pytest.raises(SystemExit):
        ifollow.main(["--run", str(tmp_path / "other")])
