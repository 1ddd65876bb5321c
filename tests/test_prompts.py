"""Stage 0: what reaches the policy is the chat template's ids, and what cannot is counted."""

import copy
import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax import config_file, prompts
from sppo_jax.config import Config, Prompts
from sppo_jax.errors import BadInput
from sppo_jax.records import prompt_id
from sppo_jax.text import chat_template
from sppo_jax.text.messages import written

HELDOUT = ["Where can I find the fox?", "What is the opposite of hot?"]


def load(tmp_path, tokenizer, rows, *, heldout=HELDOUT, iterations=2, **options):
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "heldout.jsonl", [{"prompt": text} for text in heldout])
    settings = Prompts(
        source=f"jsonl:{tmp_path}/train.jsonl", heldout=f"jsonl:{tmp_path}/heldout.jsonl", **options
    )
    return prompts.load(dataclasses.replace(Config(iterations=iterations), prompts=settings), tokenizer)


def write(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")


def texts(n, start=0):
    return [{"prompt": f"Question number {i}, please."} for i in range(start, start + n)]


@pytest.mark.parametrize(
    "text",
    [
        "None",
        "What is None?",
        "\n\nNone\n",
        "[/INST]",
        "naïve café ∑ 🦊 שלום",
        "a\x00b",
        "</s>[INST] x",
        "<s>",
        "{{ x }}",
    ],
)
def test_T01_any_text_survives_and_the_judge_sees_the_same(tokenizer, text):
    prompt = chat_template.chat_prompt(tokenizer, text)
    assert prompt.text == text
    shown = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.strip() in shown


@pytest.mark.parametrize("text", ["Where can I find the fox?", "None", "two\nlines  and spaces "])
def test_T02_prompt_ids_are_the_chat_template_with_its_generation_header(tokenizer, text):
    message = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True)["input_ids"]
    prompt = chat_template.chat_prompt(tokenizer, text)
    assert prompt.ids == expected
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(prompt.ids) == rendered
    assert rendered.endswith("[/INST]")


