"""Settings under which updates would change nothing: refused before the work is done, with values that do change something."""

import dataclasses

import numpy as np

from sppo_jax.config import Fit
from sppo_jax.errors import BadInput
from sppo_jax.training.optimizer import schedule

TINY = float(np.finfo(np.float32).tiny)  # smaller numbers are 0 on the devices
# RMSProp's largest step is ten times the rate. Below this rate it is too small to be added to a float32 weight of 1e-6.
LEAST_RATE = 1e-15
LEAST_LOSS = 1e-12  # squared nats: log-probs have rounding errors of about 1e-6
LOOKED_AT = 4  # first updates whose rates are computed; later ones are above 0 if one of these is
FEW = 4  # updates that a proposal makes


def check(fit: Fit, pairs: int, iteration: int, *, at_most: bool = False) -> None:
    """Raise BadInput unless updates over `pairs` pairs can change a weight. `at_most`: there may be fewer pairs in the end."""
    _check_numbers(fit)
    if rated(fit, pairs) == 0:
        count = f"at most {pairs}" if at_most else str(pairs)
        raise BadInput(
            f"iteration {iteration}: its pairs ({count}) make one update of up to fit.global_batch={fit.global_batch} prompts, "
            f"and the rate of the first update is 0 (fit.warmup={fit.warmup:g}): nothing would be trained; use "
            f"{proposal(fit, pairs)}"
        )


def warning(fit: Fit, pairs: int) -> str | None:
    """Return a line about an iteration in which at most one update has a rate above 0; None where there are more.

    An iteration whose pairs turn out to be so few is not refused: the game has been played up to it, and goes on.
    """
    updates, above = _updates(fit, pairs), rated(fit, pairs)
    if updates > LOOKED_AT or above > 1:
        return None
    if above == 0:
        made = "one update, whose rate is 0: nothing is trained in this iteration, and its policy is the one before"
    elif updates == 1:
        made = "one update"
    else:
        made = f"{updates} updates, of which one has a rate above 0"
    return (
        f"warning: {pairs} pairs at fit.global_batch={fit.global_batch} make {made}; for more, start in a new --out with "
        f"{proposal(fit, pairs)}"
    )


def rated(fit: Fit, pairs: int) -> int:
    """Number of the first updates over `pairs` pairs, LOOKED_AT at most, whose learning rate is above 0 in float32."""
    rate = schedule(fit, -(-pairs // fit.global_batch))
    return sum(float(rate(step)) >= TINY for step in range(min(_updates(fit, pairs), LOOKED_AT)))


def proposal(fit: Fit, pairs: int) -> str:
    """Flags with which `pairs` pairs make several updates whose rates are above 0."""
    smaller = dataclasses.replace(fit, global_batch=max(1, min(fit.global_batch, pairs // FEW)))
    if rated(smaller, pairs) > 1:
        count = _updates(smaller, pairs)
        return f"--fit.global_batch {smaller.global_batch} ({count} updates)"
    longer = max(FEW, fit.schedule_epochs)
    return f"--fit.epochs {longer} --fit.schedule_epochs {longer} ({longer} updates or more)"


def check_targets(fit: Fit, initial_loss: float, iteration: int) -> None:
    """Raise BadInput where the loss is 0 already, as far as float32 can see: updates would follow rounding errors."""
    if initial_loss < LEAST_LOSS:
        raise BadInput(
            f"iteration {iteration}: the loss is {initial_loss:g} before the first update: all targets are 0, and nothing would "
            f"be trained; raise fit.eta={fit.eta:g}, or use pairs whose win rates differ from "
            f"fit.baseline={fit.baseline}, and start in a new --out"
        )


def unchanged(fit: Fit, iteration: int, updates: int, gradient_norm: float) -> BadInput:
    """Return the error about a training after which every weight is what it was before."""
    clip = f" or fit.max_grad_norm={fit.max_grad_norm:g} (0: no clipping)" if fit.max_grad_norm else ""
    return BadInput(
        f"iteration {iteration}: no weight has changed in {updates} updates, since the steps are too small for float32 (the "
        f"last gradient's norm is {gradient_norm:g}); raise fit.learning_rate={fit.learning_rate:g}{clip}, and start in a "
        "new --out"
    )


def _updates(fit: Fit, pairs: int) -> int:
    return -(-pairs // fit.global_batch) * fit.epochs


def _check_numbers(fit: Fit) -> None:
    """Raise BadInput for numbers that are 0 on the devices, or as good as 0."""
    if fit.learning_rate < LEAST_RATE:
        raise BadInput(
            f"fit.learning_rate={fit.learning_rate:g} is too small to change a float32 weight; the paper's is 5e-7"
        )
    if fit.eta < TINY:
        raise BadInput(f"fit.eta={fit.eta:g} is 0 in float32; the paper's is 1000, the quickstart's 10")
    if 0 < fit.max_grad_norm < TINY:
        raise BadInput(
            f"fit.max_grad_norm={fit.max_grad_norm:g} is 0 in float32, which makes every gradient 0; 0 means no clipping, 1 is "
            "usual"
        )
