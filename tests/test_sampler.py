"""Responses: what is sampled, from which distribution, and what it may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sppo_jax import models, prompts, tiny, tokens
from sppo_jax.config import Config, Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models.logprob import response_logprob
from sppo_jax.sampler import Sampler, in_nucleus, next_token

TEMPERATE = Sampling(responses=3, temperature=1.0, top_p=0.95, max_new_tokens=24, slots=24)


@pytest.fixture(scope="module")
def asked(tokenizer):
    held_out = prompts.load(Config(), tokenizer).heldout
    long = tokens.chat_prompt(tokenizer, "Where can I find the fox? " * 6)  # of another length bucket
    return [*held_out[:19], long]


@pytest.fixture(scope="module")
def sampler(policy, tokenizer):
    return Sampler(policy, tokenizer, TEMPERATE)


@pytest.fixture(scope="module")
def sampled(sampler, asked):
    return sampler.generate(asked, seed=3, iteration=1)


def test_greedy_equals_transformers_generate_token_for_token_on_twenty_prompts(policy, tokenizer, asked):
    ours = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, temperature=0.0, responses=1))
    theirs = AutoModelForCausalLM.from_pretrained(tiny.path("policy"), dtype=torch.float32).eval()
    assert len(asked) == 20
    for prompt, found in zip(asked, ours.generate(asked, seed=0), strict=True):
        ids = torch.tensor([prompt.ids])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert found.response_ids[0] == out[0, len(prompt.ids) :].tolist()


def test_T05_the_end_of_sequence_is_there_if_and_only_if_it_was_sampled(policy, tokenizer, asked):
    short = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, max_new_tokens=9))
    rows = short.generate(asked, seed=0)
    eos, reasons = tokenizer.eos_token_id, set()
    for row in rows:
        for ids, reason in zip(row.response_ids, row.finish_reason, strict=True):
            reasons.add(reason)
            assert (ids[-1] == eos) == (reason == "stop")
            assert eos not in ids[:-1]
            assert len(ids) == 9 or reason == "stop"
    assert reasons == {"stop", "length"}


def test_several_end_of_sequence_ids_all_end_a_response(policy, tokenizer, asked, sampled):
    common = max(sampled[0].response_ids[0][:-1])
    both = Sampler(policy, tokenizer, TEMPERATE, eos=(tokenizer.eos_token_id, common))
    row = both.generate(asked[:1], seed=3, iteration=1)[0]
    cut = sampled[0].response_ids[0].index(common)
    assert row.response_ids[0] == sampled[0].response_ids[0][: cut + 1]
    assert row.finish_reason[0] == "stop"


def test_T06_text_is_the_decoded_ids_and_never_the_other_way_round(sampled, tokenizer, asked):
    for prompt, row in zip(asked, sampled, strict=True):
        assert row.prompt_ids == prompt.ids
        for ids, text in zip(row.response_ids, row.responses, strict=True):
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
            assert "</s>" not in text


@pytest.mark.parametrize("case", ["alone", "reversed", "other_batch", "fewer_k", "eight_devices"])
def test_T18_a_response_depends_on_seed_iteration_prompt_and_k_alone(
    sampler, sampled, asked, tokenizer, case, eight_devices
):
    if case == "alone":
        found = [
            sampler.generate([prompt], seed=3, iteration=1)[0] for prompt in (asked[0], asked[7], asked[-1])
        ]
        expected = [sampled[0], sampled[7], sampled[-1]]
    elif case == "reversed":
        found, expected = sampler.generate(asked[::-1], seed=3, iteration=1)[::-1], sampled
    elif case == "other_batch":
        narrow = Sampler(models.load(tiny.path("policy")), tokenizer, dataclasses.replace(TEMPERATE, slots=9))
        found, expected = narrow.generate(asked, seed=3, iteration=1), sampled
    elif case == "fewer_k":
        found = sampler.generate(asked, seed=3, iteration=1, responses=2)
        expected = [dataclasses.replace(row, **{f: getattr(row, f)[:2] for f in PER_K}) for row in sampled]
    else:
        sharded = models.load(tiny.path("policy"), mesh=eight_devices)
        found = Sampler(sharded, tokenizer, TEMPERATE, eight_devices).generate(asked, seed=3, iteration=1)
        expected = sampled
    assert [row.response_ids for row in found] == [row.response_ids for row in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


PER_K = ("response_ids", "responses", "finish_reason", "logprobs")


@pytest.mark.parametrize("change", [{"seed": 4}, {"iteration": 2}])
def test_T18_seed_and_iteration_change_the_samples(sampler, sampled, asked, change):
    other = sampler.generate(asked, **({"seed": 3, "iteration": 1} | change))
    same = sum(a.response_ids == b.response_ids for a, b in zip(other, sampled, strict=True))
    assert same < 3


def test_T18_prompts_do_not_share_their_draws(policy, tokenizer):
    """With the same logits everywhere, equal keys would give equal responses."""
    from flax import nnx

    flat = models.load(tiny.path("policy"))
    flat.head[...] = jnp.zeros_like(flat.head[...])
    assert isinstance(flat, nnx.Module)
    rows = Sampler(flat, tokenizer, TEMPERATE).generate([f"prompt {i}" for i in range(4)], seed=0)
    everything = [tuple(ids) for row in rows for ids in row.response_ids]
    assert len(set(everything)) == len(everything)


def test_T31_k_samples_differ_at_temperature_one_and_agree_at_zero(policy, tokenizer, sampled, asked):
    assert np.mean([len({tuple(ids) for ids in row.response_ids}) for row in sampled]) > 2.5
    greedy = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, temperature=0.0))
    assert all(len({tuple(ids) for ids in row.response_ids}) == 1 for row in greedy.generate(asked, seed=0))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_T43_T27_sampled_logprobs_equal_the_trainers_at_temperature_one(
    policy, tokenizer, asked, temperature
):
    hot = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, temperature=temperature))
    for row in hot.generate(asked[:6], seed=0):
        n = len(row.prompt_ids)
        tokens_BT = np.zeros((len(row.response_ids), 96), np.int32)
        for i, ids in enumerate(row.response_ids):
            tokens_BT[i, : n + len(ids)] = row.prompt_ids + ids
        length = jnp.array([n + len(ids) for ids in row.response_ids])
        ours = response_logprob(policy, jnp.asarray(tokens_BT), jnp.full(len(length), n), length)
        np.testing.assert_allclose(row.logprobs, ours, atol=1e-4)


def test_a_prompt_without_room_is_refused(policy, tokenizer, asked):
    roomy = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, max_new_tokens=500))
    with pytest.raises(BadInput, match="512 positions"):
        roomy.generate(asked[:1], seed=0)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_exactly_the_sorted_one(top_p):
    logits = (
        np.random.default_rng(0).normal(size=(64, 777)).astype(np.float32) * np.linspace(0.1, 8, 64)[:, None]
    )
    found = np.asarray(in_nucleus(jnp.asarray(logits, jnp.float32), top_p))
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
    expected = np.zeros(found.shape, bool)
    np.put_along_axis(expected, order, before < top_p - 1e-7, -1)
    assert (found != expected).sum() <= 1  # a mass within rounding of top_p may fall on either side
    assert found.any(-1).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.6)])
def test_tokens_are_drawn_from_the_stated_distribution(temperature, top_p):
    draws = 20_000
    logits = jnp.asarray(np.random.default_rng(1).normal(size=50) * 1.5, jnp.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    tiled = jnp.broadcast_to(logits, (draws, 50))
    drawn = np.asarray(next_token(tiled, keys, temperature=temperature, top_p=top_p))
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[np.cumsum(p[order]) - p[order] < top_p]
    exact = np.zeros(50)
    exact[kept] = p[kept] / p[kept].sum()
    counts = np.bincount(drawn, minlength=50)
    assert counts[exact == 0].sum() == 0
    inside = exact > 0
    chi_square = ((counts - draws * exact)[inside] ** 2 / (draws * exact[inside])).sum()
    freedom = inside.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
