"""Training prompts of an iteration with their K responses: what the judge made of them, and what was trained on."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Pair, Preferences, Responses
from sppo_jax.report.samples import printable, prompt_of
from sppo_jax.run.directory import RunDir
from sppo_jax.run.evaluations import Tell

SHARDS = 8  # of an iteration that are read: they are examples, and not worth minutes
SHOWN = 4  # prompts of which the page shows all responses
NAME = re.compile(r"shard-\d+-of-\d+\.parquet")


@dataclass(frozen=True)
class Response:
    """A response with its win rate among the K, in [0, 1]. `role`: best, worst, kept, or empty where it was not trained on."""

    text: str
    win_rate: float
    tokens: int
    cut: bool  # at sampling.max_new_tokens
    role: str


@dataclass(frozen=True)
class Example:
    """A training prompt as messages, and its K responses, the best first. `trained`: whether any of them was trained on."""

    prompt: list[dict[str, str]]
    responses: list[Response]
    trained: bool


def examples(run: RunDir, t: int, tell: Tell) -> list[Example]:
    """Some prompts of iteration t, apart from each other, from the first of its shards.

    Empty where no responses were judged, as of pairs that were given, or where pairs.parquet cannot be read. `tell` gets a
    line about each file that cannot be read.
    """
    found = []
    for shard in shards(run, t, tell):
        found = [(row, rates) for row, judged, _ in shard if (rates := _rates(judged, row)) is not None]
        if found:
            break
    found = found[:: max(1, len(found) // SHOWN)][:SHOWN]
    path = run.pairs(t)
    try:
        if not found or not files.exists(path):
            return []
        pairs = records.read(path, Pair, prompts=[row.prompt_id for row, _ in found])
    except BadInput as error:
        tell(str(error).replace(f"{run.root}/", ""))
        return []
    trained = {pair.prompt_id: pair.response_ids for pair in pairs}
    return [_example(row, rates, trained.get(row.prompt_id) or []) for row, rates in found]


def rows(run: RunDir, t: int, tell: Tell) -> Iterator[tuple[Responses, np.ndarray]]:
    """Responses of iteration t with their P [K, K], from its first shards."""
    for shard in shards(run, t, tell):
        yield from ((row, p) for row, _, p in shard)


def shards(run: RunDir, t: int, tell: Tell) -> Iterator[list[tuple[Responses, Preferences, np.ndarray]]]:
    """Responses, preferences and P [K, K] of the prompts in each of iteration t's first shards, without damaged rows."""
    folder = run.iteration(t) / "preferences"
    names = files.entries(folder) if files.is_dir(folder) else []
    for name in islice(filter(NAME.fullmatch, names), SHARDS):
        path, its = folder / name, run.iteration(t) / "responses" / name
        try:
            judged, answered = records.read(path, Preferences), records.read(its, Responses)
        except BadInput as error:
            tell(str(error).replace(f"{run.root}/", ""))
            continue
        if [row.prompt_id for row in answered] != [row.prompt_id for row in judged]:
            tell(f"{path.relative_to(run.root)}: belongs to other responses")
            continue
        found = [(row, its, _matrix(its, row)) for row, its in zip(answered, judged, strict=True)]
        if any(p is None for *_, p in found):
            tell(f"{path.relative_to(run.root)}: damaged: a row has no prompt, response or probability")
        yield [(row, its, p) for row, its, p in found if p is not None]


def _example(row: Responses, rates: Sequence[float], trained: Sequence[Sequence[int]]) -> Example:
    order = [int(k) for k in np.argsort(-np.asarray(rates), kind="stable")]
    # Equal responses have equal ids: of them the best is the first, and the worst the last.
    roles: dict[int, str] = {}
    for i, ids in enumerate(trained):
        role = "best" if i == 0 else "worst" if i == len(trained) - 1 else "kept"
        same = [k for k in order if row.response_ids[k] == ids and k not in roles]
        if same:
            roles[same[-1] if role == "worst" else same[0]] = role
    shown = [
        Response(
            text=printable(row.responses[k]),
            win_rate=rates[k],
            tokens=len(row.response_ids[k]),
            cut=row.finish_reason[k] == "length",
            role=roles.get(k, ""),
        )
        for k in order
    ]
    return Example(prompt_of(row), shown, bool(roles))


def _rates(judged: Preferences, row: Responses) -> list[float] | None:
    """The win rates of a row's K responses; None where they, or what else an example shows, are not whole."""
    k = len(row.responses)
    columns: list[Any] = [judged.win_rate, row.response_ids, row.finish_reason]
    if any(column is None or len(column) != k or None in column for column in columns):
        return None
    return judged.win_rate if np.isfinite(judged.win_rate).all() else None


def _matrix(judged: Preferences, row: Responses) -> np.ndarray | None:
    """P [K, K] of a row; None where it, or a text of the row, is not whole."""
    responses: list[Any] = row.responses or []  # of a damaged file: anything
    texts = [row.prompt, *responses]
    try:
        p = np.array(judged.probability, np.float64)
    except (TypeError, ValueError):
        return None
    whole = (
        len(texts) > 1 and all(isinstance(text, str) for text in texts) and p.shape == (len(texts) - 1,) * 2
    )
    return p if whole and np.isfinite(p).all() else None
