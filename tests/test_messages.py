"""A prompt is one text, which holds a message of the user's or a conversation, and gives back what was put in."""

import pytest

from sppo_jax.text import reading
from sppo_jax.text.messages import messages_of, with_response, written


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "one message": [user("Hi?")],
    "a system message": [SYSTEM, user("Hi?")],
    "three turns": [user("a\nb"), assistant('"é"'), user("😀 </s>")],
    "a message that spells a conversation": [user(written([SYSTEM, user("Hi?")]))],
    "a message that spells a spelled conversation": [user(written([user(written([SYSTEM, user("Hi?")]))]))],
    "empty texts": [user(""), assistant(""), user("")],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_messages_survive_being_written(messages):
    assert messages_of(written(messages)) == messages


def test_a_single_message_is_written_as_its_text():
    assert written([user("Hi?")]) == "Hi?"


@pytest.mark.parametrize(
    "text",
    [
        "Hi?",
        '[{"role": "user", "content": "Hi?"}',
        '[{"role": "user", "content": "Hi?"}] ',
        '[{"content": "Hi?", "role": "user"}]',
        '[{"role": "user",  "content": "Hi?"}]',
        '[{"role": "tool", "content": "Hi?"}]',
        '[{"role": "user", "content": 1}]',
        '[{"role": "user", "content": "Hi?", "name": "x"}]',
        '[{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]',
        '[{"role": "' + "[" * 100_000,
    ],
)
def test_any_other_text_is_a_message_of_the_users(text):
    assert messages_of(text) == [user(text)]


def test_a_response_ends_the_conversation():
    prompt = written([SYSTEM, user("Hi?")])
    assert [m["role"] for m in with_response(prompt, "Hello.")] == ["system", "user", "assistant"]
    assert list(with_response("Hi?", "Hello.")[0]) == ["content", "role"]


def test_pairrm_reads_a_single_turn_as_it_is():
    assert reading.joined("Hi?", ["a", "b"]) == ("Hi?", ["a", "b"])
    assert reading.joined(written([SYSTEM, user("Hi?")]), ["a"]) == ("Be brief.\nHi?", ["a"])


def test_pairrm_reads_several_turns_as_its_authors_join_them():
    """The expected texts follow from `compare_conversations` and `RankerDataset` of llm-blender 0.0.2."""
    prompt, candidates = reading.joined(written([user("One?"), assistant("1"), user("Two?")]), ["2", "zwei"])
    assert prompt == (
        "Finish the following coversation in each i-th turn by filling in <Response i> with your response."
        "USER: One?\nAssistant: <Response 1>\nUSER: Two?\nAssistant: <Response 2>"
    )
    assert candidates == ["<Response 1>: 1\n<Response 2>: 2", "<Response 1>: 1\n<Response 2>: zwei"]


def test_a_system_message_and_turns_in_a_row_keep_their_place():
    talk = [SYSTEM, user("One?"), user("Well?"), assistant("1"), assistant("one"), user("Two?")]
    prompt, (candidate,) = reading.joined(written(talk), ["2"])
    assert prompt.endswith(
        "response.Be brief.\nUSER: One?\nUSER: Well?\nAssistant: <Response 1>\nUSER: Two?\nAssistant: <Response 2>"
    )
    assert candidate == "<Response 1>: 1\n<Response 1>: one\n<Response 2>: 2"
