"""OUT/report.html, one self-contained file with pictures, written after each iteration; and its table as text.

`python -m sppo_jax.report --run OUT` writes it again from what is on disk.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo_jax import config_file, files, records
from sppo_jax.command import Flags
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.records import Responses
from sppo_jax.report import pictures
from sppo_jax.run import bucket, evaluations, metrics
from sppo_jax.run import manifest as manifest_file
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Evaluation, Rate, Tell
from sppo_jax.text.messages import messages_of

SAMPLES = 12  # held-out prompts whose responses are shown
LARGE = 1e6  # from here on figures are shown with an exponent
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(run: RunDir) -> None:
    """Write report.html from eval.json, metrics.jsonl and the held-out responses.

    What is missing or damaged is left out, and the page says so. Raises BadInput if no iteration's eval.json can be read.
    """
    import jinja2

    notes: list[str] = []
    found = evaluations.read_all(run, notes.append)
    if all(e.iteration == BASE for e in found):
        why = "; ".join(notes[:1]) or "no iteration is complete yet"
        raise BadInput(f"{run.root}: {why}, so there is nothing to report")
    lines = metrics.read(run, notes.append)
    base = f"{run.evaluation(BASE).relative_to(run.root)}"
    if found[0].iteration != BASE and not any(note.startswith(base) for note in notes):
        notes.append(f"{base}: missing")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_printable(run.root.name or "this directory"),
        header=HEADER,
        rows=rows(found),
        held_out=_held_out(run),
        judged=judged_rows(lines),
        pictures=pictures.pictures(found, lines),
        samples=_samples(run, found[-1].iteration, notes.append),
        configuration=_text_of(run.config, notes.append),
        manifest=_text_of(run.manifest, notes.append),
        notes=[_printable(note) for note in notes],
    )
    with replacing(run.report) as part:
        part.write_text(page, encoding="utf-8")


HEADER = (
    "iteration",
    "win rate, judge",
    "win rate, oracle",
    "winners",
    "losers",
    "KL/token",
    "tokens",
    "words",
)


def rows(found: Sequence[Evaluation]) -> list[list[str]]:
    """The cells of the results table: win rates against the base, and log-ratios on held-out prompts in nats."""
    return [
        [
            str(e.iteration),
            *(rate(e.against(name, "base")) for name in ("judge", "oracle")),
            *(figure(value, "{:+.2f}") for value in (e.winners, e.losers)),
            figure(e.kl_per_token, "{:.4f}"),
            *(figure(value, "{:.1f}") for value in (e.tokens, e.words)),
        ]
        for e in found
    ]


def figure(value: float | None, form: str) -> str:
    """A number in the given form, or `-` for None; large ones with an exponent."""
    if value is None:
        return "-"
    return form.format(value) if abs(value) < LARGE else f"{value:.3g}"


DIAGNOSTICS = (
    ("prompts with a cycle", "cycle_share", "{:.1%}"),
    ("pairs that tie", "tie_share", "{:.1%}"),
    ("position bias", "position_bias", "{:+.2f}"),
    ("win rate and length", "length_correlation", "{:+.2f}"),
    ("entropy", "entropy", "{:.2f}"),
)
CUT = ("cut_prompts", "cut_responses")


def judged_rows(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the judge's table, its head first: properties of each iteration's K x K matrices, and counts of cut texts."""
    head = ["iteration", *(name for name, *_ in DIAGNOSTICS), "cut prompts", "cut responses"]
    table = []
    for line in (line for line in lines if line["stage"] == "judge"):
        t = line["iteration"]
        shards = [s for s in lines if s["stage"] == "judge_shard" and s["iteration"] == t]
        cut = [figure(sum(s.get(name) or 0 for s in shards), "{:.0f}") for name in CUT]
        table.append([str(t), *(figure(line.get(key), form) for _, key, form in DIAGNOSTICS), *cut])
    return [head, *table] if table else []


