"""The loop: the algorithm box of arXiv:2405.00675, stage by stage, each skipped when its output is complete."""

import contextlib
from collections.abc import Callable

from sppo_jax import export, files, fit, heldout, judge, pairs, records, respond
from sppo_jax.errors import BadInput
from sppo_jax.models import Transformer
from sppo_jax.records import Pair
from sppo_jax.report import model_card, page
from sppo_jax.session import Session
from sppo_jax.training import checkpoint
from sppo_jax.training.profiling import Profiler


def play(session: Session) -> None:
    """pi_1 is the base; iteration t turns pi_t, its reference, into pi_{t+1}. Then the report and a table."""
    run = session.run
    for line in session.notes():
        session.metrics.say(line)
    for t in range(1, session.config.iterations + 1):
        if not run.evaluation(t).exists():
            iterate(session, t)
            page.write(run)
        if run.export(t).exists():
            model_card.write(run, t)
    page.write(run)  # once more, for a run that ended between its last evaluation and its report
    session.metrics.say(page.table(run))
    session.metrics.say(f"report: {run.report}")


def iterate(session: Session, t: int) -> None:
    """One iteration: sample, judge, regress, export, measure."""
    made_from = session.made_from(t - 1, session.trained_on(t))
    heldout.answer(session, t - 1)

    if session.given:
        trained_on = _pairs(session, t, lambda: session.given[t - 1], made_from)
    else:
        trained_on = _played(session, t, made_from)
    probed = heldout.probe(session, t)

    # pi_{t+1} = argmin E ( log pi/pi_t - target )^2
    if not session.run.export(t).exists():
        session.put_policy(t, _fit(session, t, trained_on))
        if session.architecture.lora_rank:
            session.write_adapter(t)
        export.export(session.policy(t), session.base, session.run.export(t))

    heldout.answer(session, t)
    heldout.measure(session, t, probed)


def _played(session: Session, t: int, made_from: dict[str, str]) -> list[Pair]:
    """Sample, judge, select."""
    c, metrics = session.config, session.metrics

    prompts, shard_prompts = session.sets.train[t - 1], c.sampling.shard_prompts
    with judge.Judging(
        session.judge,
        c.judge,
        session.as_judged,
        prompts=len(prompts),
        run=session.run,
        iteration=t,
        shard_prompts=shard_prompts,
        made_from=made_from,
        metrics=metrics,
    ) as judging:
        # y_1 .. y_K ~ pi_t(.|x), for every prompt x of the iteration; judged while others are sampled
        responses = respond.respond(
            prompts,
            lambda: session.sampler(t - 1),
            judging,
            run=session.run,
            iteration=t,
            seed=c.seed,
            shard_prompts=shard_prompts,
            made_from=made_from,
            metrics=metrics,
        )
        if session.judge.on_mesh:
            session.rest_sampler()
        # P(y_i > y_j | x) for every ordered pair, and P(y_k > pi_t | x) ~ mean_j P(y_k > y_j | x)
        preferences = judging.finish(responses)

    # the responses kept, with their targets eta (P - 1/2)
    def select() -> list[Pair]:
        selected, counts = pairs.select(
            responses, preferences, how=c.pairs.select, eta=c.fit.eta, baseline=c.fit.baseline
        )
        metrics.say(f"iteration {t} pairs: " + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
        metrics.scalars(t, "pairs", 0, **{name: float(n) for name, n in counts.items()})
        if not selected:
            raise BadInput(f"iteration {t}: no prompt has a preferred response; is sampling.temperature 0?")
        return selected

    digests = {"responses": records.digest(responses), "preferences": records.digest(preferences)}
    found = _pairs(session, t, select, made_from | digests)
    gap = pairs.sampler_gap(found, responses)
    metrics.scalars(t, "sampler_gap", 0, **gap)
    metrics.say(
        f"iteration {t} pairs: the sampler's log-probs are {gap['rms']:.1e} nats a token from training's "
        f"(root mean square; at most {gap['max']:.1e})"
    )
    return found


def _pairs(
    session: Session, t: int, select: Callable[[], list[Pair]], made_from: dict[str, str]
) -> list[Pair]:
    """Read or make pairs.parquet. It exists only with reference log-probs in it: complete means trainable.

    Where training has not begun, the log-probs of a file from before are made anew: another mesh or machine gives
    other last bits, and the log-ratio must start at exactly 0.
    """
    path = session.run.pairs(t)
    if path.exists():
        found = records.read(path, Pair, made_from)
        if checkpoint.begun(session.run.checkpoints(t)) or session.run.export(t).exists():
            return found
        again = pairs.with_reference(found, session.logprobs(t - 1, found, t))
        if again == found:
            return found
        with files.replacing(path) as part:
            records.write(part, Pair, again, made_from)
    else:
        session.metrics.poll()
        selected = select()
        filled = pairs.with_reference(selected, session.logprobs(t - 1, selected, t))
        with files.replacing(path) as part:
            records.write(part, Pair, filled, made_from)
    return records.read(path, Pair, made_from)


def _fit(session: Session, t: int, trained_on: list[Pair]) -> Transformer:
    batches, profiler = session.batches(trained_on, t), None
    with checkpoint.Checkpoints(session.run.checkpoints(t)) as checkpoints, contextlib.ExitStack() as stack:
        if t == 1 and session.config.log.profile:
            profiler = stack.enter_context(Profiler(session.run.profile, session.config.log.profile))
        return fit.fit(
            session.take_policy(t - 1),
            batches,
            settings=session.config.fit,
            programs=session.programs(batches.steps_per_epoch),
            mesh=session.mesh,
            checkpoints=checkpoints,
            iteration=t,
            log_every=session.config.log.every,
            metrics=session.metrics,
            profiler=profiler,
        )
