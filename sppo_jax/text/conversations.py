"""Conversations in rows: the usual spellings of a list of messages become turns, and turns a prompt or a pair.

Only the turns that are used are looked at: what a later message holds, or lacks, does not matter.
"""

import ast
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from sppo_jax.text.messages import ROLES as KNOWN
from sppo_jax.text.messages import messages_of, written

Which = Literal["last", "first"]  # of the user's turns: the one that a prompt ends with
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
WRITTEN_KEYS = (("role", "content"), ("from", "value"))  # of messages in a text
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
LONGEST = 1_000_000  # characters of a text that is tried as a written conversation
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a message's parts that are text
# What the templates of chats put around turns, in texts of one piece.
MARKERS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "[INST]",
    "[/INST]",
)
HEADERS = (("Human:", "Assistant:"), ("User:", "Assistant:"), ("### Instruction:", "### Response:"))


class Turn(NamedTuple):
    """A message: its role and its text. Where `text` is None, `reason` is the name of the count for its row."""

    role: str
    text: str | None
    reason: str = ""


def turns(value: Any) -> list[Turn] | None:
    """Return the turns of a conversation: a list of messages, or a struct of lists; None for anything else.

    A message has `role` and `content`, or `from` and `value` (ShareGPT). Its content is a text, or a list of parts, whose
    texts are joined; with a part that is not text, such as an image, it has no text. A message that is no struct has
    neither role nor text. A text is a conversation if it is such a list, written in JSON or as Python prints it.
    """
    if isinstance(value, str):
        return turns(_written(value))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        messages = [message if isinstance(message, dict) else {} for message in value]
    elif (found := _structs(value, (*ROLE_KEYS, *TEXT_KEYS))) is not None:
        messages = found
    else:
        return None
    return [Turn(_role(message), *_content(_first(message, TEXT_KEYS))) for message in messages]


def prompt(value: Any, which: Which = "last") -> tuple[str, bool] | str:
    """Return the prompt in a column's value, and whether the user says more later, which is left out; or a reason.

    The value is the text itself, or a conversation. `which`: "last", all of it up to the user's last turn, system messages
    included; "first", the user's first turn alone, where the conversation begins with it. The prompt is one text, as
    `messages.written` writes it. The reason, for which the row is skipped, is the name of a count.
    """
    found = turns(value)
    if not found:
        return (_written_prompt([Turn("user", value)]), False) if isinstance(value, str) else "no_text"
    asked = [i for i, turn in enumerate(found) if turn.role == "user"]
    if which == "first":
        used = found[:1]
        if used[0].role == "system":
            return "begins_with_system"
    else:
        used = found[: asked[-1] + 1] if asked else found
    roles = [turn.role for turn in used]
    if reason := _out_of_place(roles):
        return reason
    if reasons := [turn.reason for turn in used if turn.text is None]:
        return reasons[0]
    return _written_prompt(used), asked[-1] >= len(used)


def pair(chosen: Any, rejected: Any) -> tuple[str, str, str] | str:
    """Return (prompt, chosen, rejected) of the two conversations of a pair, or the reason for skipping it.

    They are the same but for their last turn, which is a response. What is before it is the prompt, one text as
    `messages.written` writes it.
    """
    found = [turns(value) for value in (chosen, rejected)]
    if any(conversation is None for conversation in found):
        return "no_text"
    conversations = [conversation or [] for conversation in found]
    if any(turn.role not in KNOWN for turns in conversations for turn in turns):
        return "unknown_role"
    if reasons := [turn.reason for turns in conversations for turn in turns if turn.text is None]:
        return reasons[0]
    if any(not _answers([turn.role for turn in turns]) for turns in conversations):
        return "other_turns"
    (*before, better), (*other, worse) = conversations
    if before != other:
        return "other_prompt"
    text, responses = _written_prompt(before), (str(better.text), str(worse.text))
    if any_empty(text):
        return "empty"
    if not responses[0].strip():
        return "empty_chosen"
    if responses[0] == responses[1]:
        return "identical"
    return (text, *responses) if all(map(is_unicode, (text, *responses))) else "not_unicode"