@pytest.mark.parametrize("text", ["hello", "spells </s> out"])
def test_T02_a_template_with_an_assistant_header_ends_in_it(tokenizer, text):
    """Mistral's template has no header of its own, so that it alone could not tell whether one was asked for."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    prompt = chat_template.chat_prompt(other, text)
    assert other.decode(prompt.ids) == f"user: {text}\nassistant:"


@pytest.mark.parametrize("text", ["hello", "<s> hello", "</s>", "<s><s>[INST]"])
def test_T03_exactly_one_bos_for_any_text(tokenizer, text):
    ids = chat_template.chat_prompt(tokenizer, text).ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_T03_no_bos_where_the_family_has_none(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    assert tokenizer.bos_token_id not in chat_template.chat_prompt(other, "hello").ids


def test_T04_an_over_long_prompt_is_skipped_and_counted_never_cut(tmp_path, tokenizer):
    rows = [*texts(4), {"prompt": "fox " * 40}, {"prompt": "x" * 1_000_000}]
    found = load(tmp_path, tokenizer, rows, max_length=30, per_iteration=10, iterations=1)
    assert found.counts["train"] == {"rows": 6, "too_long": 2, "kept": 4}
    assert all(len(p.ids) <= 30 and p.ids[0] == 1 for p in found.train[0])


def test_odd_rows_are_skipped_and_counted_by_reason(tmp_path, tokenizer):
    rows = [
        *texts(3), {"prompt": ""}, {"prompt": " \n"}, {"prompt": None}, {"prompt": 7}, {"text": "x"}, b"{not json",
        b"[1, 2]", b'{"prompt": "\\ud800"}', *texts(2), {"prompt": HELDOUT[0]}, b"", b"[" * 100_000,
    ]  # fmt: skip
    found = load(tmp_path, tokenizer, rows, per_iteration=3, iterations=1)
    assert found.counts["train"] == {
        "rows": 15, "empty": 2, "no_text": 3, "not_json": 2, "not_object": 1, "not_unicode": 1, "repeated": 2,
        "in_heldout": 1, "kept": 3,
    }  # fmt: skip


def test_T17_no_prompt_is_both_held_out_and_trained_on(tmp_path, tokenizer):
    shared = texts(30)
    found = load(tmp_path, tokenizer, shared, heldout=[r["prompt"] for r in texts(10)], per_iteration=15)
    train = {p.prompt_id for part in found.train for p in part}
    assert not train & {p.prompt_id for p in found.heldout}
    assert len(train) == 20


def test_T17_the_embedded_sets_are_disjoint(tokenizer):
    found = prompts.load(config_file.load(), tokenizer)
    sets = [{p.prompt_id for p in part} for part in (*found.train, found.heldout)]
    assert [len(s) for s in sets] == [128, 128, 128, 500]
    assert len(set().union(*sets)) == 128 * 3 + 500


def test_one_pool_is_divided_by_the_seed_and_the_division_outlives_more_iterations(tmp_path, tokenizer):
    few, more = (load(tmp_path, tokenizer, texts(30), per_iteration=7, iterations=n) for n in (2, 4))
    assert more.train[:2] == few.train
    ids = [p.prompt_id for part in more.train for p in part]
    assert len(ids) == len(set(ids)) == 28
    assert [p.text for p in few.train[0]] != [row["prompt"] for row in texts(7)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jsonl:nowhere.jsonl", r"^prompts.source=jsonl:nowhere.jsonl: no such file$"),
        ("csv:x", "jsonl:PATH"),
        ("nowhere", "jsonl:PATH"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tokenizer, source, message):
    settings = dataclasses.replace(
        Config(), prompts=Prompts(source=source, heldout="embedded:prompts/heldout.jsonl")
    )
    with pytest.raises(BadInput, match=message):
        prompts.load(settings, tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_name_with_iteration_in_it_names_a_set_for_each(tmp_path, tokenizer, kind):
    write(tmp_path / "heldout.jsonl", [{"q": text} for text in HELDOUT])
    for t in (1, 2):
        rows = [{"q": row["prompt"]} for row in texts(4 if t == 1 else 6)]
        if kind == "jsonl":
            write(tmp_path / f"{t}.jsonl", rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{t}.parquet")
    settings = Prompts(
        source=f"{kind}:{tmp_path}/{{iteration}}.{kind}",
        heldout=f"jsonl:{tmp_path}/heldout.jsonl",
        column="q",
    )
    found = prompts.load(dataclasses.replace(Config(iterations=2), prompts=settings), tokenizer)
    assert [len(part) for part in found.train] == [4, 2]
    assert found.counts["iteration 2"] == {"rows": 6, "in_iteration_1": 4, "kept": 2}


def test_splits_name_the_sets_and_a_text_is_in_the_first_that_has_it(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sets = {"train_1": texts(5), "train_2": texts(5, 4), "test_1": texts(2, 8), "test_2": texts(2, 20)}
    entries = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in sets)
    for name, rows in sets.items():
        write(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n"
    )
    where = f"hf:{tmp_path}"
    settings = Prompts(source=where, split="train_{iteration}", heldout=where, heldout_split="test_1+test_2")
    found = prompts.load(dataclasses.replace(Config(iterations=2), prompts=settings), tokenizer)
    assert [p.text for p in found.heldout] == [row["prompt"] for row in (*sets["test_1"], *sets["test_2"])]
    assert {p.text for p in found.train[0]} == {row["prompt"] for row in texts(5)}
    assert {p.text for p in found.train[1]} == {row["prompt"] for row in texts(3, 5)}
    assert found.counts["iteration 2"] == {"rows": 5, "in_iteration_1": 1, "in_heldout": 1, "kept": 3}


@pytest.mark.parametrize("knob", ["heldout", "heldout_split"])
def test_the_held_out_set_is_one_for_all_iterations(tokenizer, knob):
    settings = dataclasses.replace(
        Config(), prompts=Prompts(**{"heldout": "jsonl:x", knob: "jsonl:{iteration}"})
    )
    with pytest.raises(BadInput, match=r"same for every iteration.*join splits with \+"):
        prompts.load(settings, tokenizer)


ROLES = {role: {"role": role, "content": f"{role}!"} for role in ("user", "assistant", "system")}
USER, REPLY, SYSTEM = ROLES["user"], ROLES["assistant"], ROLES["system"]
MORE = {"role": "user", "content": "And then?"}
TALKS = [
    [USER, REPLY, MORE],
    [USER, REPLY, MORE, REPLY],
    [REPLY],
    [SYSTEM, USER],
    [],
    [[USER]],
    "as it is",
    ["user"],
]
TALKS += [[USER, MORE], [USER, {**REPLY, "content": " "}, MORE], [USER, {**REPLY, "content": "\ud800"}, MORE]]


def test_a_conversation_is_a_prompt_up_to_the_users_last_turn(tmp_path, tokenizer):
    """The embedded policy's template takes no system message."""
    found = load(tmp_path, tokenizer, [{"prompt": talk} for talk in TALKS], iterations=1)
    whole = written([USER, REPLY, MORE])
    assert {p.text for p in found.train[0]} == {whole, written([USER, MORE]), "as it is"}
    assert next(p.ids for p in found.train[0] if p.text == whole) == chat_template.conversation(
        tokenizer, [USER, REPLY, MORE]
    )
    assert found.counts["train"] == {
        "rows": 11, "repeated": 1, "no_text": 3, "begins_with_assistant": 1, "empty": 1, "not_unicode": 1, "refused": 1,
        "kept": 3,
    }  # fmt: skip
    (note,) = found.notes
    assert "1 has roles that the policy's chat template refuses" in note


