"""How a judge reads a prompt and the responses to it.

A judge compares texts. A prompt that is a conversation has to become one: as PairRM's authors join it, or as the policy's
chat template renders it. A judge of the user's own reads the prompt as the records hold it (`sppo_jax.text.messages`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from sppo_jax.text import chat_template, thoughts
from sppo_jax.text.messages import messages_of, written

# The prompt and the responses as the judge reads them.
Reading = Callable[[str, Sequence[str]], tuple[str, list[str]]]

# The words of `compare_conversations` in llm-blender 0.0.2, with its spelling: PairRM is to read what it was tried with.
TASK = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."


def as_it_is(prompt: str, responses: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt's text and the responses, unchanged."""
    return prompt, list(responses)


def joined(prompt: str, responses: Sequence[str]) -> tuple[str, list[str]]:
    """What PairRM reads: of a conversation with several turns, what `compare_conversations` of llm-blender makes of it.

    The prompt is then the user's turns with a place for each response, and a candidate all responses: the earlier ones,
    which candidates share, and the last. Of a prompt with a single turn of the user's, its text and the responses as they
    are. llm-blender knows no system message; here it stands before the user's first turn, on lines of its own.
    """
    whole = messages_of(prompt)
    system = [m["content"] for m in whole if m["role"] == "system"]
    rest = [m for m in whole if m["role"] != "system"]
    if len(rest) == 1:
        return "\n".join([*system, rest[0]["content"]]), list(responses)
    lines, earlier, number = list(system), [], 0
    for i, message in enumerate(rest):
        if message["role"] == "assistant":
            earlier.append(f"<Response {number}>: {message['content']}")
            continue
        lines.append("USER: " + message["content"])
        if i + 1 == len(rest) or rest[i + 1]["role"] == "assistant":
            number += 1
            lines.append(f"Assistant: <Response {number}>")
    return TASK + "\n".join(lines), [
        "\n".join([*earlier, f"<Response {number}>: {text}"]) for text in responses
    ]


def rendered(tokenizer: Any, *, without: str = "") -> Reading:
    """A reading of prompts in the chat template of the policy's tokenizer, as the official code has it, with plain responses.

    `without`: an end of the generation header that is left out.
    """

    def read(prompt: str, responses: Sequence[str]) -> tuple[str, list[str]]:
        return chat_template.chat_text(tokenizer, prompt).removesuffix(without), list(responses)

    return read


def answers_only(read: Reading, *, opened: bool) -> Reading:
    """`read` without the thoughts of the assistant's, in earlier turns and in responses.

    `opened`: a response begins inside a thought, which the generation header has opened.
    """

    def without(prompt: str, responses: Sequence[str]) -> tuple[str, list[str]]:
        messages = [
            m | {"content": thoughts.taken_out(m["content"])} if m["role"] == "assistant" else m
            for m in messages_of(prompt)
        ]
        return read(written(messages), [thoughts.taken_out(text, opened=opened) for text in responses])

    return without
