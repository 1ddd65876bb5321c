"""Without a source of held-out prompts, a share of the user's own is held out, the same for every course of the run."""

import json
import random

import pytest

from sppo_jax import config_file, interchange, prompts
from sppo_jax.errors import BadInput
from sppo_jax.interchange import COLUMNS
from sppo_jax.records import prompt_id
from sppo_jax.session import Session

TEXTS = [f"Question number {i}, please." for i in range(60)]


def write(path, texts, column="prompt"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def load(tokenizer, source, *words, iterations=1):
    flags = [f"--prompts.source=jsonl:{source}", "--prompts.heldout=", f"--iterations={iterations}", *words]
    return prompts.load(config_file.load([], flags), tokenizer)


def ids(part):
    return {prompt.prompt_id for prompt in part}


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [(60, [], 6), (59, [], 5), (9, [], 1), (2, [], 1), (60, ["--eval.prompts=4"], 4)],
)
def test_a_tenth_of_ones_own_prompts_is_held_out_and_not_trained_on(
    tmp_path, tokenizer, number, words, expected
):
    write(tmp_path / "own.jsonl", [*TEXTS[:number], *TEXTS[:number]])
    found = load(tokenizer, tmp_path / "own.jsonl", *words)
    assert len(found.heldout) == expected
    assert ids(found.heldout) == found.heldout_ids
    assert ids(found.heldout) | ids(found.train[0]) == {prompt_id(text) for text in TEXTS[:number]}
    assert not ids(found.heldout) & ids(found.train[0])


def test_the_share_is_counted_and_said(tmp_path, tokenizer):
    write(tmp_path / "own.jsonl", TEXTS)
    found = load(tokenizer, tmp_path / "own.jsonl")
    assert found.counts == {
        "heldout": {"held_out_of_prompts_source": 6, "kept": 6},
        "train": {"rows": 60, "in_heldout": 6, "kept": 54},
    }
    session = object.__new__(Session)
    session.config, session.sets = config_file.load(), found
    *counted, note = session.notes()
    assert counted == [
        "prompts, train: 54 of 60 rows used; 6 are held out",
        "prompts, heldout: 6 used",
    ]
    assert note.startswith("prompts.heldout is empty: 6 of the 60 prompts of prompts.source=jsonl:")


OTHER_COURSES = {
    "more iterations": (["--prompts.per_iteration=10"], 5),
    "fewer prompts an iteration": (["--prompts.per_iteration=3"], 1),
    "another seed": (["--seed=7"], 1),
}


@pytest.mark.parametrize(("words", "iterations"), OTHER_COURSES.values(), ids=OTHER_COURSES.keys())
def test_the_share_is_the_same_for_every_course_of_a_run(tmp_path, tokenizer, words, iterations):
    write(tmp_path / "own.jsonl", TEXTS)
    first = load(tokenizer, tmp_path / "own.jsonl", "--prompts.per_iteration=10")
    other = load(tokenizer, tmp_path / "own.jsonl", *words, iterations=iterations)
    assert other.heldout == first.heldout
    assert not ids(other.heldout) & {i for part in other.train for i in ids(part)}


def test_the_share_does_not_depend_on_the_order_of_rows(tmp_path, tokenizer):
    write(tmp_path / "own.jsonl", TEXTS)
    write(tmp_path / "other.jsonl", random.Random(0).sample(TEXTS, len(TEXTS)))
    found = [load(tokenizer, tmp_path / name).heldout for name in ("own.jsonl", "other.jsonl")]
    assert found[0] == found[1]


def test_with_a_set_for_each_iteration_the_share_is_of_the_first_and_apart_from_all(tmp_path, tokenizer):
    write(tmp_path / "1.jsonl", TEXTS[:40])
    write(tmp_path / "2.jsonl", TEXTS)
    one, two = (load(tokenizer, tmp_path / "{iteration}.jsonl", iterations=n) for n in (1, 2))
    assert one.heldout == two.heldout
    assert one.train[0] == two.train[0]
    assert ids(two.heldout) < {prompt_id(text) for text in TEXTS[:40]}
    assert (len(two.heldout), [len(part) for part in two.train]) == (4, [36, 20])
    assert two.counts["iteration 2"] == {"rows": 60, "in_iteration_1": 36, "in_heldout": 4, "kept": 20}


def test_over_long_prompts_are_not_held_out(tmp_path, tokenizer):
    write(tmp_path / "own.jsonl", [*TEXTS[:3], *("fox " * (50 + i) for i in range(57))])
    found = load(tokenizer, tmp_path / "own.jsonl", "--prompts.max_length=30", "--eval.prompts=2")
    assert (len(found.heldout), len(found.train[0])) == (2, 1)
    assert found.counts["train"] == {"rows": 60, "in_heldout": 2, "too_long": 57, "kept": 1}


@pytest.mark.parametrize("texts", [["Only one?"], ["Only one?", " Only one? "]])
def test_a_single_prompt_cannot_be_shared(tmp_path, tokenizer, texts):
    write(tmp_path / "own.jsonl", texts)
    with pytest.raises(BadInput, match=r"prompts.source=.* one distinct prompt.*prompts.heldout"):
        load(tokenizer, tmp_path / "own.jsonl")


def row(text):
    turns = [
        [{"content": text, "role": "user"}, {"content": reply, "role": "assistant"}]
        for reply in ("yes", "no")
    ]
    return dict(zip(COLUMNS, (*turns, 0.8, 0.7, 0.3), strict=True))


def given(source, iterations):
    """Return the configuration of given pairs without held-out prompts; the training prompts are not read."""
    words = [f"--pairs.source=jsonl:{source}", "--prompts.heldout=", "--prompts.source=jsonl:unread"]
    return config_file.load([], [*words, f"--iterations={iterations}"])


def test_with_given_pairs_the_share_is_of_their_prompts_and_left_out_of_the_pairs(tmp_path, tokenizer):
    for t, texts in ((1, TEXTS[:30]), (2, TEXTS)):
        (tmp_path / f"{t}.jsonl").write_text("".join(json.dumps(row(text)) + "\n" for text in texts))
    config = given(f"{tmp_path}/{{iteration}}.jsonl", 2)
    sets = prompts.load(config, tokenizer)
    assert (len(sets.heldout), sets.train) == (3, [])
    assert sets.counts == {"heldout": {"held_out_of_pairs_source": 3, "kept": 3}}
    for t, kept in ((1, 27), (2, 57)):
        pairs, counts = interchange.read(
            config, t, tokenizer, eos=(2,), positions=128, heldout=sets.heldout_ids
        )
        assert counts["in_heldout"] == 3
        assert len(pairs) == kept
        assert not {pair.prompt_id for pair in pairs} & sets.heldout_ids


def test_one_given_pair_cannot_be_shared(tmp_path, tokenizer):
    (tmp_path / "1.jsonl").write_text(json.dumps(row("Only one?")))
    with pytest.raises(BadInput, match=r"pairs.source=.* one distinct prompt.*prompts.heldout"):
        prompts.load(given(f"{tmp_path}/1.jsonl", 1), tokenizer)


def test_a_split_of_no_source_is_not_ignored(tmp_path, tokenizer):
    write(tmp_path / "own.jsonl", TEXTS)
    with pytest.raises(BadInput, match=r"prompts.heldout_split=validation is read with prompts.heldout only"):
        load(tokenizer, tmp_path / "own.jsonl", "--prompts.heldout_split=validation")
