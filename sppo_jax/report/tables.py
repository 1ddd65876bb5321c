"""The report's tables as cells, the head first: results, the judge's matrices, features of responses; and results as text."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from scipy.special import stdtrit

from sppo_jax.run import intervals
from sppo_jax.run.directory import BASE
from sppo_jax.run.evaluations import Evaluation, Rate

Table = list[list[str]]
ABSENT = "-"
LARGE, HUGE = 999.5, 99_999.5  # from here on figures are shown without a fraction, and with an exponent

# The heading on the page, the one in the terminal, and the cell of an iteration. In the terminal all of them together,
# with the widest figures, have 78 characters.
RESULTS: tuple[tuple[str, str, Callable[[Evaluation], str]], ...] = (
    ("iteration", "iter", lambda e: str(e.iteration)),
    ("win rate, judge", "win, judge", lambda e: rate(e.against("judge", "base"))),
    ("win rate, oracle", "win, oracle", lambda e: rate(e.against("oracle", "base"))),
    ("winners", "winners", lambda e: figure(e.winners, "{:+.2f}")),
    ("losers", "losers", lambda e: figure(e.losers, "{:+.2f}")),
    ("KL/token", "KL/token", lambda e: figure(e.kl_per_token, "{:.4f}")),
    ("tokens", "tokens", lambda e: figure(e.tokens, "{:.1f}")),
    ("words", "words", lambda e: figure(e.words, "{:.1f}")),
)
DIAGNOSTICS = (
    ("prompts with a cycle", "cycle_share", "{:.1%}"),
    ("pairs that tie", "tie_share", "{:.1%}"),
    ("position bias", "position_bias", "{:+.2f}"),
    ("win rate and length", "length_correlation", "{:+.2f}"),
    ("entropy", "entropy", "{:.2f}"),
)
NOTE = "win: against the base, ± one standard error; iter 0: the base against itself"
CUT = ("cut_prompts", "cut_responses")


def results(found: Sequence[Evaluation], *, short: bool = False) -> Table:
    """Win rates against the base, and log-ratios on held-out prompts in nats. `short`: with the terminal's headings."""
    head = [name if short else heading for heading, name, _ in RESULTS]
    return _without_empty([head, *([cell(e) for _, _, cell in RESULTS] for e in found)])


def as_text(found: Sequence[Evaluation]) -> str:
    """The results for the terminal, at most 79 characters wide."""
    cells = results(found, short=True)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], NOTE])


def judged(lines: Sequence[dict[str, Any]]) -> Table:
    """Properties of each iteration's K x K matrices, and counts of cut texts, from the lines of metrics.jsonl; empty without any."""
    head = ["iteration", *(name for name, *_ in DIAGNOSTICS), "cut prompts", "cut responses"]
    table = []
    for line in (line for line in lines if line["stage"] == "judge"):
        t = line["iteration"]
        shards = [s for s in lines if s["stage"] == "judge_shard" and s["iteration"] == t]
        cut = [f"{sum(s.get(name) or 0 for s in shards):.0f}" for name in CUT]
        table.append([str(t), *(figure(line.get(key), form) for _, key, form in DIAGNOSTICS), *cut])
    return _without_empty([head, *table]) if table else []


def features(found: Sequence[Evaluation]) -> Table:
    """Means of what the oracle finds in held-out responses: a row for each feature, the most changed first, a column for each policy.

    The last column has the last policy's change from the base on the same prompts, with half of its 95 % interval. Empty
    without any.
    """
    measured = [e for e in found if e.features]
    names = list(dict.fromkeys(name for e in measured for name in e.features))
    change = {name: measured[-1].features.get(name, 0) - measured[0].features.get(name, 0) for name in names}
    names.sort(key=lambda name: -abs(change[name]))
    head = ["responses", *("base" if e.iteration == BASE else f"iteration {e.iteration}" for e in measured)]
    rows = [
        [name, *(figure(e.features.get(name), "{:.3f}") for e in measured), _changed(measured[-1], name)]
        for name in names
    ]
    return _without_empty([[*head, "change, 95 %"], *rows]) if rows else []


def _changed(last: Evaluation, name: str) -> str:
    """The mean change ± half of its 95 % interval over prompts; without it where that is luck."""
    found = last.changes.get(name)
    if found is None or found.mean is None:
        return ABSENT
    mean, prompts = figure(found.mean, "{:+.3f}"), last.prompts or 0
    if found.stderr is None or prompts < intervals.FEW:
        return mean
    half = float(stdtrit(prompts - 1, (1 + intervals.LEVEL) / 2)) * found.stderr
    return f"{mean} ± {figure(half, '{:.3f}')}"


def figure(value: float | None, form: str) -> str:
    """A number in the given form, or `-` for None; of large ones the whole part, of huge ones two digits and an exponent."""
    if value is None:
        return ABSENT
    if abs(value) < LARGE:
        return form.format(value)
    sign = "+" if "+" in form else ""
    if abs(value) < HUGE:
        return f"{value:{sign}.0f}"
    return re.sub(r"e\+?0*", "e", f"{value:{sign}.1e}")


def rate(found: Rate | None, absent: str = ABSENT) -> str:
    """A win rate with its standard error, or `absent` where there is none."""
    return f"{figure(found.mean, '{:.3f}')} ± {figure(found.stderr, '{:.3f}')}" if found else absent


def _without_empty(table: Table) -> Table:
    """The table without columns in which nothing was measured."""
    full = [i for i in range(len(table[0])) if any(row[i] != ABSENT for row in table[1:])]
    return [[row[i] for i in full] for row in table]
