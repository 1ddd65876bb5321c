"""Stage 3 from and to files: reads and writes pairs in the parquet columns of the official code.

`python -m sppo_jax.interchange --run OUT --iteration T --to FILE` writes a finished iteration's pairs.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sppo_jax import files, records
from sppo_jax.command import Flags, call
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.records import Pair, prompt_id
from sppo_jax.run import bucket
from sppo_jax.run.directory import RunDir
from sppo_jax.text import conversations, rows, skipped
from sppo_jax.text.chat_template import Refused, chat_prompt, written_ids
from sppo_jax.text.messages import with_response
from sppo_jax.text.source import Source

COLUMNS = ("chosen", "rejected", "chosen_probs", "chosen_probs_win", "chosen_probs_lose")
ENDINGS = (".parquet", ".parq", "")  # of names that may be written
SCHEMA = pa.schema([records.SCHEMAS[Pair].field(name) for name in COLUMNS])


def read(
    config: Config, t: int, tokenizer: Any, *, eos: tuple[int, ...], positions: int, heldout: Collection[int]
) -> tuple[list[Pair], dict[str, int]]:
    """Return iteration t's pairs from pairs.source, and counts of the pairs kept and of those skipped, by reason.

    The source holds responses as text only, so their ids come from the policy's tokenizer, with the end of turn.
    Skipped: a conversation that is not a prompt and its response; a prompt that is repeated, held out (its id is
    in `heldout`), refused by the chat template or longer than prompts.max_length; a pair longer than the model's
    `positions`; a pair without two different responses; a probability outside [0, 1]. Reference log-probs are NaN until stage 5 fills them in.
    Raises BadInput if the source cannot be read or leaves no pairs.
    """

    source = Source("pairs.source", config.pairs.source, config.pairs.split).at(t)
    counts: Counter[str] = Counter()
    pairs: dict[int, Pair] = {}
    for row in rows.rows(source, COLUMNS):
        counts["rows"] += 1
        if isinstance(row, str):
            counts[row] += 1
            continue
        found = conversations.pair(row.get("chosen"), row.get("rejected"))
        if isinstance(found, str):
            counts[found] += 1
            continue
        text, chosen, rejected = found
        probabilities: list[Any] = [row.get(name) for name in COLUMNS[2:]]
        if not all(map(_is_probability, probabilities)):
            counts["bad_probability"] += 1
            continue
        identity = prompt_id(text)
        if identity in pairs or identity in heldout:
            counts["repeated" if identity in pairs else "in_heldout"] += 1
            continue
        try:
            prompt = chat_prompt(tokenizer, text)
        except Refused:
            counts["refused"] += 1
            continue
        responses = [written_ids(tokenizer, response, eos) for response in (chosen, rejected)]
        if (
            len(prompt.ids) > config.prompts.max_length
            or len(prompt.ids) + max(map(len, responses)) > positions
        ):
            counts["too_long"] += 1
            continue
        pairs[identity] = _pair(text, prompt.ids, (chosen, rejected), responses, probabilities, config)
    counts["kept"] = len(pairs)
    if not pairs:
        raise _no_pairs(source, t, counts, config, positions)
    return list(pairs.values()), dict(counts)


def write(pairs: Sequence[Pair], path: Path) -> None:
    """Write the five columns, one row per pair, as `datasets` and the official code read them; whole or not at all."""
    if files.is_dir(path):
        raise BadInput(f"{path}: a directory; name a file in it")
    columns = {name: [getattr(pair, name) for pair in pairs] for name in COLUMNS}
    with files.replacing(path) as part:
        pq.write_table(pa.table(columns, schema=SCHEMA), part)


def main(words: Sequence[str]) -> None:
    """Write the pairs that the command line names. Raises BadInput for a command line that cannot be used."""
    parser = Flags("sppo_jax.interchange", "Write an iteration's pairs in the official code's columns.")
    parser.add_argument("--run", required=True, metavar="OUT", help="run directory")
    parser.add_argument("--iteration", required=True, type=int, metavar="T", help="iteration, from 1")
    parser.add_argument(
        "--to", required=True, metavar="FILE", help="new parquet file, outside of run directories"
    )
    given = parser.read(words)
    with bucket.reading(given.run, bucket.without_weights):
        run = RunDir(files.expand(given.run))
        path = run.pairs(given.iteration)
        if not files.is_file(path):
            raise BadInput(f"--run {given.run}: {_no_iteration(run, given.iteration)}")
        to = Path(files.expand(given.to))
        if reason := _unfit(to, run):
            raise BadInput(f"--to {given.to}: {reason}")
        pairs = records.read(path, Pair)
    write(pairs, to)
    print(f"{len(pairs)} pairs written to {given.to}")


def _no_iteration(run: RunDir, t: int) -> str:
    """Return why a run directory has no pairs of iteration t."""
    if _is_run(run.root):
        return f"iteration {t} has no pairs ({run.pairs(t)} is missing)"
    above = run.root.parent
    meant = (
        f"; did you mean --run {above}?"
        if _is_run(above)
        else "; name the directory of the run's config.yaml"
    )
    return f"not a run directory{meant}" if files.exists(run.root) else f"no such directory{meant}"


def _is_run(root: Path) -> bool:
    paths = RunDir(root)
    return files.is_file(paths.config) and files.is_file(paths.manifest)


def _unfit(to: Path, run: RunDir) -> str:
    """Return why a file may not be written at `to`, where something would be lost or misnamed; else ""."""
    if files.is_dir(to):
        return "a directory; name a file in it"
    if files.exists(to) and not files.is_file(to):
        return "neither a file nor a directory; choose another name"
    above = Path(os.path.realpath(to.parent))
    for parent in (above, *above.parents):
        if parent == Path(os.path.realpath(run.root)) or _is_run(parent):
            return (
                f"inside the run directory {parent}, whose files only the run writes; name a file elsewhere"
            )
    if files.exists(to) or to.is_symlink():
        return "the file exists, and is not replaced; choose another name"
    if to.suffix.lower() not in ENDINGS:
        return f"the pairs are written as parquet, not {to.suffix}; give {to.with_suffix('.parquet').name}"
    return ""


def _no_pairs(source: Source, t: int, counts: Counter[str], config: Config, positions: int) -> BadInput:
    """The line about a source that leaves no pairs, with the knob that helps."""
    advice = {
        "too_long": f"raise prompts.max_length={config.prompts.max_length} if the prompts are, or give pairs that fit "
        f"into the model's {positions} positions",
        "in_heldout": "name other prompts in prompts.heldout",
        "no_text": "both columns hold lists of messages",
        **{reason: skipped.ADVICE[reason] for reason in ("unknown_role", "refused")},
    }.get(skipped.commonest(counts), "docs/prompts.md describes the columns")
    where = " in 'chosen' or 'rejected'"
    return skipped.nothing(source, f"pairs for iteration {t}", counts, where=where, advice=advice)


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _pair(
    text: str,
    prompt_ids: list[int],
    texts: tuple[str, str],
    response_ids: list[list[int]],
    probabilities: Sequence[float],
    config: Config,
) -> Pair:
    """A Pair of the texts (chosen, rejected), with `probabilities` in the order of COLUMNS."""
    won, *rates = map(float, probabilities)
    level = float(config.fit.baseline)
    chosen, rejected = (with_response(text, response) for response in texts)
    return Pair(
        chosen=chosen,
        rejected=rejected,
        chosen_probs=won,
        chosen_probs_win=rates[0],
        chosen_probs_lose=rates[1],
        prompt_id=prompt_id(text),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        win_rate=rates,
        baseline=level,
        target=[config.fit.eta * (rate - level) for rate in rates],
        ref_logprob=[math.nan] * len(rates),
    )


if __name__ == "__main__":
    call(main, resumes=False)
