"""The sampler in 8 bits: which arrays are rounded, how far that moves log-probs, and what stays exact."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from sppo_jax import config_file, prompts
from sppo_jax.config import Config, Sampling
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.models import hf, lora
from sppo_jax.models.logprob import response_logprob
from sppo_jax.models.transformer import Transformer, product
from sppo_jax.sampler import Sampler
from sppo_jax.sampler.quantized import Int8, rounded
from sppo_jax.sampler.weights import placed, serving_bytes, serving_model
from sppo_jax.settings import resuming
from tests.conftest import ODD
from tests.test_sampler import TEMPERATE

EIGHT = dataclasses.replace(TEMPERATE, quantize="int8")
# As Gemma and Qwen2 differ from Mistral, all at once; the vocabulary is the tokenizer's.
GEMMA = dataclasses.replace(
    ODD, vocab=768, layers=1, tied=True, activation="gelu_tanh", qkv_bias=True, post_norms=True,
    norm_offset=True, attention_softcap=5.0, logit_softcap=8.0, scaled_embedding=True, lora_rank=2,
)  # fmt: skip


def gemma(mesh):
    """Tied and with adapters, all weights at random and large."""
    rng = np.random.default_rng(0)
    like = hf.abstract(GEMMA, mesh) | lora.abstract(GEMMA, mesh)
    draw = {path: 0.15 * rng.normal(size=x.shape).astype(np.float32) for path, x in like.items()}
    return Transformer(GEMMA, {path: jax.device_put(draw[path], x.sharding) for path, x in like.items()})


def quantized_params(serving):
    return jax.tree.leaves(nnx.state(serving, Int8), is_leaf=lambda x: isinstance(x, Int8))


@pytest.fixture(scope="module")
def asked(tokenizer):
    return prompts.load(config_file.load(), tokenizer).heldout[:20]  # all of one length bucket


@pytest.fixture(scope="module")
def sampler(policy, tokenizer):
    return Sampler(policy, tokenizer, EIGHT)


@pytest.fixture(scope="module")
def sampled(sampler, asked):
    return sampler.generate(asked, seed=3)


@pytest.mark.parametrize(
    ("equation", "shape", "ins"),
    [("BTD,DHC->BTHC", (48, 6, 10), 1), ("BTHC,HCD->BTD", (6, 10, 48), 2), ("...D,DV->...V", (48, 102), 1)],
)
def test_a_product_in_8_bits_is_that_with_the_rounded_matrix(equation, shape, ins):
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=size).astype(np.float32) for size in (shape, (2, 5, *shape[:ins])))
    w[..., 3], w[..., 4] = 0, 100 * w[..., 4]
    q = jax.jit(rounded, static_argnums=1)(w, ins)
    assert q.qvalue.dtype == jnp.int8
    assert q.scale.shape == (1,) * ins + shape[ins:]
    near, scale = np.asarray(q.qvalue, np.float32) * np.asarray(q.scale), np.asarray(q.scale)
    assert (abs(near - w) <= scale / 2 * (1 + 1e-4)).all()  # half a step, a column's own largest included
    for dtype in ("float32", "bfloat16"):  # int8 times bfloat16 is no further rounding
        cast = jnp.asarray(x, dtype)
        exact = np.einsum(equation, np.asarray(cast, np.float32), near)
        found = product(equation, cast, q, jnp.float32)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * abs(exact).max())
    assert product(equation, cast, q).dtype == jnp.bfloat16


def test_the_samplers_matrices_are_int8_and_the_policys_stay_what_they_were(policy, sampler):
    kept = jax.tree.leaves(nnx.state(policy))
    assert all(x.dtype == jnp.float32 for x in kept)
    serving = nnx.merge(sampler.graph, sampler.weights)
    for name in (*lora.MATRICES, "head"):
        param = serving.head if name == "head" else serving.layers[1][name]
        master = policy.head[...] if name == "head" else policy.layers[name][...][1]
        assert isinstance(param, Int8)
        assert param[...].qvalue.dtype == jnp.int8
        np.testing.assert_allclose(qwix.dequantize(param[...]), master, atol=float(abs(master).max()) / 255)
    for ours, theirs in ((serving.embedding, policy.embedding), (serving.norm, policy.norm)):
        np.testing.assert_array_equal(ours[...], theirs[...])
    held = sum(x.nbytes for x in jax.tree.leaves(sampler.weights))
    assert held == serving_bytes(policy, True) < 0.34 * serving_bytes(policy, False)


def test_a_tied_model_with_adapters_computes_with_its_rounded_matrices(one_device):
    """Biases, adapters, norms and the embedding's rows are as exact as before."""
    model = gemma(one_device)
    tokens_BT = jax.random.randint(jax.random.key(5), (2, 12), 0, GEMMA.vocab)
    place_BT = jnp.broadcast_to(jnp.arange(12), tokens_BT.shape)

    def logits(model):
        return model.logits(
            model.forward(tokens_BT, model.rope(place_BT), model.whole_attention(place_BT >= 0))
        )

    @jax.jit
    def both(model):
        near = model.unstacked()
        near.head = nnx.data(nnx.Param(qwix.dequantize(rounded(model.embedding[...].T, 1))))
        for layer in near.layers:
            for name, (ins, _, _) in lora.MATRICES.items():
                layer[name] = nnx.Param(qwix.dequantize(rounded(layer[name][...], len(ins))))
        return logits(serving_model(model, True)), logits(near)

    ours, near = both(model)
    assert np.std(near) > 0.3  # far from uniform
    np.testing.assert_allclose(ours, near, atol=1e-4)


