"""Stage 3: judged candidates → what we train on: the responses kept, their targets, and counts of what was left out."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sppo_jax.preferences import TIE
from sppo_jax.records import Pair, Preferences, Responses


def select(
    responses: Sequence[Responses],
    preferences: Sequence[Preferences],
    *,
    how: Literal["best_worst", "all"],
    eta: float,
    baseline: float | Literal["log_partition"],
) -> tuple[list[Pair], dict[str, int]]:
    """One Pair per prompt that holds a signal, and counts.

    Dropped: prompts whose K win rates are all equal (identical answers, a pure cycle) and prompts whose best
    response is empty. A prompt's targets depend on its own candidates alone. Reference log-probs are NaN until
    stage 5 fills them in.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for row, judged in zip(responses, preferences, strict=True):
        rates = np.asarray(judged.win_rate)
        order = np.argsort(-rates, kind="stable")
        best, worst = order[0], order[-1]
        if rates[best] - rates[worst] <= TIE:
            counts["no_signal"] += 1
            continue
        if not row.responses[best].strip():
            counts["empty_chosen"] += 1
            continue
        kept = order if how == "all" else order[[0, -1]]
        level = log_partition(rates, eta) if baseline == "log_partition" else baseline
        pairs.append(
            Pair(
                chosen=_conversation(row.prompt, row.responses[best]),
                rejected=_conversation(row.prompt, row.responses[worst]),
                chosen_probs=judged.probability[best][worst],
                chosen_probs_win=float(rates[best]),
                chosen_probs_lose=float(rates[worst]),
                prompt_id=row.prompt_id,
                prompt_ids=row.prompt_ids,
                response_ids=[row.response_ids[k] for k in kept],
                win_rate=rates[kept].tolist(),
                baseline=float(level),
                target=(eta * (rates[kept] - level)).tolist(),
                ref_logprob=[float("nan")] * len(kept),
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


def sampler_gap(pairs: Sequence[Pair], responses: Sequence[Responses]) -> dict[str, float]:
    """How far the sampler's log-probs are from the reference's, which training computes: nats per token of a response.

    Mean, root mean square and largest of the absolute differences over the responses kept. Rounding alone where both
    compute in float32; what sampling.quantize costs, where it is on.
    """
    sampled = {row.prompt_id: row for row in responses}
    gaps = []
    for pair in pairs:
        row = sampled[pair.prompt_id]
        for ids, reference in zip(pair.response_ids, pair.ref_logprob, strict=True):
            gaps.append(abs(row.logprobs[row.response_ids.index(ids)] - reference) / len(ids))
    return {"mean": float(np.mean(gaps)), "rms": float(np.sqrt(np.mean(np.square(gaps)))), "max": max(gaps)}


def log_partition(win_rate: np.ndarray, eta: float) -> float:
    """log Z / eta with log Z ~ log mean_k exp(eta P_k): the baseline in units of a win rate."""
    highest = float(np.max(win_rate))
    return highest + float(np.log(np.mean(np.exp(eta * (win_rate - highest))))) / eta


def _conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]
