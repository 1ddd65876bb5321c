"""Stage 7: policies on held-out prompts: responses, win rates, and how far the policy moved; eval.json.

`python -m sppo_jax.evaluate` measures any policies, outside of a run (evaluation/flags.py).
"""

if __name__ == "__main__":
    # Before the stage's own imports, which take seconds: a mistake on the command line is refused at once.
    import sys

    from sppo_jax.command import call
    from sppo_jax.evaluation.flags import main

    call(main)
    sys.exit()

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sppo_jax import files, judges, pairs, records
from sppo_jax.judges import CheckedJudge, Judge, prefer
from sppo_jax.preferences import TIE, probability_matrix
from sppo_jax.records import Pair, Preferences, Prompt, Responses
from sppo_jax.run import pod
from sppo_jax.run.directory import BASE
from sppo_jax.run.metrics import from_totals
from sppo_jax.run.stage import Stage, there
from sppo_jax.run.trackers import Sample
from sppo_jax.sampler import Sampler
from sppo_jax.session import Session
from sppo_jax.text.messages import messages_of, with_response
from sppo_jax.text.reading import Reading, as_it_is

SAMPLES = 4  # held-out prompts whose responses log.to gets


def respond(run: Session, t: int, sampler: Callable[[], Sampler]) -> list[Responses]:
    """Held-out responses of the policy after iteration t: one a prompt, two by the base, to be compared with itself."""
    stage, path, asked = run.heldout_stage(t, policy=t), run.paths.heldout(t, "responses"), run.sets.heldout

    def drawn() -> list[Responses]:
        return _generated(asked, sampler(), stage, t, responses=2 if t == BASE else 1)

    found = stage.kept(path, Responses, drawn)
    records.check_prompts(path, found, asked)
    return found


def draw_probe(
    run: Session, t: int, sampler: Callable[[], Sampler], facts: Callable[[], dict[str, Any]] = dict
) -> list[Responses]:
    """Held-out responses of iteration t's reference, K a prompt, on which its movement is measured.

    Empty where the probe is on disk already. `facts` are shown beside the progress; an exception in it ends the sampling.
    """
    stage, asked = run.heldout_stage(t, policy=t - 1), run.sets.heldout[: run.config.eval.probe_prompts]
    if there(run.paths.heldout(t, "probe")):
        return []
    stage.metrics.poll(together=True)
    return _generated(asked, sampler(), stage, t, responses=run.config.sampling.responses, facts=facts)


def _generated(
    asked: Sequence[Prompt],
    engine: Sampler,
    stage: Stage,
    t: int,
    *,
    responses: int,
    facts: Callable[[], dict[str, Any]] = dict,
) -> list[Responses]:
    """So many responses to each held-out prompt, in order. Several processes share the prompts, unless they sample together."""
    together = not engine.alone
    share = list(asked) if together else pod.dealt(asked)
    name = f"held-out, {responses} each"
    with stage.progress(name, len(share), "prompts") as advance:
        most = len(share) * responses * engine.sampling.max_new_tokens
        chunks = stage.metrics.chunks(advance, facts, most=most, together=together)
        drawn = (
            engine.generate(share, seed=stage.seed, iteration=t, responses=responses, on_progress=chunks)
            if share
            else []
        )
    if together or pod.count() == 1:
        return drawn
    return [Responses(**row) for row in pod.collected(name, [asdict(row) for row in drawn])]


def judge_probe(run: Session, t: int, drawn: Sequence[Responses]) -> list[Pair]:
    """All drawn responses of each held-out prompt with a signal, best first and worst last, not scored yet.

    If no prompt has a signal, all prompts, each with its responses in the order drawn: without winners and losers, the
    policy's divergence is still measured.
    """
    if not drawn:
        return []
    stage, c = run.heldout_stage(t, policy=t - 1), run.config
    comparisons = len(drawn) * c.sampling.responses * (c.sampling.responses - 1)
    with stage.progress("judge, held-out", comparisons, "pairs", minor=True) as advance:
        judged = prefer(drawn, judges.Shared(run.judge), c.judge, run.reading, from_totals(advance))
    ranked = pairs.select(drawn, judged, how="all", eta=c.fit.eta, baseline=0.5)[0]
    return ranked or [_unranked(row, found) for row, found in zip(drawn, judged, strict=True)]


