"""The figures of an evaluation as texts of at most 79 columns."""

from collections.abc import Sequence
from typing import Any

from sppo_jax.command import printable
from sppo_jax.run.intervals import FEW

Figures = dict[str, Any]
WIDTH = 79
NAME = 28  # columns of a name
SMALL = f"""Of fewer than {FEW} prompts an interval is exact and wide, and a win rate at equal
lengths has none: too few to tell (docs/evaluation.md)"""


def win_rate(found: Figures) -> str:
    """One policy against another."""
    lines = _head(found)
    lines.append(_row("", "win rate", "95 % interval", "ties"))
    for name, figures in found["judges"].items():
        controlled = figures["length_controlled_own_fit"]
        lines.append(_rate(name, figures))
        lines.append(
            _row("  length-controlled*", _number(controlled["mean"]), _interval(controlled["interval"]), "")
        )
        for category, part in figures.get("categories", {}).items():
            lines.append(_rate(f"  {printable(' '.join(category.split()))} ({part['prompts']})", part))
    lines += ["", _row("", *(f"policy {letter}" for letter in "AB"))]
    labels = {
        "characters": "characters, mean", "tokens": "tokens, mean", "truncated": "truncated share",
        "distinct_1": "distinct words", "distinct_2": "distinct pairs of words", "repeated": "repeated responses",
    }  # fmt: skip
    mine, theirs = found["texts"]
    for key, label in labels.items():
        lines.append(_row(label, *(_number(part[key]) for part in (mine, theirs))))
    numbers = [found["prompts"]] + [
        part["prompts"]
        for figures in found["judges"].values()
        for part in figures.get("categories", {}).values()
    ]
    return "\n".join(
        [*lines, "", "* own fit, at equal lengths: not AlpacaEval's (docs/evaluation.md)", *_small(*numbers)]
    )


def round_robin(found: Figures) -> str:
    """All pairs of policies: the row's win rate against the column's."""
    lines = _head(found)
    letters = [chr(ord("A") + i) if i < 26 else str(i) for i in range(len(found["policies"]))]
    for name, figures in found["judges"].items():
        lines += [f"{name}: win rate of the row's policy against the column's", "    " + _cells(letters)]
        for letter, row, share in zip(letters, figures["win_rate"], figures["mixture"], strict=True):
            lines.append(f"{letter:>3} " + _cells([_number(p) for p in row]) + f"   mixture {share:.3f}")
        ring = [letters[i] for i in figures["cycle"]]
        lines.append(
            f"ring: {' > '.join([*ring, ring[0]])}"
            if ring
            else "no ring: no policies beat each other in turn"
        )
        lines.append(f"duality gap of the mixture: {figures['gap']:.1e}")
    return "\n".join(lines)


def best_of(found: Figures) -> str:
    """The best of n responses against one."""
    names = list(found["curve"][0]["win_rate"])
    lines = _head(found)
    for name in names:
        lines.append(_row(f"best of n, by the {name}", "win rate", "95 % interval", "ties"))
        lines += [_rate(f"  {point['n']}", point["win_rate"][name]) for point in found["curve"]]
    return "\n".join([*lines, *_small(found["prompts"])])


def _small(*prompts: int) -> list[str]:
    """The word on intervals of few prompts, where one of these numbers of prompts is small."""
    return [SMALL] if min(prompts) < FEW else []


def _head(found: Figures) -> list[str]:
    lines = [f"{chr(ord('A') + i)} {_cut(name)}" for i, name in enumerate(found["policies"])]
    s = found["sampling"]
    return [
        *lines,
        f"{found['prompts']} prompts, seed {found['seed']}, temperature {s['temperature']:g}, top_p {s['top_p']:g}, "
        f"at most {s['max_new_tokens']} tokens",
        "",
    ]


def _rate(name: str, figures: Figures) -> str:
    return _row(name, _number(figures["mean"]), _interval(figures["interval"]), _number(figures["ties"]))


def _row(name: str, *cells: str) -> str:
    """A name and its cells, right-aligned; a name that is too long loses its middle."""
    widths = (12, 18, 10)
    return (
        f"{_cut(name, NAME):<{NAME}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False))
    ).rstrip()


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>7}" for cell in cells)


def _interval(ends: Sequence[float | None]) -> str:
    low, high = ends
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _cut(text: str, width: int = WIDTH - 2) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"
