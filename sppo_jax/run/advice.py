"""Signs that a run goes wrong, read from its lines of metrics.jsonl, each with its number and what to do about it.

The run prints them as warnings when they appear, and the report lists them. They change no result.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sppo_jax.config import Config
from sppo_jax.losses import LOSSES
from sppo_jax.run.intervals import FEW

# At the first update log-ratios are 0, and the loss is what doing nothing costs. Batches differ: one of 16 pairs has up to
# twice another's loss. Three times the first one's is no chance.
LOSS = 3.0
# Single responses overshoot their targets: in the quickstart, which is healthy, one of 64 reaches 5.5 times the largest.
RATIO = 10.0
LEAST_TARGET = (
    1.0  # nats; smaller targets lie within what any update moves the log-ratio of a text of 100 tokens by
)
SLOWER = 10.0  # RMSProp's first step is 1 / sqrt(1 - .99) = 10 times the rate (training/optimizer.py), Adam's is the rate
TRUNCATED = 0.1  # share of responses; below it the judge seldom reads a text without its end
NO_SIGNAL = 0.25  # share of prompts; a quarter of sampling and judging is then for nothing
EMPTY = 0.1  # share of prompts; some prompts do ask for nothing
GREEDY = 0.1  # temperatures below it make nearly all responses of a prompt equal
UNDECIDED = (
    0.98  # share of log 2, the entropy of a coin: probabilities are then within .08 of 1/2, root mean square
)
TIES = 0.75  # share of pairs; a judge that says good or bad reaches it where 85 % of the responses are good
# Of the way from 1/K, where length plays no part, to 1, where nothing else does. Longer responses are often better ones.
LONGEST = 0.5
STANDARD_ERRORS = 3.0  # above 1/K, or else chance among few prompts may be the reason
FAR = 0.5  # nats per token; a response of 100 tokens is then e^50 times less likely than before
NEAR = 0.001  # nats per token; the same response has then moved by a tenth of a nat
LONGER, SHORTER = 1.5, 0.6  # ratio of mean lengths within one iteration; the paper's models grow by 1.1
COARSE = 0.1  # a rise of the win rate from .5 that has to be noticed: the paper's first iterations bring about as much
NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")
ELSEWHERE = "start in a new --out with"


@dataclass(frozen=True)
class Advice:
    """A sign in one iteration, and what to do about it. `text` is one line without a full stop."""

    iteration: int
    stage: str
    text: str


def found(lines: Sequence[Mapping[str, Any]], config: Config, t: int | None = None) -> list[Advice]:
    """Return the signs in lines of metrics.jsonl (`metrics.read`), of iteration t or of all, each at most once an iteration."""
    signs = []
    for i in sorted({line["iteration"] for line in lines}) if t is None else (t,):
        mine = _Iteration([line for line in lines if line["iteration"] == i], config)
        for stage, rules in RULES.items():
            signs += [Advice(i, stage, text) for rule in rules if (text := rule(mine))]
    return signs


@dataclass(frozen=True)
class Repeated:
    """A sign in all iterations that have it. `iterations` in words, such as "1 to 3, 5"; `text` is that of the last of them."""

    iterations: str
    several: bool
    stage: str
    text: str


def grouped(signs: Sequence[Advice]) -> list[Repeated]:
    """Signs with the same words, whatever their numbers, in one; in the order in which they appeared first."""
    alike: dict[tuple[str, str], list[Advice]] = {}
    for sign in signs:
        alike.setdefault((sign.stage, NUMBER.sub("#", sign.text)), []).append(sign)
    return [
        Repeated(_ranges([sign.iteration for sign in same]), len(same) > 1, stage, same[-1].text)
        for (stage, _), same in alike.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in words, such as "1 to 3, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class Signs:
    """The signs of a run while it goes on: each is new once in an iteration."""

    def __init__(self, config: Config, before: Sequence[Mapping[str, Any]] = ()):
        """`before`: the lines of earlier starts, whose signs were printed then."""
        self._config = config
        self._told = {(sign.iteration, sign.stage) for sign in found(before, config)}
        self._kept: dict[str, Mapping[str, Any]] = {}  # of one iteration, by stage; of its updates the first
        for line in before:
            self._keep(line)

    def seen(self, line: Mapping[str, Any]) -> list[Advice]:
        """Return the new signs of the stage of this line, which is not taken."""
        t, stage = line["iteration"], line["stage"]
        if stage not in RULES or (t, stage) in self._told:
            return []
        kept = [other for other in self._kept.values() if other["iteration"] == t]
        return [sign for sign in found([*kept, line], self._config, t) if sign.stage == stage]

    def take(self, line: Mapping[str, Any]) -> list[Advice]:
        """Return the new signs of the stage of this line, and take it: they are not new any more."""
        signs = self.seen(line)
        self._told |= {(sign.iteration, sign.stage) for sign in signs}
        self._keep(line)
        return signs

    def _keep(self, line: Mapping[str, Any]) -> None:
        if line["stage"] in RULES and (line["stage"] != "fit" or line["step"] == 0):
            self._kept[line["stage"]] = line


class _Iteration:
    """The lines of one iteration."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], config: Config):
        self.config = config
        self.updates = [line for line in lines if line["stage"] == "fit"]
        self._last = {line["stage"]: line for line in lines}

    def names(self, stage: str, name: str) -> bool:
        """Whether the last line of a stage that is not trained in has this name. Runs of older versions lack some."""
        return name in self._last.get(stage, {})

    def get(self, stage: str, name: str) -> float | None:
        """A number of the last line of a stage that is not trained in; None where there is none."""
        return _number(self._last.get(stage, {}), name)


