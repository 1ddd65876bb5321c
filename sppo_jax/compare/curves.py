"""The curves of a comparison as inline SVG: each seed faint, the mean over seeds in full."""

import functools
from typing import Any

from sppo_jax.compare.figures import Figures, at, measure
from sppo_jax.report.pictures import SERIES, line_at, points, svg

DASHES = ("", "7 3", "2 3")  # of the first eight variants, the next eight, and the rest
# Measure, title, caption, and the value that means no change.
PANELS = (
    ("win_rate_oracle", "Win rate against the base, oracle", "Held-out prompts; 0.5 is no better.", 0.5),
    ("win_rate_judge", "Win rate against the base, judge", "Held-out prompts; 0.5 is no better.", 0.5),
    ("winners", "Winners' log-ratio", "Best held-out responses of each iteration's reference, nats.", 0.0),
    ("losers", "Losers' log-ratio", "Worst held-out responses of each iteration's reference, nats.", 0.0),
    ("kl_per_token", "Divergence per token", "KL(reference ‖ policy) of each iteration, nats.", 0.0),
    ("tokens", "Response length", "Mean tokens on held-out prompts.", None),
)


def pictures(found: Figures) -> list[dict[str, str]]:
    """[{title, caption, svg}] of the measures that some run has."""
    drawn = [
        {
            "title": title,
            "caption": caption,
            "svg": svg(title, functools.partial(_draw, found, name, level), "iteration"),
        }
        for name, title, caption, level in PANELS
    ]
    return [picture for picture in drawn if picture["svg"]]


def legend(found: Figures) -> list[dict[str, str]]:
    """[{name, colour, dashes}] of the variants."""
    return [
        {"name": variant["name"], "colour": _colour(i), "dashes": _dashes(i)}
        for i, variant in enumerate(found["variants"])
    ]


def _draw(found: Figures, name: str, level: float | None, axes: Any) -> None:
    for i, variant in enumerate(found["variants"]):
        means = points((of["iteration"], measure(of, name)["mean"]) for of in variant["over_seeds"])
        # The mean of one seed is that seed.
        for run in variant["runs"] if len(variant["runs"]) > 1 else ():
            seed = points((of["iteration"], at(run, of["iteration"]).get(name)) for of in run["iterations"])
            if seed[0]:
                axes.plot(*seed, linewidth=1.3, alpha=0.45, color=_colour(i))
        if means[0]:
            line = (0, tuple(map(float, dashes))) if (dashes := _dashes(i).split()) else "-"
            axes.plot(*means, "o", markersize=5, linewidth=2.2, linestyle=line, color=_colour(i), zorder=3)
    if level is not None:
        line_at(axes, level)


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _dashes(number: int) -> str:
    return DASHES[min(number // len(SERIES), len(DASHES) - 1)]
