"""Stage 7: the new policy on held-out prompts: win rates, log-ratios of winners and losers, divergence, length."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sppo_jax.preferences import probability_matrix
from sppo_jax.records import Pair, Responses


def win_rate(
    judge: Any,
    policy: Sequence[Responses],
    against: Sequence[Responses],
    *,
    k: int = 0,
    as_shown: Callable[[str], str] = str,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """P(policy's response > opponent's), both orders averaged: mean over prompts and its standard error.

    The policy's first response against the opponent's k-th; prompts in the same order. `judge` has `compare`;
    `as_shown` maps an instruction to what it reads.
    """
    if [row.prompt_id for row in policy] != [row.prompt_id for row in against]:
        raise ValueError("win rates compare answers to the same prompts")
    both = [[mine.responses[0], theirs.responses[k]] for mine, theirs in zip(policy, against, strict=True)]
    logits = judge.compare([as_shown(row.prompt) for row in policy], both, on_progress)
    p = probability_matrix(logits)[:, 0, 1]
    return {"mean": float(p.mean()), "stderr": float(p.std(ddof=1) / np.sqrt(len(p))) if len(p) > 1 else 0.0}


def lengths(responses: Sequence[Responses]) -> dict[str, float]:
    """Mean tokens and words of first responses, and the share cut at max_new_tokens."""
    first = [(row.response_ids[0], row.responses[0], row.finish_reason[0]) for row in responses]
    return {
        "tokens": float(np.mean([len(ids) for ids, _, _ in first])),
        "words": float(np.mean([len(text.split()) for _, text, _ in first])),
        "truncated_share": float(np.mean([reason == "length" for _, _, reason in first])),
    }


def log_ratios(probe: Sequence[Pair], logprob: np.ndarray) -> dict[str, float]:
    """Movement of the policy on held-out responses drawn from its reference pi_t, best first and worst last.

    winners, losers: mean log pi_theta/pi_t of best and worst, nats. kl_per_token: mean of -log-ratio over all
    responses per token, an estimate of KL(pi_t || pi_theta).
    """
    ratio = logprob - np.array([pair.ref_logprob for pair in probe])
    tokens = sum(len(ids) for pair in probe for ids in pair.response_ids)
    n = len(probe)
    return {
        "winners": float(ratio[:, 0].mean()),
        "winners_stderr": float(ratio[:, 0].std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
        "losers": float(ratio[:, -1].mean()),
        "losers_stderr": float(ratio[:, -1].std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
        "kl_per_token": float(-ratio.sum() / tokens),
    }
