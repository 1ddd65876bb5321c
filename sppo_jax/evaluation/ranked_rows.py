"""Rows of prompts and responses → the judge → rows with scores: what is judged at once, kept on disk, and written at the end."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sppo_jax import config as configuration
from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.preferences import TIE
from sppo_jax.records import Preferences, Responses, prompt_id
from sppo_jax.text.messages import messages_of
from sppo_jax.text.reading import Reading

# These import jax, and come where they are needed.
if TYPE_CHECKING:
    from sppo_jax.judges import CheckedJudge
    from sppo_jax.run.metrics import Metrics

ENDINGS = {".jsonl": "jsonl", ".parquet": "parquet"}
# Rows of a call of a judge on the mesh: those of a shard of a run, so that the bits are a run's.
TOGETHER = configuration.Sampling.shard_prompts
_floats = pa.list_(pa.float64())
_messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class Asked:
    """A row of the input. One that cannot be ranked has no responses and no prompt, unless these can be shown."""

    prompt: str | None  # one text (text.messages)
    responses: list[str] | None
    usable: bool = True


def rank(
    asked: Sequence[Asked],
    judge: "CheckedJudge",
    settings: configuration.Judge,
    read_as: Reading,
    kept: "Kept",
    metrics: "Metrics",
) -> None:
    """Judge the rows and write them with their scores to kept.out, unless it was written of the same ones by the same judge.

    The preferences of an earlier start come from `kept`. A row that cannot be ranked gets no scores. The judge gets what a run gives it at once: one row, or for a judge on the mesh the rows of a shard. Raises Terminated
    where a signal has asked for a stop.
    """
    from sppo_jax.judges import prefer
    from sppo_jax.run.metrics import from_totals

    found: list[Preferences | None] = [_alone(row) if row.usable else None for row in asked]
    calls = [(unit, _records(asked, unit)) for unit in units(asked, judge.on_mesh)]
    keys = [kept.key([read_as(row.prompt, row.responses) for row in members]) for _, members in calls]
    made_from = files.sha256_text(json.dumps([kept.by, [asdict(row) for row in asked], keys]))
    if kept.finished(made_from):
        kept.forget()  # a crash after --out was whole leaves the lines
        return
    begun = set(kept.rows)
    if not begun.issuperset(keys) and files.exists(kept.out):
        raise BadInput(f"--out {kept.out}: the file exists, and is not replaced; choose another name")
    done = sum(_pairs(members) for key, (_, members) in zip(keys, calls, strict=True) if key in kept.rows)
    cut: Counter[str] = Counter()
    with metrics.progress("judge", sum(_pairs(m) for _, m in calls), "pairs", done=done) as advance:
        for key, (unit, members) in zip(keys, calls, strict=True):
            if key in kept.rows:
                advance(0 if key in begun else _pairs(members))  # equal rows are judged once
            else:
                metrics.poll()
                before, report = judge.cut, from_totals(advance)

                def on_progress(so_far: int, total: int, report: Any = report) -> None:
                    report(so_far, total)
                    metrics.poll()

                judged = prefer(members, judge, settings, read_as, on_progress)
                report(_pairs(members), _pairs(members))  # the judge may not report progress
                kept.add(key, judged, judge.cut - before)
            judged, some = kept.rows[key]
            cut += some
            for i, row in zip(unit, judged, strict=True):
                found[i] = row
    if cut:
        metrics.say(
            f"judge: reads only the beginning of {cut['prompts']} prompts and {cut['responses']} responses "
            "(judge.source_tokens, judge.total_tokens)"
        )
    write(kept.out, asked, found)
    kept.finish(made_from)


def units(asked: Sequence[Asked], on_mesh: bool) -> list[list[int]]:
    """The rows of each call of the judge, which have equally many responses, at least two."""
    found: list[list[int]] = []
    size = TOGETHER if on_mesh else 1
    for start in range(0, len(asked), size):
        by_k: dict[int, list[int]] = {}
        for i in range(start, min(start + size, len(asked))):
            if asked[i].usable and len(asked[i].responses or ()) > 1:
                by_k.setdefault(len(asked[i].responses or ()), []).append(i)
        found += by_k.values()
    return found


def _alone(row: Asked) -> Preferences:
    """The preferences of a single response, which nothing is compared with."""
    return Preferences(prompt_id(row.prompt or ""), [[0.0]], [[0.5]], [0.5], "")


def _records(asked: Sequence[Asked], unit: Sequence[int]) -> list[Responses]:
    """The rows as the judge stage has them; their ids do not matter."""
    return [
        Responses(prompt_id(row.prompt or ""), row.prompt or "", [], [], row.responses or [], [], [])
        for row in (asked[i] for i in unit)
    ]


def _pairs(members: Sequence[Responses]) -> int:
    """Number of ordered pairs i != j of the responses, over all rows."""
    return sum(len(row.responses) * (len(row.responses) - 1) for row in members)


class Kept:
    """What is judged, on disk beside a file that is not written yet: a line for each call of the judge.

    A line's key names all that its scores depend on: the judge, its knobs and the texts as it reads them. So lines of
    another judge or of other rows are not read.
    """

    def __init__(self, out: Path, judged_by: str):
        self.out, self._path, self.by = out, beside(out), judged_by
        self.rows: dict[str, tuple[list[Preferences], Counter[str]]] = {}
        text = ""
        if files.exists(self._path):
            try:
                text = self._path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise BadInput(f"{self._path}: {error.strerror}; delete it, and run again") from None
        for line in text.split("\n"):
            try:  # a crash may have cut a line
                said = json.loads(line)
                judged = [Preferences(**row) for row in said["rows"]]
                self.rows[said["key"]] = judged, Counter(said["cut"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue

    def key(self, shown: Sequence[tuple[str, list[str]]]) -> str:
        """The key of a call with these prompts and responses, as the judge reads them."""
        return files.sha256_text(json.dumps([self.by, shown]))

    def add(self, key: str, judged: list[Preferences], cut: Counter[str]) -> None:
        """Keep what a call has returned. Raises BadInput where the system refuses the write."""
        self.rows[key] = judged, cut
        with files.writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": key, "rows": [asdict(row) for row in judged], "cut": dict(cut)}
        files.append(self._path, f"\n{json.dumps(line)}\n".encode())  # on a line of its own, see above

    def finished(self, made_from: str) -> bool:
        """Whether --out is as it was written, of the rows and by the judge of this digest."""
        try:
            return made(self.out).read_text() == f"{made_from} {files.sha256([self.out])}"
        except (OSError, ValueError):  # one of the two is not there, or is not a text
            return False

    def finish(self, made_from: str) -> None:
        """Keep the digest of what --out, which is whole, was made from, and delete the lines."""
        with files.replacing(made(self.out)) as part:
            part.write_text(f"{made_from} {files.sha256([self.out])}")
        self.forget()

    def forget(self) -> None:
        """Delete the lines."""
        with files.writing(self._path):
            self._path.unlink(missing_ok=True)


def beside(out: Path) -> Path:
    """The hidden file beside --out in which what is judged is kept."""
    return out.with_name(f".{out.name}.partial.jsonl")


def made(out: Path) -> Path:
    """The hidden file beside --out that names what it was made from, once it is whole."""
    return out.with_name(f".{out.name}.made_from")


def ranks(win_rate: Sequence[float]) -> list[int]:
    """The place of each response, from 1, the best: one more than the number of responses with a higher win rate.

    Win rates within 1e-6 count as equal, so that ties share the better place: 1, 2, 2, 4.
    """
    rates = np.asarray(win_rate, np.float64)
    above: list[int] = (1 + (rates[None, :] - rates[:, None] > TIE).sum(axis=1)).tolist()
    return above


def write(out: Path, asked: Sequence[Asked], found: Sequence[Preferences | None]) -> None:
    """Write the rows with their scores, whole or not at all, in the notation that the file's ending names."""
    lines = [_line(row, judged) for row, judged in zip(asked, found, strict=True)]
    with files.replacing(out) as part:
        if ENDINGS[out.suffix.lower()] == "jsonl":
            with part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            return
        conversations = any(isinstance(line["prompt"], list) for line in lines)
        if conversations:  # a column has one type
            for line in lines:
                line["prompt"] = None if line["prompt"] is None else _messages_of(line["prompt"])
        schema = pa.schema(
            [
                ("prompt", _messages if conversations else pa.string()),
                ("responses", pa.list_(pa.string())),
                ("logits", pa.list_(_floats)),
                ("probability", pa.list_(_floats)),
                ("win_rate", _floats),
                ("rank", pa.list_(pa.int32())),
            ]
        )
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), part)


def _messages_of(prompt: Any) -> Any:
    return prompt if isinstance(prompt, list) else messages_of(prompt)


def _line(row: Asked, judged: Preferences | None) -> dict[str, Any]:
    """A row of the file that is written."""
    prompt: Any = row.prompt
    if prompt is not None and (turns := messages_of(prompt)) != [{"role": "user", "content": prompt}]:
        prompt = turns
    return {
        "prompt": prompt,
        "responses": row.responses,
        "logits": judged and judged.logits,
        "probability": judged and judged.probability,
        "win_rate": judged and judged.win_rate,
        "rank": judged and ranks(judged.win_rate),
    }