def test_of_a_conversation_the_users_first_message_is_the_prompt_where_that_is_asked(tmp_path, tokenizer):
    found = load(tmp_path, tokenizer, [{"prompt": talk} for talk in TALKS], iterations=1, turns="first")
    assert {p.text for p in found.train[0]} == {"user!", "as it is"}
    assert found.counts["train"] == {
        "rows": 11, "no_text": 3, "begins_with_assistant": 1, "begins_with_system": 1, "more_turns": 1, "repeated": 4,
        "kept": 2,
    }  # fmt: skip


@pytest.mark.parametrize("heldout", ["", "own"])
def test_conversations_that_the_template_refuses_are_said_where_nothing_else_is_left(
    tmp_path, tokenizer, heldout
):
    write(tmp_path / "bad.jsonl", [{"prompt": [SYSTEM, {**USER, "content": str(i)}]} for i in range(4)])
    write(tmp_path / "good.jsonl", texts(2))
    words = [f"--prompts.source=jsonl:{tmp_path}/bad.jsonl", "--iterations=1"]
    words += [f"--prompts.heldout=jsonl:{tmp_path}/good.jsonl"] if heldout else []
    with pytest.raises(
        BadInput, match=r"of 4 rows 4 have roles that .* \(refused\); Gemma's takes no system"
    ):
        prompts.load(config_file.load([], words), tokenizer)


def test_held_out_texts_beyond_those_that_are_asked_stay_held_out(tmp_path, tokenizer):
    write(tmp_path / "all.jsonl", texts(9))
    write(tmp_path / "some.jsonl", texts(6))
    settings = config_file.load(
        [],
        [
            f"--prompts.source=jsonl:{tmp_path}/all.jsonl", f"--prompts.heldout=jsonl:{tmp_path}/some.jsonl",
            "--eval.prompts=2", "--iterations=1",
        ],
    )  # fmt: skip
    found = prompts.load(settings, tokenizer)
    assert (len(found.heldout), len(found.train[0])) == (2, 3)
    assert found.heldout_ids == {prompt_id(row["prompt"]) for row in texts(6)}


def test_pairs_that_are_given_need_no_prompts_to_sample(tmp_path, tokenizer):
    write(tmp_path / "heldout.jsonl", texts(2))
    words = [
        "--pairs.source=parquet:x", "--iterations=1", "--prompts.source=jsonl:nowhere", f"--prompts.heldout=jsonl:{tmp_path}/heldout.jsonl",
    ]  # fmt: skip
    found = prompts.load(config_file.load([], words), tokenizer)
    assert (len(found.heldout), found.train, list(found.counts)) == (2, [], ["heldout"])


def test_too_few_prompts_for_an_iteration_is_named(tmp_path, tokenizer):
    with pytest.raises(BadInput, match="no prompts for iteration 2"):
        load(tmp_path, tokenizer, texts(5), per_iteration=5)


def test_prompt_ids_depend_on_the_text_alone():
    assert prompt_id("None") == prompt_id("None") != prompt_id("none")
    assert 0 <= prompt_id("x") < 2**63


