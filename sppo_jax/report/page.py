"""OUT/report.html, one self-contained file with pictures, written after each iteration; and its table as text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo_jax import config_file, files
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.report import headline, pictures, rings, samples, tables, trained_on
from sppo_jax.report.samples import printable
from sppo_jax.run import advice, evaluations, metrics
from sppo_jax.run import manifest as manifest_file
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Tell
from sppo_jax.run.intervals import FEW

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# A flag of a command line, with its value if that begins with a digit: no line may break at its hyphens.
FLAG = re.compile(r"--[a-z][\w.]*(?: \d(?:[\w.+-]*\w)?)?")


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
    base, last = f"{run.evaluation(BASE).relative_to(run.root)}", found[-1]
    if found[0].iteration != BASE and not any(note.startswith(base) for note in notes):
        notes.append(f"{base}: missing")
    before, after = samples.heldout(run, last.iteration, notes.append)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["flags"] = _with_flags
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=printable(run.root.name or "this directory"),
        headline=headline.sentences(found),
        advice=advice.grouped(_advice(run, lines)),
        results=tables.results(found),
        held_out=_held_out(run),
        few=FEW,
        features=tables.features(found),
        judged=tables.judged(lines),
        pictures=pictures.pictures(found, lines, (samples.lengths(before), samples.lengths(after))),
        last=last.iteration,
        groups=samples.groups(before, after, last),
        trained_on=trained_on.examples(run, last.iteration, notes.append),
        ring=rings.strongest(run, last.iteration, notes.append),
        configuration=_text_of(run.config, notes.append),
        manifest=_text_of(run.manifest, notes.append),
        notes=[printable(note) for note in dict.fromkeys(notes)],
    )
    with replacing(run.report) as part:
        part.write_text(page, encoding="utf-8")


def _with_flags(text: str) -> Any:
    """Escaped text in which each flag of a command line is code."""
    from markupsafe import Markup, escape

    return Markup(FLAG.sub(r"<code>\g<0></code>", str(escape(text))))


def _advice(run: RunDir, lines: Sequence[dict[str, Any]]) -> list[advice.Advice]:
    """What the run's figures advise; nothing where its configuration, whose damage is noted elsewhere, cannot be read."""
    try:
        return advice.found(lines, config_file.load([run.config]))
    except BadInput:
        return []


def table(run: RunDir) -> str:
    """The results as text for the terminal, at most 79 characters wide."""
    return tables.as_text(evaluations.read_all(run, lambda _: None))


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
    return printable(text)