def table(run: RunDir) -> str:
    """`rows` as text for the terminal."""
    cells = [list(HEADER), *rows(evaluations.read_all(run, lambda _: None))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rate(found: Rate | None, absent: str = "-") -> str:
    """A win rate with its standard error, or `absent` where there is none."""
    return f"{figure(found.mean, '{:.3f}')} ± {figure(found.stderr, '{:.3f}')}" if found else absent


def _held_out(run: RunDir) -> str:
    """The line about held-out prompts that were taken from the prompts' own source; empty where they were not."""
    try:
        found = evaluations.held_out(manifest_file.read(run))
    except BadInput:  # what is wrong with the manifest is noted where its text is shown
        return ""
    return f"Held out: {found[0]} of the prompts of {found[1]}." if found else ""


def _text_of(path: Path, tell: Tell) -> str:
    """The text of a file of the run; empty, with a line to `tell`, where it is missing or cannot be read."""
    try:
        if not files.exists(path):
            tell(f"{path.name}: missing")
            return ""
        text = files.read_text(path)
        if path.suffix == ".json":
            files.read_json(path)
        else:
            config_file.load([path])
    except BadInput as error:
        tell(f"{path.name}: damaged: {str(error).removeprefix('--config ').removeprefix(f'{path}: ')}")
        return ""
    return _printable(text)


def _samples(run: RunDir, last: int, tell: Tell) -> list[dict[str, Any]]:
    """Prompts, as lists of messages, with the first responses of the base and of the last policy; none, with a line to `tell`, without the files."""
    before, after = (_responses(run, t, tell) for t in (BASE, last))
    if not before or not after:
        return []
    if [row.prompt_id for row in before] != [row.prompt_id for row in after]:
        tell(f"the held-out responses of iterations {BASE} and {last} belong to different prompts")
        return []
    step = max(1, len(before) // SAMPLES)  # neighbours in the set are often alike
    chosen = list(zip(before, after, strict=True))[::step][:SAMPLES]
    return [
        {
            "prompt": [m | {"content": _printable(m["content"])} for m in messages_of(b.prompt)],
            "before": _printable(b.responses[0]),
            "after": _printable(a.responses[0]),
        }
        for b, a in chosen
    ]


def _responses(run: RunDir, t: int, tell: Tell) -> list[Responses]:
    path = run.heldout(t, "responses")
    name = path.relative_to(run.root)
    try:
        if not files.exists(path):
            tell(f"{name}: missing")
            return []
        found = records.read(path, Responses)
    except BadInput as error:
        tell(f"{name}: {str(error).removeprefix(f'{path}: ')}")
        return []
    if not all(
        isinstance(row.prompt, str) and row.responses and row.responses[0] is not None for row in found
    ):
        tell(f"{name}: damaged: a row has no prompt or no response")
        return []
    return found


def _printable(text: str) -> str:
    """Text from outside without control characters and halves of characters; the template escapes markup."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )


def main(words: Sequence[str]) -> None:
    """Write the report of `--run OUT` again. Raises BadInput for other flags, or where OUT is not a run directory."""
    flags = Flags("sppo_jax.report", "Write OUT/report.html again from what is on disk.")
    flags.add_argument("--run", required=True, action="append", metavar="OUT", help="run directory")
    given = flags.read(words).run
    if len(given) > 1:
        raise BadInput("--run is given twice; give one run directory")
    with bucket.reading(given[0], bucket.without_weights):
        run = RunDir(files.expand(given[0]))
        if not files.is_dir(run.root):
            what = "not a directory" if files.exists(run.root) else "no such directory"
            raise BadInput(f"--run {given[0]}: {what}; give the directory that --out named")
        if not os.path.lexists(run.config):  # one that cannot be read is noted on the page
            raise BadInput(f"--run {given[0]}: not a run directory (it has no config.yaml)")
        write(run)
        print(bucket.shown(run.report))
