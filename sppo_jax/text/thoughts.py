"""Thoughts: what a policy writes between `<think>` and `</think>` before it answers, which judges need not read."""

import re
from typing import Any

from sppo_jax.text import chat_template

OPEN, CLOSE = "<think>", "</think>"
SIGNS = (OPEN, CLOSE, "enable_thinking")  # of a template that knows thoughts
THOUGHT = re.compile(f"{OPEN}.*?(?:{CLOSE}|\\Z)", re.DOTALL)
# Of a generation header: a thought that it opens, or an empty one, after which the policy answers at once.
AT_END = re.compile(rf"{OPEN}\s*(?P<closed>{CLOSE}\s*)?\Z")


def strips(knob: str, tokenizer: Any) -> str:
    """Return judge.strip with `auto` resolved: "think" where the chat template knows thoughts, else "none".

    It does where its text names their marks, or the option that switches them. `tokenizer`: None where responses are ranked
    without a policy, of whose template nothing is known.
    """
    if knob != "auto" or tokenizer is None:
        return "none" if knob == "auto" else knob
    return "think" if any(sign in tokenizer.get_chat_template() for sign in SIGNS) else "none"


def of_header(tokenizer: Any) -> tuple[str, bool]:
    """Return the thought at the end of the generation header, "" without, and whether it is open: the response goes on with it."""
    if tokenizer is None:
        return "", False
    shown = chat_template.chat_text(tokenizer, chat_template.PROBE).rpartition(chat_template.PROBE)[2]
    found = AT_END.search(shown)
    return (found[0], found["closed"] is None) if found else ("", False)


def taken_out(text: str, *, opened: bool = False) -> str:
    """Return what an assistant's message says without its thoughts; one that is not closed goes to the end.

    `opened`: the message begins inside a thought. So does one that closes a thought before it opens any.
    """
    first = text.find(CLOSE)
    if opened or (first >= 0 and OPEN not in text[:first]):
        text = OPEN + text
    said = THOUGHT.sub("", text)
    if CLOSE in said:  # of thoughts within thoughts
        said = said.rpartition(CLOSE)[2]
    return said if said == text else said.lstrip()
