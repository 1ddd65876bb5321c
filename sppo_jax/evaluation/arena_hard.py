"""Arena-Hard: one response to each question, as the lines that arena-hard-auto reads, with what it counts in an answer."""

import json
import re
from collections.abc import Sequence
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.evaluation.mt_bench import short_id
from sppo_jax.evaluation.questions import IDS, Question
from sppo_jax.text.messages import messages_of

ARENA_FORMATS = ("current", "2024")
# The models whose tokens the benchmark's scripts count, by format.
COUNTED = {"current": "gpt-4o", "2024": "gpt-3.5-turbo"}
CODE = re.compile("```([^`]*)```")


def check(questions: Sequence[Question], arena_format: str) -> None:
    """Raise BadInput unless each question has an id of its own and is a single message."""
    if arena_format not in ARENA_FORMATS:
        raise BadInput(f"--arena-format {arena_format}: must be one of {', '.join(ARENA_FORMATS)}")
    seen = set()
    for question in questions:
        identity = _identity(question)
        if not identity:
            raise BadInput(
                "arena_hard needs uid (before April 2025: question_id), a text; give arena-hard-auto's "
                "data/arena-hard-v0.1/question.jsonl or v2.0's in --prompts"
            )
        if len(messages_of(question.prompt)) > 1:
            raise BadInput(f"question {identity}: arena_hard's questions are single messages")
        if identity in seen:
            raise BadInput(f"question {identity} is there twice")
        seen.add(identity)


def lines(
    questions: Sequence[Question], outputs: Sequence[str], model: str, tstamp: float, arena_format: str
) -> tuple[list[str], list[str]]:
    """The file's lines, in the questions' order, and sentences about them. The same arguments give the same bytes.

    Raises BadInput as `check` does.
    """
    check(questions, arena_format)
    said = [output.strip() for output in outputs]
    counts, notes = _metadata(said, arena_format)
    write = _current if arena_format == "current" else _of_2024
    written = [
        json.dumps(write(question, answer, model, tstamp, count))
        for question, answer, count in zip(questions, said, counts, strict=True)
    ]
    if empty := said.count(""):
        notes.append(
            f"{empty} answers are empty: show_result.py --control-features divides by their length, 0"
        )
    return written, notes


def markdown(answer: str) -> dict[str, dict[str, int]]:
    """The headers, list items and bold passages of an answer, as the benchmark counts them.

    What stands between two ``` is taken out first, wherever the same text occurs; the marks themselves stay.
    """
    for block in CODE.findall(answer):
        answer = answer.replace(block, "")
    return {
        "header_count": {f"h{n}": _count(rf"^#{{{n}}}\s", answer) for n in range(1, 7)},
        "list_count": {
            "ordered": _count(r"^\s*\d+\.\s", answer),
            "unordered": _count(r"^\s*[-*+]\s", answer),
        },
        "bold_count": {"**": _count(r"\*\*[^*\n]+\*\*", answer), "__": _count(r"__[^_\n]+__", answer)},
    }


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def _metadata(answers: Sequence[str], arena_format: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What is counted in each answer, or {} for each and the reason.

    The reader tells the counts by their places, the length first: without a length the others would be taken for it, so
    that there are all or none.
    """
    model = COUNTED[arena_format]
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(model)
    except Exception as error:  # of the import, or of the network's library
        reason = f"the table of tokens of {model} cannot be loaded ({type(error).__name__}); it comes from the network, once"
        if isinstance(error, ImportError):
            reason = "tiktoken is not installed (pip install -e .[arena-hard])"
        none: list[dict[str, Any]] = [{} for _ in answers]
        return none, [
            f"no metadata: {reason}; the answers can be judged, but show_result.py --control-features cannot read them until "
            "the benchmark's utils/add_markdown_info.py has added it"
        ]
    return [
        {"token_len": len(encoding.encode(answer, disallowed_special=()))} | markdown(answer)
        for answer in answers
    ], []


def _identity(question: Question) -> str:
    found = next((question.row[key] for key in reversed(IDS) if question.row.get(key) is not None), "")
    return found if isinstance(found, str) else ""


def _current(
    question: Question, answer: str, model: str, tstamp: float, counts: dict[str, Any]
) -> dict[str, Any]:
    identity = _identity(question)
    return {
        "uid": identity,
        "ans_id": short_id(model, identity, answer),
        "model": model,
        "messages": [*messages_of(question.prompt), {"role": "assistant", "content": {"answer": answer}}],
        "tstamp": tstamp,
    } | ({"metadata": counts} if counts else {})


def _of_2024(
    question: Question, answer: str, model: str, tstamp: float, counts: dict[str, Any]
) -> dict[str, Any]:
    identity = _identity(question)
    return {
        "question_id": identity,
        "answer_id": short_id(model, identity, answer),
        "model_id": model,
        "choices": [{"index": 0, "turns": [{"content": answer}]}],
        "tstamp": tstamp,
    } | ({"conv_metadata": counts} if counts else {})
