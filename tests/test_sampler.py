"""Responses: their tokens, the distribution they are drawn from, and everything that they may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sppo_jax import config_file, models, prompts, sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.models.logprob import response_logprob
from sppo_jax.records import Prompt
from sppo_jax.sampler import Sampler, capacity, engine
from sppo_jax.sampler.programs import Programs
from sppo_jax.sampler.stream import Stream
from sppo_jax.text import chat_template

TEMPERATE = Sampling(responses=3, temperature=1.0, top_p=0.95, max_new_tokens=24, slots=24)


@pytest.fixture(scope="module")
def asked(tokenizer):
    held_out = prompts.load(config_file.load(), tokenizer).heldout
    long = chat_template.chat_prompt(tokenizer, "Where can I find the fox? " * 6)  # of another length bucket
    return [*held_out[:19], long]


@pytest.fixture(scope="module")
def sampler(policy, tokenizer):
    return Sampler(policy, tokenizer, TEMPERATE)


@pytest.fixture(scope="module")
def sampled(sampler, asked):
    return sampler.generate(asked, seed=3, iteration=1)


def test_greedy_equals_transformers_generate_token_for_token_on_twenty_prompts(policy, tokenizer, asked):
    ours = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, temperature=0.0, responses=1))
    theirs = AutoModelForCausalLM.from_pretrained(names.path("policy"), dtype=torch.float32).eval()
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


def small(policy, tokenizer, mesh=None, **options):
    return Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, **options), mesh)


@pytest.mark.parametrize("case", ["alone", "reversed", "again", "fewer_k", "shards"])
def test_T18_a_response_is_the_same_in_every_bit_whatever_else_is_sampled(sampler, sampled, asked, case):
    expected = sampled
    if case == "alone":
        found = [sampler.generate([p], seed=3, iteration=1)[0] for p in (asked[0], asked[7], asked[-1])]
        expected = [sampled[0], sampled[7], sampled[-1]]
    elif case == "reversed":
        found = sampler.generate(asked[::-1], seed=3, iteration=1)[::-1]
    elif case == "again":  # pages still hold the earlier responses
        found = sampler.generate(asked, seed=3, iteration=1)
    elif case == "fewer_k":
        found = sampler.generate(asked, seed=3, iteration=1, responses=2)
        expected = [dataclasses.replace(row, **{f: getattr(row, f)[:2] for f in PER_K}) for row in sampled]
    else:
        found = [
            row for i in range(0, 20, 3) for row in sampler.generate(asked[i : i + 3], seed=3, iteration=1)
        ]
    assert found == expected


def test_T18_little_memory_costs_time_and_changes_nothing(policy, tokenizer, asked):
    """Responses that are preempted for want of pages start again, and draw the same tokens."""
    long = dataclasses.replace(TEMPERATE, max_new_tokens=200, slots=8)
    roomy = Sampler(policy, tokenizer, long, eos=())
    tight = Sampler(policy, tokenizer, dataclasses.replace(long, cache_tokens=14 * 64), eos=())
    expected = roomy.generate(asked[:4], seed=3, iteration=1)
    assert tight.generate(asked[:4], seed=3, iteration=1) == expected
    assert tight.stats.evicted_tokens > 0 == roomy.stats.evicted_tokens
    assert tight.stats.tokens == roomy.stats.tokens == 4 * 3 * 200


@pytest.fixture(scope="module")
def three_slots(policy, tokenizer, asked):
    return small(policy, tokenizer, slots=3).generate(asked, seed=3, iteration=1)


def test_T18_eight_replicas_of_three_slots_draw_what_one_of_them_draws_in_every_bit(
    three_slots, tokenizer, asked, eight_flat
):
    model = models.load(names.path("policy"), mesh=eight_flat)
    eight = small(model, tokenizer, eight_flat, slots=24)
    assert eight.replicas == 8
    assert eight.generate(asked, seed=3, iteration=1) == three_slots


@pytest.fixture(scope="module")
def eight_flat():
    return sharding.make_mesh(1, 8, 1)


def same_tokens(found, expected):
    """Other shapes and sums over devices give other last bits, and the same tokens."""
    assert [row.response_ids for row in found] == [row.response_ids for row in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_T18_the_number_of_slots_changes_no_token(sampled, three_slots):
    same_tokens(three_slots, sampled)


def test_a_cpu_decodes_no_more_slots_than_there_is_work_for_and_draws_the_same(policy, tokenizer, asked):
    """60 responses begin in 64 of 128 slots. Chunks end when 48 slots are enough for the rest, after 5 steps, and when 32 are.

    Some of the last 20 were beyond the 32nd slot. 15 responses begin in 32.
    """
    sampler = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, slots=128, max_new_tokens=80), eos=())
    limits = [[9, 80, 5]] * 20
    found = dict(sampler.stream(asked, seed=3, limits=limits))
    assert sampler.programs.sizes == (64, 48, 32)
    computed = sampler.stats.slot_steps
    assert (sampler.stats.steps, computed) == (80, 5 * 64 + 4 * 48 + 71 * 32)
    few = dict(sampler.stream(asked[:5], seed=3, limits=limits[:5]))
    assert few == {i: found[i] for i in range(5)}
    assert sampler.stats.slot_steps - computed == 32 * (sampler.stats.steps - 80)


@pytest.mark.parametrize(("width", "slots"), [(128, 80), (576, 80), (1024, 40), (4096, 40)])
def test_a_wide_model_has_no_more_slots_on_a_cpu_than_make_it_faster(policy, one_device, width, slots):
    """160 responses: 80 slots of 320 for the embedded policy and for SmolLM2, 40 for a model of twice its width."""
    a = dataclasses.replace(policy.architecture, model=width)
    found = capacity.Capacity(one_device, Sampling(), a, jnp.float32, "xla", None)
    assert found.slots_for(160) == slots


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_T18_four_replicas_of_two_devices_draw_the_same_tokens(
    sampled, asked, tokenizer, policy, eight_devices, temperature
):
    expected = sampled
    if temperature == 0:
        expected = small(policy, tokenizer, temperature=0.0).generate(asked, seed=3, iteration=1)
    model = models.load(names.path("policy"), mesh=eight_devices)
    other = small(model, tokenizer, eight_devices, temperature=temperature)
    assert other.replicas == 4
    same_tokens(other.generate(asked, seed=3, iteration=1), expected)


PER_K = ("response_ids", "responses", "finish_reason", "logprobs")


@pytest.mark.parametrize("change", [{"seed": 4}, {"iteration": 2}])
def test_T18_seed_and_iteration_change_the_samples(sampler, sampled, asked, change):
    other = sampler.generate(asked, **({"seed": 3, "iteration": 1} | change))
    same = sum(a.response_ids == b.response_ids for a, b in zip(other, sampled, strict=True))
    assert same < 3


def test_T18_prompts_do_not_share_their_draws(policy, tokenizer):
    """With the same logits everywhere, equal keys would give equal responses."""
    flat = models.load(names.path("policy"))
    flat.head[...] = jnp.zeros_like(flat.head[...])
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


@pytest.fixture
def compiled():
    """A list with an entry for each program compiled during a test."""
    names = []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_warm_up_and_each_chunk_is_read_once(
    sampler, sampled, asked, monkeypatch, compiled
):
    reads, counted = [], []
    get, chunks = jax.device_get, sampler.programs.decode[24]
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(x.shape) or get(x))
    monkeypatch.setitem(sampler.programs.decode, 24, lambda *a: counted.append(0) or chunks(*a))
    sampler.generate(asked[5:], seed=8, iteration=2)
    assert compiled == []
    assert len(reads) == len(counted) > 3


def test_a_transfer_that_nobody_asked_for_is_an_error(sampler, asked, monkeypatch):
    """The guard is on while the slots are served: a NumPy array among the arguments is refused."""
    monkeypatch.setattr(Stream, "_put", lambda self, x, place: x)
    with pytest.raises(Exception, match=r"[Dd]isallowed"):
        sampler.generate(asked[:1], seed=0)


def test_a_prompt_is_handed_over_when_its_last_response_has_ended(policy, tokenizer, asked):
    two = Sampler(policy, tokenizer, dataclasses.replace(TEMPERATE, slots=6, max_new_tokens=60), eos=())
    limits = [[60, 1, 1], *[[2, 3, 1]] * 9]
    progress, order = [], []
    for i, row in two.stream(
        asked[:10], seed=0, limits=limits, on_progress=lambda *added: progress.append(added)
    ):
        order.append(i)
        assert [len(ids) for ids in row.response_ids] == limits[i]
    assert sorted(order) == list(range(10))
    assert order[-1] == 0  # its first response is long; the others did not wait for it
    prompts, drawn, busy = zip(*progress, strict=True)
    assert sum(prompts) == 10
    assert sum(drawn) == two.stats.tokens
    assert max(busy) == 6


def test_slots_are_refilled_while_others_go_on(policy, tokenizer, asked):
    """One response in ten is long. A static batch would wait for it in every batch; the slots do not."""
    sampler = Sampler(
        policy, tokenizer, dataclasses.replace(TEMPERATE, slots=10, responses=10, max_new_tokens=60), eos=()
    )
    limits = [[60] + [6] * 9] * 20
    for _ in sampler.stream(asked, seed=0, responses=10, limits=limits):
        pass
    assert sampler.stats.tokens == 20 * (60 + 54)
    assert sampler.stats.slot_efficiency > 0.5  # 0.19 in batches


def test_other_weights_are_sampled_from_at_once(policy, tokenizer, asked, sampled, sampler, compiled):
    """As in a run: released for training, then given the next policy. Nothing is compiled again."""
    other = models.load(names.path("policy"))
    other.head[...] = other.head[...] * 0.5
    jax.block_until_ready(other.head[...])
    compiled.clear()
    sampler.release()
    sampler.set_weights(other)
    assert sampler.generate(asked[:3], seed=3, iteration=1) != sampled[:3]
    sampler.release()
    sampler.set_weights(policy)
    assert sampler.generate(asked[:3], seed=3, iteration=1) == sampled[:3]
    assert compiled == []


def test_a_sampler_serves_one_stream_at_a_time(sampler, sampled, asked, policy):
    stream = sampler.stream(asked[:4], seed=3, iteration=1)
    first = next(stream)
    for other in (
        lambda: sampler.stream(asked[4:5], seed=0),
        lambda: sampler.set_weights(policy),
        sampler.release,
    ):
        with pytest.raises(RuntimeError, match="middle of a stream"):
            other()
    found = dict([first, *stream])
    assert [found[i] for i in range(4)] == sampled[:4]
    next(sampler.stream(asked[:4], seed=3, iteration=1))  # left in the middle
    assert sampler.generate(asked[:4], seed=3, iteration=1) == sampled[:4]


@pytest.mark.parametrize("limits", [[[0, 1, 1]], [[]], [[1, 1, 1], [1, 1, 1]]])
def test_limits_that_ask_for_nothing_are_refused(sampler, asked, limits):
    with pytest.raises(BadInput, match="limits need"):
        sampler.stream(asked[:1], seed=0, limits=limits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"responses": 0}, r"responses 0 must be a whole number in \[1, 2\*\*16\)"),
        ({"responses": -1}, "responses -1"),
        ({"responses": True}, "responses True"),
        ({"iteration": -1}, r"iteration -1 must be a whole number in \[0, 2\*\*32\)"),
        ({"iteration": 2**32}, "iteration 4294967296"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"prompts": [Prompt("x", [])]}, "'x' has no tokens"),
        ({"prompts": [Prompt("x", [1, -1])]}, "holds token id -1, and the model has 768 tokens"),
        ({"prompts": [Prompt("x", [768, 1])]}, "token id 768, .* whole numbers from 0 to 767"),
        ({"prompts": [Prompt("x", [2**31])]}, "token id 2147483648"),
        ({"prompts": [Prompt("x", [1, 2.5])]}, r"token id 2\.5"),
        ({"prompts": [Prompt("x", [1, None])]}, "token id None"),
        ({"prompts": [Prompt("x", [1] * 489)]}, "489 tokens and sampling.max_new_tokens=24 exceed the model's 512"),
        ({"prompts": "a text"}, r"prompts is one text, 'a text'; give a list"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused_by_name_before_the_devices_work(
    sampler, monkeypatch, change, said
):
    monkeypatch.setattr(Sampler, "warm_up", None)
    with pytest.raises(BadInput, match=said):
        sampler.generate(**({"prompts": ["a"], "seed": 0} | change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": float("nan")}, r"sampling\.temperature=nan must be at least 0"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"slots": 0}, "slots=0"),
        ({"responses": 0}, "responses=0"),
    ],
)
def test_a_sampler_with_settings_out_of_their_range_is_refused_by_name(policy, tokenizer, change, said):
    with pytest.raises(BadInput, match=said):
        small(policy, tokenizer, **change)


@pytest.mark.parametrize("eos", [(-1,), (1, 768)])
def test_ends_that_the_model_does_not_have_are_refused_by_name(policy, tokenizer, eos):
    with pytest.raises(BadInput, match=rf"eos holds token id {eos[-1]}"):
        Sampler(policy, tokenizer, TEMPERATE, eos=eos)


@pytest.mark.parametrize("value", [2.0, "2", None, True, float("nan"), [2]])
def test_numbers_and_ids_that_are_not_integers_are_refused_by_name(value):
    with pytest.raises(BadInput, match=r"^responses .* must be a whole number in \[1, 2\*\*31\)"):
        engine._check_number("responses", value, 1, 2**31)
    with pytest.raises(BadInput, match=r"^a prompt holds token id "):
        engine._check_ids("a prompt", [1, value], 768)


def test_integers_of_numpy_are_as_good_as_pythons(sampler):
    engine._check_number("responses", np.int32(2), 1, 2**31)
    engine._check_ids("a prompt", list(np.array([1, 767])), 768)
    assert sampler.generate([], seed=0) == []


def test_a_cache_that_cannot_hold_one_response_is_refused(policy, tokenizer, asked):
    with pytest.raises(BadInput, match=r"cache_tokens=64: .* at least"):
        small(policy, tokenizer, cache_tokens=64).generate(asked[:1], seed=0)


@pytest.mark.parametrize("when", ["compile", "advance"])
def test_devices_without_memory_are_one_line_and_the_sampler_goes_on_later(
    policy, tokenizer, asked, sampled, monkeypatch, when
):
    ours = Sampler(policy, tokenizer, TEMPERATE)
    if when == "advance":
        ours.warm_up([len(prompt.ids) for prompt in asked])

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    place = (Stream, "advance") if when == "advance" else (Programs, "compile")
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(BadInput, match=r"no memory for .* lower sampling\.slots"):
            ours.generate(asked, seed=3, iteration=1)
    assert ours.generate(asked[:1], seed=3, iteration=1) == sampled[:1]
