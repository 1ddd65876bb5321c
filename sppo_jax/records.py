"""The records that pass from stage to stage, and their parquet form: Prompt, Responses, Preferences, Pair."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sppo_jax.errors import BadInput, one_line
from sppo_jax.files import replacing


@dataclass(frozen=True)
class Prompt:
    """An instruction and its token ids with the chat template, generation header included."""

    text: str
    ids: list[int]

    @property
    def prompt_id(self) -> int:
        """The id of the instruction: the function `prompt_id` of its text."""
        return prompt_id(self.text)


@dataclass(frozen=True)
class Responses:
    """K responses to one prompt. `response_ids` are the sampled ids, with the end of sequence if it was sampled.

    Of responses that were made elsewhere (responses.source) they are the tokenizer's ids of the text, with its end.
    """

    prompt_id: int
    prompt: str
    prompt_ids: list[int]
    response_ids: list[list[int]]
    responses: list[str]
    finish_reason: list[str]  # stop: an id that ends a response was sampled; length: cut at max_new_tokens
    logprobs: list[float]  # log pi(y|x) at temperature 1, nats; NaN of responses made elsewhere


@dataclass(frozen=True)
class Preferences:
    """The judge's comparisons of one prompt's K responses, in the order of the responses."""

    prompt_id: int
    logits: list[list[float]]  # [i][j]: i shown first against j
    probability: list[list[float]]  # P(i > j)
    win_rate: list[float]
    estimator: str


@dataclass(frozen=True)
class Pair:
    """One prompt's training data: R responses, best first, worst last (R is 2, or K for pairs.select=all).

    The first five columns are the interchange of the official code.
    """

    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    chosen_probs: float  # P(chosen > rejected)
    chosen_probs_win: float  # win rate of the chosen
    chosen_probs_lose: float  # win rate of the rejected
    prompt_id: int
    prompt_ids: list[int]
    response_ids: list[list[int]]
    win_rate: list[float]
    baseline: float  # payoff whose target is 0: 1/2, or the prompt's log Z / eta; 0 with scores
    target: list[float]  # eta (payoff - baseline), which the log-ratio is regressed on, nats
    ref_logprob: list[float]  # log pi_t(y|x), nats
    score: list[float] | None = None  # with judge.target=score: mean of the judge's scores, nats
    base_logprob: list[float] | None = None  # with fit.anchor: log pi_0(y|x), nats

    @property
    def payoff(self) -> list[float]:
        """What the judge says of each response, and its order: the mean score where there is one, else the win rate."""
        return self.win_rate if self.score is None else self.score


_message = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
_ids, _doubles = pa.list_(pa.int32()), pa.list_(pa.float64())
SCHEMAS: dict[type, pa.Schema] = {
    Responses: pa.schema(
        [
            ("prompt_id", pa.int64()),
            ("prompt", pa.string()),
            ("prompt_ids", _ids),
            ("response_ids", pa.list_(_ids)),
            ("responses", pa.list_(pa.string())),
            ("finish_reason", pa.list_(pa.string())),
            ("logprobs", _doubles),
        ]
    ),
    Preferences: pa.schema(
        [
            ("prompt_id", pa.int64()),
            ("logits", pa.list_(_doubles)),
            ("probability", pa.list_(_doubles)),
            ("win_rate", _doubles),
            ("estimator", pa.string()),
        ]
    ),
    Pair: pa.schema(
        [
            ("chosen", _message),
            ("rejected", _message),
            ("chosen_probs", pa.float64()),
            ("chosen_probs_win", pa.float64()),
            ("chosen_probs_lose", pa.float64()),
            ("prompt_id", pa.int64()),
            ("prompt_ids", _ids),
            ("response_ids", pa.list_(_ids)),
            ("win_rate", _doubles),
            ("baseline", pa.float64()),
            ("target", _doubles),
            ("ref_logprob", _doubles),
            ("score", _doubles),
            ("base_logprob", _doubles),
        ]
    ),
}
OPTIONAL = frozenset({"score", "base_logprob"})  # columns that a file lacks where all values are None
Record = TypeVar("Record", Responses, Preferences, Pair)


def prompt_id(text: str) -> int:
    """63 bits of the text's sha256, an identity that does not depend on order, file or batch.

    White space around the text is left out, since many templates drop it.
    """
    return int.from_bytes(hashlib.sha256(text.strip().encode("utf-8")).digest()[:8], "big") >> 1


def write(path: Path, kind: type[Record], rows: Sequence[Record], made_from: dict[str, str]) -> None:
    """Write rows as parquet. `made_from`, {input: digest}, goes into the file's metadata."""
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in fields(kind)}
    columns = {
        name: values
        for name, values in columns.items()
        if name not in OPTIONAL or any(value is not None for value in values)
    }
    schema = _schema(kind, columns).with_metadata({"made_from": json.dumps(made_from, sort_keys=True)})
    pq.write_table(pa.table(columns, schema=schema), path)


