"""OUT/report.html, one self-contained file with pictures, written after each iteration; and its table as text.

`python -m sppo_jax.report --run OUT` writes it again from what is on disk.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo_jax import config_file, files, records
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.records import Responses
from sppo_jax.report import pictures
from sppo_jax.report.pictures import Evaluation
from sppo_jax.run import metrics
from sppo_jax.run.directory import BASE, RunDir

SAMPLES = 12  # held-out prompts whose responses are shown
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write(run: RunDir) -> None:
    """Write report.html from eval.json, metrics.jsonl and the held-out responses."""
    import jinja2

    found, lines = evaluations(run), metrics.read(run)
    if len(found) < 2:
        raise BadInput(f"{run.root}: no iteration is complete yet, so there is nothing to report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.root.name,
        header=HEADER,
        rows=rows(found),
        judged=judged_rows(lines),
        pictures=pictures.pictures(found, lines),
        samples=_samples(run, found[-1]["iteration"]),
        configuration=run.config.read_text(encoding="utf-8"),
        manifest=run.manifest.read_text(encoding="utf-8"),
    )
    with replacing(run.report) as part:
        part.write_text(page, encoding="utf-8")


def evaluations(run: RunDir) -> list[Evaluation]:
    """eval.json of the base and of every complete iteration, in order."""
    paths = [run.evaluation(t) for t in run.iterations()]
    return [files.read_json(path) for path in paths if path.exists()]


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
    table = []
    for e in found:
        ratio, length = e.get("log_ratio", {}), e["length"]
        rates = [rate(e["win_rate"].get(name, {}).get("base")) for name in ("judge", "oracle")]
        ratios = [f"{ratio[key]:+.2f}" if key in ratio else "-" for key in ("winners", "losers")]
        kl = f"{ratio['kl_per_token']:.4f}" if ratio else "-"
        table.append(
            [str(e["iteration"]), *rates, *ratios, kl, f"{length['tokens']:.1f}", f"{length['words']:.1f}"]
        )
    return table


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
        cut = [f"{sum(s.get(name, 0) for s in shards):.0f}" for name in CUT]
        table.append([str(t), *(form.format(line[key]) for _, key, form in DIAGNOSTICS), *cut])
    return [head, *table] if table else []


def table(run: RunDir) -> str:
    """`rows` as text for the terminal."""
    cells = [list(HEADER), *rows(evaluations(run))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def rate(found: dict[str, float] | None, absent: str = "-") -> str:
    """A win rate with its standard error, or `absent` where there is none."""
    return f"{found['mean']:.3f} ± {found['stderr']:.3f}" if found else absent


def _samples(run: RunDir, last: int) -> list[dict[str, str]]:
    before, after = (records.read(run.heldout(t, "responses"), Responses) for t in (BASE, last))
    step = max(1, math.floor(len(before) / SAMPLES))  # neighbours in the set are often alike
    chosen = list(zip(before, after, strict=True))[::step][:SAMPLES]
    return [
        {
            "prompt": _printable(b.prompt),
            "before": _printable(b.responses[0]),
            "after": _printable(a.responses[0]),
        }
        for b, a in chosen
    ]


def _printable(text: str) -> str:
    """Generated text without control characters; the template escapes markup."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text
    )


def main(words: Sequence[str]) -> None:
    """Write the report of `--run OUT` again. Raises BadInput for other flags, or where OUT is not a run directory."""
    if len(words) != 2 or words[0] != "--run":
        if "--help" not in words:
            raise BadInput("usage: python -m sppo_jax.report --run OUT")
        print("python -m sppo_jax.report --run OUT\n\nWrite OUT/report.html again from what is on disk.")
        return
    run = RunDir(words[1])
    if not run.config.is_file():
        raise BadInput(f"--run {words[1]}: not a run directory (it has no config.yaml)")
    config_file.load([run.config])
    write(run)
    print(run.report)
