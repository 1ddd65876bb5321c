"""Every family's tokenizer with the sampler and the log-probabilities: ends, ids as sampled, and masks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import records
from sppo_jax.config import Sampling
from sppo_jax.models import hf
from sppo_jax.models.logprob import response_logprob
from sppo_jax.records import Pair, Responses
from sppo_jax.sampler import Sampler
from sppo_jax.text import chat_template
from sppo_jax.training.batches import Batches
from tests.families import FAMILIES
from tests.test_tokens import ROWS


@pytest.fixture(scope="module")
def even_model(tmp_path_factory, one_device):
    """Return a model for which every id is equally likely, also those without a token."""
    directory = tmp_path_factory.mktemp("even")
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": ROWS, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    model = hf.initialise(hf.read_architecture(directory), jax.random.key(0), one_device)
    model.head[...] = jnp.zeros_like(model.head[...])
    return model


def test_T05_T06_every_end_ends_a_response_and_ids_stay_as_sampled(
    family_directories, chat, family_name, even_model, tmp_path
):
    ends = chat_template.eos_ids(family_directories[family_name], chat, ROWS)
    settings = Sampling(responses=96, temperature=1.0, top_p=1.0, max_new_tokens=48, slots=96)
    prompt = chat_template.chat_prompt(chat, "Where is the </s> fox?")
    row = Sampler(even_model, chat, settings, eos=ends).generate([prompt], seed=1)[0]
    last = {ids[-1] for ids, why in zip(row.response_ids, row.finish_reason, strict=True) if why == "stop"}
    assert last == set(ends)
    for ids, why, text in zip(row.response_ids, row.finish_reason, row.responses, strict=True):
        assert (why == "stop") == (ids[-1] in ends)
        assert not set(ends) & set(ids[:-1])
        assert why == "stop" or len(ids) == 48
        assert text == chat_template.response_text(chat, ids)
    assert max(max(ids) for ids in row.response_ids) >= len(chat)  # ids without a token were sampled too
    records.write(tmp_path / "rows.parquet", Responses, [row], {})
    assert records.read(tmp_path / "rows.parquet", Responses) == [row]
    assert row.prompt_ids == prompt.ids


@pytest.mark.parametrize("family_name", ["qwen_2.5", "llama_2", "llama_3", "gemma_2"])
def test_T30_lengths_make_the_masks_whatever_pads(load_family, family_name, even_model, one_device):
    """The padding token is one of the ends (Qwen, Llama 2), absent (Llama 3), or a token of its own (Gemma)."""
    chat = load_family(family_name)
    pad = {"qwen_2.5": "<|endoftext|>", "llama_2": "</s>", "gemma_2": "<pad>"}.get(family_name)
    assert chat.pad_token == pad
    filler = chat.pad_token_id or 0
    answer = chat("The fox", add_special_tokens=False)["input_ids"]
    end = chat.pad_token_id if pad in FAMILIES[family_name].ends else chat.eos_token_id
    prompt = chat_template.chat_prompt(chat, "Where?")
    none: list = []
    pair = Pair(
        none, none, 0.5, 0.5, 0.5, prompt.prompt_id, prompt.ids, [[*answer, end], answer, [end]],
        [0.5] * 3, 0.5, [0.0] * 3, [0.0] * 3,
    )  # fmt: skip
    n = len(prompt.ids)
    length_R = np.array([n + len(answer) + 1, n + len(answer), n + 1])
    tokens_RT = np.full((3, 32), filler)
    for row, (ids, length) in enumerate(zip(pair.response_ids, length_R, strict=True)):
        tokens_RT[row, :length] = prompt.ids + ids
    (part,) = Batches([pair], global_batch=1, epochs=1, seed=0, iteration=1)[0].microbatches
    assert (part.slot > 0).sum() == sum(map(len, pair.response_ids))
    length_R = jnp.asarray(length_R)
    found = response_logprob(even_model, jnp.asarray(tokens_RT), jnp.full(3, n), length_R)
    np.testing.assert_allclose(found, -np.log(ROWS) * np.array([len(answer) + 1, len(answer), 1]), rtol=1e-5)


def test_ids_that_no_token_has_add_no_text(chat):
    ids = chat("The fox", add_special_tokens=False)["input_ids"]
    expected = chat_template.response_text(chat, ids)
    assert expected.strip() == "The fox"
    assert chat_template.response_text(chat, [*ids, ROWS - 1, len(chat), 2**31 - 1]) == expected
    assert chat_template.response_text(chat, [ROWS - 1]) == chat_template.response_text(chat, []) == ""
