"""The pictures of the report, one function each, as inline SVG whose colours follow the page's."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sppo_jax.run.directory import BASE
from sppo_jax.run.evaluations import Evaluation

# Each is replaced by the page's colour of that name, which a dark page has other values for.
INK = {"judge": "#4063d8", "oracle": "#389826", "down": "#cb3c33", "plain": "#555555", "faint": "#bbbbbb"}
SERIES = ("#4c78c8", "#e08a1e", "#3f9e5a", "#c8504a", "#8d6bb8", "#2f9aa8", "#b0724f", "#8a8f98")
LARGEST = 1e12  # a point beyond it would leave nothing to see of the others
LEVEL = "_level"  # label of a horizontal line, which alone is no picture
BINS = 20
STANDARD_ERRORS = 1.96  # on either side of a mean log-ratio: 95 % of a normal distribution
# Points: the width that a legend may have, of one of its characters, and of a line's picture and the gap to the next.
LEGEND, CHARACTER, HANDLE = 285, 4.6, 38
WORK = ("sampling", "judging", "scoring", "training", "exporting", "evaluating")


@dataclass(frozen=True)
class Facts:
    """The pictures' data: the base's and each iteration's evaluation, lines of metrics.jsonl by stage, and response lengths."""

    evaluations: Sequence[Evaluation]
    lines: Sequence[dict[str, Any]]
    lengths: tuple[Sequence[int], Sequence[int]]  # tokens of the base's and the last policy's responses

    @property
    def trained(self) -> list[Evaluation]:
        """Evaluations of all policies but the base."""
        return [e for e in self.evaluations if e.iteration != BASE]

    @property
    def last(self) -> Evaluation:
        """The evaluation of the last policy."""
        return self.evaluations[-1]

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage."""
        return [line for line in self.lines if line["stage"] == stage]


def pictures(
    evaluations: Sequence[Evaluation],
    lines: Sequence[dict[str, Any]],
    lengths: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> list[dict[str, str]]:
    """[{title, caption, svg}] from all evaluations, the lines of metrics.jsonl, and lengths of the base's and the last responses.

    A figure that is None is left out, and so is a picture without any.
    """
    facts = Facts(evaluations, lines, lengths)
    one = " One iteration so far, so a point." if len(facts.trained) == 1 else ""
    drawn = [
        {
            "title": title,
            "caption": caption + one * (draw in BY_ITERATION),
            "svg": svg(title, _of(facts, draw), xlabel),
        }
        for title, caption, draw, xlabel in PANELS
    ]
    return [picture for picture in drawn if picture["svg"]]


def _of(facts: Facts, draw: Callable[[Any, Facts], None]) -> Callable[[Any], None]:
    return lambda axes: draw(axes, facts)


def _win_rates(axes: Any, facts: Facts) -> None:
    for name, form in (("judge", "o-"), ("oracle", "s--")):
        rates = [(e.iteration, rate) for e in facts.evaluations if (rate := e.against(name, "base"))]
        drawn = [(t, rate.mean, rate.interval or _around(rate.mean, None)) for t, rate in rates]
        _errorbars(axes, drawn, INK[name], name, form)
    line_at(axes, 0.5)


def _win_probabilities(axes: Any, facts: Facts) -> None:
    itself = next((e.against("judge", "base") for e in facts.evaluations if e.iteration == BASE), None)
    last, bins = facts.last.against("judge", "base"), np.linspace(0, 1, BINS + 1)
    if last and last.per_prompt:
        if itself and itself.per_prompt:
            _histogram(axes, itself.per_prompt, bins, INK["plain"], "base against itself")
        _histogram(axes, last.per_prompt, bins, INK["judge"], f"iteration {facts.last.iteration}")


def _log_ratios(axes: Any, facts: Facts) -> None:
    winners = [(e.iteration, e.winners, _around(e.winners, e.winners_stderr)) for e in facts.trained]
    losers = [(e.iteration, e.losers, _around(e.losers, e.losers_stderr)) for e in facts.trained]
    _errorbars(axes, winners, INK["oracle"], "winners")
    _errorbars(axes, losers, INK["down"], "losers")
    line_at(axes, 0)


def _lengths(axes: Any, facts: Facts) -> None:
    t, tokens = points((e.iteration, e.tokens) for e in facts.evaluations)
    _curve(axes, t, tokens, "o-", INK["plain"])
    if highest := max(tokens, default=0):
        axes.set_ylim(0, 1.2 * highest)


def _length_distributions(axes: Any, facts: Facts) -> None:
    base, last = facts.lengths
    if not base or not last:
        return
    longest = max(*base, *last)
    width = -(-(longest + 1) // BINS)  # whole tokens, so that no bin holds more lengths than another
    bins = np.arange(0, longest + width + 1, width)
    _histogram(axes, base, bins, INK["plain"], "base")
    _histogram(axes, last, bins, INK["judge"], f"iteration {facts.last.iteration}")


def _divergence(axes: Any, facts: Facts) -> None:
    _curve(axes, *points((e.iteration, e.kl_per_token) for e in facts.trained), "o-", INK["plain"])
    line_at(axes, 0)


def _cycles(axes: Any, facts: Facts) -> None:
    for key, label, form, ink in (
        ("cycle_share", "prompts with a cycle", "o-", INK["judge"]),
        ("tie_share", "pairs that tie", "s-", INK["plain"]),
    ):
        _curve(axes, *_by_iteration(facts.of("judge"), key), form, ink, label)
    axes.set_ylim(bottom=0)


def _leanings(axes: Any, facts: Facts) -> None:
    for key, label, form, ink in (
        ("length_correlation", "win rate and length, correlation", "o-", INK["judge"]),
        ("position_bias", "position bias, nats", "s-", INK["plain"]),
    ):
        _curve(axes, *_by_iteration(facts.of("judge"), key), form, ink, label)
    line_at(axes, 0)


def _loss(axes: Any, facts: Facts) -> None:
    for n, e in enumerate(facts.trained):
        mine = [line for line in facts.of("fit") if line["iteration"] == e.iteration]
        losses = points((line["step"], line.get("loss")) for line in mine)
        _curve(axes, *losses, "-", SERIES[n % len(SERIES)], f"iteration {e.iteration}")


def _seconds(axes: Any, facts: Facts) -> None:
    lines = [line for line in facts.of("seconds") if (line.get("total") or 0) > 0]
    t = [line["iteration"] for line in lines]
    spent = {name: np.array([max(line.get(name) or 0.0, 0.0) for line in lines]) for name in WORK}
    rest = np.array([line["total"] for line in lines]) - sum(spent.values())
    below = np.zeros(len(lines))
    for (name, seconds), ink in zip([*spent.items(), ("other", rest.clip(0))], SERIES, strict=False):
        if seconds.any():
            axes.bar(t, seconds, 0.6, bottom=below, color=ink, label=name)
            below = below + seconds
    if t:
        axes.set_xlim(min(t) - 0.6, max(t) + 0.6)
        axes.set_ylim(0, 1.05 * max(below))


def _speed(axes: Any, facts: Facts) -> None:
    t, tokens = _by_iteration(facts.of("respond"), "tokens_per_second")
    _curve(axes, t, tokens, "o-", INK["plain"])
    axes.set_ylim(bottom=0)


# Title, caption, what draws it, and the label of the x axis.
PANELS: list[tuple[str, str, Callable[[Any, Facts], None], str]] = [
    ("Win rate against the base", "Held-out prompts, 95 % intervals over them; 0.5 is no better.", _win_rates, "iteration"),
    ("Win probabilities, prompt by prompt", "Held-out prompts; to the right of 0.5 the judge prefers the policy's response.",
     _win_probabilities, "P(response beats the base's)"),
    ("Log-ratio against the reference", "Held-out responses of each iteration's reference, nats; bars of 1.96 standard errors.", _log_ratios, "iteration"),
    ("Divergence per token", "KL(reference ‖ policy) of each iteration, nats.", _divergence, "iteration"),
    ("Response length", "Mean tokens on held-out prompts.", _lengths, "iteration"),
    ("Lengths, response by response", "Held-out prompts.", _length_distributions, "tokens"),
    ("Training loss", "Starts at the mean squared target, by construction.", _loss, "update"),
    ("Cycles and ties", "Shares of the judge's K × K matrices.", _cycles, "iteration"),
    ("What the judge leans to", "0: neither to long responses nor to the one shown first.", _leanings, "iteration"),
    ("Where the time goes", "Seconds of each iteration, over all its starts.", _seconds, "iteration"),
    ("Sampling speed", "Tokens per second.", _speed, "iteration"),
]  # fmt: skip

# Pictures that have no point of the base: after one iteration they have a single one.
BY_ITERATION = (_log_ratios, _divergence, _cycles, _leanings, _speed)


def points(found: Iterable[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Coordinates x and y of the points that have a y that can be drawn."""
    drawn = [(x, y) for x, y in found if y is not None and abs(y) <= LARGEST]
    return [x for x, _ in drawn], [y for _, y in drawn]


