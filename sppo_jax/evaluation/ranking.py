"""The command that only ranks: rows of (prompt, responses) → all ordered pairs judged → win rates and ranks, row by row.

`python -m sppo_jax.judge --in FILE --out FILE`. What is judged is kept in a hidden file beside --out until that is written.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sppo_jax import command, config_file, files
from sppo_jax.config import Config, knobs
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import ranked_rows
from sppo_jax.evaluation.ranked_rows import ENDINGS, Asked, Kept
from sppo_jax.settings import embedded
from sppo_jax.settings import words as command_line
from sppo_jax.text import answers, rows, skipped, text_files
from sppo_jax.text.answers import Unusable
from sppo_jax.text.source import Row, Source

# judges, run and what imports jax come in the functions, after flags and rows are checked: a mistake is refused at once.

READ = ("judge.", "prompts.column", "responses.split", "responses.column")  # knobs that this command reads
FLAGS = {"--in": True, "--out": True, "--template": True, "--config": True}
SCHEMES = ("jsonl:", "parquet:", "hf:", "tfds:", "embedded:")
FEW = 100  # one row in so many may be unusable
ABOUT = """python -m sppo_jax.judge --in FILE --out FILE --judge.path NAME [--judge.key value ...]

Compares every ordered pair of each row's responses by PairRM or a judge of your own, and writes each row with logits,
probability, win_rate and rank (docs/judges.md). The same command again goes on where it was interrupted; of a finished
file it prints the line again. Example:

  python -m sppo_jax.judge --in answers.jsonl --out ranked.jsonl --judge.path llm-blender/PairRM-hf

where a line of answers.jsonl is {"prompt": "Who?", "responses": ["I", "You and I"]}

  --in FILE
      rows: a file of JSON lines or parquet, or jsonl:PATH, parquet:PATH, hf:NAME or tfds:NAME as prompts.source takes them
  --out FILE.jsonl|FILE.parquet
      a new file: the rows' prompts and responses, with their scores
  --template DIR|OWNER/NAME
      the model whose tokenizer and chat template the judge's reading needs: for --judge.prompt chat
  --config FILE
      a configuration, of which only the knobs below are read"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    source: Source
    out: Path
    template: str
    config: Config


