"""The report's first sentences: whether the last policy is better than the base, by each judge, with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from sppo_jax.run.directory import BASE
from sppo_jax.run.evaluations import Evaluation, Rate
from sppo_jax.run.intervals import FEW


@dataclass(frozen=True)
class Sentence:
    """`kind`: better, worse, same or unknown; `verdict` in bold, and the figures that it rests on."""

    kind: str
    verdict: str
    figures: str


def sentences(found: Sequence[Evaluation]) -> list[Sentence]:
    """One sentence for the judge and one for the oracle; without a measured win rate, one that says so."""
    last, base = found[-1], next((e for e in found if e.iteration == BASE), None)
    said = [
        _sentence(name, last, rate, base.against(name, "base") if base else None)
        for name in ("judge", "oracle")
        if (rate := last.against(name, "base"))
    ]
    missing = Sentence("unknown", "Not known.", f"Iteration {last.iteration} has no measured win rate.")
    return said or [missing]


def _sentence(name: str, last: Evaluation, rate: Rate, itself: Rate | None) -> Sentence:
    within = rate.interval
    if last.prompts is not None and last.prompts < FEW:
        kind, verdict = "unknown", f"Too few prompts to tell, by the {name}."
    elif within is None:
        kind, verdict = (
            "unknown",
            f"Not known, by the {name}, since the prompts' win probabilities are missing.",
        )
    elif within[0] > 0.5:
        kind, verdict = "better", f"Better than the base, by the {name}."
    elif within[1] < 0.5:
        kind, verdict = "worse", f"Worse than the base, by the {name}."
    else:
        kind, verdict = "same", f"No change that these prompts can show, by the {name}."
    spread = (
        f" (95\N{NO-BREAK SPACE}% interval {_percent(within[0])} to {_percent(within[1])})" if within else ""
    )
    includes = ", which includes 50\N{NO-BREAK SPACE}%" if kind == "same" else ""
    before = f"; the base wins {_percent(itself.mean)} against itself" if itself and itself.mean else ""
    prompts = "the" if last.prompts is None else f"{last.prompts}"
    after = f"After {last.iteration} iteration{'s' * (last.iteration != 1)}"
    return Sentence(
        kind,
        verdict,
        f"{after} the policy wins {_percent(rate.mean)} of its comparisons with the base{spread}{includes}, "
        f"on {prompts} held-out prompt{'s' * (last.prompts != 1)}{before}.",
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
