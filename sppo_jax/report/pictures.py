"""The pictures of the report, one function each, as inline SVG."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sppo_jax.run.directory import BASE
from sppo_jax.run.evaluations import Evaluation

INK = {"judge": "#4063d8", "oracle": "#389826", "up": "#389826", "down": "#cb3c33", "plain": "#555555"}
LARGEST = 1e12  # a point beyond it would leave nothing to see of the others


@dataclass(frozen=True)
class Facts:
    """The pictures' data: the base's and each iteration's evaluation, and lines of metrics.jsonl."""

    evaluations: Sequence[Evaluation]
    judged: Sequence[dict[str, Any]]
    fitted: Sequence[dict[str, Any]]

    @property
    def trained(self) -> list[Evaluation]:
        """Evaluations of all policies but the base."""
        return [e for e in self.evaluations if e.iteration != BASE]


def pictures(evaluations: Sequence[Evaluation], lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """[{title, caption, svg}] from all evaluations and the lines of metrics.jsonl. A figure that is None is left out."""
    facts = Facts(
        evaluations,
        judged=[line for line in lines if line["stage"] == "judge"],
        fitted=[line for line in lines if line["stage"] == "fit"],
    )
    return [
        {"title": title, "caption": caption, "svg": _svg(draw, facts, xlabel)}
        for title, caption, draw, xlabel in PANELS
    ]


def _win_rates(axes: Any, facts: Facts) -> None:
    for name in ("judge", "oracle"):
        rates = [
            (e.iteration, rate.mean, rate.stderr)
            for e in facts.evaluations
            if (rate := e.against(name, "base"))
        ]
        _errorbars(axes, rates, INK[name], name)
    _line_at(axes, 0.5)
    _legend(axes)


def _log_ratios(axes: Any, facts: Facts) -> None:
    winners = [(e.iteration, e.winners, e.winners_stderr) for e in facts.trained]
    losers = [(e.iteration, e.losers, e.losers_stderr) for e in facts.trained]
    _errorbars(axes, winners, INK["up"], "winners")
    _errorbars(axes, losers, INK["down"], "losers")
    _line_at(axes, 0)
    _legend(axes)


def _lengths(axes: Any, facts: Facts) -> None:
    t, tokens = _points((e.iteration, e.tokens) for e in facts.evaluations)
    axes.plot(t, tokens, "o-", color=INK["plain"])
    if highest := max(tokens, default=0):
        axes.set_ylim(0, 1.2 * highest)


def _divergence(axes: Any, facts: Facts) -> None:
    axes.plot(*_points((e.iteration, e.kl_per_token) for e in facts.trained), "o-", color=INK["plain"])
    _line_at(axes, 0)


def _cycles(axes: Any, facts: Facts) -> None:
    for key, label, form, ink in (
        ("cycle_share", "prompts with a cycle", "o-", INK["judge"]),
        ("tie_share", "pairs that tie", "s-", INK["plain"]),
    ):
        axes.plot(*_judged(facts, key), form, color=ink, label=label)
    axes.set_ylim(bottom=0)
    _legend(axes)


def _leanings(axes: Any, facts: Facts) -> None:
    for key, label, form, ink in (
        ("length_correlation", "win rate and length, correlation", "o-", INK["judge"]),
        ("position_bias", "position bias, nats", "s-", INK["plain"]),
    ):
        axes.plot(*_judged(facts, key), form, color=ink, label=label)
    _line_at(axes, 0)
    _legend(axes)


def _loss(axes: Any, facts: Facts) -> None:
    for e in facts.trained:
        mine = [line for line in facts.fitted if line["iteration"] == e.iteration]
        points = _points((line["step"], line.get("loss")) for line in mine)
        axes.plot(*points, label=f"iteration {e.iteration}")
    _legend(axes)


# Title, caption, what draws it, and the label of the x axis.
PANELS: list[tuple[str, str, Callable[[Any, Facts], None], str]] = [
    ("Win rate against the base", "Held-out prompts, 95 % intervals; 0.5 is no better.", _win_rates, "iteration"),
    ("Log-ratio against the reference", "Held-out responses of each iteration's reference, nats.", _log_ratios, "iteration"),
    ("Response length", "Mean tokens on held-out prompts.", _lengths, "iteration"),
    ("Divergence per token", "KL(reference ‖ policy) of each iteration, nats.", _divergence, "iteration"),
    ("Cycles and ties", "Shares of the judge's K × K matrices.", _cycles, "iteration"),
    ("What the judge leans to", "0: neither to long responses nor to the one shown first.", _leanings, "iteration"),
    ("Training loss", "Starts at the mean squared target, by construction.", _loss, "update"),
]  # fmt: skip


def _points(found: Iterable[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Coordinates x and y of the points that have a y that can be drawn."""
    drawn = [(x, y) for x, y in found if y is not None and abs(y) <= LARGEST]
    return [x for x, _ in drawn], [y for _, y in drawn]


def _judged(facts: Facts, key: str) -> tuple[list[int], list[float]]:
    return _points((line["iteration"], line.get(key)) for line in facts.judged)


def _errorbars(
    axes: Any, found: Iterable[tuple[int, float | None, float | None]], ink: str, label: str
) -> None:
    """Means with 95 % intervals, of (x, mean, standard error); nothing where there are none."""
    drawn = [(x, y, e or 0.0) for x, y, e in found if y is not None and max(abs(y), e or 0.0) <= LARGEST]
    if drawn:
        x, mean, stderr = zip(*drawn, strict=True)
        spread = [1.96 * value for value in stderr]
        axes.errorbar(x, mean, spread, marker="o", capsize=4, color=ink, label=label)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _line_at(axes: Any, y: float) -> None:
    axes.axhline(y, color="#bbbbbb", linewidth=1)


def _svg(draw: Callable[[Any, Facts], None], facts: Facts, xlabel: str) -> str:
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
        draw(axes, facts)
        axes.set_xlabel(xlabel)
        if xlabel == "iteration":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]
