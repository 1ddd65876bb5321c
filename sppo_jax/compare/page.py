"""The report of a comparison: one self-contained file in the style of a run's report."""

import re
from pathlib import Path

from sppo_jax.compare import curves, tables
from sppo_jax.compare.figures import Figures, differences, main_measure, measure, shown
from sppo_jax.files import replacing
from sppo_jax.report import page
from sppo_jax.report.samples import printable

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write(path: Path, found: Figures) -> None:
    """Write the page of a comparison's figures: the same bytes for the same figures."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    counts = [measure(shown(variant), main_measure(found))["n"] for variant in found["variants"]]
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{_count(len(found['variants']), 'variant')}, {_count(len(found['seeds']), 'seed')}",
        style=_style(),
        headline=headline(found),
        failed=found["failed"],
        missing=found["missing"],
        notes=found["notes"],
        results=tables.results(found),
        footnote=" ".join(tables.footnote(found, counts)),
        first=found["variants"][0]["name"],
        differences=tables.differences(found),
        pictures=curves.pictures(found),
        legend=curves.legend(found),
        several=len(found["seeds"]) > 1,
        differing=tables.differing(found),
        by_seed=tables.by_seed(found),
        command=found["command"],
        versions=", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items())),
        platform=found["platform"],
        level=f"{found['level']:.0%}",
    )
    with replacing(path) as part:
        part.write_text(printable(text), encoding="utf-8")


def headline(found: Figures) -> list[str]:
    """Which variant has the highest mean win rate, and whether the next one's difference from it is more than chance."""
    by = main_measure(found)
    judge = by.removeprefix("win_rate_")
    ranked = sorted(
        (v for v in found["variants"] if measure(shown(v), by)["n"]), key=lambda v: -shown(v)[by]["mean"]
    )
    if not ranked:
        return ["No variant has a measured win rate in the iteration that the table shows."]
    best = ranked[0]
    said = f"{best['name']} has the highest mean win rate by the {judge}, {shown(best)[by]['mean']:.3f}"
    if len(ranked) == 1:
        won = tables.spread(shown(best)[by], "{:.3f}")
        return [f"{best['name']} wins {won} of its comparisons with the base, by the {judge}."]
    second = ranked[1]
    return [
        f"{said}; {second['name']} follows with {shown(second)[by]['mean']:.3f}. {_apart(best, second, by)}"
    ]


def _apart(best: Figures, second: Figures, by: str) -> str:
    """The sentence about the difference of two variants, seed by seed."""
    of = measure(differences(best, second), by)
    if of["half_width"] is None:
        return "Of one seed in common, the difference may be chance."
    shown_as = f"{of['mean']:.3f} ± {of['half_width']:.3f} over {of['n']} seeds"
    if abs(of["mean"]) > of["half_width"]:
        return f"Seed by seed the difference is {shown_as}."
    return f"Seed by seed the difference is {shown_as}: these seeds do not tell the two apart."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _style() -> str:
    """The style of a run's report."""
    found = re.search(r"<style>(.*?)</style>", page.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, page.TEMPLATE
    return found[1]
