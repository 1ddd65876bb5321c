"""MT-Bench: two turns of each question, the second in sight of the first's answer, as the lines that FastChat reads."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sppo_jax.errors import BadInput
from sppo_jax.evaluation import presets
from sppo_jax.evaluation.questions import Question, turns_of
from sppo_jax.text.messages import Message, written

IDS = range(81, 161)  # question_id of MT-Bench's 80 questions
TURNS = 2
SHOWN = 5  # ids in a message
ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # of the package shortuuid

Respond = Callable[[Sequence[str], float], list[str]]


def check(questions: Sequence[Question]) -> None:
    """Raise BadInput unless each question has an integer question_id of its own and two turns of text."""
    seen = set()
    for question in questions:
        number, turns = question.row.get("question_id"), turns_of(question.row)
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadInput(
                f"mt_bench needs question_id, an integer, found {number!r}; give FastChat's data/mt_bench/question.jsonl "
                "in --prompts"
            )
        if len(turns) != TURNS or not all(isinstance(turn, str) for turn in turns):
            raise BadInput(f"question {number}: mt_bench needs `turns`, a list of {TURNS} texts")
        if number in seen:
            raise BadInput(f"question {number} is there twice")
        seen.add(number)


def answers(questions: Sequence[Question], respond: Respond) -> list[list[str]]:
    """The answers to both turns of each question, without the white space around them.

    `respond(prompts, temperature)` returns one response to each prompt. It is called for one turn and one temperature at
    a time, that of the questions' categories, in ascending order. The second turn's prompt is the first turn, its answer
    and the second turn. Raises BadInput as `check` does.
    """
    check(questions)
    talks: list[list[Message]] = [[] for _ in questions]
    by_temperature = defaultdict(list)
    for n, question in enumerate(questions):
        by_temperature[presets.temperature(question.category)].append(n)
    for turn in range(TURNS):
        for temperature, group in sorted(by_temperature.items()):
            for n in group:
                talks[n].append({"role": "user", "content": turns_of(questions[n].row)[turn]})
            responses = respond([written(talks[n]) for n in group], temperature)
            for n, response in zip(group, responses, strict=True):
                talks[n].append({"role": "assistant", "content": response.strip()})
    return [[message["content"] for message in talk if message["role"] == "assistant"] for talk in talks]


def lines(
    questions: Sequence[Question], outputs: Sequence[Sequence[str]], model: str, tstamp: float
) -> list[str]:
    """The file's lines, by question_id. The same arguments give the same bytes. Raises BadInput as `check` does."""
    check(questions)
    found = {}
    for question, turns in zip(questions, outputs, strict=True):
        number, said = question.row["question_id"], [turn.strip() for turn in turns]
        if len(said) != TURNS:
            raise ValueError(f"question {number}: {len(said)} answers, expected {TURNS}")
        found[number] = {
            "question_id": number,
            "answer_id": short_id(model, str(number), *said),
            "model_id": model,
            "choices": [{"index": 0, "turns": said}],
            "tstamp": tstamp,
        }
    return [json.dumps(found[number]) for number in sorted(found)]


def notes(path: Path, questions: Sequence[Question], outputs: Sequence[Sequence[str]]) -> list[str]:
    """Sentences about questions of MT-Bench that are missing, and about empty answers."""
    said = []
    if missing := sorted(set(IDS) - {question.row["question_id"] for question in questions}):
        shown = ", ".join(map(str, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
        said.append(
            f"{path}: {len(missing)} of MT-Bench's {len(IDS)} questions are missing ({shown}), at which FastChat's judge stops"
        )
    if empty := sum(not turn.strip() for turns in outputs for turn in turns):
        said.append(f"{path}: {empty} answers are empty")
    return said


def short_id(*parts: str) -> str:
    """22 letters and digits as the package shortuuid writes an id, from a digest of the parts instead of chance."""
    digest = hashlib.sha256(json.dumps(parts).encode("utf-8")).digest()
    number, letters = int.from_bytes(digest[:16], "big"), ""
    for _ in range(22):
        number, rest = divmod(number, len(ALPHABET))
        letters = ALPHABET[rest] + letters
    return letters
