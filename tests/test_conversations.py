"""Conversations of rows: any usual spelling is read, and only the turns that are used are looked at."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax.text import conversations, rows
from sppo_jax.text.messages import messages_of, written
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
    assert conversations.prompt([USER, later, REPLY]) == ("Hi?", False)


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
    assert conversations.prompt(value) == ("Hi?", False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
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
    assert conversations.prompt(value) == conversations.prompt(value, "first") == reason


SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": "And then?"}
TALK = [SYSTEM, USER, REPLY, MORE]


def written_in(key, talk):
    """A conversation with its role at `key`, as ShareGPT or as chats have it."""
    names = {"user": "human", "assistant": "gpt"} if key == "from" else {}
    text = {"role": "content", "from": "value"}[key]
    return [{key: names.get(m["role"], m["role"]), text: m["content"]} for m in talk]


@pytest.mark.parametrize(
    "value",
    [
        TALK, [*TALK, REPLY], [*TALK, {"role": "tool", "content": None}, REPLY],
        written_in("from", [*TALK, REPLY]), json.dumps([*TALK, REPLY]), str(TALK),
        {"from": ["system", "human", "gpt", "human", "gpt"], "value": ["Be brief.", "Hi?", "Hello.", "And then?", "x"]},
        [{"role": "developer", "content": "Be brief."}, *TALK[1:]],
    ],
)  # fmt: skip
def test_a_prompt_is_the_whole_conversation_up_to_the_users_last_turn(value):
    text, more = conversations.prompt(value)
    assert (messages_of(text), more) == (TALK, False)


@pytest.mark.parametrize(
    "talk",
    [[SYSTEM, SYSTEM, USER], [USER, MORE], [USER, REPLY, REPLY, MORE], [USER, REPLY, SYSTEM, MORE], [USER]],
)
def test_any_order_in_which_the_user_begins_is_left_to_the_template(talk):
    assert messages_of(conversations.prompt(talk)[0]) == talk


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        ([SYSTEM], "no_user"), ([SYSTEM, REPLY], "begins_with_assistant"), ([REPLY, USER], "begins_with_assistant"),
        ([SYSTEM, REPLY, USER], "begins_with_assistant"), ([USER, {"role": "tool", "content": "x"}, MORE], "unknown_role"),
        ([{"role": "narrator", "content": "x"}, USER], "unknown_role"),
        ([USER, {"role": "assistant", "content": None}, MORE], "no_text"),
        ([USER, {"role": "assistant", "content": [IMAGE]}, MORE], "not_only_text"),
        ([{"role": "system"}, USER], "no_text"),
    ],
)  # fmt: skip
def test_a_turn_that_cannot_be_read_costs_the_row_where_it_is_used(talk, reason):
    assert conversations.prompt(talk) == reason


@pytest.mark.parametrize("system", [SYSTEM, {"role": "system", "content": ""}, {"role": "developer"}])
def test_the_first_turn_alone_takes_no_system_message(system):
    assert conversations.prompt([system, USER], "first") == "begins_with_system"


def test_markers_and_empty_texts_are_looked_for_in_every_message():
    text, _ = conversations.prompt([USER, REPLY, MORE])
    assert not conversations.has_markers(text)
    assert not conversations.any_empty(text)
    assert conversations.has_markers(conversations.prompt([USER, {**REPLY, "content": "[INST]"}, MORE])[0])
    assert conversations.any_empty(conversations.prompt([{**SYSTEM, "content": " \n"}, USER])[0])


@pytest.mark.parametrize("key", ["role", "from"])
@pytest.mark.parametrize("role", ["Human", "USER", "user ", " Human\n", "Prompter"])
def test_case_and_space_around_a_role_mean_nothing(key, role):
    text = {"role": "content", "from": "value"}[key]
    talk = [{key: role, text: "Hi?"}, {key: "Assistant ", text: "Hello."}]
    other = [{key: role, text: "Hi?"}, {key: "GPT", text: "No."}]
    assert conversations.prompt(talk) == ("Hi?", False)
    assert conversations.pair(talk, other) == ("Hi?", "Hello.", "No.")
    whole, _ = conversations.prompt([{key: "System", text: "x"}, *talk])
    assert [m["role"] for m in messages_of(whole)] == ["system", "user"]


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
    assert conversations.prompt(f" {write(talk)}\n") == conversations.prompt(talk)
    assert conversations.prompt(talk, "first")[0] == "Hi?"


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
    assert conversations.prompt(text) == (text, False)


def test_a_prompt_whose_conversation_goes_on_is_marked():
    assert conversations.prompt([USER, REPLY, USER], "first") == ("Hi?", True)
    assert conversations.prompt([USER, REPLY], "first") == ("Hi?", False)


def test_the_pairs_of_a_conversation_share_all_but_their_last_turn():
    talks = [[*TALK, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    assert conversations.pair(*talks) == (written(TALK), "Yes.", "No.")
    for other, reason in (
        (talks[1][1:], "other_prompt"),
        ([*TALK[:2], {"role": "assistant", "content": "Hello!"}, *talks[1][3:]], "other_prompt"),
        (talks[1][2:], "other_turns"),
        (TALK, "other_turns"),
        ([*talks[1], REPLY], "other_turns"),
        ([*TALK[:2], {"role": "tool", "content": "x"}, *talks[1][2:]], "unknown_role"),
        ([{"role": "system", "content": [IMAGE]}, *talks[1][1:]], "not_only_text"),
    ):
        assert conversations.pair(talks[0], other) == reason
    blank = [[{**SYSTEM, "content": " "}, *talk[1:]] for talk in talks]
    assert conversations.pair(*blank) == "empty"


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
    assert conversations.prompt(row["messages"]) == ("Hi?", False)
