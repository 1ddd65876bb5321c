"""Conversations of rows: any usual spelling is read, and only the turns that are used are looked at."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax.text import conversations, rows
from sppo_jax.text.source import Source

USER, REPLY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([USER, REPLY], [("user", "Hi?", ""), ("assistant", "Hello.", "")]),
        ({"role": ["user"], "content": ["Hi?"]}, [("user", "Hi?", "")]),
        ({"from": ["human"], "value": ["Hi?"]}, [("user", "Hi?", "")]),
        ([], []),
        ([{"role": "user"}], [("user", None, "no_text")]),
        ([{"role": "user", "content": 3}], [("user", None, "no_text")]),
        ({"role": ["user"], "content": []}, None),
        ({"role": "user", "content": "Hi?"}, None),
        ([[USER, REPLY]], None), ("Hi?", None), (None, None),
    ],
)  # fmt: skip
def test_conversations_of_both_layouts_are_read(value, expected):
    assert conversations.turns(value) == expected


LATER = {
    "null content": {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    "no content": {"role": "assistant", "tool_calls": [{"name": "f"}]},
    "parts with an image": {"role": "assistant", "content": [{"type": "text", "text": "Look:"}, IMAGE]},
    "a number": {"role": "tool", "content": 42},
    "no role": {"content": "x"},
    "null": {"role": None, "content": None},
    "null in place of a message": None,
    "a text in place of a message": "Hello.",
    "a number in place of a message": 3,
    "a list in place of a message": [REPLY],
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER.keys())
def test_what_a_later_message_lacks_costs_no_row(later):
    assert conversations.instruction([USER, later, REPLY]) == ("Hi?", False)


SPELLINGS = {
    "text": "Hi?",
    "role and content": [USER],
    "ShareGPT": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}],
    "ShareGPT as a struct of lists": {"from": ["human", "gpt"], "value": ["Hi?", "Hello."]},
    "both spellings, one null": [{"role": None, "content": None, "from": "human", "value": "Hi?"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]}],
    "parts without types": [{"role": "user", "content": [{"text": "Hi?"}]}],
    "parts that are texts": [{"role": "user", "content": ["Hi?"]}],
    "parts with null columns": [
        {"role": "user", "content": [{"type": "text", "text": "Hi?", "image_url": None}]}
    ],
    "parts as a struct of lists": [{"role": "user", "content": {"type": ["text"], "text": ["Hi?"]}}],
}


@pytest.mark.parametrize("value", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_the_usual_spellings_of_a_prompt_are_the_same_prompt(value):
    assert conversations.instruction(value) == ("Hi?", False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}, USER], "begins_with_system"),
        ([{"role": "system", "content": ""}, USER], "begins_with_system"),
        ([{"role": "developer", "content": "x"}, USER], "begins_with_system"),
        ([{"from": "gpt", "value": "x"}], "begins_with_assistant"),
        ([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}], "not_only_text"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "not_only_text"),
        ([{"role": "user", "content": None}], "no_text"), 
        ([{"role": "tool", "content": "x"}], "unknown_role"), ([{"content": "x"}], "unknown_role"),
        ([{"role": "narrator", "content": "x"}], "unknown_role"), ([{"user": "Human", "message": "x"}], "unknown_role"),
        ([None, USER], "no_text"), ([], "no_text"), (["Hi?"], "no_text"), (3, "no_text"), (None, "no_text"),
    ],
)  # fmt: skip
def test_a_row_that_holds_no_prompt_has_a_precise_reason(value, reason):
    assert conversations.instruction(value) == reason


@pytest.mark.parametrize("key", ["role", "from"])
@pytest.mark.parametrize("role", ["Human", "USER", "user ", " Human\n", "Prompter"])
def test_case_and_space_around_a_role_mean_nothing(key, role):
    text = {"role": "content", "from": "value"}[key]
    talk = [{key: role, text: "Hi?"}, {key: "Assistant ", text: "Hello."}]
    other = [{key: role, text: "Hi?"}, {key: "GPT", text: "No."}]
    assert conversations.instruction(talk) == ("Hi?", False)
    assert conversations.pair(talk, other) == ("Hi?", "Hello.", "No.")
    assert conversations.instruction([{key: "System", text: "x"}, *talk]) == "begins_with_system"


def test_an_unknown_role_in_a_pair_is_said():
    odd = [USER, {"role": "narrator", "content": "x"}]
    assert conversations.pair(odd, [USER, REPLY]) == "unknown_role"
    assert conversations.pair([{"user": "Human", "message": "x"}] * 2, [USER, REPLY]) == "unknown_role"


WRITTEN = [
    [USER, REPLY],
    [{"from": "human", "value": "Hi?"}],
    [{"role": "USER", "content": "Hi?"}, USER | {"n": None}],
]


WRITERS = {
    "JSON": json.dumps,
    "JSON on lines": lambda talk: json.dumps(talk, indent=1),
    "Python": str,
    "numpy": lambda talk: str(np.array([*talk, None], object)[:-1]),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("talk", WRITTEN)
def test_a_conversation_that_is_written_in_a_text_is_that_conversation(write, talk):
    assert conversations.instruction(f" {write(talk)}\n") == conversations.instruction(talk)
    assert conversations.instruction(talk)[0] == "Hi?"


def test_a_pair_of_written_conversations_is_a_pair():
    talks = [[USER, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    assert conversations.pair(json.dumps(talks[0]), str(talks[1])) == ("Hi?", "Yes.", "No.")


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}]', '["user", "content"]', '[{"role": "user", "content": "Hi?"}] Write this as YAML.', "[]", "[{", '{"role": "user", "content": "Hi?"}',
        '[{"role": "user", "content": "Hi?"}, 3]', "[{'role': open('x'), 'content': ''}]", "[{" * 5000 + "}]" * 5000, '[{"role": "user"}]', "[INST] Hi? [/INST]",
    ],
)  # fmt: skip
def test_any_other_text_stays_a_text(text):
    assert conversations.instruction(text) == (text, False)


def test_a_prompt_whose_conversation_goes_on_is_marked():
    assert conversations.instruction([USER, REPLY, USER]) == ("Hi?", True)
    assert conversations.instruction([USER, REPLY]) == ("Hi?", False)


def test_pairs_are_read_in_the_usual_spellings_as_well():
    def turns(response):
        return [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": response}]

    parts = [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}]
    assert conversations.pair(turns("Yes."), [USER, *parts]) == ("Hi?", "Yes.", "No.")
    assert (
        conversations.pair([USER, {"role": "assistant", "content": [IMAGE]}], turns("No.")) == "not_only_text"
    )
    assert conversations.pair([USER, {"role": "assistant", "content": None}], turns("No.")) == "no_text"


def test_conversations_of_parquet_are_read(tmp_path):
    part = pa.struct([("type", pa.large_string()), ("text", pa.large_string()), ("image", pa.binary())])
    kind = pa.large_list(
        pa.struct([("content", pa.list_(part)), ("role", pa.dictionary(pa.int32(), pa.string()))])
    )
    message = {"role": "user", "content": [{"type": "text", "text": "Hi?"}]}
    pq.write_table(pa.table({"messages": pa.array([[message]], kind)}), tmp_path / "rows.parquet")
    (row,) = rows.rows(Source("prompts.source", f"parquet:{tmp_path}/rows.parquet", "train"), ["messages"])
    assert conversations.instruction(row["messages"]) == ("Hi?", False)