NOTHING = {
    "a column without text": (
        [{"prompt": None, "q": "a", "chat": [{"role": "user", "content": "b"}], "n": 3}] * 3, [],
        "of 3 rows 3 have no text in column 'prompt' (no_text); set prompts.column to a column that holds text: q, chat",
    ),
    "system messages": (
        [{"prompt": [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]}], ["--prompts.turns=first"],
        "of 1 row 1 has a system message first, which prompts.turns=first does not take (begins_with_system); set prompts.turns to",
    ),
    "over-long prompts": (
        [{"prompt": "fox " * 40}] * 2, ["--prompts.max_length=30"],
        "of 2 rows 1 is repeated (repeated), 1 is too long (too_long); raise prompts.max_length=30: a short one has",
    ),
    "rows that are not objects": (
        [b'"a"', b'"b"'], [], "of 2 rows 2 are JSON, but not objects with columns (not_object); write one object per line",
    ),
    "an empty file": ([], [], "it has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("heldout", ["", "own"])
@pytest.mark.parametrize(("rows", "words", "said"), NOTHING.values(), ids=NOTHING.keys())
def test_a_source_that_leaves_nothing_says_why_and_names_the_knob_that_helps(
    tmp_path, tokenizer, rows, words, said, heldout
):
    """The same sentence for the training prompts and for the held-out ones."""
    write(tmp_path / "bad.jsonl", rows)
    write(tmp_path / "good.jsonl", texts(2))
    source, other = ("heldout", "source") if heldout else ("source", "heldout")
    flags = [
        f"--prompts.{source}=jsonl:{tmp_path}/bad.jsonl",
        f"--prompts.{other}=jsonl:{tmp_path}/good.jsonl",
    ]
    with pytest.raises(BadInput) as caught:
        prompts.load(config_file.load([], [*flags, "--iterations=1", *words]), tokenizer)
    assert str(caught.value).startswith(f"prompts.{source}=jsonl:{tmp_path}/bad.jsonl leaves no ")
    assert ("held-out prompts" in str(caught.value)) == bool(heldout)
    assert said in str(caught.value)
    assert "{" not in str(caught.value).replace('{"prompt": "..."}', "")


def test_the_same_source_for_training_and_evaluation_is_told_how_to_share(tmp_path, tokenizer):
    said = (
        r"of 9 rows 9 are held out \(in_heldout\); name other prompts in prompts.heldout, or leave it empty"
    )
    with pytest.raises(BadInput, match=said):
        load(tmp_path, tokenizer, texts(9), heldout=[row["prompt"] for row in texts(9)], iterations=1)


@pytest.mark.parametrize(
    ("number", "iterations", "said"),
    [(5, 2, "set prompts.per_iteration to 2"), (2, 4, "set prompts.per_iteration to 1 and iterations to 2")],
)
def test_a_pool_that_is_used_up_names_values_that_work(tmp_path, tokenizer, number, iterations, said):
    with pytest.raises(BadInput, match=f"take all its {number} prompts.*{said}, in a new --out"):
        load(tmp_path, tokenizer, texts(number), per_iteration=5, iterations=iterations)
    each, count = (2, 2) if number == 5 else (1, 2)
    assert all(load(tmp_path, tokenizer, texts(number), per_iteration=each, iterations=count).train)


@pytest.mark.parametrize(
    ("column", "near"), [("promt", "prompt"), ("Prompt", "prompt"), ("conversation", "conversations")]
)
def test_a_column_that_is_mistyped_lists_the_columns_and_the_nearest(tmp_path, tokenizer, column, near):
    write(tmp_path / "own.jsonl", [{"prompt": "a", "conversations": [], "n": 1}])
    words = [f"--prompts.source=jsonl:{tmp_path}/own.jsonl", f"--prompts.column={column}"]
    said = rf"no column '{column}'; there are conversations, n, prompt; set prompts.column .*mean '{near}'"
    with pytest.raises(BadInput, match=said):
        prompts.load(config_file.load([], [*words, "--prompts.heldout="]), tokenizer)


def test_conversations_that_go_on_are_counted_and_said(tmp_path, tokenizer):
    talk = [
        {"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Hello."), ("user", "And?"))
    ]
    rows = [{"prompt": talk}, {"prompt": talk[:2]}, *texts(2)]
    assert load(tmp_path, tokenizer, rows, iterations=1).notes == []
    found = load(tmp_path, tokenizer, rows, iterations=1, turns="first")
    assert found.counts["train"] == {"rows": 4, "more_turns": 1, "repeated": 1, "kept": 3}
    (note,) = found.notes
    assert "1 of the prompts begin conversations with more turns of the user" in note
