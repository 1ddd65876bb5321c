"""Log-probabilities of responses against brute force over transformers' logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sppo_jax import models, sharding
from sppo_jax.hub import names
from sppo_jax.models import Transformer, hf, logprob
from sppo_jax.models.attention import Kernel
from sppo_jax.models.logprob import response_logprob
from sppo_jax.models.trees import Trees

PROMPTS = [[1, 30, 40, 50], [1, 9, 8, 7, 6, 5, 4], [1, 99]]
ANSWERS = [[60, 70, 2], [60, 71, 72, 73, 80, 2], [500, 501, 502, 503]]

# As one program: called by itself, each of its operations would be compiled alone.
score = jax.jit(response_logprob)


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(names.path("policy"), dtype=torch.float32).eval()


def brute_force(theirs, prompt, answer):
    """Return the sum of log-softmax in float64 for one unpadded sequence, one token at a time."""
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + answer])).logits[0].double()
    log_p = torch.log_softmax(logits, -1)
    return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))


def batch(pairs, width, pad=0):
    tokens = np.full((len(pairs), width), pad, np.int32)
    for row, (prompt, answer) in enumerate(pairs):
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
    prompt_length = np.array([len(p) for p, _ in pairs], np.int32)
    length = np.array([len(p) + len(a) for p, a in pairs], np.int32)
    return jnp.asarray(tokens), jnp.asarray(prompt_length), jnp.asarray(length)


@pytest.mark.parametrize("width", [13, 32, 64])
@pytest.mark.parametrize("pad", [0, 2, 3, 500])
def test_T36_logprobs_equal_a_brute_force_sum_under_any_padding(theirs, policy, width, pad):
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    ours = score(policy, *batch(pairs, width, pad))
    expected = [brute_force(theirs, p, a) for p, a in pairs]
    np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=0)


def test_T36_a_sequence_that_fills_its_row_does_not_wrap_around(theirs, policy):
    prompt, answer = PROMPTS[1], ANSWERS[1]
    ours = score(policy, *batch([(prompt, answer)], len(prompt) + len(answer)))
    np.testing.assert_allclose(ours[0], brute_force(theirs, prompt, answer), atol=2e-4)


def test_T30_the_end_of_sequence_counts_even_when_it_is_the_padding_id(theirs, policy):
    prompt = PROMPTS[0]
    with_eos, without = [60, 70, 2], [60, 70]
    ours = score(policy, *batch([(prompt, with_eos), (prompt, without)], 16, pad=2))
    assert ours[0] < ours[1] - 1e-3
    np.testing.assert_allclose(ours[0], brute_force(theirs, prompt, with_eos), atol=2e-4)


def test_T37_responses_that_share_a_prefix_are_scored_in_full(theirs, policy):
    prompt = PROMPTS[0]
    pairs = [(prompt, [60, 70, 80, 2]), (prompt, [60, 70, 90, 2])]
    ours = score(policy, *batch(pairs, 16))
    np.testing.assert_allclose(ours, [brute_force(theirs, *pair) for pair in pairs], atol=2e-4)


def test_chunked_logits_give_the_same_sums_and_gradients(policy, monkeypatch):
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    graph, params = nnx.split(policy)

    def total(params):
        return response_logprob(nnx.merge(graph, params), *batch(pairs, 32)).sum()

    whole, whole_grad = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(logprob, "CHUNK", 5)
    chunked, chunked_grad = jax.jit(jax.value_and_grad(total))(params)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(chunked_grad), jax.tree.leaves(whole_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("axes", "blocks", "tied"),
    [
        ((1, 4, 2), 1, False),
        ((1, 4, 2), 5, False),
        ((1, 4, 2), 5, True),
        ((2, 2, 2), 1, True),
        ((2, 2, 2), 3, False),
        ((8, 1, 1), 5, False),
        ((1, 2, 4), 1, False),
        ((1, 2, 4), 5, True),
    ],
)
def test_a_head_in_blocks_gives_what_it_gives_whole(axes, blocks, tied, odd_model, monkeypatch):
    """Log-probabilities and gradients equal those of one device without blocks; neither 5 blocks nor 4 devices divide 102."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 102, (16, 20)), jnp.int32)
    lengths = jnp.full(16, 4), jnp.asarray(np.arange(16) % 8 + 12)

    def both(model):
        graph, params = nnx.split(model)

        def total(params):
            found = response_logprob(nnx.merge(graph, params), tokens, *lengths)
            return jnp.sum(jnp.sin(found)), found

        return jax.jit(jax.grad(total, has_aux=True))(params)

    mesh = sharding.make_mesh(*axes)
    odd_model.architecture = dataclasses.replace(odd_model.architecture, logit_softcap=30.0, tied=tied)
    weights = {"embedding": odd_model.embedding[...], "norm": odd_model.norm[...]}
    if tied:
        odd_model.head = None
    else:
        weights["head"] = odd_model.head[...]
    weights |= {f"layers.{name}": w for name, w in odd_model.stacked().items()}
    placed = {
        name: jax.device_put(weights[name], x.sharding)
        for name, x in hf.abstract(odd_model.architecture, mesh).items()
    }
    cut = Transformer(odd_model.architecture, placed, jnp.float32, Kernel("xla", mesh))
    local = 16 * 20 // sharding.batch_shards(mesh)
    monkeypatch.setattr(logprob, "LOGITS", -(-local * 102 // blocks))
    for found, wanted in zip(*map(jax.tree.leaves, (both(cut), both(odd_model))), strict=True):
        wanted = np.asarray(wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_devices_along_tensor_gather_their_own_columns_and_add_up_in_float32(odd_model, monkeypatch):
    """The collectives of the gradient's program, for 102 columns in blocks of 17 and bfloat16 compute."""
    mesh = sharding.make_mesh(1, 4, 2)
    a, half = odd_model.architecture, jnp.bfloat16
    weights = dict(hf.abstract(a, mesh))
    monkeypatch.setattr(logprob, "LOGITS", 4 * 20 * 34)  # each device has 4 rows of 20 tokens
    label = jnp.zeros((16, 20), jnp.int32)

    def total(hidden_BTD, head):
        model = Transformer(a, weights | {"head": head}, half, Kernel("xla", mesh))
        return jnp.sum(logprob._token_logprob(model, hidden_BTD, label))

    like = jax.ShapeDtypeStruct((16, 20, a.model), half), weights["head"]
    travels: dict[str, list] = {}
    for eqn in equations(jax.make_jaxpr(jax.grad(total, (0, 1)))(*like).jaxpr):
        for name in ("all_gather", "psum", "reduce_scatter", "psum_scatter", "pmax"):
            if eqn.primitive.name.startswith(name):
                travels.setdefault(name, []).extend(x.aval for x in eqn.invars)
    assert {x.shape[-1] for x in travels.pop("all_gather")} == {17}
    assert {"psum", "reduce_scatter", "pmax"} <= travels.keys()
    assert {x.dtype for found in travels.values() for x in found} == {jnp.dtype("float32")}


def equations(jaxpr):
    """Yield the equations of a jaxpr and of all jaxprs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def test_a_label_beyond_the_vocabulary_has_no_logprob(policy, eight_devices):
    several = models.load(names.path("policy"), mesh=eight_devices)
    label = jnp.zeros((8, 4), jnp.int32).at[1, 2].set(policy.architecture.vocab)
    for model in (policy, several):
        hidden_BTD = jnp.ones((8, 4, policy.architecture.model))
        found = jax.jit(lambda model, hidden, label: logprob._token_logprob(model, hidden, label))(
            model, hidden_BTD, label
        )
        np.testing.assert_array_equal(np.isnan(found), label > 0)


def test_packed_sequences_have_the_logprobs_that_they_have_alone(theirs, policy):
    """Three sequences in one row of 32, and the third again in a row of its own, padded on the left."""
    rows, segment, slot = np.zeros((3, 2, 32), np.int32)
    expected = [brute_force(theirs, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    begin = 0
    for s, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True), 1):
        end = begin + len(prompt) + len(answer)
        rows[0, begin:end], segment[0, begin:end] = prompt + answer, s
        slot[0, begin + len(prompt) : end] = s
        begin = end
    last = PROMPTS[2] + ANSWERS[2]
    rows[1, -len(last) :], segment[1, -len(last) :], slot[1, -len(ANSWERS[2]) :] = last, 1, 1
    before = np.broadcast_to(np.arange(31), (2, 31))
    scored = logprob.Scored(*map(jnp.asarray, (before, rows[:, 1:], slot[:, 1:])))
    found = jax.jit(logprob.packed_logprob)(
        policy, jnp.asarray(rows), Trees.of(jnp.asarray(segment)), scored, jnp.arange(1, 4)
    )
    np.testing.assert_allclose(found, [expected, [expected[2], 0, 0]], atol=2e-4)


def test_T39_logprobs_stay_float32_and_below_zero_in_bfloat16_compute(policy):
    half = models.load(names.path("policy"), dtype=jnp.bfloat16)
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    args = batch(pairs, 32)
    ours = score(half, *args)
    assert ours.dtype == jnp.float32
    assert half.logits(half.hidden(args[0])).dtype == jnp.float32
    assert (np.asarray(ours) < 0).all()
    # Close to float32 and not on bfloat16's grid: sums near -30 would be multiples of 1/8 there.
    np.testing.assert_allclose(ours, score(policy, *args), atol=0.5)
    assert not np.array_equal(ours, ours.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_certain_token_has_log_probability_zero_not_above(odd_model):
    head = odd_model.head
    head[...] = jnp.zeros_like(head[...]).at[:, 5].set(1.0)
    odd_model.norm[...] = odd_model.norm[...] * 0 + 1000.0
    tokens = jnp.full((1, 8), 5, jnp.int32)
    value = score(odd_model, tokens, jnp.array([1]), jnp.array([8]))
    assert float(value[0]) <= 0.0


def test_padding_and_batch_mates_do_not_change_a_logprob(policy):
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    together = score(policy, *batch(pairs, 32))
    alone = jnp.concatenate([score(policy, *batch([pair], 32)) for pair in pairs])
    # Sums in another order: a few units in the last place of float32.
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-5)


def test_the_table_covers_every_tensor_of_the_checkpoint():
    architecture = hf.read_architecture(names.path("policy"))
    ours = {name for t in hf.table(architecture) for name in t.names(architecture)}
    from safetensors import safe_open

    with safe_open(names.path("policy") / "model.safetensors", "numpy") as tensors:
        assert set(tensors.keys()) == ours