def _schema(kind: type, columns: Collection[str]) -> pa.Schema:
    """The schema of a file with these columns: all of the kind's but optional ones."""
    return pa.schema([f for f in SCHEMAS[kind] if f.name in columns or f.name not in OPTIONAL])


def replace(path: Path, kind: type[Record], rows: Sequence[Record], made_from: dict[str, str]) -> None:
    """Write rows as `write` does, whole or not at all: a file under its final name is complete."""
    with replacing(path) as part:
        write(part, kind, rows, made_from)


def read(
    path: Path,
    kind: type[Record],
    made_from: dict[str, str] | None = None,
    prompts: Sequence[int] | None = None,
) -> list[Record]:
    """Rows of a file, all or those with a prompt_id in `prompts`.

    Raises BadInput if it cannot be read, is damaged, or was made from something else than `made_from`.
    """
    only = None if prompts is None else [("prompt_id", "in", prompts)]
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, filters=only)
        if not table.schema.remove_metadata().equals(_schema(kind, table.schema.names)):
            raise BadInput(f"{path}: has other columns than {kind.__name__}; delete it and run again")
        found = json.loads((table.schema.metadata or {}).get(b"made_from", b"{}"))
        rows = [kind(**row) for row in table.to_pylist()]
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the content's
            raise BadInput(f"{path}: cannot be read: {os.strerror(error.errno)}") from None
        raise BadInput(
            f"{path}: damaged ({one_line(error)}); delete it and run again to make it anew"
        ) from None
    if made_from is not None:
        check_made_from(path, kind, found, made_from)
    return rows


def check_made_from(path: Path, kind: type, found: Any, made_from: Mapping[str, str]) -> None:
    """Raise BadInput, naming the inputs, where records of this kind in `path` were not made from `made_from`.

    Responses are accepted whatever the judge: they do not depend on it, but by the policy that it trained. `found`: what
    the file names, which may be anything.
    """
    found = found if isinstance(found, dict) else {}
    matters = [key for key in made_from if not (kind is Responses and key == "judge")]
    if other := sorted(key for key in matters if found.get(key) != made_from[key]):
        raise BadInput(
            f"{path}: was made from another {' and '.join(other)}; choose another --out, or delete it"
        )


def check_prompts(
    where: Path,
    rows: Sequence[Responses] | Sequence[Preferences],
    asked: Sequence[Prompt] | Sequence[Responses],
) -> None:
    """Raise BadInput unless `rows`, read from `where`, belong to the prompts asked, in their order."""
    if [row.prompt_id for row in rows] != [prompt.prompt_id for prompt in asked]:
        raise BadInput(f"{where}: belongs to other prompts than asked; delete it and run again")


def digest(rows: Sequence[Responses] | Sequence[Preferences] | Sequence[Pair]) -> str:
    """The sha256 of the records' contents, which goes into the metadata of files made from them."""
    value = hashlib.sha256()
    for row in rows:
        held = {name: x for name, x in asdict(row).items() if x is not None}
        value.update(json.dumps(held, sort_keys=True).encode())
    return value.hexdigest()


def square(rows: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Nested lists [n][K][K] as a float64 array."""
    return np.asarray(rows, np.float64)
