"""The questions of an evaluation, from any source of rows: also the public benchmarks' own files, known by their columns."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.text import conversations, rows
from sppo_jax.text.source import Row, Source


@dataclass(frozen=True)
class Question:
    """A prompt (sppo_jax.text.messages), its category ("" without one), and the source's row, for the files' own fields."""

    prompt: str
    category: str = ""
    row: Row = field(default_factory=dict)


def read(
    source: str, *, split: str, column: str, limit: int | None, tell: Callable[[str], None] = lambda _: None
) -> list[Question]:
    """The first `limit` questions of a source, in its order. None is skipped silently: `tell` gets a line about rows without.

    The prompt is in column `turns` (its first one; MT-Bench), else `instruction` (AlpacaEval), else `column`. Raises
    BadInput where the source cannot be read or has no question.
    """
    named, found, skipped = Source("--prompts", source, split), list[Question](), Counter[str]()
    for row in rows.rows(named, None):
        if limit is not None and len(found) == limit:
            break
        if isinstance(row, str):
            skipped[row] += 1
            continue
        prompt = prompt_of(_value(row, column))
        if prompt is None or not prompt.strip() or not conversations.is_unicode(prompt):
            skipped["no_prompt"] += 1
            continue
        found.append(Question(prompt, _category(row), row))
    if not found:
        raise BadInput(
            f"--prompts {source}: no question in column {column!r}; name the column with --prompts.column"
        )
    if skipped:
        tell(f"warning: --prompts {source}: {skipped.total()} rows hold no question and are left out")
    return found


def prompt_of(value: Any) -> str | None:
    """The prompt in a column's value; None where there is none."""
    found = conversations.instruction(value)
    return None if isinstance(found, str) else found[0]


def _value(row: Row, column: str) -> Any:
    if column in row and column != "prompt":
        return row[column]
    if isinstance(row.get("turns"), list) and row["turns"]:
        return row["turns"][0]
    return row.get("prompt", row.get("instruction"))


def _category(row: Row) -> str:
    found = row.get("category", row.get("dataset", ""))
    return found if isinstance(found, str) else ""
