"""The optimiser: torch's RMSProp under a linear schedule, as an optax chain."""

import math

import optax

from sppo_jax.config import Fit


def schedule(fit: Fit, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate of update s: linear from 0 at s = 0 to the peak where warm-up ends, then linear to 0.

    It spans `schedule_epochs`, which may exceed the `epochs` of the run: the paper's runs stop in warm-up (18
    epochs scheduled, 1 run), the released code's reach 0 (1 scheduled, 1 run).
    """
    total = steps_per_epoch * fit.schedule_epochs
    warmup = math.ceil(fit.warmup * total)  # as transformers rounds it
    decay = optax.linear_schedule(fit.learning_rate, 0.0, total - warmup)
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, fit.learning_rate, warmup), decay], [warmup])


def make_optimizer(fit: Fit, steps_per_epoch: int) -> optax.GradientTransformation:
    """RMSProp as in torch: decay .99, epsilon 1e-8 outside the root, second moment from 0, no momentum.

    optax's defaults differ in all three. Gradients are first clipped by their global norm where `max_grad_norm` is set.
    """
    rmsprop = optax.rmsprop(
        schedule(fit, steps_per_epoch), decay=0.99, eps=1e-8, eps_in_sqrt=False, initial_scale=0.0
    )
    if fit.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(fit.max_grad_norm), rmsprop)
    return rmsprop
