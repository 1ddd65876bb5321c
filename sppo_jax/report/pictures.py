"""The pictures of the report, one function each, as inline SVG."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sppo_jax.run.directory import BASE

INK = {"judge": "#4063d8", "oracle": "#389826", "up": "#389826", "down": "#cb3c33", "plain": "#555555"}

Evaluation = dict[str, Any]  # one eval.json


@dataclass(frozen=True)
class Facts:
    """The pictures' data: eval.json of the base and each iteration, and lines of metrics.jsonl."""

    evaluations: Sequence[Evaluation]
    judged: Sequence[dict[str, Any]]
    fitted: Sequence[dict[str, Any]]

    @property
    def trained(self) -> list[Evaluation]:
        """Evaluations of all policies but the base."""
        return [e for e in self.evaluations if e["iteration"] != BASE]


def pictures(evaluations: Sequence[Evaluation], lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """[{title, caption, svg}] from all eval.json and the lines of metrics.jsonl."""
    facts = Facts(
        evaluations,
        judged=[line for line in lines if line["stage"] == "judge"],
        fitted=[line for line in lines if line["stage"] == "fit" and line.get("loss") is not None],
    )
    return [
        {"title": title, "caption": caption, "svg": _svg(draw, facts, xlabel)}
        for title, caption, draw, xlabel in PANELS
    ]


def _win_rates(axes: Any, facts: Facts) -> None:
    for name in ("judge", "oracle"):
        points = [
            (e["iteration"], e["win_rate"][name]["base"]) for e in facts.evaluations if name in e["win_rate"]
        ]
        if points:
            x, rates = zip(*points, strict=True)
            _errorbars(axes, x, [r["mean"] for r in rates], [r["stderr"] for r in rates], INK[name], name)
    _line_at(axes, 0.5)
    axes.legend(frameon=False)


def _log_ratios(axes: Any, facts: Facts) -> None:
    t, ratios = _iterations(facts.trained), [e["log_ratio"] for e in facts.trained]
    for name, ink in (("winners", INK["up"]), ("losers", INK["down"])):
        _errorbars(axes, t, [r[name] for r in ratios], [r[f"{name}_stderr"] for r in ratios], ink, name)
    _line_at(axes, 0)
    axes.legend(frameon=False)


def _lengths(axes: Any, facts: Facts) -> None:
    tokens = [e["length"]["tokens"] for e in facts.evaluations]
    axes.plot(_iterations(facts.evaluations), tokens, "o-", color=INK["plain"])
    axes.set_ylim(0, 1.2 * max(tokens))


def _divergence(axes: Any, facts: Facts) -> None:
    kl = [e["log_ratio"]["kl_per_token"] for e in facts.trained]
    axes.plot(_iterations(facts.trained), kl, "o-", color=INK["plain"])
    _line_at(axes, 0)


def _cycles(axes: Any, facts: Facts) -> None:
    t = _iterations(facts.judged)
    cycles, ties = ([line[key] for line in facts.judged] for key in ("cycle_share", "tie_share"))
    axes.plot(t, cycles, "o-", color=INK["judge"], label="prompts with a cycle")
    axes.plot(t, ties, "s-", color=INK["plain"], label="pairs that tie")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _leanings(axes: Any, facts: Facts) -> None:
    t = _iterations(facts.judged)
    for key, label, form, ink in (
        ("length_correlation", "win rate and length, correlation", "o-", INK["judge"]),
        ("position_bias", "position bias, nats", "s-", INK["plain"]),
    ):
        axes.plot(t, [line[key] for line in facts.judged], form, color=ink, label=label)
    _line_at(axes, 0)
    axes.legend(frameon=False)


def _loss(axes: Any, facts: Facts) -> None:
    for t in _iterations(facts.trained):
        mine = [line for line in facts.fitted if line["iteration"] == t]
        axes.plot([line["step"] for line in mine], [line["loss"] for line in mine], label=f"iteration {t}")
    axes.legend(frameon=False)


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


def _iterations(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["iteration"] for row in rows]


def _errorbars(
    axes: Any, x: Sequence[int], mean: list[float], stderr: list[float], ink: str, label: str
) -> None:
    """Means with 95 % intervals."""
    spread = [1.96 * value for value in stderr]
    axes.errorbar(x, mean, spread, marker="o", capsize=4, color=ink, label=label)


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
