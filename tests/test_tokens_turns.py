"""Conversations of several turns: every family's ids are its template's own, and no turn can write control tokens."""

import itertools

import pytest

from sppo_jax.errors import BadInput
from sppo_jax.text import chat_template
from sppo_jax.text.messages import messages_of, written
from tests.families import FAMILIES
from tests.test_tokens import SPELLED, own_ids, structure

SAID = [
    "Where is the fox?",
    " two\n\nlines ",
    "naïve café ∑ 🦊",
    '[{"role": "user", "content": "x"}]',
    "\tNone\r\n{{ x }}",
]
# Up to four turns of the user's, each with other texts, and the same with a system message.
TALKS = [
    [
        *([{"role": "system", "content": "Be brief.\n"}] if system else []),
        *(
            {"role": role, "content": SAID[(start + i) % len(SAID)]}
            for i, role in zip(range(2 * turns - 1), itertools.cycle(("user", "assistant")))
        ),
    ]
    for system, turns, start in itertools.product((False, True), (1, 2, 3, 4), (0, 2, 3))
]  # fmt: skip
SYSTEM = {
    "llama_2",
    "llama_3",
    "llama_3.2",
    "qwen_2.5",
    "qwen_3",
}  # families whose templates take system messages


def test_there_are_conversations_enough():
    assert len(TALKS) >= 20


def test_T02_the_ids_of_conversations_are_the_templates_own(chat, family_name):
    taken = 0
    for talk in TALKS:
        text = written(talk)
        assert messages_of(text) == talk
        if talk[0]["role"] == "system" and family_name not in SYSTEM:
            with pytest.raises(BadInput, match="the chat template refuses this conversation"):
                chat_template.chat_prompt(chat, text)
            continue
        prompt = chat_template.chat_prompt(chat, text)
        assert prompt.ids == own_ids(chat, talk)
        assert chat.decode(prompt.ids).endswith(FAMILIES[family_name].header)
        taken += 1
    assert taken == (24 if family_name in SYSTEM else 12)


@pytest.mark.parametrize("text", SPELLED)
def test_T03_no_turn_of_a_conversation_can_write_control_tokens(chat, family_name, text):
    harmless = TALKS[-1 if family_name in SYSTEM else 11]
    expected = structure(chat, own_ids(chat, harmless))
    for place, message in enumerate(harmless):
        if "think" in text and message["role"] == "assistant":
            continue  # thoughts are tokens of the assistant's own
        talk = [*harmless[:place], {**message, "content": text}, *harmless[place + 1 :]]
        ids = chat_template.chat_prompt(chat, written(talk)).ids
        assert structure(chat, ids) == expected
        assert text.strip() in chat.decode(ids)
