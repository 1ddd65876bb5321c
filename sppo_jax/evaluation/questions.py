"""The questions of an evaluation, from any source of rows: also the public benchmarks' own files, known by their columns."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.text import conversations, rows, skipped
from sppo_jax.text.messages import written
from sppo_jax.text.source import COLUMNS, Row, Source, shown_name

KNOB = "--prompts"
# Columns that name a question in its benchmark: two of them may ask the same.
IDS = ("question_id", "uid")


@dataclass(frozen=True)
class Question:
    """A prompt (sppo_jax.text.messages), its category ("" without one), and the source's row, for the files' own fields."""

    prompt: str
    category: str = ""
    row: Row = field(default_factory=dict)


def read(
    source: str,
    *,
    split: str,
    column: str,
    limit: int | None,
    turns: conversations.Which = "last",
    tell: Callable[[str], None] = lambda _: None,
) -> list[Question]:
    """The first `limit` questions of a source (None: all), in its order.

    The prompt of a row is in `column`; in a row without it, the first of `turns` (MT-Bench, and Arena-Hard before April
    2025) or `instruction` (AlpacaEval). It is asked as it is, white space around it included. The category is in
    `category`, or `dataset` (AlpacaEval). A row that is empty, not text or a repetition is left out: a repetition has the
    question_id or uid of an earlier row, or the prompt where it has neither. `turns` as in prompts.turns. `tell` gets a line about such rows, and
    one about prompts with white space around them. Raises BadInput where the source cannot be read or has no question.
    """
    named, seen, columns = Source(KNOB, source, split), set[str](), dict[str, None]()
    found, count = list[Question](), Counter[str]()
    for row in rows.rows(named, None):
        if len(found) == limit:
            break
        count["rows"] += 1
        if isinstance(row, str):
            count[row] += 1
            continue
        columns |= dict.fromkeys(row)
        prompt, reason = _prompt(row, column, turns)
        identity = next((f"{key} {row[key]}" for key in IDS if row.get(key) is not None), prompt)
        reason = reason or ("repeated" if identity in seen else "")
        if reason:
            count[reason] += 1
            continue
        seen.add(identity)
        found.append(Question(prompt, _category(row), row))
    if not found:
        names = ", ".join(map(shown_name, list(columns)[:COLUMNS]))
        advice = f"name the column of the prompts with --prompts.column, one of {names}" if names else ""
        raise skipped.nothing(named, "questions", count, where=f" in column {column!r}", advice=advice)
    if left_out := skipped.described(count, f" in column {column!r}"):
        tell(f"{named}: {left_out}, and left out")
    if spaced := sum(question.prompt != question.prompt.strip() for question in found):
        tell(
            f"{named}: {spaced} prompts have white space around them: it is kept, in what is asked and written"
        )
    return found


def _prompt(row: Row, column: str, turns: conversations.Which) -> tuple[str, str]:
    """(prompt, "") of a row, or ("", the name of the reason why it has none)."""
    value = row.get(column)
    found = conversations.prompt(value, turns) if value is not None else _of_benchmark(row)
    if isinstance(found, str):
        return "", found
    if not found[0].strip():
        return "", "empty"
    return (found[0], "") if conversations.is_unicode(found[0]) else ("", "not_unicode")


def _of_benchmark(row: Row) -> tuple[str, bool] | str:
    """The text of a benchmark's column, which is a message of the user's whatever it spells; or why there is none."""
    turns, text = turns_of(row), row.get("instruction")
    if not turns and row.get("input"):
        raise BadInput(
            f"{KNOB}: rows have an instruction and an input beside it; write both into one column, and name that with "
            "--prompts.column"
        )
    text = turns[0] if turns else text
    return (written([{"role": "user", "content": text}]), False) if isinstance(text, str) else "no_text"


def turns_of(row: Row) -> list[Any]:
    """The texts of a row's `turns`: MT-Bench has texts, Arena-Hard before April 2025 {"content": text}."""
    turns = row.get("turns")
    found = turns if isinstance(turns, list) else []
    return [turn.get("content") if isinstance(turn, dict) else turn for turn in found]


def _category(row: Row) -> str:
    found = next((row[key] for key in ("category", "dataset") if row.get(key)), "")
    return found if isinstance(found, str) else ""
