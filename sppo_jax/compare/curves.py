"""The curves of a comparison as inline SVG: each seed faint, the mean over seeds in full."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sppo_jax.compare.figures import Figures, at, measure
from sppo_jax.report.pictures import LARGEST, SERIES

WIDE, HIGH = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 38  # margins around the axes
STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
TICKS = 5  # at most about so many on the vertical axis
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
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One variant in one picture: the points of each seed, and their means."""

    seeds: list[Points]
    mean: Points
    colour: str
    dashes: str


def pictures(found: Figures) -> list[dict[str, str]]:
    """[{title, caption, svg}] of the measures that some run has."""
    drawn = []
    for name, title, caption, level in PANELS:
        curves = [_curve(variant, name, i) for i, variant in enumerate(found["variants"])]
        if any(curve.mean for curve in curves):
            drawn.append({"title": title, "caption": caption, "svg": svg(title, curves, level)})
    return drawn


def legend(found: Figures) -> list[dict[str, str]]:
    """[{name, colour, dashes}] of the variants."""
    return [
        {"name": variant["name"], "colour": _colour(i), "dashes": _dashes(i)}
        for i, variant in enumerate(found["variants"])
    ]


def svg(title: str, curves: Sequence[Curve], level: float | None) -> str:
    """One picture, the same bytes for the same numbers; its text has the page's colour."""
    points = [point for curve in curves for line in [curve.mean, *curve.seeds] for point in line]
    last = max(1, *(int(x) for x, _ in points))
    ys = [y for _, y in points] + ([] if level is None else [level])
    marks = ticks(min(ys), max(ys))
    low, high = min(marks[0], *ys), max(marks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / last, (y - low) / (high - low)
        return LEFT + across * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - up * (HIGH - TOP - BOTTOM)

    parts = [_grid(place(0, y)[1], _number(y, marks), y == level) for y in marks]
    parts += [_text(place(x, low)[0], HIGH - BOTTOM + 18, f"{x}", "middle") for x in _iterations(last)]
    parts.append(_text((LEFT + WIDE - RIGHT) / 2, HIGH - 4, "iteration", "middle"))
    if level is not None and level not in marks:
        parts.append(_grid(place(0, level)[1], "", strong=True))
    for curve in curves:
        parts += [_line([place(*point) for point in seed], curve, faint=True) for seed in curve.seeds]
    for curve in curves:  # above all faint ones
        parts.append(_line([place(*point) for point in curve.mean], curve, faint=False))
    return (
        f'<svg role="img" aria-label="{html.escape(title)}" viewBox="0 0 {WIDE} {HIGH}" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = high - low or max(abs(high), 1.0) / 10
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(s * power for s in STEPS if span / (s * power) <= TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _curve(variant: Figures, name: str, number: int) -> Curve:
    means = [(of["iteration"], measure(of, name)["mean"]) for of in variant["over_seeds"]]
    seeds = [
        [(of["iteration"], at(run, of["iteration"]).get(name)) for of in run["iterations"]]
        for run in variant["runs"]
    ]
    # The mean of one seed is that seed.
    seeds = seeds if len(seeds) > 1 else []
    return Curve([_drawn(line) for line in seeds], _drawn(means), _colour(number), _dashes(number))


def _drawn(line: Sequence[tuple[int, float | None]]) -> Points:
    """The points that have a value that can be drawn."""
    return [(float(x), y) for x, y in line if y is not None and abs(y) <= LARGEST]


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _dashes(number: int) -> str:
    return DASHES[min(number // len(SERIES), len(DASHES) - 1)]


def _iterations(last: int) -> range:
    return range(0, last + 1, -(-last // 10))


def _number(y: float, marks: Sequence[float]) -> str:
    """A tick's text, with as many digits as tell it from the next one."""
    step = marks[1] - marks[0]
    if max(map(abs, marks)) >= 1e5:
        return f"{y:.3g}"
    digits = next((n for n in range(8) if abs(round(step, n) - step) < step / 1000), 8)
    return f"{y if abs(y) > step / 1000 else 0:.{digits}f}"


def _grid(y: float, label: str, strong: bool) -> str:
    ink = "var(--plain)" if strong else "var(--edge)"
    line = (
        f'<line x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{ink}" stroke-width="1"/>'
    )
    return line + (_text(LEFT - 6, y + 4, label, "end") if label else "")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _line(points: Sequence[tuple[float, float]], curve: Curve, *, faint: bool) -> str:
    """A line through the points; a dot at each one of a mean, so that a single one is seen."""
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{curve.dashes}"' if curve.dashes and not faint else ""
    style = 'stroke-width="1.3" stroke-opacity=".45"' if faint else 'stroke-width="2.2"'
    line = f'<polyline points="{path}" fill="none" stroke="{curve.colour}" {style}{dashes}/>'
    dots = (
        ""
        if faint
        else "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>' for x, y in points)
    )
    return line + dots
