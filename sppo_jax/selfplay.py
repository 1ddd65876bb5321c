"""The loop: the algorithm box of arXiv:2405.00675, stage by stage. Each stage reads what is on disk, or makes it."""

from sppo_jax import evaluate, export, fit, pairs, respond
from sppo_jax.files import exists
from sppo_jax.judge import Judging
from sppo_jax.records import Pair
from sppo_jax.report import model_card, page
from sppo_jax.run import bucket, pod
from sppo_jax.run.stage import Stage, there
from sppo_jax.session import Session
from sppo_jax.training.checkpoint import NoneWhole


def play(run: Session) -> None:
    """Play all iterations, then write the report and print its table. pi_1 is the base model."""
    for line in run.notes():
        run.metrics.say(line)
    for t in range(1, run.config.iterations + 1):
        if not there(run.paths.evaluation(t)):
            begun = exists(run.paths.iteration(t))
            with run.clock.iteration(t, begun=begun):
                if begun and (line := run.reused(t)):
                    run.metrics.say(line)
                for done in (t - 1, t) if there(run.paths.export(t)) else (t - 1,):
                    export.mend(run.paths, run.config, run.source, done, run.mesh, run.devices.free)
                iterate(run, t)
            if t < run.config.iterations and pod.first():
                page.write(run.paths)
        if pod.first() and run.paths.export(t).exists():
            model_card.write(run.paths, t)
    if pod.first():
        page.write(run.paths)
        run.metrics.say(page.table(run.paths), always=True)
    run.metrics.say(f"report: {bucket.shown(run.paths.report)}", always=True)


def iterate(run: Session, t: int) -> None:
    """pi_t → pi_{t+1}: sample, judge, regress, export, measure."""
    stage = run.stage(t)
    trained_on, probe = _given(run, t, stage) if run.given else _played(run, t, stage)

    if not there(run.paths.export(t)):
        try:
            with run.devices.training(t - 1) as hand_over:
                # pi_{t+1} = argmin E ( log pi/pi_t - target )^2, or another loss of losses.py
                run.devices.put(t, fit.fit(hand_over, trained_on, run.trainer, stage))
        except NoneWhole:  # training begins again, with the log-probs of this machine's own forward pass
            iterate(run, t)
            return
        with run.clock.doing("exporting"):
            export.export_policy(run.devices.policy(t), run.source, run.paths, t)

    with run.clock.doing("evaluating"):
        evaluate.measure(run, t, probe)


def _played(run: Session, t: int, stage: Stage) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, sampled (or given) and judged, and the held-out probe of the same policy."""
    prompts = run.sets.train[t - 1]
    with Judging(stage, run.judge, run.config.judge, run.reading, len(prompts)) as judging:
        with run.devices.sampling(t - 1) as sampler:
            evaluate.respond(run, t - 1, sampler)
            # y_1 .. y_K ~ pi_t(.|x) for every prompt x; the judge compares some while others are sampled
            if run.answered:  # by responses.source
                responses = respond.given(run.answered[t - 1], judging, stage)
            else:
                responses = respond.respond(prompts, sampler, judging, stage)
            drawn = evaluate.draw_probe(run, t, sampler, judging.progress)
        with run.devices.judging():
            # P(y_i > y_j | x) of every ordered pair, and P(y_k > pi_t | x) ~ mean_j P(y_k > y_j | x)
            preferences = judging.finish(responses)
            ranked = evaluate.judge_probe(run, t, drawn)
    with run.devices.scoring(t - 1, stage) as logprob:
        # the responses kept, their targets eta (P - 1/2), and log pi_t(y|x)
        trained_on = pairs.from_preferences(responses, preferences, logprob, stage, run.config)
        return trained_on, evaluate.score_probe(run, t, ranked, logprob)


def _given(run: Session, t: int, stage: Stage) -> tuple[list[Pair], list[Pair]]:
    """The pairs that pairs.source names instead, and the held-out probe."""
    with run.devices.sampling(t - 1) as sampler:
        evaluate.respond(run, t - 1, sampler)
        drawn = evaluate.draw_probe(run, t, sampler)
    with run.devices.judging():
        ranked = evaluate.judge_probe(run, t, drawn)
    with run.devices.scoring(t - 1, stage) as logprob:
        trained_on = pairs.scored(lambda: run.given[t - 1], logprob, stage, run.config.fit.anchor)
        return trained_on, evaluate.score_probe(run, t, ranked, logprob)
