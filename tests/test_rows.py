"""The lines about unusual rows: many that are skipped, mixed splits, columns without text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax import config_file, interchange, prompts
from sppo_jax.errors import BadInput
from sppo_jax.session import Session
from sppo_jax.text import rows
from sppo_jax.text.source import Source

TEXTS = [f"Question number {i}, please." for i in range(20)]
OBJECTS = [{"prompt": text} for text in TEXTS]


def write(path, found):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found))
    return path


def load(tokenizer, name, *words):
    flags = [f"--prompts.source={name}", "--prompts.heldout=", "--iterations=1", *words]
    return prompts.load(config_file.load([], flags), tokenizer)


def refused(tokenizer, name, *words):
    with pytest.raises(BadInput) as caught:
        load(tokenizer, name, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MANY = {
    "lines that are not JSON": (["{oops"] * 5, "of 25 rows 5 are not JSON (not_json); write one object per line"),
    "no text": ([{"prompt": None}] * 3, "of 23 rows 3 have no text in column 'prompt' (no_text); is it the right"),
    "unknown roles": ([{"prompt": [{"role": "x", "content": "a"}]}] * 30, "of 50 rows 30 have a message of an unknown role"),
    "too long": ([{"prompt": f"{i} " + "fox " * 3000} for i in range(30)], "of 50 rows 30 are too long (too_long); raise prompts.max_length"),
    "two reasons": (["{oops", {"prompt": " "}, {"prompt": ""}], "of 23 rows 2 are empty (empty), 1 is not JSON (not_json);"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "said"), MANY.values(), ids=MANY.keys())
def test_many_skipped_rows_are_noted_with_reasons_and_advice(tmp_path, tokenizer, bad, said):
    found = load(
        tokenizer, f"jsonl:{write(tmp_path / 'own.jsonl', [*OBJECTS, *bad])}", "--prompts.max_length=60"
    )
    (note,) = [note for note in found.notes if "many rows" in note]
    assert note.startswith("prompts, train: many rows are skipped: ")
    assert said in note


@pytest.mark.parametrize("more", [[], ["{oops"] * 2, OBJECTS * 3])
def test_few_skipped_rows_and_repeated_ones_are_not_noted(tmp_path, tokenizer, more):
    found = load(tokenizer, f"jsonl:{write(tmp_path / 'own.jsonl', [*OBJECTS, *more])}")
    assert not [note for note in found.notes if "many rows" in note]


def turns(text, reply):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def given(text, **other):
    probabilities = {"chosen_probs": 0.8, "chosen_probs_win": 0.7, "chosen_probs_lose": 0.3}
    return {"chosen": turns(text, "yes"), "rejected": turns(text, "no"), **probabilities, **other}


def test_many_skipped_pairs_are_noted_as_well(tmp_path, tokenizer):
    path = write(tmp_path / "1.jsonl", [*(given(t) for t in TEXTS[:4]), given("x", chosen_probs=7)])
    words = [f"--pairs.source=jsonl:{path}", "--prompts.heldout=", "--iterations=1"]
    session = object.__new__(Session)
    session.config = config_file.load([], words)
    session.tokenizer, session.eos = tokenizer, (2,)
    session.architecture = type("Model", (), {"max_positions": 128})
    session.sets = prompts.load(session.config, tokenizer)
    session._given()
    assert "of 5 rows 1 has a probability that is missing or outside [0, 1]" in session.notes()[-1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (["{oops"] * 4, "one distinct prompt (of 5 rows 4 are not JSON (not_json)), of which none"),
        ([{"prompt": 3}, {"prompt": " "}], "1 has no text in column 'prompt' (no_text), 1 is empty (empty)"),
        ([OBJECTS[0]], "one distinct prompt (of 2 rows 1 is repeated (repeated))"),
    ],
)  # fmt: skip
def test_a_single_prompt_that_others_were_skipped_beside_says_why(tmp_path, tokenizer, bad, said):
    name = f"jsonl:{write(tmp_path / 'own.jsonl', [OBJECTS[0], *bad])}"
    assert said in refused(tokenizer, name)


MARKED = [
    "<|im_start|>user\nHi?<|im_end|>", "<s>[INST] Hi? [/INST]", "\n\nHuman: Hi?\n\nAssistant: Hello.",
    "### Instruction:\nHi?\n### Response:\n", "<|start_header_id|>user<|end_header_id|>Hi?", "<start_of_turn>user\nHi?",
    '{"role": ["user"], "content": ["Hi?"]}', "array([{'from': 'human', 'value': 'Hi?'}], dtype=object)",
]  # fmt: skip


def test_texts_with_a_templates_markers_are_counted_and_said(tmp_path, tokenizer):
    plain = ["Human: a noun?", "Explain\nAssistant: then Human:", "What is INST?", '{"from": 3}', "[value]"]
    rows = [*OBJECTS, *({"prompt": text} for text in [*MARKED, *plain])]
    found = load(tokenizer, f"jsonl:{write(tmp_path / 'own.jsonl', rows)}")
    assert found.counts["train"]["template_markers"] == len(MARKED)
    (note,) = [note for note in found.notes if "markers" in note]
    assert note.startswith(f"prompts, train: {len(MARKED)} of the prompts hold a chat template's markers")


SPLITS = [
    ("train.jsonl", "test.jsonl"), ("train-00000.jsonl", "validation-00000.jsonl"), ("data.jsonl", "test_1.jsonl"),
    ("my-train.jsonl.gz", "my-dev.jsonl.gz"), ("TRAIN.jsonl", "Valid.jsonl"), ("a_train.jsonl", "a_eval.jsonl", "b_train.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("names", SPLITS)
def test_files_of_several_splits_are_not_pooled(tmp_path, tokenizer, names, kind):
    for name in names:
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(OBJECTS), tmp_path / f"{name.partition('.')[0]}.parquet")
        else:
            write(tmp_path / name, OBJECTS)
    message = refused(tokenizer, f"{kind}:{tmp_path}")
    assert message.startswith(f"prompts.source={kind}:{tmp_path}: files of several splits in one directory (")
    assert "give one file, or hf:DIR with a split" in message


@pytest.mark.parametrize(
    "names", [["a.jsonl", "b.jsonl"], ["train-1.jsonl", "train-2.jsonl"], ["latest.jsonl", "contest.jsonl"], ["test1.jsonl", "test2.jsonl"]]
)  # fmt: skip
def test_which_files_of_a_directory_are_read_is_said(tmp_path, tokenizer, names):
    for i, name in enumerate(names):
        write(tmp_path / name, OBJECTS[i::2])
    found = load(tokenizer, f"jsonl:{tmp_path}")
    assert (
        f"prompts.source=jsonl:{tmp_path}: 2 files of the directory are read: {', '.join(sorted(names))}"
        in found.notes
    )
    assert found.counts["train"]["rows"] == 20


BINARIZED = {
    "prompt": "a",
    "chosen": turns("a", "b"),
    "rejected": turns("a", "c"),
    "score_chosen": 8.0,
    "score_rejected": 5.0,
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", [BINARIZED, {"chosen": "a", "rejected": "b"}, {"prompt": "a"}])
def test_pairs_without_the_official_columns_name_those_that_are_needed(tmp_path, tokenizer, kind, row):
    path = write(tmp_path / "rows.jsonl", [row])
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path := tmp_path / "rows.parquet")
    config = config_file.load([], [f"--pairs.source={kind}:{path}", "--iterations=1"])
    with pytest.raises(BadInput) as caught:
        interchange.read(config, 1, tokenizer, eos=(2,), positions=128, heldout=())
    for column in interchange.COLUMNS:
        assert column in str(caught.value)
    assert "probabilities from 0 to 1" in str(caught.value)
    assert "did you mean" not in str(caught.value)


SHAPES = {
    "nested": ([{"id": 0, "data": {"prompt": "a"}}] * 2, "none of them holds text or a conversation: write one object per row"),
    "only numbers": ([{"id": 0, "n": 2}] * 2, "none of them holds text or a conversation"),
    "pandas' split": ([{"columns": ["prompt"], "index": [0], "data": [["a"]]}], "one JSON object that holds whole columns"),
    "rows by their ids": ([{"x1": {"prompt": "a"}, "x2": {"prompt": "b"}}], "one JSON object whose values are the rows"),
    "rows by their ids, of another column": ([{"1": {"q": "a"}, "2": {"q": "b"}}], "one JSON object whose values are the rows"),
    "some with text": ([{"id": 0, "q": "a", "data": {}}] * 2, "set prompts.column to one that holds text (q)"),
    "a conversation": ([{"id": 0, "talk": turns("a", "b")}] * 2, "set prompts.column to one that holds text (talk)"),
}  # fmt: skip


@pytest.mark.parametrize(("found", "said"), SHAPES.values(), ids=SHAPES.keys())
def test_only_columns_that_hold_text_are_proposed(tmp_path, tokenizer, found, said):
    assert said in refused(tokenizer, f"jsonl:{write(tmp_path / 'own.jsonl', found)}")


def test_only_columns_that_hold_text_are_proposed_of_parquet_as_well(tmp_path):
    pq.write_table(pa.table({"id": [1], "n": [2.0], "q": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(
        BadInput, match=r"there are id, n, q; set prompts.column to one that holds text \(q\)"
    ):
        list(rows.rows(Source("prompts.source", f"parquet:{tmp_path}/p.parquet", "train"), ["prompt"]))
