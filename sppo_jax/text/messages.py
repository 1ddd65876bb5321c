"""A prompt as one text: what the user says, or a conversation written as JSON; and the messages that it holds.

Everything that carries a prompt (records, shards, the report, judges of the user's own) carries this text.
"""

import json
from collections.abc import Sequence

ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # role (one of ROLES) and content


def written(messages: Sequence[Message]) -> str:
    """The text of a prompt: the content of a single message of the user's, else all messages as a JSON list.

    `messages_of` is its inverse. The last message is the user's.
    """
    if len(messages) == 1 and _read(messages[0]["content"]) is None:
        return messages[0]["content"]
    return _dumped(messages)


def messages_of(prompt: str) -> list[Message]:
    """The messages of a prompt. A text that is not exactly as `written` writes a conversation is one of the user's."""
    return _read(prompt) or [{"role": "user", "content": prompt}]


def with_response(prompt: str, response: str) -> list[Message]:
    """The whole conversation of a prompt and a response to it, keys in the order of the official code's columns."""
    whole = [*messages_of(prompt), {"role": "assistant", "content": response}]
    return [{"content": message["content"], "role": message["role"]} for message in whole]


def _dumped(messages: Sequence[Message]) -> str:
    return json.dumps([{key: m[key] for key in ("role", "content")} for m in messages], ensure_ascii=False)


def _read(prompt: str) -> list[Message] | None:
    """The messages of a conversation in the one spelling of `_dumped`; None for any other text."""
    if not prompt.startswith('[{"role": "'):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    known = all(
        isinstance(m, dict)
        and m.keys() == {"role", "content"}
        and m["role"] in ROLES
        and isinstance(m["content"], str)
        for m in found
    )
    return found if known and found[-1]["role"] == "user" and _dumped(found) == prompt else None
