"""Stage 5: reference log-probs once, then the loop of updates that minimises the loss; resumable at any update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sppo_jax.config import Fit
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.losses import LOSSES
from sppo_jax.models.transformer import Transformer
from sppo_jax.run.metrics import Metrics
from sppo_jax.training.batches import Batches
from sppo_jax.training.checkpoint import Checkpoints
from sppo_jax.training.optimizer import schedule
from sppo_jax.training.profiling import Profiler
from sppo_jax.training.update import Programs, Scalars, split


def logprobs(
    model: Transformer,
    batches: Batches,
    count: int,
    programs: Programs,
    mesh: Mesh,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """log pi(y|x) of `count` pairs' responses [count, R], from one pass over `batches`' first epoch.

    `on_progress` is called after each batch with the number of its pairs.
    Raises BadInput where a log-probability is not finite.
    """
    _, params, frozen = split(model)
    out: np.ndarray | None = None
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        found = [programs.forward(params, frozen, part)[0] for part in batch.placed(mesh)]
        for part, pair_G, logprob_GR in zip(batch.microbatches, batch.pairs, found, strict=True):
            if out is None:
                out = np.full((count, logprob_GR.shape[-1]), np.nan)
            out[pair_G[part.real]] = np.asarray(logprob_GR)[part.real]
        if on_progress is not None:
            on_progress(batch.prompts)
    assert out is not None
    if bad := np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist():
        raise BadInput(
            f"the policy gives pair {bad[0]} a log-probability that is not finite: its weights are damaged"
        )
    return out


def fit(
    model: Transformer,
    batches: Batches,
    *,
    settings: Fit,
    programs: Programs,
    mesh: Mesh,
    checkpoints: Checkpoints,
    iteration: int,
    log_every: int,
    metrics: Metrics,
    profiler: Profiler | None = None,
) -> Transformer:
    """Train over `batches`, from the last checkpoint on if there is one, and return the new policy.

    Donates `model`'s arrays to the optimiser. `profiler` records some of the updates.
    Raises BadInput when the loss stops being finite, before a checkpoint of that update is written; Terminated after
    SIGTERM, with a checkpoint of the last update.
    """
    total = len(batches)
    _, params, frozen = split(model)
    state = programs.first_state(params)
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)
    _announce(batches, settings, start, iteration, metrics)
    with metrics.progress(f"iteration {iteration} fit", total - start, "updates") as advance:
        log = _Log(metrics, advance, settings, batches, iteration, log_every)
        for step, batch in zip(range(start, total), batches.from_step(start), strict=True):
            if profiler is not None:
                if profiler.turns(step - start):
                    log.flush()  # so that whole updates are recorded
                profiler.step(step - start)
            state, scalars = programs.train_step(state, frozen, batch.placed(mesh))
            log.add(step, scalars)
            stopping = metrics.stop_requested and step + 1 < total
            if stopping or (step + 1) % settings.checkpoint_every == 0 or step + 1 == total:
                log.flush()  # raises where this update's loss is not finite
                checkpoints.save(step + 1, state)
            if stopping:
                checkpoints.wait()
                raise Terminated
    checkpoints.wait()
    checkpoints.keep_only(total)
    return nnx.merge(programs.graph, state.params, frozen)


class _Log:
    """Reads, checks and reports the updates' scalars, one update behind the devices.

    The host waits for update n's scalars only when n + 1 is dispatched, so that the devices never wait for the host.
    """

    def __init__(
        self,
        metrics: Metrics,
        advance: Callable[..., None],
        settings: Fit,
        batches: Batches,
        iteration: int,
        every: int,
    ):
        self._metrics, self._advance, self._iteration, self._every = metrics, advance, iteration, every
        self._rate, self._last = schedule(settings, batches.steps_per_epoch), len(batches) - 1
        self._unread: tuple[int, Scalars] | None = None

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
        if step == 0:
            self._metrics.say(
                f"iteration {self._iteration} fit: step 0 loss {values['loss']:.6g}, "
                f"largest log-ratio {values['max_log_ratio']:g}"
            )
        if step % self._every == 0 or step == self._last:
            rate = float(self._rate(step))
            self._metrics.scalars(self._iteration, "fit", step, learning_rate=rate, **values)
        self._advance(1, loss=values["loss"], margin=values["margin"])

    def _check(self, step: int, values: dict[str, float]) -> None:
        if not np.isfinite([values["loss"], values["grad_norm"]]).all():
            raise BadInput(
                f"iteration {self._iteration}: the loss is {values['loss']} with gradient norm {values['grad_norm']} "
                f"at update {step}; lower fit.learning_rate or set fit.max_grad_norm, and start in a new --out"
            )
        if step == 0 and values["max_log_ratio"] != 0:  # the same program on the same batch: exactly 0
            raise RuntimeError(
                f"log-ratio at step 0 is {values['max_log_ratio']}: reference and policy differ"
            )


def _announce(batches: Batches, settings: Fit, start: int, iteration: int, metrics: Metrics) -> None:
    """Print where training starts, and the shape of its microbatches."""
    label = f"iteration {iteration} fit"
    if start:
        metrics.say(f"{label}: resumes at update {start} of {len(batches)}")
    else:
        whole, first = expected_initial_loss(batches, settings)
        metrics.say(
            f"{label}: expected initial loss {whole:.6g} (mean target^2); first batch {first:.6g}"
            if LOSSES[settings.loss].squared
            else f"{label}: expected initial loss {whole:.6g} (log-ratios 0)"
        )
    at = batches.layout
    metrics.say(
        f"{label}: at most {at.microbatches} microbatches of {at.rows} rows of {at.width} tokens, "
        f"{at.real_token_share:.0%} of which are real"
    )


def expected_initial_loss(batches: Batches, settings: Fit) -> tuple[float, float]:
    """The loss where every log-ratio is 0 (SPPO: mean target^2), over the first epoch and in its first batch."""
    loss = LOSSES[settings.loss]
    values, prompts = [], []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        parts = [part for part in batch.microbatches if part.share > 0]
        values.append(
            sum(
                float(part.share * loss.compute(jnp.asarray(part.ref_logprob), part, settings.eta))
                for part in parts
            )
        )
        prompts.append(batch.prompts)
    return float(np.average(values, weights=prompts)), values[0]