def _by_iteration(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return points((line["iteration"], line.get(key)) for line in lines)


def _curve(axes: Any, x: Sequence[int], y: Sequence[float], form: str, ink: str, label: str = "") -> None:
    if y:
        axes.plot(x, y, form if len(y) > 1 else "o", color=ink, label=label)
        if form != "-":
            _value_of_one(axes, x, y, ink)


def _histogram(axes: Any, values: Sequence[float], bins: np.ndarray, ink: str, label: str) -> None:
    """Shares of prompts in each bin, as an outline over a pale area."""
    shares = np.histogram(values, bins)[0] / len(values)
    axes.stairs(shares, bins, fill=True, alpha=0.18, color=ink)
    axes.stairs(shares, bins, color=ink, linewidth=1.5, label=label)


def _around(mean: float | None, stderr: float | None) -> tuple[float, float]:
    """The ends of a mean's error bar; the mean itself where it has no standard error."""
    spread, at = STANDARD_ERRORS * (stderr or 0.0), mean or 0.0
    return at - spread, at + spread


def _errorbars(
    axes: Any,
    found: Iterable[tuple[int, float | None, tuple[float, float]]],
    ink: str,
    label: str,
    form: str = "o-",
) -> None:
    """Means with error bars, of (x, mean, their ends); nothing where there are none."""
    drawn = [(x, y, *ends) for x, y, ends in found if y is not None and max(map(abs, (y, *ends))) <= LARGEST]
    if drawn:
        x, mean, low, high = map(np.array, zip(*drawn, strict=True))
        spread = np.maximum([mean - low, high - mean], 0)
        axes.errorbar(x, mean, spread, fmt=form, capsize=4, color=ink, label=label)
        _value_of_one(axes, list(x), list(mean), ink)


def _value_of_one(axes: Any, x: Sequence[int], y: Sequence[float], ink: str) -> None:
    """Write the value beside a point that is alone, since no line shows where it lies: of a second one on its left."""
    if len(x) == 1:
        axes.margins(y=0.2)
        side = -1 if axes.texts else 1
        axes.annotate(
            f"{y[0]:.3g}", (x[0], y[0]), xytext=(10 * side, 0), textcoords="offset points", color=ink,
            ha="left" if side > 0 else "right", va="center",
        )  # fmt: skip


def _legend(axes: Any) -> None:
    """Name what is drawn, above the plot: within it a legend would lie over the curves and bars."""
    handles, labels = axes.get_legend_handles_labels()
    named = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label != LEVEL]
    if named:
        longest = max(len(label) for _, label in named)
        columns = max(1, min(len(named), int(LEGEND / (CHARACTER * longest + HANDLE))))
        axes.legend(
            *zip(*named, strict=True), loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False,
            fontsize="small", columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip


def line_at(axes: Any, y: float) -> None:
    """Draw a faint level line, which alone is no picture."""
    axes.axhline(y, color=INK["faint"], linewidth=1, label=LEVEL)


def svg(title: str, draw: Callable[[Any], None], xlabel: str) -> str:
    """What `draw` draws on matplotlib's axes as inline SVG, the same bytes for the same numbers; empty where it draws nothing."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids differ between the pictures of one page
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.9))
        axes = figure.add_subplot()
        draw(axes)
        drawn: list[Any] = [*axes.lines, *axes.patches, *axes.containers]
        if all(artist.get_label() == LEVEL for artist in drawn):
            return ""
        _legend(axes)
        axes.set_xlabel(xlabel)
        if xlabel in ("iteration", "update"):
            left, right = axes.get_xlim()
            if right - left < 1:  # a single point
                only = (left + right) / 2
                axes.set_xlim(only - 1, only + 1)
                axes.xaxis.set_major_locator(FixedLocator([only]))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        # Once: a figure with a layout of its own is drawn, and laid out, twice in saving.
        ConstrainedLayoutEngine().execute(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = "<svg" + out.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # names that nothing refers to, and that all pictures share
    for name, ink in INK.items():
        text = text.replace(ink, f"var(--{name})")
    return text.replace("#000000", "currentColor").replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
