"""After each iteration: OUT/report.html, one self-contained file with pictures, and the table on the terminal.

`python -m sppo_jax.report --run OUT` writes it anew from what is on disk.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sppo_jax import config_file, files, records
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.records import Responses
from sppo_jax.run import metrics
from sppo_jax.run.directory import BASE, RunDir

SAMPLES = 12  # held-out prompts whose answers are shown
TEMPLATE = Path(__file__).with_name("report.html.jinja")
INK = {"judge": "#4063d8", "oracle": "#389826", "up": "#389826", "down": "#cb3c33", "plain": "#555555"}

Evaluation = dict[str, Any]  # one eval.json


def write(run: RunDir) -> None:
    """Write report.html from eval.json, metrics.jsonl and the held-out responses."""
    import jinja2

    found = evaluations(run)
    if len(found) < 2:
        raise BadInput(f"{run.root}: no iteration is complete yet, so there is nothing to report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.root.name,
        header=HEADER,
        rows=rows(found),
        judged=judged_rows(metrics.read(run)),
        pictures=_pictures(found, metrics.read(run)),
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
    """The table's cells: win rates are against the base, log-ratios are held-out and in nats."""
    table = []
    for e in found:
        ratio, length = e.get("log_ratio", {}), e["length"]
        rates = [_rate(e["win_rate"].get(name, {}).get("base")) for name in ("judge", "oracle")]
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
    """The table of the judge, its head first: what each iteration's K x K matrices hold, and what was too long."""
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


def _rate(rate: dict[str, float] | None) -> str:
    return f"{rate['mean']:.3f} ± {rate['stderr']:.3f}" if rate else "-"


def _pictures(found: Sequence[Evaluation], lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """[{title, caption, svg}]."""
    trained = [e for e in found if e["iteration"] != BASE]
    t = [e["iteration"] for e in trained]
    judged = [line for line in lines if line["stage"] == "judge"]
    fitted = [line for line in lines if line["stage"] == "fit" and line.get("loss") is not None]

    def win_rates(axes: Any) -> None:
        for name in ("judge", "oracle"):
            points = [(e["iteration"], e["win_rate"][name]["base"]) for e in found if name in e["win_rate"]]
            if points:
                x, rate = zip(*points, strict=True)
                spread = [1.96 * r["stderr"] for r in rate]
                axes.errorbar(
                    x, [r["mean"] for r in rate], spread, marker="o", capsize=4, color=INK[name], label=name
                )
        axes.axhline(0.5, color="#bbbbbb", linewidth=1)
        axes.legend(frameon=False)

    def ratios(axes: Any) -> None:
        for name, ink in (("winners", INK["up"]), ("losers", INK["down"])):
            mean = [e["log_ratio"][name] for e in trained]
            spread = [1.96 * e["log_ratio"][f"{name}_stderr"] for e in trained]
            axes.errorbar(t, mean, spread, marker="o", capsize=4, color=ink, label=name)
        axes.axhline(0, color="#bbbbbb", linewidth=1)
        axes.legend(frameon=False)

    def length(axes: Any) -> None:
        axes.plot(
            [e["iteration"] for e in found], [e["length"]["tokens"] for e in found], "o-", color=INK["plain"]
        )
        axes.set_ylim(0, 1.2 * max(e["length"]["tokens"] for e in found))

    def divergence(axes: Any) -> None:
        axes.plot(t, [e["log_ratio"]["kl_per_token"] for e in trained], "o-", color=INK["plain"])
        axes.axhline(0, color="#bbbbbb", linewidth=1)

    def cycles(axes: Any) -> None:
        x = [line["iteration"] for line in judged]
        axes.plot(
            x,
            [line["cycle_share"] for line in judged],
            "o-",
            color=INK["judge"],
            label="prompts with a cycle",
        )
        axes.plot(x, [line["tie_share"] for line in judged], "s-", color=INK["plain"], label="pairs that tie")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)

    def leanings(axes: Any) -> None:
        x = [line["iteration"] for line in judged]
        for key, label, form in (
            ("length_correlation", "win rate and length, correlation", "o-"),
            ("position_bias", "position bias, nats", "s-"),
        ):
            ink = INK["judge"] if key == "length_correlation" else INK["plain"]
            axes.plot(x, [line[key] for line in judged], form, color=ink, label=label)
        axes.axhline(0, color="#bbbbbb", linewidth=1)
        axes.legend(frameon=False)

    def loss(axes: Any) -> None:
        for i in t:
            mine = [line for line in fitted if line["iteration"] == i]
            axes.plot(
                [line["step"] for line in mine], [line["loss"] for line in mine], label=f"iteration {i}"
            )
        axes.legend(frameon=False)
        axes.set_xlabel("update")

    panels: list[tuple[str, str, Callable[[Any], None]]] = [
        ("Win rate against the base", "Held-out prompts, 95 % intervals; 0.5 is no better.", win_rates),
        (
            "Log-ratio against the reference",
            "Held-out responses of each iteration's reference, nats.",
            ratios,
        ),
        ("Response length", "Mean tokens on held-out prompts.", length),
        ("Divergence per token", "KL(reference ‖ policy) of each iteration, nats.", divergence),
        ("Cycles and ties", "What the judge's K × K matrices hold.", cycles),
        ("What the judge leans to", "0: neither to long responses nor to the one shown first.", leanings),
        ("Training loss", "Starts at the mean squared target, by construction.", loss),
    ]
    return [{"title": a, "caption": b, "svg": _svg(draw, whole=draw is not loss)} for a, b, draw in panels]


def _svg(draw: Callable[[Any], None], *, whole: bool) -> str:
    """One picture as inline SVG, the same bytes for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "sppo_jax",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("iteration")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]


def _samples(run: RunDir, last: int) -> list[dict[str, str]]:
    before, after = (records.read(run.heldout(t, "responses"), Responses) for t in (BASE, last))
    step = max(1, math.floor(len(before) / SAMPLES))  # spread over the set: neighbours are often alike
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
    """`--run OUT`."""
    if len(words) != 2 or words[0] != "--run":
        if "--help" not in words:
            raise BadInput("usage: python -m sppo_jax.report --run OUT")
        print("python -m sppo_jax.report --run OUT\n\nWrite OUT/report.html anew from what is on disk.")
        return
    run = RunDir(words[1])
    if not run.config.is_file():
        raise BadInput(f"--run {words[1]}: no run directory (it has no config.yaml)")
    config_file.load([run.config])
    write(run)
    print(run.report)