def any_empty(text: str) -> bool:
    """Return whether a message of a prompt is white space alone."""
    return not all(message["content"].strip() for message in messages_of(text))


def has_markers(text: str) -> bool:
    """Return whether a message of a prompt is probably a whole conversation itself, by what it spells."""
    return any(_has_markers(message["content"]) for message in messages_of(text))


def _has_markers(text: str) -> bool:
    """Return whether a text has a chat template's markers in it, or keys of messages."""
    if any(marker in text for marker in MARKERS):
        return True
    if text.lstrip().startswith(("{", "[", "array(")) and any(
        all(f'"{key}":' in text or f"'{key}':" in text for key in keys) for keys in WRITTEN_KEYS
    ):
        return True
    lines = "\n" + text
    return any(0 <= lines.find("\n" + user) < lines.rfind("\n" + reply) for user, reply in HEADERS)


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which JSON can spell and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _out_of_place(roles: Sequence[str]) -> str:
    """Return the reason for which messages of these roles are not a prompt; "" for a prompt."""
    first = next((role for role in roles if role != "system"), "")
    if first == "assistant":
        return "begins_with_assistant"
    if any(role not in KNOWN for role in roles):
        return "unknown_role"
    return "" if first else "no_user"


def _answers(roles: Sequence[str]) -> bool:
    """Return whether messages of these roles are a prompt and a response to it."""
    return roles[-2:] == ["user", "assistant"] and not _out_of_place(roles)


def _written_prompt(found: Sequence[Turn]) -> str:
    return written([{"role": turn.role, "content": str(turn.text)} for turn in found])


def _structs(value: Any, keys: Sequence[str]) -> list[dict[str, Any]] | None:
    """Return a list of structs, also from a struct of lists, of which those at `keys` are read; else None."""
    if isinstance(value, dict):
        columns = {key: value[key] for key in keys if isinstance(value.get(key), list)}
        if len({len(column) for column in columns.values()}) != 1:
            return None
        rows = zip(*columns.values(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else None


def _first(message: dict[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value at `keys` that is not null: files of mixed rows fill the other spellings with nulls."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _role(message: dict[str, Any]) -> str:
    role = _first(message, ROLE_KEYS)
    role = role.strip().lower() if isinstance(role, str) else ""
    return ROLES.get(role, role)


def _written(text: str) -> Any:
    """Return the list of messages that a text is, as exports of tables to CSV write one; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and text[1:].lstrip().startswith("{")):
        return None
    if len(text) > LONGEST:
        return None
    # numpy prints no commas between items; Python's own texts hold no line feeds, so that these are not in a message.
    readings = (json.loads, ast.literal_eval, lambda text: ast.literal_eval(text.replace("}\n {", "}, {")))
    value = next(
        (value for value in map(functools.partial(_tried, text), readings) if value is not None), None
    )
    if isinstance(value, list) and all(isinstance(item, dict) and _is_message(item) for item in value):
        return value
    return None


def _tried(text: str, read: Callable[[str], Any]) -> Any:
    """Return the value that `read` finds in a text; None where it finds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes in a text that is not Python
            return read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _is_message(item: dict[str, Any]) -> bool:
    return any(isinstance(item.get(role), str) and text in item for role, text in WRITTEN_KEYS)


def _content(value: Any) -> tuple[str | None, str]:
    """Return (text, "") of a message's content, or (None, reason)."""
    if isinstance(value, str):
        return value, ""
    parts = (
        [{"text": part} if isinstance(part, str) else part for part in value]
        if isinstance(value, list)
        else value
    )
    found = _structs(parts, ("type", *TEXT_KEYS))
    if not found:
        return None, "no_text"
    texts = [_first(part, TEXT_KEYS) if part.get("type") in TEXT_PARTS else None for part in found]
    known = [text for text in texts if isinstance(text, str)]
    return ("".join(known), "") if len(known) == len(texts) else (None, "not_only_text")
