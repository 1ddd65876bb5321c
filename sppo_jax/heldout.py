"""Held-out prompts around an iteration: answers of each policy, the probe of movement, and eval.json."""

from typing import Any

from sppo_jax import evaluate, files, judge, pairs, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Pair, Responses
from sppo_jax.run.directory import BASE
from sppo_jax.run.metrics import from_totals
from sppo_jax.session import Session


def answer(session: Session, t: int) -> list[Responses]:
    """Held-out responses of the policy after iteration t; the base answers twice, to be compared with itself."""
    path, made_from = session.run.heldout(t, "responses"), session.made_from(t, "prompts_heldout")
    if not path.exists():
        session.metrics.poll()
        asked, seed = session.sets.heldout, session.config.seed
        with session.metrics.progress(f"iteration {t} held-out", len(asked), "prompts") as advance:
            found = session.sampler(t).generate(
                asked,
                seed=seed,
                iteration=t,
                responses=2 if t == BASE else 1,
                on_progress=session.metrics.chunks(advance),
            )
        with files.replacing(path) as part:
            records.write(part, Responses, found, made_from)
    answers = records.read(path, Responses, made_from)
    if [row.prompt_id for row in answers] != [prompt.prompt_id for prompt in session.sets.heldout]:
        raise BadInput(f"{path}: answers other prompts than asked; delete it and run again")
    return answers


def probe(session: Session, t: int) -> list[Pair]:
    """Held-out responses of iteration t's reference, ranked, with its log-probs: what movement is measured on."""
    path, made_from, c = (
        session.run.heldout(t, "probe"),
        session.made_from(t - 1, "prompts_heldout"),
        session.config,
    )
    if not path.exists():
        session.metrics.poll()
        asked = session.sets.heldout[: c.eval.probe_prompts]
        with session.metrics.progress(f"iteration {t} probe", len(asked), "prompts") as advance:
            found = session.sampler(t - 1).generate(
                asked, seed=c.seed, iteration=t, on_progress=session.metrics.chunks(advance)
            )
        if session.judge.on_mesh:
            session.rest_sampler()
        comparisons = len(found) * c.sampling.responses * (c.sampling.responses - 1)
        with session.metrics.progress(
            f"iteration {t} probe judge", comparisons, "pairs", minor=True
        ) as advance:
            judged = judge.prefer(found, session.judge, c.judge, session.as_judged, from_totals(advance))
        session.judge.release()
        selected, _ = pairs.select(found, judged, how="all", eta=c.fit.eta, baseline=0.5)
        if not selected:
            raise BadInput(f"iteration {t}: no held-out prompt has a preferred response")
        filled = pairs.with_reference(selected, session.logprobs(t - 1, selected, t))
        with files.replacing(path) as part:
            records.write(part, Pair, filled, made_from)
    return records.read(path, Pair, made_from)


def measure(session: Session, t: int, probed: list[Pair]) -> None:
    """Write iteration t's eval.json, its last file; with the first one, the base's against itself."""
    policy, base, previous = (answer(session, i) for i in (t, BASE, t - 1))
    if session.judge.on_mesh:
        session.rest_sampler()
    judges = {"judge": session.judge} | ({} if session.oracle is None else {"oracle": session.oracle})

    def rate(
        name: str, against: list[Responses], mine: list[Responses] = policy, k: int = 0
    ) -> dict[str, float]:
        shown = session.as_judged if name == "judge" else str
        label = f"iteration {t} win rate, {name}"
        with session.metrics.progress(label, 2 * len(mine), "pairs", minor=True) as advance:
            on_progress = from_totals(advance)
            return evaluate.win_rate(
                judges[name], mine, against, k=k, as_shown=shown, on_progress=on_progress
            )

    rates = {name: {"base": rate(name, base)} for name in judges}
    for name in judges:  # in iteration 1 the previous policy is the base
        rates[name]["previous"] = rates[name]["base"] if t == 1 else rate(name, previous)
    if t == 1:
        zero = {name: {"base": rate(name, base, mine=base, k=1)} for name in judges}
    for name in judges:
        judges[name].release()
    found: dict[str, Any] = {
        "iteration": t,
        "prompts": len(policy),
        "win_rate": rates,
        "length": evaluate.lengths(policy),
        "log_ratio": evaluate.log_ratios(probed, session.logprobs(t, probed, t)),
    }
    if t == 1:
        at_base = {
            "iteration": BASE,
            "prompts": len(base),
            "win_rate": zero,
            "length": evaluate.lengths(base),
        }
        files.write_json(session.run.evaluation(BASE), at_base)
    files.write_json(session.run.evaluation(t), found)
    flat = {f"win_rate_{name}_{who}": r["mean"] for name, by in rates.items() for who, r in by.items()}
    session.metrics.scalars(t, "evaluate", 0, **flat, **found["log_ratio"], **found["length"])
    shown = ", ".join(f"{name.removeprefix('win_rate_')} {rate:.3f}" for name, rate in flat.items())
    session.metrics.say(f"iteration {t} win rates on {len(policy)} held-out prompts: {shown}")
