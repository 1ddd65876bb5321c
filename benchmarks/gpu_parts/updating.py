"""An update of Mistral-7B's shapes with random weights: model FLOPs utilisation and peak memory, against the plan's."""

import dataclasses
import gc
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampler_device import MISTRAL, random_model

from gpu_parts import SEED, At, Figure
from gpu_parts.card import architecture, one_device, sheet
from sppo_jax import config, sharding
from sppo_jax.config import Config
from sppo_jax.models import Architecture, hf, lora
from sppo_jax.plan import chips, stages
from sppo_jax.plan import target as plan_target
from sppo_jax.plan.compiled import DoesNotFit
from sppo_jax.plan.cost import GIB, UnitCost
from sppo_jax.plan.lengths import Lengths
from sppo_jax.training import memory, update
from sppo_jax.training.microbatch import Microbatch
from sppo_jax.training.packing import Layout, arranged

# Prompts of an update with two sequences each, and tokens of a sequence: two microbatches of full rows.
PROMPTS, WIDTH = 16, 1024
# As many layers as have room for float32 masters, RMSProp's state and gradients: 32 need about 120 GiB.
DEPTHS = (32, 24, 16, 8, 4)
RANK = 16
TIMES = 2


def train(at: At) -> Iterator[Figure]:
    """All weights, with as many of the 32 layers as the card has room for by the plan's formula."""
    yield from _deepest(at, rank=0)


def adapters(at: At) -> Iterator[Figure]:
    """Adapters of rank 16 beside frozen weights."""
    yield from _deepest(at, rank=RANK)


def _deepest(at: At, rank: int) -> Iterator[Figure]:
    for layers in DEPTHS:
        a = dataclasses.replace(architecture(at, layers), lora_rank=rank)
        found = _planned(at, a)
        name = f"{'all weights' if not rank else f'adapters of rank {rank}'}, {a.layers} of {MISTRAL.layers} layers"
        if isinstance(found, str):
            yield Figure(f"{name}: no room", f"{name}: no room by formula ({found})", {"why": found})
            continue
        try:
            yield _measured(at, a, found, name)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failure = str(error).split("\n")[0][:300]
        else:
            return
        # Outside of the handler, whose error keeps the arrays alive.
        gc.collect()
        yield Figure(f"{name}: out of memory", f"{name}: OUT OF MEMORY, but the plan has {found.peak / GIB:.1f} GiB: {failure}", {"plan_peak_bytes": found.peak, "error": failure})  # fmt: skip


def _config(at: At, a: Architecture) -> Config:
    """A run whose sequences all have WIDTH tokens."""
    prompts, width = _sizes(at)
    return Config(
        model=config.Model(lora_rank=a.lora_rank),
        prompts=config.Prompts(per_iteration=prompts, max_length=width // 2),
        sampling=config.Sampling(max_new_tokens=width // 2),
        fit=config.Fit(global_batch=prompts),
    )


def _sizes(at: At) -> tuple[int, int]:
    return (2, 64) if at.rehearse else (PROMPTS, WIDTH)


def _planned(at: At, a: Architecture) -> UnitCost | str:
    """The plan of this update on the card, or why it does not fit."""
    c, chip, width = _config(at, a), sheet(at), _sizes(at)[1]
    mesh = plan_target.mesh(c.mesh, chips.stand_ins(chip, 1), stand_ins=True)
    lengths = Lengths(prompt=width // 2, response=width // 2)
    try:
        return stages.fit_stages(plan_target.Target(c, a, chip, mesh, lengths, compiled=False))["fit"]
    except DoesNotFit as error:
        return str(error)


def _measured(at: At, a: Architecture, plan: UnitCost, name: str) -> Figure:
    c, mesh, chip = _config(at, a), one_device(), sheet(at)
    prompts, width = _sizes(at)
    packing = memory.Update.of(c, a, mesh, width).packing(sharding.memory_limit(mesh))
    plans, layout = arranged(
        [[*range(prompts)]], [[width, width]] * prompts, packing
    )  # any token may be scored
    batches = [_microbatch(a, layout, len(part.prompts), prompts).placed(mesh) for part in plans[0]]
    key = jax.random.key(SEED)
    if a.lora_rank:
        model = lora.attach(random_model(dataclasses.replace(a, lora_rank=0)), a.lora_rank, key, mesh)
    else:
        model = hf.initialise(a, key, mesh, jnp.bfloat16)
    programs = update.make_programs(a, jnp.bfloat16, mesh, c.fit, steps_per_epoch=1)
    _, params, frozen = update.split(model)
    state = programs.first_state(params)
    kernel = model.kernel.name
    del model, params
    seconds, losses = [], []
    for _ in range(1 + TIMES):  # the first compiles
        began = time.perf_counter()
        state, scalars = programs.train_step(state, frozen, batches)
        losses.append(float(scalars["loss"]))  # waits for the loss, and the next line for the update
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    best = min(seconds[1:])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    mfu = plan.flops / chip.flops / best
    return Figure(
        name,
        f"update of {name}, {2 * prompts * width} tokens without padding in {len(batches)} microbatches ({kernel}): {best:.2f} s, "
        f"{2 * prompts * width / best:.0f} tokens/s, MFU {mfu:.1%} (plan {plan.mfu:.1%}), peak {peak / GIB:.1f} GiB (plan {plan.peak / GIB:.1f}); "
        f"first {seconds[0]:.0f} s",
        {
            "layers": a.layers, "lora_rank": a.lora_rank, "kernel": kernel, "seconds": seconds, "microbatches": len(batches),
            "tokens": 2 * prompts * width, "rows": layout.rows, "mfu": mfu, "plan_mfu": plan.mfu, "plan_seconds": plan.seconds,
            "peak_bytes": peak, "plan_peak_bytes": plan.peak, "losses": losses, "finite": bool(np.isfinite(losses).all()),
        },
    )  # fmt: skip


def _microbatch(a: Architecture, layout: Layout, prompts: int, total: int) -> Microbatch:
    """Random tokens: row 2 g + r is response r of prompt g, half of its tokens the prompt."""
    rng = np.random.default_rng(SEED)
    shape = (layout.rows, layout.width)
    tokens = rng.integers(5, a.vocab, shape).astype(np.int32)
    place_BT = np.broadcast_to(np.arange(layout.width, dtype=np.int32), shape)
    real = np.arange(layout.rows) < 2 * prompts
    place = np.zeros((layout.prompts, 2), np.int32)
    place[:prompts] = np.arange(2 * prompts).reshape(-1, 2) * layout.slots

    def per_prompt(value: Any, *more: int) -> np.ndarray:
        x = np.zeros((layout.prompts, *more), np.float32)
        x[:prompts] = value
        return x

    return Microbatch(
        tokens=tokens,
        segment=np.broadcast_to(real[:, None], shape).astype(np.int32),
        branch=np.zeros(shape, np.int32),
        position=place_BT,
        before=place_BT,
        label=np.roll(tokens, -1, axis=1),
        slot=((place_BT >= layout.width // 2 - 1) & (place_BT < layout.width - 1) & real[:, None]).astype(
            np.int32
        ),
        slots=np.arange(1, layout.slots + 1, dtype=np.int32),
        place=place,
        ref_logprob=per_prompt(0.0, 2),
        base_logprob=per_prompt(np.nan, 2),
        payoff=per_prompt([0.75, 0.25], 2),
        baseline=per_prompt(0.5),
        probability=per_prompt(0.75),
        real=np.arange(layout.prompts) < prompts,
        share=np.asarray(prompts / total, np.float32),
    )
