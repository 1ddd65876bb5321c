"""The decoder and its Hugging Face form, against transformers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from sppo_jax import models
from sppo_jax.errors import BadInput
from sppo_jax.models import hf
from tests.test_families import texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return (directory, transformers model) with odd shapes, a window of 7 and a head that is not the embedding."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=102, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, sliding_window=7, max_position_embeddings=64, rms_norm_eps=1e-5,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("odd")
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture
def copy(checkpoint, tmp_path):
    """Return a copy of the checkpoint, to damage."""
    return shutil.copytree(checkpoint[0], tmp_path / "copy")


def test_the_window_is_shorter_than_the_texts_and_matters(checkpoint, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    tokens, valid = texts("right")
    with_window, without = (models.load(d)(jnp.asarray(tokens)) for d in (checkpoint[0], copy))
    assert np.abs(np.asarray(with_window - without))[0, 10:].max() > 0.1


def test_published_configs_with_top_level_rope_theta_are_read(checkpoint, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["rope_parameters"]
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    assert hf.read_architecture(copy).rope.theta == 1e6


def test_half_precision_checkpoints_become_float32_masters(checkpoint, tmp_path):
    directory, original = checkpoint
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert model.head[...].dtype == jnp.float32
    expected = original.lm_head.weight.detach().bfloat16().float().numpy().T
    np.testing.assert_array_equal(np.asarray(model.head[...]), expected)


def test_T19_the_family_is_read_from_config_json_not_from_the_path(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint[0], tmp_path / "gemma-2-llama-3-8b")
    assert models.load(directory).architecture.heads == 6
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(BadInput, match="MambaForCausalLM"):
        models.load(directory)


def damage(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"1 tensors are missing, first {NAME}"),
        (
            lambda t: t.update({NAME: t[NAME][:-1].copy()}),
            f"{NAME} has shape .79, 48., config.json makes it .80, 48.",
        ),
        (lambda t: t.update({"model.layers.0.extra": t[NAME].copy()}), "unknown.*model.layers.0.extra"),
        (lambda t: t[NAME].__setitem__((3, 4), np.nan), f"{NAME} holds NaN"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(copy, change, said):
    damage(copy, change)
    with pytest.raises(BadInput, match=said):
        models.load(copy)


def test_a_truncated_file_and_a_missing_one_are_reported(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="damaged"):
        models.load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        models.load(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", "absent.safetensors"])
def test_an_index_cannot_lead_out_of_its_directory(copy, name):
    (copy / "model.safetensors").unlink()  # the single file would be preferred
    index = {"weight_map": {"lm_head.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="index"):
        models.load(copy)


def test_a_directory_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(BadInput, match="no such directory, and not a name on the hub"):
        models.load(tmp_path / "nowhere")


def test_parameters_are_born_sharded_and_small_axes_stay_whole(eight_devices):
    from tests.conftest import ODD

    model = hf.initialise(ODD, jax.random.key(0), eight_devices)
    q, k = model.layers["q"][...], model.layers["k"][...]
    assert q.sharding.shard_shape(q.shape) == (3, 12, 3, 10)
    assert k.sharding.shard_shape(k.shape) == (3, 12, 1, 10)
    assert model.norm[...].sharding.is_fully_replicated
