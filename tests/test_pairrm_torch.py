"""PairRM's network in PyTorch: its attention against transformers' with the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sppo_jax.pairrm import files, torch_model
from sppo_jax.pairrm.format import TextPair

MODEL = Path(__file__).parent / "golden" / "pairrm" / "pairrm_hf"
CONFIG: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "drop_out": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 48,
    "initializer_range": 0.3,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-7,
    "max_position_embeddings": 64,  # log buckets from offset 8, clipped from 64
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 16,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
    "vocab_size": 90,
}
EXACT = 1e-6  # in float64; transformers rounds the square root of its scale to float32


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def model_of(**changed: Any) -> torch_model.PairRM:
    """Return a model in float64, so that only a fault makes a difference."""
    model = torch_model.PairRM(CONFIG | changed).double()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # initialised to 0 and 1, they would hide an omission
                value += 0.3 * torch.randn(value.shape)
    return model.eval()


def pair_of(tokens: int) -> TextPair:
    ids = np.random.default_rng(tokens).integers(4, 90, tokens).astype(np.int32)
    return TextPair(*np.split(ids, [tokens // 4, tokens // 2]))


def of_transformers(model: torch_model.PairRM, pairs: list[TextPair]) -> list[torch.Tensor]:
    """Return the last hidden states of each pair by itself, computed by transformers' own module."""
    whole = [torch.from_numpy(pair.ids.astype(np.int64))[None] for pair in pairs]
    return [model.pretrained_model(ids, torch.ones_like(ids)).last_hidden_state[0] for ids in whole]


def largest_difference(hidden: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    """Return the largest difference over tokens that are not padding."""
    rows = zip(hidden, wanted, strict=True)
    return max(float((row[: len(one)] - one).abs().max()) for row, one in rows)


def test_position_scores_are_those_of_the_formula() -> None:
    heads, channels = 2, 5
    for tokens in (1, 2, 9):
        offsets = range(1 - tokens, tokens)
        query, key = torch.randn(2, 3, heads, tokens, channels)
        far_key, far_query = torch.randn(2, heads, len(offsets), channels)  # row o: offset o + 1 - tokens
        wanted = torch.empty(3, heads, tokens, tokens)
        for i in range(tokens):
            for j in range(tokens):
                at = i - j + tokens - 1
                wanted[..., i, j] = (query[:, :, i] * far_key[:, at] + key[:, :, j] * far_query[:, at]).sum(
                    -1
                )
        for strip in (1, 2, 4, 9):
            found = torch_model.position_scores(query, key, far_key.flip(1), far_query, strip)
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("piece", [1, 2**21], ids=["head by head", "heads together"])
def test_hidden_states_equal_transformers(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "_PIECE", piece)
    model = model_of()
    with torch.inference_mode():
        for tokens in (4, 64, 65, 150):
            pairs = [pair_of(tokens)]
            wanted = of_transformers(model, pairs)
            assert largest_difference(model.hidden(pairs), wanted) < EXACT
            assert largest_difference(model.fix().hidden(pairs), wanted) < EXACT


def test_hidden_states_in_float32_equal_transformers() -> None:
    model = model_of(initializer_range=0.1).float().fix()
    pairs = [pair_of(150), pair_of(90)]
    with torch.inference_mode():
        assert largest_difference(model.hidden(pairs), of_transformers(model, pairs)) < 1e-5


def test_padding_and_batch_mates_change_nothing() -> None:
    model = model_of().fix()
    pairs = [pair_of(tokens) for tokens in (70, 4, 129, 33)]
    with torch.inference_mode():
        assert largest_difference(model.hidden(pairs), of_transformers(model, pairs)) < EXACT
        alone = np.concatenate([model.logits([pair]) for pair in pairs])
    np.testing.assert_allclose(model.logits(pairs), alone, rtol=0, atol=1e-6)


def test_gradients_equal_transformers() -> None:
    model = model_of().fix()  # the fixed tables must not cut off the gradient
    pairs = [pair_of(70)]
    weight = torch.randn(70, CONFIG["hidden_size"], dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((hidden * weight).sum(), list(model.pretrained_model.parameters()))
        for hidden in (model.hidden(pairs)[0], of_transformers(model, pairs)[0])
    )
    for (name, _), ours, theirs in zip(model.pretrained_model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)
        assert theirs.abs().max() > 1, name


def test_dropout_falls_in_training_only() -> None:
    for where in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        model, pairs = model_of(**{where: 0.5}), [pair_of(30)]
        with torch.inference_mode():
            assert torch.equal(model.hidden(pairs), model.hidden(pairs))
            assert not torch.equal(model.train().hidden(pairs), model.hidden(pairs)), where


def test_training_forgets_what_was_fixed() -> None:
    model, pairs = model_of().fix(), [pair_of(40)]
    before = model.logits(pairs)
    model.train()
    with torch.no_grad():
        model.pretrained_model.encoder.rel_embeddings.weight += 1 - 2 * torch.rand(32, 48)
    model.eval()
    with torch.inference_mode():
        assert largest_difference(model.hidden(pairs), of_transformers(model, pairs)) < EXACT
    assert not np.allclose(model.logits(pairs), before, atol=1e-3)
    assert "positions" not in model.fix().state_dict()


def test_loading_draws_nothing_at_random_and_leaves_nothing_unset() -> None:
    state = torch.random.get_rng_state()
    model = torch_model.load(files.read(MODEL))
    assert torch.equal(torch.random.get_rng_state(), state)
    everything = [*model.named_parameters(), *model.named_buffers()]
    assert not any(value.is_meta for _, value in everything)
    ids = model.pretrained_model.embeddings.position_ids
    assert torch.equal(ids, torch.arange(64)[None])
    assert {name for name, _ in model.named_buffers()} == {torch_model._POSITION_IDS, "positions"}


def test_bfloat16_is_near_and_answers_in_float32() -> None:
    checkpoint = files.read(MODEL)
    exact, rough = torch_model.load(checkpoint), torch_model.load(checkpoint, "cpu", torch.bfloat16)
    assert {value.dtype for value in rough.parameters()} == {torch.bfloat16}
    pairs = [pair_of(90), pair_of(40)]
    wanted, found = exact.logits(pairs), rough.logits(pairs)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - wanted).max() < 0.15
    assert np.abs(wanted).max() > 0.3
