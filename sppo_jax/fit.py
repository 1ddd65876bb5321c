"""Stages 4 and 5: pairs → batches → the loop of updates that minimises the loss; resumable at any update."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import compilation
from sppo_jax.config import Config, Fit
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.losses import LOSSES
from sppo_jax.models.transformer import Transformer
from sppo_jax.records import Pair
from sppo_jax.run import pod
from sppo_jax.run.stage import Stage
from sppo_jax.training import effect
from sppo_jax.training.batches import Batches
from sppo_jax.training.checkpoint import Checkpoints, sums
from sppo_jax.training.optimizer import schedule
from sppo_jax.training.profiling import Profiler
from sppo_jax.training.trainer import Trainer
from sppo_jax.training.update import Programs, Scalars, anchored, split

SKIPPED = 5  # updates in a row whose gradients may be infinite or NaN; the next one ends the run


def fit(
    hand_over: Callable[[], Transformer], trained_on: Sequence[Pair], trainer: Trainer, stage: Stage
) -> Transformer:
    """Regress the policy's log-ratios on the pairs' targets, from the last checkpoint on if there is one. Returns the policy.

    `hand_over` returns the policy that the iteration starts with; its arrays are donated. The checkpoints lie in the
    run's directory. Raises as `train`.
    """
    run, t, profiled = stage.run, stage.iteration, trainer.config.log.profile
    if line := effect.warning(trainer.config.fit, len(trained_on)):
        stage.say("fit", line)
    batches, profiler = trainer.batches(trained_on, t), None
    with Checkpoints(run.checkpoints(t)) as checkpoints, contextlib.ExitStack() as stack:
        if t == 1 and profiled and pod.first():
            profiler = stack.enter_context(Profiler(run.profile, profiled))
        return train(
            hand_over(),
            batches,
            config=trainer.config,
            programs=trainer.programs(batches.steps_per_epoch),
            mesh=trainer.mesh,
            checkpoints=checkpoints,
            stage=stage,
            profiler=profiler,
        )


def train(
    model: Transformer,
    batches: Batches,
    *,
    config: Config,
    programs: Programs,
    mesh: Mesh,
    checkpoints: Checkpoints,
    stage: Stage,
    profiler: Profiler | None = None,
) -> Transformer:
    """Run the updates over `batches`, from the last checkpoint on if there is one, and return the new policy.

    Donates `model`'s arrays to the optimiser. `profiler` records some of the updates.
    Raises BadInput when the loss stops being finite, before a checkpoint of that update is written, when no weight has
    changed after the last update, or when a checkpoint cannot be written; NoneWhole when none of the checkpoints can be
    resumed from; Terminated after a request to stop, with a checkpoint of the last update.
    """
    total = len(batches)
    _, params, frozen = split(model)
    before, moves = sums({"params": params}), effect.rated(config.fit, batches.pairs)
    state = programs.first_state(params)
    resumed = checkpoints.resume(state, last=total, say=lambda line: stage.say("fit", line))
    start, state = resumed or (0, state)
    _announce(batches, config.fit, start, stage)
    with stage.progress("fit", total - start, "updates") as advance:
        log = _Log(stage, advance, config, batches)
        for step, batch in zip(range(start, total), batches.from_step(start), strict=True):
            if profiler is not None:
                if profiler.turns(step - start):
                    log.flush()  # so that whole updates are recorded
                profiler.step(step - start)
            state, scalars = programs.train_step(state, frozen, batch.placed(mesh))
            log.add(step, scalars)
            if step == start + 1:
                compilation.collect()  # of the weights before the first update, which a CPU may have read in place
            stopping = stage.metrics.stop_agreed() and step + 1 < total
            if stopping or (step + 1) % config.fit.checkpoint_every == 0 or step + 1 == total:
                log.flush()  # raises where this update's loss is not finite
                if step + 1 == total and moves and sums({"params": state.params}) == before:
                    raise effect.unchanged(config.fit, stage.iteration, total, log.gradient_norm)
                if step + 1 == total or not log.skipped:  # else the last checkpoint is from before that began
                    checkpoints.save(step + 1, state)
            if stopping:
                checkpoints.wait()
                pod.meet("stopped")
                raise Terminated
    checkpoints.wait()
    checkpoints.keep_only(total)
    return nnx.merge(programs.graph, state.params, frozen)


class _Log:
    """Reads, checks and reports the updates' scalars, one update behind the devices.

    The host waits for update n's scalars only when n + 1 is dispatched, so that the devices never wait for the host.
    """

    def __init__(self, stage: Stage, advance: Callable[..., None], config: Config, batches: Batches):
        self._stage, self._advance, self._every = stage, advance, config.log.every
        self._rate, self._last = schedule(config.fit, batches.steps_per_epoch), len(batches) - 1
        self._unread: tuple[int, Scalars] | None = None
        self.gradient_norm = 0.0  # of the last update read
        self.skipped = 0  # the last updates in a row that changed nothing

    def add(self, step: int, scalars: Scalars) -> None:
        """Take the scalars of an update just dispatched, and report the one before."""
        self.flush()
        self._unread = step, scalars

    def flush(self) -> None:
        """Report the last update: wait for its scalars. Raises BadInput where its loss is not finite."""
        if self._unread is None:
            return
        (step, scalars), self._unread = self._unread, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self._check(step, values)
        self.gradient_norm = values["grad_norm"]
        values["learning_rate"] = float(self._rate(step))
        if step == 0:
            self._stage.say(
                "fit", f"step 0 loss {values['loss']:.6g}, largest log-ratio {values['max_log_ratio']:g}"
            )
            if not values["learning_rate"]:
                self._stage.say(
                    "fit", "warm-up: the rate of step 0 is 0, so the loss moves only after step 1"
                )
        # An update whose scalars are a sign that training goes wrong is written in any case: it is said at once.
        if step % self._every == 0 or step == self._last or self._stage.is_sign("fit", values, step=step):
            self._stage.scalars("fit", values, step=step)
        self._advance(1, loss=values["loss"], margin=values["margin"])

    def _check(self, step: int, values: dict[str, float]) -> None:
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            self._skip(step, values)
            return
        self.skipped = 0
        if step == 0 and values["max_log_ratio"] != 0:  # the same program on the same batch: exactly 0
            raise RuntimeError(
                f"log-ratio at step 0 is {values['max_log_ratio']}: reference and policy differ"
            )

    def _skip(self, step: int, values: dict[str, float]) -> None:
        """Report an update that changed nothing. Raises BadInput where it did change weights, or where it is not the exception.

        Too many in a row, or a loss that is not finite at the end, are no exception: the policy itself is damaged.
        """
        found = f"the loss is {values['loss']} with gradient norm {values['grad_norm']} at update {step}"
        ends = step == self._last and not np.isfinite(values["loss"])
        if ends or np.isfinite(values["grad_norm"]) or self.skipped == SKIPPED:
            before = f" after {self.skipped} others that were skipped" if self.skipped else ""
            raise BadInput(
                f"iteration {self._stage.iteration}: {found}{before}; lower fit.learning_rate or set fit.max_grad_norm, and "
                "start in a new --out (the last checkpoint is from before)"
            )
        self.skipped += 1
        values["skipped"] = 1.0
        self._stage.say(
            "fit", f"warning: {found}: skipped, number {self.skipped} in a row of at most {SKIPPED}"
        )


def _announce(batches: Batches, settings: Fit, start: int, stage: Stage) -> None:
    """Print where training starts, and the shape of its microbatches. Raises BadInput where all targets are 0."""
    if start:
        stage.say("fit", f"resumes at update {start} of {len(batches)}")
    else:
        whole, first = expected_initial_loss(batches, settings)
        effect.check_targets(settings, whole, stage.iteration)
        if LOSSES[settings.loss].squared:
            offset = f"(target - {settings.anchor:g} log pi_t/pi_0)" if settings.anchor else "target"
            stage.say("fit", f"expected initial loss {whole:.6g} (mean {offset}^2); first batch {first:.6g}")
        else:
            stage.say("fit", f"expected initial loss {whole:.6g} (log-ratios 0)")
    at = batches.layout
    smaller = f" or {at.smaller.rows} of {at.smaller.width}" if at.smaller else ""
    stage.say(
        "fit",
        f"at most {at.microbatches} microbatches of {at.rows} rows of {at.width} tokens{smaller}, "
        f"{at.real_token_share:.0%} of which are real",
    )


def expected_initial_loss(batches: Batches, settings: Fit) -> tuple[float, float]:
    """The loss where every log-ratio to pi_t is 0 (SPPO: mean target^2), over the first epoch and in its first batch."""
    loss = LOSSES[settings.loss]
    values, prompts = [], []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        parts = [(part, anchored(part, settings.anchor)) for part in batch.microbatches if part.share > 0]
        values.append(
            sum(
                float(part.share * loss.compute(jnp.asarray(part.ref_logprob), read, settings.eta))
                for part, read in parts
            )
        )
        prompts.append(batch.prompts)
    return float(np.average(values, weights=prompts)), values[0]