def main(words: Sequence[str]) -> None:
    """Rank the rows that the command line names. Raises BadInput for a command line or rows that cannot be used."""
    if "--help" in words or "-h" in words:
        print(usage())
        return
    request = parse(words)
    asked, lines = read(request.source, request.config)
    from sppo_jax import compilation, judges
    from sppo_jax.run.directory import RunDir
    from sppo_jax.run.metrics import Metrics

    compilation.keep_programs()
    settings, tokenizer = request.config.judge, _tokenizer(request.template)
    judge = judges.open_judge(settings)
    try:
        # Only for its lines, progress and signals: this command writes no metrics.
        with (
            _alone(request.out),
            Metrics(RunDir(request.out.parent)) as metrics,
            metrics.stopping_on_signals(),
        ):
            judge.report_to(metrics.say)
            for line in lines:
                metrics.say(line)
            read_as = judges.reading_of(settings, tokenizer)
            kept = Kept(request.out, json.dumps([judge.identity, _of_scores(request.config)]))
            ranked_rows.rank(asked, judge, settings, read_as, kept, metrics)
    finally:
        judge.close()
    print(f"{len(asked)} rows written to {request.out}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a lock beside --out. Raises BadInput where another command writes the same file, or has just written it."""
    from sppo_jax.run import directory

    lock = out.with_name(f".{out.name}.lock")
    with files.writing(lock):
        file = lock.open("a+b", buffering=0)
    with directory.held(file):
        try:
            _target(str(out))  # again, now that nobody else can write it
            yield
        finally:
            lock.unlink(missing_ok=True)


def usage() -> str:
    """The text of --help: the command's flags, and the knobs that it reads."""
    lines = [ABOUT]
    for knob in knobs():
        if knob.key.startswith(READ):
            limits = f", {knob.range}" if knob.range else ""
            lines += [f"  --{knob.key} {knob.kind}{limits}", f"      {knob.help} (default: {knob.default!r})"]
    return command.as_called("\n".join(lines))


def parse(words: Sequence[str]) -> Request:
    """Return what the command line asks for. Raises BadInput for what cannot be used."""
    own, overrides = command_line.split(words, FLAGS)
    for word in overrides:
        if not word.removeprefix("--").startswith(READ):
            read = ", ".join(f"--{key}{'KEY' * key.endswith('.')}" for key in READ)
            raise BadInput(f"{word.partition('=')[0]} is not read by this command, which reads {read}")
    given = dict(own)
    for flag in ("--in", "--out"):
        if flag not in given:
            raise BadInput(f"{flag} FILE is missing; see --help for an example")
        if "://" in given[flag]:
            raise BadInput(
                f"{flag} {given[flag]}: not a place on this machine; copy the file, and give its path"
            )
    configs = [value for flag, value in own if flag == "--config"]
    config = config_file.load(configs, overrides)
    source, out = _source(given["--in"], config), _target(given["--out"])
    pairrm = ":" not in config.judge.backend
    if pairrm and not configs and not any(word.startswith("--judge.path=") for word in overrides):
        raise BadInput(
            "--judge.path is missing: name a PairRM, such as llm-blender/PairRM-hf, or a directory "
            f"({embedded.JUDGE} to take the toy's on purpose), or a judge of your own with --judge.backend module:attribute"
        )
    if config.judge.prompt == "chat" and "--template" not in given:
        raise BadInput(
            "--judge.prompt chat reads prompts in a model's chat template: name that model with --template DIR or OWNER/NAME"
        )
    return Request(source, out, given.get("--template", ""), config)


def _source(name: str, config: Config) -> Source:
    """The source that --in names, by its path or in the notation of prompts.source."""
    if not name.startswith(SCHEMES):
        path = Path(files.expand(name))
        if not files.is_file(path):
            raise BadInput(
                f"--in {name}: {'not a file' if files.exists(path) else f'no such file{files.near(path)}'}"
            )
        name = f"{text_files.notation(path, f'--in {name}')}:{path}"
    else:
        scheme, _, path_ = name.partition(":")
        name = f"{scheme}:{files.expand(path_)}"
    return Source("--in", name, config.responses.split)


def _target(name: str) -> Path:
    """The path that --out names. Raises BadInput unless a new file can have it."""
    path = Path(files.expand(name))
    if files.is_dir(path):
        raise BadInput(f"--out {name}: a directory; name a file in it")
    if path.suffix.lower() not in ENDINGS:
        raise BadInput(f"--out {name}: rows are written as {' or '.join(ENDINGS)}; end the name so")
    ours = (ranked_rows.beside(path), ranked_rows.made(path))
    if files.exists(path) and not any(files.exists(mark) for mark in ours):
        raise BadInput(f"--out {name}: the file exists, and is not replaced; choose another name")
    return path


def _tokenizer(template: str) -> Any:
    """The tokenizer of the model that --template names; None without one."""
    if not template:
        return None
    from sppo_jax.hub import names, repositories
    from sppo_jax.text import chat_template

    if template.startswith("embedded:"):
        return chat_template.load_tokenizer(names.resolve(template))
    wanted = ("config.json", *repositories.BESIDE)
    return chat_template.load_tokenizer(repositories.snapshot(template, None, wanted).directory)


def read(source: Source, config: Config) -> tuple[list[Asked], list[str]]:
    """Return the rows of a source, and lines about them for people.

    Raises BadInput, with the number of the first row that cannot be ranked, where these are more than one in a hundred.
    """
    columns = (config.prompts.column, config.responses.column)
    asked: list[Asked] = []
    counts: Counter[str] = Counter()
    first = 0
    for row in rows.rows(source, columns):
        found, fault = _asked(row, *columns)
        asked.append(found)
        if fault:
            first = first or len(asked)
            counts[fault] += 1
    if not asked:
        raise BadInput(f"{source} has no rows")
    where = f" in column {columns[0]!r}"
    if counts.total() * FEW > len(asked):
        why = skipped.described(counts | {"rows": len(asked)}, where)
        raise BadInput(f"{source}: row {first} cannot be ranked: {why}; correct the rows, or leave them out")
    lines = [f"{source}: {len(asked)} rows"]
    if counts:
        why = skipped.described(counts | {"rows": len(asked)}, where)
        lines.append(f"{source}: row {first} and others cannot be ranked, and have no scores: {why}")
    if single := sum(found.usable and len(found.responses or ()) == 1 for found in asked):
        lines.append(f"{source}: rows with a single response, which gets a win rate of 1/2: {single}")
    return asked, lines + _warnings(config)


def _warnings(config: Config) -> list[str]:
    if ":" in config.judge.backend or not config.judge.path.startswith("embedded:"):
        return []
    return [f"warning: judge.path={config.judge.path} is a toy that can judge the embedded prompts alone"]


def _asked(row: Row | str, prompts: str, responses: str) -> tuple[Asked, str]:
    """A row with what can be shown of it, and the name of the count for its fault; "" for one that can be ranked."""
    value: Row = {} if isinstance(row, str) else row
    faults = [row] if isinstance(row, str) else []
    text, found = None, answers.responses(value.get(responses))
    try:
        text = answers.whole_prompt(value.get(prompts))
    except Unusable as fault:
        faults.append(str(fault))
    if isinstance(found, str):
        faults.append(found)
    return Asked(text, None if isinstance(found, str) else found, not faults), faults[0] if faults else ""


def _of_scores(config: Config) -> dict[str, Any]:
    """The knobs that fix the scores of a judge, beside its identity."""
    return asdict(replace(config.judge, path="", python=""))
