"""Responses made elsewhere, in rows: a column with the list of a prompt's responses."""

from typing import Any

from sppo_jax.text import conversations
from sppo_jax.text.conversations import is_unicode
from sppo_jax.text.messages import written


def responses(value: Any) -> list[str] | str:
    """The responses in a column's value, or the reason why its row has none, which is the name of a count."""
    if not isinstance(value, list) or not value:
        return "no_responses"
    if not all(isinstance(text, str) for text in value):
        return "not_texts"
    return value if all(map(is_unicode, value)) else "not_unicode"


def whole_prompt(value: Any) -> str:
    """The prompt in a column's value as one text (text.messages): a text, or a conversation, of which every turn is read.

    Raises Unusable, with the name of a count, unless it can be shown to a judge.
    """
    turns = conversations.turns(value)
    if not turns:
        text = value if isinstance(value, str) else None
        if text is None:
            raise Unusable("no_text")
    else:
        if any(turn.role not in conversations.KNOWN for turn in turns):
            raise Unusable("unknown_role")
        if reason := next((turn.reason for turn in turns if turn.text is None), ""):
            raise Unusable(reason)
        if turns[-1].role != "user":
            raise Unusable("ends_with_assistant")
        text = written([{"role": turn.role, "content": str(turn.text)} for turn in turns])
    if not text.strip() or (turns and not str(turns[-1].text).strip()):
        raise Unusable("empty")
    if not is_unicode(text):
        raise Unusable("not_unicode")
    return text


class Unusable(Exception):
    """A row that cannot be used; the message is the name of the count for it."""
