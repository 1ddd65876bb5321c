"""The run and the plan agree: both take dtype, layout, slots and pages from the same rules, for the same memory."""

import dataclasses

import jax
import numpy as np
import pytest

from sppo_jax import models, sharding
from sppo_jax.config import Config, Fit, Model, Prompts, Sampling
from sppo_jax.hub import names
from sppo_jax.models import attention, lora
from sppo_jax.plan import compiled, target
from sppo_jax.plan.chips import GPUS
from sppo_jax.plan.cost import GIB
from sppo_jax.plan.lengths import Lengths
from sppo_jax.plan.target import Target
from sppo_jax.sampler import Sampler, capacity
from sppo_jax.sampler.programs import Programs
from sppo_jax.training.trainer import Trainer
from tests.test_fit import pairs_of

LONGEST = 40  # tokens of the longest prompt
BASE = Config(
    model=Model(path="embedded:policy"),
    prompts=Prompts(max_length=LONGEST),
    sampling=Sampling(max_new_tokens=64, slots=64),
    fit=Fit(global_batch=16),
)
CASES = {
    # In float32; memory for fewer pages than 64 slots could fill.
    "one device": ("one_device", 24, BASE),
    "eight devices, bfloat16": (
        "eight_devices",
        6,
        dataclasses.replace(BASE, model=Model(path="embedded:policy", compute_dtype="bfloat16")),
    ),
    "adapters, int8": (
        "one_device",
        16,
        dataclasses.replace(
            BASE,
            model=Model(path="embedded:policy", lora_rank=4),
            sampling=dataclasses.replace(BASE.sampling, quantize="int8", slots=40),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_dtype_layout_slots_and_pages_of_its_plan(case, request, tokenizer, monkeypatch):
    fixture, mebibytes, config = CASES[case]
    mesh, limit = request.getfixturevalue(fixture), mebibytes * 2**20
    a = target.architecture(config)
    chip = dataclasses.replace(GPUS["h100"], gib=limit / GIB)
    plan = Target(config, a, chip, mesh, Lengths(), compiled=False)

    trainer = Trainer(config, a, mesh, sharding.compute_dtype(config.model.compute_dtype, mesh))
    assert trainer.compute_dtype == plan.dtype

    rows = pairs_of(16, longest=LONGEST)
    lengths = [[len(row.prompt_ids) + len(ids) for ids in row.response_ids] for row in rows]
    vars(plan)["work"] = dataclasses.replace(plan.work, lengths_GR=lengths)
    monkeypatch.setattr(sharding, "memory_limit", lambda _: limit)
    # A plan counts the head at all tokens, and no kernel of a device that is planned for shares prompts.
    monkeypatch.setattr(attention, "branches", lambda kernel: False)
    found = trainer.batches(rows, 1).layout
    assert dataclasses.replace(found, scored=None) == plan.layout

    model = models.load(names.path("policy"), mesh=mesh, dtype=trainer.compute_dtype)
    if a.lora_rank:
        model = lora.attach(model, a.lora_rank, jax.random.key(0), mesh)
    sampler = Sampler(model, tokenizer, config.sampling, mesh, longest=LONGEST)
    resident = compiled.local_bytes(sampler.weights) + compiled.kept_bytes(config, a, mesh, plan.dtype)
    monkeypatch.setattr(capacity, "memory_in_use", lambda _: resident)
    monkeypatch.setattr(Programs, "compile", lambda *_: 0)
    sampler.warm_up([LONGEST])
    planned = compiled.sampling_programs(config, a, mesh, plan.dtype, plan.limit)
    ran = sampler.programs
    assert dataclasses.replace(ran.shape, eos=planned.shape.eos) == planned.shape
    assert [np.shape(x) for x in jax.tree.leaves(sampler.pages)] == [
        x.shape for x in jax.tree.leaves(planned.pages)
    ]
    assert ran.model.compute_dtype == planned.model.compute_dtype == plan.dtype
    assert sampler.mesh.shape == planned.mesh.shape
