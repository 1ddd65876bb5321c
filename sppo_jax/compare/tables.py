"""The tables of a comparison: as cells for the page, and as text of at most 79 columns for the terminal."""

from collections.abc import Sequence

from sppo_jax.command import printable
from sppo_jax.compare.figures import Figures, main_measure, measure, shown
from sppo_jax.report.tables import ABSENT, Table, figure

WIDTH = 79
SEPARATOR = "  "
NAMES = {
    "win_rate_judge": ("win rate, judge", "win, judge", "{:.3f}"),
    "win_rate_oracle": ("win rate, oracle", "win, oracle", "{:.3f}"),
    "winners": ("winners", "winners", "{:+.2f}"),
    "losers": ("losers", "losers", "{:+.2f}"),
    "kl_per_token": ("KL/token", "KL/token", "{:.4f}"),
    "tokens": ("tokens", "tokens", "{:.1f}"),
}  # heading on the page, in the terminal, and form of a number
RATES = ("win_rate_judge", "win_rate_oracle")


def as_text(found: Figures) -> str:
    """The table for the terminal, with what its figures are below it."""
    variants = found["variants"]
    counts = [measure(shown(v), main_measure(found))["n"] for v in variants]
    rows = [
        _cells(v, main_measure(found), str(n) * (len(set(counts)) > 1))
        for v, n in zip(variants, counts, strict=True)
    ]
    heads = [
        "n",
        *(NAMES[name][1] for name in RATES),
        "least",
        *(NAMES[name][1] for name in NAMES if name not in RATES),
    ]
    full = [i for i in range(len(heads)) if any(row[i] not in (ABSENT, "") for row in rows)]
    columns = [[heads[i], *(row[i] for row in rows)] for i in full]
    widths = [max(map(len, column)) for column in columns]
    names = [printable(v["name"]) for v in variants]
    room = WIDTH - sum(widths) - len(SEPARATOR) * len(widths)
    letters = [_letter(i) for i in range(len(names))] if max(map(len, names)) > room else names
    legend = [] if letters == names else [_cut(f"{a}  {b}") for a, b in zip(letters, names, strict=True)]
    first = ["variant"[: max(room, 0)] if letters == names else "", *letters]
    width = max(map(len, first))
    lines = [
        SEPARATOR.join(
            [name.ljust(width), *(column[i].rjust(w) for column, w in zip(columns, widths, strict=True))]
        )
        for i, name in enumerate(first)
    ]
    by = f", by the {main_measure(found).removeprefix('win_rate_')}"
    rule = "-" * max(map(len, lines))
    return "\n".join(
        [*legend, *[""] * bool(legend), lines[0], rule, *lines[1:], "", *footnote(found, counts, by)]
    )


def footnote(found: Figures, counts: Sequence[int], by: str = "") -> list[str]:
    """What the figures of the table are, in lines of at most 79 columns. `by`: the end of the sentence about least values."""
    numbers = sorted(set(counts))
    at_t = sorted({v["iteration"] for v in found["variants"]})
    when = f"iteration {at_t[0]}" if len(at_t) == 1 else "the last iteration of each variant"
    if numbers[-1] < 2:
        what = ["One seed: there is no interval, and a difference may be chance."]
    else:
        seeds = f"{numbers[0]} seeds" if len(numbers) == 1 else "the n seeds that have it"
        what = [
            f"Means over {seeds}. ±: half of the {found['level']:.0%} interval of that mean, by",
            f"Student's t over seeds. least: the lowest win rate of a seed{by}.",
        ]
        what += ["Where n is 1 there is no interval."] if numbers[0] < 2 else []
    return [f"After {when}, on held-out prompts; win rates are against the base.", *what]


def results(found: Figures) -> Table:
    """The table of the page: means with their intervals, and least values over seeds."""
    variants = found["variants"]
    names = [name for name in NAMES if any(name in shown(v) for v in variants)]
    table = [["variant", "iteration", "seeds"]]
    for name in names:
        table[0] += [NAMES[name][0], *(["least"] if name in RATES else [])]
    for v in variants:
        row = [printable(v["name"]), str(v["iteration"]), str(measure(shown(v), main_measure(found))["n"])]
        for name in names:
            of, form = measure(shown(v), name), NAMES[name][2]
            row += [spread(of, form), *([figure(of["least"], form)] if name in RATES else [])]
        table.append(row)
    same = len({v["iteration"] for v in variants}) == 1  # then it is below the table
    return [row[:1] + row[1 + same :] for row in table]


def differences(found: Figures) -> Table:
    """Each variant minus the first one, seed by seed; empty where there is nothing to subtract."""
    names = [name for name in NAMES if any(name in v["against_first"] for v in found["variants"])]
    head = ["variant", "seeds", *(NAMES[name][0] for name in names)]
    rows = []
    for v in found["variants"][1:]:
        cells = [measure(v["against_first"], name) for name in names]
        signed = [
            spread(of, NAMES[name][2].replace(":.", ":+.")) for of, name in zip(cells, names, strict=True)
        ]
        rows.append([printable(v["name"]), str(max((of["n"] for of in cells), default=0)), *signed])
    return [head, *rows] if names else []


def by_seed(found: Figures) -> Table:
    """Every run, at every iteration."""
    names = [
        name
        for name in NAMES
        if any(name in at for v in found["variants"] for r in v["runs"] for at in r["iterations"])
    ]
    rows = [
        [
            printable(v["name"]),
            str(run["seed"]),
            str(of["iteration"]),
            *(figure(of.get(name), NAMES[name][2]) for name in names),
        ]
        for v in found["variants"]
        for run in v["runs"]
        for of in run["iterations"]
    ]
    return [["variant", "seed", "iteration", *(NAMES[name][0] for name in names)], *rows]


def differing(found: Figures) -> Table:
    """The knobs in which the variants differ, a column for each variant; empty of one variant."""
    rows = [[key, *(str(value) or "''" for value in values)] for key, values in found["differ"].items()]
    return [["knob", *(printable(v["name"]) for v in found["variants"])], *rows] if rows else []


def spread(of: Figures, form: str) -> str:
    """A mean with half of its interval's width, if it has one."""
    mean = figure(of["mean"], form)
    return mean if of["half_width"] is None else f"{mean} ± {figure(of['half_width'], form.replace('+', ''))}"


def _cells(variant: Figures, by: str, count: str) -> list[str]:
    """A row of the terminal's table without its name."""
    of = shown(variant)
    rates = [spread(measure(of, name), NAMES[name][2]) for name in RATES]
    least = measure(of, by)
    rest = [figure(measure(of, name)["mean"], NAMES[name][2]) for name in NAMES if name not in RATES]
    return [count, *rates, figure(least["least"] if least["n"] > 1 else None, "{:.3f}"), *rest]


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else str(i)


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 31]}…{text[-30:]}"