def _unranked(row: Responses, judged: Preferences) -> Pair:
    """A prompt's responses as a Pair in which none is better than another, not scored yet."""
    k = len(row.responses)
    return Pair(
        chosen=with_response(row.prompt, row.responses[0]),
        rejected=with_response(row.prompt, row.responses[-1]),
        chosen_probs=judged.probability[0][-1],
        chosen_probs_win=0.5,
        chosen_probs_lose=0.5,
        prompt_id=row.prompt_id,
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        win_rate=[0.5] * k,
        baseline=0.5,
        target=[0.0] * k,
        ref_logprob=[float("nan")] * k,
    )


def score_probe(run: Session, t: int, ranked: list[Pair], logprob: pairs.LogProb) -> list[Pair]:
    """The probe of iteration t with its reference's log-probs, from disk or from `ranked`."""

    def scored() -> list[Pair]:
        return pairs.with_reference(ranked, logprob(ranked))

    return run.heldout_stage(t, policy=t - 1).kept(run.paths.heldout(t, "probe"), Pair, scored)


def measure(run: Session, t: int, probe: list[Pair]) -> None:
    """Write iteration t's eval.json, its last file; with the first one, the base's against itself."""
    stage = run.heldout_stage(t, policy=t)
    found = {}
    for i in (t, t - 1, BASE):  # the last two are on disk, unless a file was lost
        with run.devices.sampling(i) as sampler:
            found[i] = respond(run, i, sampler)
    policy, previous, base = found[t], found[t - 1], found[BASE]
    shared = {"judge": judges.Shared(run.judge)} | (
        {"oracle": judges.Shared(run.oracle)} if run.oracle else {}
    )
    readings = {"judge": run.reading, "oracle": run.oracle_reading}

    def rate(name: str, against: list[Responses], mine: list[Responses] = policy, k: int = 0) -> np.ndarray:
        with stage.progress(f"win rate, {name}", 2 * len(mine), "pairs", minor=True) as advance:
            return win_probabilities(
                shared[name],
                mine,
                against,
                k=k,
                read=readings[name],
                on_progress=from_totals(advance),
            )

    with run.devices.judging():
        rates = {name: {"base": rate(name, base)} for name in shared}
        for name in shared:  # in iteration 1 the previous policy is the base
            rates[name]["previous"] = rates[name]["base"] if t == 1 else rate(name, previous)
        at_base = {name: {"base": rate(name, base, mine=base, k=1)} for name in shared} if t == 1 else {}
        finder, read = run.oracle or run.judge, readings["oracle" if run.oracle else "judge"]
        noticed = {i: features(finder, rows, read) for i, rows in {BASE: base, t: policy}.items()}
    with run.devices.scoring(t, stage) as logprob:
        moved = log_ratios(probe, logprob(probe))

    def write() -> None:
        if t == 1:
            files.write_json(run.paths.evaluation(BASE), _evaluation(BASE, base, at_base, noticed[BASE]))
        found = _evaluation(t, policy, rates, noticed[t]) | {"log_ratio": _finite(moved)}
        if noticed[t]:
            found["features_change"] = changes(noticed[BASE], noticed[t])
        files.write_json(run.paths.evaluation(t), found)

    pod.written("eval.json", write)
    flat = {f"win_rate_{name}_{who}": p for name, by in rates.items() for who, p in by.items()}
    means = {key: float(p.mean()) for key, p in flat.items()}
    errors = {f"{key}_stderr": _stderr(p) for key, p in flat.items()}
    before = {"tokens_before": lengths(previous)["tokens"]}
    asked = {"prompts": float(len(policy))}
    stage.scalars("evaluate", means | errors | asked | moved | lengths(policy) | before)
    stage.metrics.samples(t, _samples(base, policy))
    shown = ", ".join(f"{name.removeprefix('win_rate_')} {mean:.3f}" for name, mean in means.items())
    stage.metrics.say(f"iteration {t} win rates on {len(policy)} held-out prompts: {shown}")


