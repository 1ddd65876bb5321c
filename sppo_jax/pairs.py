"""Stage 3: responses and preferences → training's pairs: responses kept, targets eta (P - 1/2), reference log-probs.

With judge.target=score the targets are eta times mean scores; with fit.anchor the base's log-probs lie beside the reference's.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from sppo_jax import records
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.preferences import TIE, mean_scores
from sppo_jax.records import Pair, Preferences, Responses
from sppo_jax.run import pod
from sppo_jax.run.advice import GREEDY
from sppo_jax.run.directory import BASE
from sppo_jax.run.stage import Stage, there, visible
from sppo_jax.text.messages import with_response
from sppo_jax.training import checkpoint


class LogProb(Protocol):
    """Training's forward pass."""

    def __call__(self, pairs: Sequence[Pair], policy: int = ..., /) -> np.ndarray:
        """log pi(y|x) [n, R] of every pair's responses, in nats, by the policy after iteration `policy`.

        By default it is the policy that the iteration starts with.
        """


def from_preferences(
    responses: Sequence[Responses],
    preferences: Sequence[Preferences],
    logprob: LogProb,
    stage: Stage,
    config: Config,
) -> list[Pair]:
    """The pairs made of an iteration's responses and preferences. Raises BadInput if no prompt has a preferred response."""

    judge = config.judge
    score = functools.partial(mean_scores, estimator=judge.estimator, sharpness=judge.sharpness)

    def selected() -> list[Pair]:
        found, counts = select(
            responses,
            preferences,
            how=config.pairs.select,
            eta=config.fit.eta,
            baseline=config.fit.baseline,
            score=score if judge.target == "score" else None,
        )
        stage.say("pairs", ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
        largest = max((abs(x) for pair in found for x in pair.target), default=0.0)
        stage.scalars("pairs", {name: float(n) for name, n in counts.items()} | {"largest_target": largest})
        if not found:
            raise _without_signal(stage.iteration, counts, len(responses), config)
        return found

    sources = {"responses": records.digest(responses), "preferences": records.digest(preferences)}
    stage = dataclasses.replace(stage, made_from=stage.made_from | sources)
    found = scored(selected, logprob, stage, config.fit.anchor)
    gap = sampler_gap(found, responses)
    if gap:
        stage.scalars("sampler_gap", gap)
        stage.say(
            "pairs",
            f"the sampler's log-probs are {gap['rms']:.1e} nats a token from training's "
            f"(root mean square; at most {gap['max']:.1e})",
        )
    return found


def scored(
    selected: Callable[[], Sequence[Pair]], logprob: LogProb, stage: Stage, anchor: float
) -> list[Pair]:
    """Read or make pairs.parquet. It exists only with reference log-probs in it: complete means trainable.

    With an `anchor` above 0 the base's are in it, too; in iteration 1 they are the reference's.

    Where training has not begun, the log-probs of a file from an earlier start are computed again: another mesh or
    machine gives other last bits, and the log-ratio must start at exactly 0.
    """
    run, t = stage.run, stage.iteration
    before = None
    if there(run.pairs(t)):
        visible(run.pairs(t))
        before = records.read(run.pairs(t), Pair, stage.made_from)
    if before and (checkpoint.begun(run.checkpoints(t)) or there(run.export(t))):
        return before
    if before is None:
        stage.metrics.poll(together=True)
    chosen = before or selected()
    # First the base's, so that the policy that is to be trained is in memory afterwards.
    base = logprob(chosen, BASE) if anchor and t - 1 != BASE else None
    ref = logprob(chosen)
    filled = with_reference(chosen, ref)
    if anchor:
        filled = with_base(filled, ref if base is None else base)
    if filled != before:
        pod.written("pairs", lambda: records.replace(run.pairs(t), Pair, filled, stage.made_from))
        visible(run.pairs(t))
    return records.read(run.pairs(t), Pair, stage.made_from)


def select(
    responses: Sequence[Responses],
    preferences: Sequence[Preferences],
    *,
    how: Literal["best_worst", "all"],
    eta: float,
    baseline: float | Literal["log_partition"],
    score: Callable[[Sequence[Sequence[float]]], np.ndarray] | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """One Pair per prompt that holds a signal, and counts of what was kept and left out.

    `score`: from a prompt's logits to the payoffs [K] that take the place of its win rates, with 0 as their baseline.
    Dropped: prompts whose K payoffs are all equal (identical responses, a pure cycle) and prompts whose best
    response is empty. A prompt's targets depend on its own responses alone. Reference log-probs are NaN until
    `with_reference` fills them in.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for row, judged in zip(responses, preferences, strict=True):
        rates = np.asarray(judged.win_rate)
        payoff = rates if score is None else score(judged.logits)
        order = np.argsort(-payoff, kind="stable")
        best, worst = order[0], order[-1]
        if payoff[best] - payoff[worst] <= TIE:
            counts["no_signal"] += 1
            continue
        if not row.responses[best].strip():
            counts["empty_chosen"] += 1
            continue
        kept = order if how == "all" else order[[0, -1]]
        level = log_partition(rates, eta) if baseline == "log_partition" else baseline
        if score is not None:
            level = 0.0  # of a response against itself
        pairs.append(
            Pair(
                chosen=with_response(row.prompt, row.responses[best]),
                rejected=with_response(row.prompt, row.responses[worst]),
                chosen_probs=judged.probability[best][worst],
                chosen_probs_win=float(rates[best]),
                chosen_probs_lose=float(rates[worst]),
                prompt_id=row.prompt_id,
                prompt_ids=row.prompt_ids,
                response_ids=[row.response_ids[k] for k in kept],
                win_rate=rates[kept].tolist(),
                baseline=float(level),
                target=(eta * (payoff[kept] - level)).tolist(),
                ref_logprob=[float("nan")] * len(kept),
                score=None if score is None else payoff[kept].tolist(),
            )
        )
        counts["truncated_responses"] += sum(row.finish_reason[k] == "length" for k in kept)
        counts["responses"] += len(kept)
    counts["kept"] = len(pairs)
    return pairs, dict(counts)


def with_reference(pairs: Sequence[Pair], ref_logprob: np.ndarray) -> list[Pair]:
    """Pairs with their reference log-probs [n, R], in nats, filled in."""
    filled = zip(pairs, ref_logprob.tolist(), strict=True)
    return [dataclasses.replace(pair, ref_logprob=values) for pair, values in filled]


def with_base(pairs: Sequence[Pair], base_logprob: np.ndarray) -> list[Pair]:
    """Pairs with the base's log-probs [n, R], in nats, filled in."""
    filled = zip(pairs, base_logprob.tolist(), strict=True)
    return [dataclasses.replace(pair, base_logprob=values) for pair, values in filled]


def sampler_gap(pairs: Sequence[Pair], responses: Sequence[Responses]) -> dict[str, float]:
    """Differences between the sampler's log-probs and the reference's, which training computes, in nats per token.

    Returns mean, root mean square and largest of the absolute differences over the responses kept: rounding alone
    where both compute in float32, and the cost of sampling.quantize where it is on. Responses that were made elsewhere
    (their log-probs are NaN) are left out; empty where all were.
    """
    sampled = {row.prompt_id: row for row in responses}
    gaps = []
    for pair in pairs:
        row = sampled[pair.prompt_id]
        for ids, reference in zip(pair.response_ids, pair.ref_logprob, strict=True):
            sampled_with = row.logprobs[row.response_ids.index(ids)]
            if not np.isnan(sampled_with):
                gaps.append(abs(sampled_with - reference) / len(ids))
    if not gaps:
        return {}
    return {"mean": float(np.mean(gaps)), "rms": float(np.sqrt(np.mean(np.square(gaps)))), "max": max(gaps)}


def log_partition(win_rate: np.ndarray, eta: float) -> float:
    """log Z / eta with log Z ~ log mean_k exp(eta P_k): the baseline in units of a win rate."""
    highest = float(np.max(win_rate))
    return highest + float(np.log(np.mean(np.exp(eta * (win_rate - highest))))) / eta


def _without_signal(iteration: int, counts: dict[str, int], prompts: int, config: Config) -> BadInput:
    """Return the error about an iteration in which no prompt has a pair to train on."""
    ties, empty = counts.get("no_signal", 0), counts.get("empty_chosen", 0)
    found = f"iteration {iteration}: no prompt has a preferred response: of {prompts}"
    if empty > ties:
        return BadInput(
            f"{found}, {empty} have an empty response as their best one, and {ties} have equal win rates; look at the texts in "
            f"OUT/iter_{iteration}/responses, and start in a new --out, with another judge or a model that answers"
        )
    advice = (
        f"sampling.temperature={config.sampling.temperature:g} makes a prompt's responses equal: set it to 1"
        if config.sampling.temperature < GREEDY
        else f"use more than sampling.responses={config.sampling.responses}, more prompts, or another judge"
    )
    return BadInput(
        f"{found}, {ties} have equal win rates (the judge prefers none of their responses) and {empty} an empty best one; "
        f"{advice}, and start in a new --out"
    )