def test_the_change_of_logprobs_is_that_of_random_errors_as_large(policy, sampled):
    """Rounding moves a weight by up to half a step: as noise would that is uniform between the same ends."""

    rng = np.random.default_rng(0)

    def noisy(w, axes):
        step = np.max(np.abs(w), axis=axes, keepdims=True) / 127.5
        return w + step * rng.uniform(-0.5, 0.5, w.shape).astype(np.float32)

    other = nnx.clone(policy)
    for name, (ins, _, _) in lora.MATRICES.items():
        w = np.asarray(policy.layers[name][...])
        other.layers[name][...] = jnp.asarray(noisy(w, tuple(range(1, 1 + len(ins)))))
    other.head[...] = jnp.asarray(noisy(np.asarray(policy.head[...]), 0))
    rows = [(row.prompt_ids, ids) for row in sampled for ids in row.response_ids]
    texts = np.zeros((len(rows), 64), np.int32)
    for i, (prompt, ids) in enumerate(rows):
        texts[i, : len(prompt + ids)] = prompt + ids
    begin, end = np.array([(len(prompt), len(prompt + ids)) for prompt, ids in rows], np.int32).T
    logprob = jax.jit(lambda model: response_logprob(model, *map(jnp.asarray, (texts, begin, end))))
    exact, changed = np.asarray(logprob(policy)), np.asarray(logprob(other))
    noise = np.std((changed - exact) / (end - begin))
    change = (np.concatenate([row.logprobs for row in sampled]) - exact) / (end - begin)
    assert 0.5 * noise < np.std(change) < 2 * noise
    assert abs(np.mean(change)) < noise  # no direction


def test_with_the_same_draws_most_responses_are_the_same(policy, tokenizer, asked, sampled):
    sampler = Sampler(policy, tokenizer, TEMPERATE, longest=65)  # the programs of test_sampler.py
    exact = sampler.generate(asked, seed=3)
    ours, theirs = ([ids for row in rows for ids in row.response_ids] for rows in (sampled, exact))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.9 * len(ours)
    assert all(a.logprobs != b.logprobs for a, b in zip(sampled, exact, strict=True))


def test_a_response_in_8_bits_does_not_depend_on_its_neighbours(sampler, sampled, asked):
    assert sampler.generate([asked[7]], seed=3) == [sampled[7]]
    assert sampler.generate(asked[::-1], seed=3) == sampled[::-1]


def test_tokens_are_the_same_on_eight_devices(tokenizer, asked, sampled, eight_devices):
    model = hf.load(names.path("policy"), mesh=eight_devices)
    spread = Sampler(model, tokenizer, EIGHT, eight_devices)
    assert spread.replicas == 4
    found = spread.generate(asked, seed=3)
    assert [row.response_ids for row in found] == [row.response_ids for row in sampled]
    for a, b in zip(found, sampled, strict=True):  # a key or value at the edge may round to the other side
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.02)


def test_scales_lie_as_their_matrices_do_a_tied_head_too(eight_devices):
    graph, weights = placed(gemma(eight_devices), eight_devices, eight_devices, True)
    matrices = quantized_params(nnx.merge(graph, weights))
    assert len(matrices) == 7 + 1
    for param in matrices:
        matrix, scale = param[...].qvalue, param[...].scale
        for n, a, b in zip(scale.shape, matrix.sharding.spec, scale.sharding.spec, strict=True):
            assert b == (a if n > 1 else None)
        assert "tensor" in tuple(matrix.sharding.spec)


def test_without_qwix_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(BadInput, match=r"sampling\.quantize=int8 needs the package qwix"):
        rounded(jnp.ones((4, 4)), 1)


def test_a_run_cannot_go_on_in_other_bits():
    changed = dataclasses.replace(Config(), sampling=dataclasses.replace(Sampling(), quantize="int8"))
    assert resuming.changed_keys(Config(), changed) == ["sampling.quantize"]