def _number(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _truncated(at: _Iteration) -> str | None:
    share, limit = at.get("respond", "truncated_share"), at.config.sampling.max_new_tokens
    if share is None or share <= TRUNCATED:
        return None
    return (
        f"{share:.0%} of the responses are cut at sampling.max_new_tokens={limit}: the judge reads unfinished texts, and the "
        f"policy does not learn to end; {ELSEWHERE} --sampling.max_new_tokens {2 * limit}, or ask for shorter responses"
    )


def _undecided(at: _Iteration) -> str | None:
    entropy, ties = at.get("judge", "entropy"), at.get("judge", "tie_share") or 0
    if entropy is None or entropy < UNDECIDED * math.log(2) or ties > TIES:
        return None
    mend = "it knows little about these texts; take a judge for their language and kind"
    if ":" in at.config.judge.backend:
        mend = "where a response is clearly better its log-odds should differ by 1 to 3: multiply its scores"
    return (
        f"the judge's entropy is {entropy:.3f} of at most {math.log(2):.3f} nats: to it nearly every pair is a coin's throw; {mend} "
        "(docs/judges.md), or raise judge.sharpness if it is right and only timid"
    )


def _ties(at: _Iteration) -> str | None:
    share, k = at.get("judge", "tie_share"), at.config.sampling.responses
    if share is None or share <= TIES:
        return None
    return (
        f"{share:.0%} of the pairs tie: the judge finds most responses to a prompt equally good; take one with finer grades, "
        f"harder prompts, or {ELSEWHERE} --sampling.responses {2 * k}"
    )


def _longest(at: _Iteration) -> str | None:
    share, responses = at.get("judge", "longest_share"), at.get("respond", "responses")
    k = at.config.sampling.responses
    if share is None or not responses:
        return None
    chance, prompts = 1 / k, max(responses / k, 1)
    error = math.sqrt(chance * (1 - chance) / prompts)
    if share < chance + max(LONGEST * (1 - chance), STANDARD_ERRORS * error):
        return None
    return (
        f"the best response is the longest one to {share:.0%} of the prompts (by chance {chance:.0%}): the policy will learn to "
        "write more; look at such pairs, take a judge that does not count words, and compare at equal lengths "
        "(docs/evaluation.md)"
    )


def _no_signal(at: _Iteration) -> str | None:
    number, prompts, c = at.get("pairs", "no_signal") or 0, _judged_prompts(at), at.config.sampling
    if not prompts or number <= NO_SIGNAL * prompts:
        return None
    help = (
        f"{ELSEWHERE} --sampling.temperature 1, since at {c.temperature:g} a prompt's responses are equal"
        if c.temperature < GREEDY
        else f"{ELSEWHERE} --sampling.responses {2 * c.responses}, or take a judge with finer grades or prompts that are neither "
        "too easy nor too hard"
    )
    return (
        f"{number:.0f} of {prompts:.0f} prompts have no preferred response and are not trained on: the judge finds their responses "
        f"equally good; {help}"
    )


def _empty(at: _Iteration) -> str | None:
    number, prompts = at.get("pairs", "empty_chosen") or 0, _judged_prompts(at)
    if not prompts or number <= EMPTY * prompts:
        return None
    return (
        f"the best response to {number:.0f} of {prompts:.0f} prompts is empty, and they are not trained on: look at the texts in "
        "OUT/iter_*/responses; take another judge, or a model that answers"
    )


def _judged_prompts(at: _Iteration) -> float:
    return sum(at.get("pairs", name) or 0 for name in ("kept", "no_signal", "empty_chosen"))


def _rate(at: _Iteration) -> str | None:
    first = next((_number(line, "loss") for line in at.updates if line["step"] == 0), None)
    largest = _largest_target(at)
    if first is None:
        return None
    # With log-ratios of 0 no batch has a larger loss than the square of the largest target.
    loss_limit = max(LOSS * first, largest**2 if largest is not None else 0.0)
    ratio_limit = math.inf if largest is None else RATIO * max(largest, LEAST_TARGET)
    for line in at.updates:
        loss, ratio = _number(line, "loss"), _number(line, "max_log_ratio")
        if loss is None or ratio is None or (loss <= loss_limit and ratio <= ratio_limit):
            continue
        targets = "" if largest is None else f", where targets lie within ±{largest:.3g}"
        rate = at.config.fit.learning_rate
        return (
            f"update {line['step']} has a loss of {loss:.4g} after {first:.4g} at the first, and log-ratios of up to {ratio:.3g} "
            f"nats{targets}: fit.learning_rate={rate:g} is too high (RMSProp's first steps are up to {SLOWER:.0f} times the "
            f"rate, unlike Adam's); stop, and {ELSEWHERE} --fit.learning_rate {rate / SLOWER:.3g}"
        )
    return None


def _largest_target(at: _Iteration) -> float | None:
    """The largest |target| of the pairs that are trained on, or a bound of it; None for a loss without targets.

    None with an anchor, too: log-ratios then also go back towards the base.
    """
    fit = at.config.fit
    if not LOSSES[fit.loss].squared or fit.anchor:
        return None
    if not LOSSES[fit.loss].pairs:
        if (known := at.get("pairs", "largest_target")) is not None:
            return known
        if isinstance(fit.baseline, float):
            return fit.eta * max(fit.baseline, 1 - fit.baseline)
        return fit.eta
    return fit.eta / 2


def _far(at: _Iteration) -> str | None:
    moved, rate = at.get("evaluate", "kl_per_token"), at.config.fit.learning_rate
    if moved is None or moved <= FAR:
        return None
    return (
        f"the policy has moved by {moved:.2g} nats per token in one iteration, and what it said before is now all but impossible: "
        f"read its responses; {ELSEWHERE} --fit.learning_rate {rate / SLOWER:.3g}"
    )


def _lengths(at: _Iteration) -> str | None:
    now, before = at.get("evaluate", "tokens"), at.get("evaluate", "tokens_before")
    if now is None or not before or SHORTER < now / before < LONGER:
        return None
    change = f"from {before:.1f} to {now:.1f} tokens in one iteration"
    if now > before:
        return (
            f"held-out responses have grown {change}: the judge may prefer length to content; compare at equal lengths "
            "(docs/evaluation.md), and read some"
        )
    return f"held-out responses have shrunk {change}: read some; the judge may prefer short ones, or the rate may be too high"


def _win_rate(at: _Iteration) -> str | None:
    mean, error = at.get("evaluate", "win_rate_judge_base"), at.get("evaluate", "win_rate_judge_base_stderr")
    if mean is None or not at.names("evaluate", "win_rate_judge_base_stderr"):
        return None
    fit, shown = at.config.fit, f"the held-out win rate against the base is {mean:.3f}"
    few = (at.get("evaluate", "prompts") or FEW) < FEW
    if few or error is None or (2 * error > COARSE and abs(mean - 0.5) < 2 * error):
        shown = shown if error is None else f"{shown} ± {error:.3f}"
        return (
            f"{shown}, of too few prompts to tell it from .5; hold out more (prompts.heldout; eval.prompts is "
            f"{at.config.eval.prompts})"
        )
    shown = f"{shown} ± {error:.3f}"
    if mean <= 0.5 - 2 * error:
        return (
            f"{shown}: by the judge that it learns from the policy has become worse; read its responses, and {ELSEWHERE} "
            f"--fit.learning_rate {fit.learning_rate / SLOWER:.3g}"
        )
    if mean >= 0.5 + 2 * error:
        return None
    now, before, moved = (at.get("evaluate", name) for name in ("tokens", "tokens_before", "kl_per_token"))
    lengths = "" if now is None or before is None else f", their length {before:.1f} → {now:.1f} tokens"
    if moved is not None and moved < NEAR:
        return (
            f"{shown}{lengths}: the policy has hardly moved ({moved:.1g} nats per token); {ELSEWHERE} --fit.learning_rate "
            f"{3 * fit.learning_rate:.3g}, or more prompts or fit.epochs"
        )
    return (
        f"{shown}{lengths}: the policy has not become better by its own judge; give more prompts, and see whether the judge can "
        "tell their responses apart (its entropy and its ties)"
    )


# What is looked for when a stage has written its line.
RULES: dict[str, tuple[Callable[[_Iteration], str | None], ...]] = {
    "respond": (_truncated,),
    "judge": (_undecided, _ties, _longest),
    "pairs": (_no_signal, _empty),
    "fit": (_rate,),
    "evaluate": (_far, _lengths, _win_rate),
}
