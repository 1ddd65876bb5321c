"""The optimiser is torch's, the schedule the recipe's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sppo_jax.config import Fit
from sppo_jax.training.optimizer import make_optimizer, schedule


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_rmsprop_equals_torch_over_twenty_steps_with_the_schedule(clip):
    fit = Fit(learning_rate=1e-2, warmup=0.1, max_grad_norm=clip)
    rng = np.random.default_rng(0)
    start = rng.normal(size=50).astype(np.float32)
    gradients = (rng.normal(size=(20, 50)) * 10.0 ** rng.uniform(-6, 1, 50)).astype(np.float32)

    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.RMSprop([parameter], lr=1.0, alpha=0.99, eps=1e-8)
    rate = schedule(fit, 20)
    ours, optimizer = jnp.asarray(start), make_optimizer(fit, 20)
    state = optimizer.init(ours)
    for step, gradient in enumerate(gradients):
        for group in theirs.param_groups:
            group["lr"] = float(rate(step))
        parameter.grad = torch.tensor(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        theirs.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state)
        ours = optax.apply_updates(ours, updates)
    moved = np.abs(np.asarray(ours) - start)
    assert moved.min() > 0
    np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule_epochs", "warmup", "at_last_step"),
    [(1, 32, 5e-7 / 280), (18, 562, 5e-7 * 311 / 562)],
)
def test_T20_schedule_of_the_released_scripts_and_of_the_paper(schedule_epochs, warmup, at_last_step):
    """312 updates an epoch. 1/1 peaks after 32 and decays to 0; 18/1 stops in warm-up, at 2.8e-7."""
    rate = schedule(Fit(learning_rate=5e-7, warmup=0.1, schedule_epochs=schedule_epochs), 312)
    assert float(rate(0)) == 0.0
    assert float(rate(warmup)) == pytest.approx(5e-7, rel=1e-5)
    assert float(rate(311)) == pytest.approx(at_last_step, rel=1e-4)
    assert float(rate(312 * schedule_epochs)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 9, 16])
def test_T20_step_zero_has_rate_zero_however_short_the_schedule(steps):
    rate = schedule(Fit(learning_rate=1.0, warmup=0.1), steps)
    assert float(rate(0)) == 0.0
    assert max(float(rate(step)) for step in range(steps + 1)) == pytest.approx(1.0)


def test_schedule_without_warmup_starts_at_its_peak():
    assert float(schedule(Fit(learning_rate=1.0, warmup=0.0), 10)(0)) == 1.0


def test_T38_weights_of_size_one_move_at_5e_7_in_float32_and_would_not_in_bfloat16():
    fit = Fit(learning_rate=5e-7, warmup=0.0)
    optimizer = make_optimizer(fit, 1000)
    for dtype, moves in ((jnp.float32, True), (jnp.bfloat16, False)):
        weights = jnp.ones(8, dtype)
        state = optimizer.init(weights)
        for _ in range(3):
            updates, state = optimizer.update(jnp.full(8, 0.1, dtype), state)
            weights = optax.apply_updates(weights, updates)
        assert bool(jnp.all(weights != 1)) is moves


def test_the_state_is_shaped_like_the_parameters():
    state = make_optimizer(Fit(), 10).init({"a": jnp.ones((2, 3))})
    assert (2, 3) in [leaf.shape for leaf in jax.tree.leaves(state)]