def _samples(base: Sequence[Responses], policy: Sequence[Responses]) -> list[Sample]:
    """Some prompts, apart from each other, with the first responses of the base and of the policy."""
    step = max(1, len(policy) // SAMPLES)  # neighbours in the set are often alike
    return [
        Sample(_shown(mine.prompt), before.responses[0], mine.responses[0])
        for before, mine in list(zip(base, policy, strict=True))[::step][:SAMPLES]
    ]


def _shown(prompt: str) -> str:
    """A prompt as a person reads it: a conversation with the roles."""
    messages = messages_of(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _evaluation(
    t: int,
    policy: Sequence[Responses],
    rates: dict[str, dict[str, np.ndarray]],
    noticed: dict[str, np.ndarray],
) -> dict[str, Any]:
    written = {judge: {other: _rate(p) for other, p in by.items()} for judge, by in rates.items()}
    found = {"iteration": t, "prompts": len(policy), "win_rate": written, "length": lengths(policy)}
    means = {name: float(values.mean()) for name, values in noticed.items()}
    return found | ({"features": means} if means else {})


def _rate(p: np.ndarray) -> dict[str, Any]:
    """The win rate of probabilities, one a prompt: mean, standard error, and themselves to four digits."""
    figures = _finite({"mean": float(p.mean()), "stderr": _stderr(p)})
    return {**figures, "per_prompt": p.round(4).tolist()}


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Return the figures with None (null in JSON) in the place of NaN and infinities."""
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


def win_probabilities(
    judge: Judge,
    policy: Sequence[Responses],
    against: Sequence[Responses],
    *,
    k: int = 0,
    read: Reading = as_it_is,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """P(policy's response > opponent's) of each prompt, both orders averaged: [n]. Its mean is the win rate.

    The policy's first response is compared with the opponent's k-th; prompts are in the same order. `read`:
    how the judge reads them.
    """
    if [row.prompt_id for row in policy] != [row.prompt_id for row in against]:
        raise ValueError("win rates compare responses to the same prompts")
    shown = [
        read(mine.prompt, [mine.responses[0], theirs.responses[k]])
        for mine, theirs in zip(policy, against, strict=True)
    ]
    logits = judge.compare([prompt for prompt, _ in shown], [texts for _, texts in shown], on_progress)
    return probability_matrix(logits)[:, 0, 1]


def features(judge: CheckedJudge, responses: Sequence[Responses], read: Reading) -> dict[str, np.ndarray]:
    """What the judge finds in first responses: {name: [n]}; a name that it does not give counts as 0.

    Empty of a judge without features. `read`: how the judge reads them.
    """
    shown = [read(row.prompt, row.responses[:1]) for row in responses]
    found = [judge.features(prompt, text) for prompt, (text,) in shown]
    names = dict.fromkeys(name for one in found for name in one)
    return {name: np.array([float(one.get(name, 0)) for one in found]) for name in names}


def changes(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> dict[str, dict[str, float | None]]:
    """How much features [n] of the same prompts changed: {name: mean and standard error of the difference}."""
    found, absent = {}, np.zeros(1)
    for name in dict.fromkeys((*before, *after)):
        difference = after.get(name, absent) - before.get(name, absent)
        found[name] = _finite({"mean": float(difference.mean()), "stderr": _stderr(difference)})
    return found


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

    winners, losers: mean log pi_theta/pi_t of best and worst, nats, over prompts with a preferred response; absent if
    there is none. kl_per_token: mean of -log-ratio over all responses per token, an estimate of KL(pi_t || pi_theta).
    """
    ratio = logprob - np.array([pair.ref_logprob for pair in probe])
    tokens = sum(len(ids) for pair in probe for ids in pair.response_ids)
    moved: dict[str, float] = {}
    if ranked := [i for i, pair in enumerate(probe) if pair.win_rate[0] - pair.win_rate[-1] > TIE]:
        for name, column in (("winners", 0), ("losers", -1)):
            values = ratio[ranked][:, column]
            moved |= {name: float(values.mean()), f"{name}_stderr": _stderr(values)}
    return moved | ({"kl_per_token": float(-ratio.sum() / tokens)} if tokens else {})


def _stderr(values: np.ndarray) -> float:
    """Standard error of the mean of values; NaN of a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
