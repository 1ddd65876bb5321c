"""The update's gradients against a plain reference, and what lies on the devices between its programs."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sppo_jax import models, sharding
from sppo_jax.hub import names
from sppo_jax.losses import LOSSES
from sppo_jax.models import cpu_attention, hf, logprob
from sppo_jax.models.attention import Kernel
from sppo_jax.models.transformer import Transformer
from sppo_jax.training.batches import Batches
from sppo_jax.training.microbatch import Microbatch
from sppo_jax.training.packing import Layout, Packing
from sppo_jax.training.update import forward, make_programs, split
from tests.conftest import ODD
from tests.test_fit import SETTINGS, pairs_of, prepare


def plain_gradients(model, rows, settings):
    """Loss and gradient with nothing clever: a row for each sequence, layer by layer, all logits at once, all kept."""
    graph, params = nnx.split(model)
    every = [(r.prompt_ids, ids) for r in rows for ids in r.response_ids]
    width = max(len(p) + len(ids) for p, ids in every)
    tokens = np.zeros((len(every), width), np.int32)
    valid, scored = np.zeros((2, *tokens.shape), bool)
    for b, (prompt, ids) in enumerate(every):
        tokens[b, : len(prompt) + len(ids)] = prompt + ids
        valid[b, : len(prompt) + len(ids)] = True
        scored[b, len(prompt) : len(prompt) + len(ids)] = True
    place = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    prompts = SimpleNamespace(
        ref_logprob=jnp.asarray([r.ref_logprob for r in rows], jnp.float32),
        payoff=jnp.asarray([r.payoff for r in rows], jnp.float32),
        baseline=jnp.asarray([r.baseline for r in rows], jnp.float32),
        probability=jnp.asarray([r.chosen_probs for r in rows], jnp.float32),
        real=jnp.ones(len(rows), bool),
    )

    def total(params):
        model = nnx.merge(graph, params)
        model.kernel = Kernel()  # dense masks
        hidden = model.forward(
            jnp.asarray(tokens), model.rope(place), model.whole_attention(jnp.asarray(valid))
        )
        log_p = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
        logprob_GR = jnp.where(scored[:, 1:], picked, 0).sum(1).reshape(len(rows), -1)
        return LOSSES[settings.loss].compute(logprob_GR, prompts, settings.eta)

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.fixture(scope="module")
def plain():
    """Pairs whose references are not the policy's own, so that no term vanishes, with loss and gradient by loss and choice."""
    found = {}

    def of(how, loss):
        if (how, loss) not in found:
            settings = dataclasses.replace(SETTINGS, loss=loss, global_batch=6)
            model, rows, *_ = prepare(
                pairs_of(6, how, longest=40), settings, sharding.make_mesh(devices=jax.devices()[:1])
            )
            moved = [
                dataclasses.replace(r, ref_logprob=[x + 20 - 13 * k for k, x in enumerate(r.ref_logprob)])
                for r in rows
            ]
            found[how, loss] = settings, moved, plain_gradients(model, moved, settings)
        return found[how, loss]

    return of


@pytest.mark.parametrize("remat", ["layer", "attention"])
@pytest.mark.parametrize(
    ("mesh", "most", "pack"),
    [("one_device", None, True), ("one_device", None, False), ("one_device", 128, True), ("eight_devices", 256, True),
     ("eight_devices", None, False)],
)  # fmt: skip
def test_gradients_equal_a_plain_reference(plain, mesh, most, pack, remat, request, monkeypatch):
    """Packed or not, in microbatches or not, on one device or eight, whatever is computed again, small chunks and blocks."""
    settings, rows, expected = plain("best_worst", "sppo")
    monkeypatch.setattr(logprob, "CHUNK", 40)
    monkeypatch.setattr(logprob, "LOGITS", 40 * 512)
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)
    check_gradients(
        dataclasses.replace(settings, remat=remat), rows, expected, request.getfixturevalue(mesh), most, pack
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_a_pullbacks_residuals_hold_no_weights(sizes, tied, dtype, monkeypatch):
    """A program writes its results anew: weights among the residuals, in whatever shape, would be there twice."""
    count = int(np.prod(sizes))
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    a = dataclasses.replace(ODD, vocab=4096, tied=tied)
    rows = 8
    tokens = rows // sharding.batch_shards(mesh) * 7
    monkeypatch.setattr(logprob, "LOGITS", tokens * a.vocab // 4)  # four blocks
    model = Transformer(a, dict(hf.abstract(a, mesh)), dtype, Kernel("blocked", mesh))
    graph, params, frozen = split(model)
    batch = Microbatch.abstract(mesh, Layout(1, 4, rows, 7, 1, 1.0), 2)
    _, pullback = jax.eval_shape(
        functools.partial(forward, graph=graph, remat="layer"), params, frozen, batch
    )
    assert len(pullback.residuals) > 1
    largest = max(x.size for x in pullback.residuals)
    assert largest < a.vocab * a.model // count  # the head, or a device's own part of it


@pytest.mark.parametrize(
    ("how", "loss"),
    [("all", "sppo"), ("best_worst", "dpo"), ("best_worst", "sppo_single"), ("all", "difference")],
)
def test_gradients_of_other_losses_and_of_all_k_equal_a_plain_reference(plain, how, loss, eight_devices):
    settings, rows, expected = plain(how, loss)
    check_gradients(settings, rows, expected, eight_devices, 256, True)


@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
@pytest.mark.parametrize(("how", "most"), [("best_worst", None), ("best_worst", 256), ("all", 256)])
@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_gradients_with_a_prompt_shared_by_its_responses_equal_a_plain_reference(
    plain, how, most, attention, mesh, request, monkeypatch
):
    settings, rows, expected = plain(how, "sppo")
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)
    mesh = request.getfixturevalue(mesh)
    check_gradients(settings, rows, expected, mesh, most, True, shared=True, attention=attention)


def check_gradients(settings, rows, expected, mesh, most, pack, shared=False, attention="auto"):
    model = models.load(names.path("policy"), mesh=mesh)
    programs = make_programs(model.architecture, model.compute_dtype, mesh, settings, 1, attention)
    packing = Packing(sharding.batch_shards(mesh), most, pack, shared=shared)
    batches = Batches(rows, global_batch=6, epochs=1, seed=0, iteration=1, packing=packing)
    assert (batches.layout.microbatches > 1) == (most is not None)
    assert (batches.layout.slots > 1) == pack
    _, params, frozen = split(model)
    grads, scalars = programs.gradients(params, frozen, batches[0].placed(mesh))
    loss, plain_grads = expected
    assert float(scalars["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
