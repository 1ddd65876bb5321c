"""Whole games with a policy of each kind of family: tokenizer, decoder and files."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sppo_jax import main
from tests import families
from tests.small_game import words
from tests.test_families import LLAMA3, make

KINDS = {
    "llama_3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "gemma_2": ("Gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 7}),
    "qwen_3": ("Qwen3", {}),
}


@pytest.mark.usefixtures("single_device")
@pytest.mark.parametrize("name", KINDS)
def test_a_game_is_played_and_its_reference_log_probs_are_transformers(name, tmp_path, capsys):
    family, options = KINDS[name]
    base, out = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    families.write(families.FAMILIES[name], base)
    ends = (base / "generation_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(base)
    theirs = make(family, options | {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}, base)
    (base / "generation_config.json").write_text(ends)  # saving the model has overwritten it
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"is_llama_config": True}))
    longer = {"fit__epochs": 2, "fit__schedule_epochs": 2}  # the first update has learning rate 0
    main.main(words(out, model__path=base, prompts__max_length=300, sampling__max_new_tokens=8, **longer))
    # Once in a run, although its exports have the key too.
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("has no such key: is_llama_config") == 1

    rows = pq.read_table(out / "iter_1/pairs.parquet").to_pylist()
    assert len(rows) >= 4
    for row in rows:
        message = [{"role": "user", "content": row["chosen"][0]["content"]}]
        shown = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == shown
        for ids, expected in zip(row["response_ids"], row["ref_logprob"], strict=True):
            whole = torch.tensor([row["prompt_ids"] + ids])
            with torch.no_grad():
                scores = theirs(whole).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            found = sum(float(scores[start - 1 + i, token]) for i, token in enumerate(ids))
            assert found == pytest.approx(expected, abs=2e-3)
    moved = AutoModelForCausalLM.from_pretrained(out / "iter_1/export").state_dict()
    before = theirs.state_dict()
    assert moved.keys() == before.keys()
    assert all(np.isfinite(x.numpy()).all() for x in moved.values())
    assert not torch.equal(
        moved["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
