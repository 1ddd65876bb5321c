"""Weights as files hold them: a head beside a tied one, tensors that stay unread, and numbers beyond a dtype's range."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from sppo_jax import export, models
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models import checkpoint_files, hf, lora
from sppo_jax.pairrm import files as pairrm_files
from sppo_jax.records import Prompt
from sppo_jax.sampler import Sampler
from tests.test_families import make

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
FREQUENCIES = "model.layers.{}.self_attn.rotary_emb.inv_freq"
TIED = {"tie_word_embeddings": True}
IDS = [[5, 17, 80, 3, 44, 9]]


@pytest.fixture
def said(monkeypatch):
    """The lines that loading prints for people."""
    lines = []
    monkeypatch.setattr(checkpoint_files, "say", lines.append)
    return lines


@pytest.fixture
def write(tmp_path):
    """A function that writes a small checkpoint, with other tensors beside its own or instead of them."""

    def write(family="Llama", options=TIED, **tensors):
        directory = tmp_path / "base"
        make(family, options, directory)
        change(directory, {name.replace("__", "."): x for name, x in tensors.items()})
        return directory

    return write


def change(directory, tensors):
    found = load_file(directory / "model.safetensors") | tensors
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})


def embedding(directory):
    return load_file(directory / "model.safetensors")[EMBEDDING]


def theirs(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(torch.tensor(IDS)).logits.numpy()


def ours(model):
    return np.asarray(model(jnp.asarray(IDS)))


@pytest.mark.parametrize(
    ("family", "options"), [("Llama", TIED), ("Qwen2", TIED | {"head_dim": 8}), ("Gemma2", {})]
)
def test_another_head_than_the_tied_one_is_used_and_exported_as_transformers_uses_it(
    write, family, options, tmp_path, said
):
    directory = write(family, options)
    tied = theirs(directory)
    change(directory, {HEAD: embedding(directory)[::-1].copy() * 2})
    model = models.load(directory)
    assert not model.architecture.tied
    assert len(said) == 1
    assert f"{HEAD} differs from {EMBEDDING}; both are used" in said.pop()
    expected = theirs(directory)
    assert np.abs(expected - tied).max() > 1
    np.testing.assert_allclose(ours(model), expected, atol=1e-3)
    export.export(model, directory, tmp_path / "to")
    models.load(tmp_path / "to")
    assert said == []  # the export's config.json is right
    assert json.loads((tmp_path / "to/config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(theirs(tmp_path / "to"), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_head_that_repeats_the_embedding_stays_tied_in_silence(write, dtype, tmp_path, said):
    directory = write()
    whole = np.round(embedding(directory), 1).astype(jnp.bfloat16)  # representable in every dtype
    change(directory, {EMBEDDING: whole.astype(np.float32), HEAD: whole.astype(dtype)})
    model = models.load(directory)
    assert model.architecture.tied
    assert said == []
    export.export(model, directory, tmp_path / "to")
    assert json.loads((tmp_path / "to/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("family", "options"), [("Llama", TIED), ("Qwen2", TIED | {"head_dim": 8}), ("Gemma2", {})]
)
def test_a_tied_head_alone_is_the_embedding_as_in_transformers(write, family, options, tmp_path, said):
    directory = write(family, options)
    expected = theirs(directory)
    found = load_file(directory / "model.safetensors")
    found[HEAD] = found.pop(EMBEDDING)
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_allclose(theirs(directory), expected, atol=1e-6)
    model = models.load(directory)
    np.testing.assert_allclose(ours(model), expected, atol=1e-3)
    export.export(model, directory, tmp_path / "to")
    np.testing.assert_allclose(theirs(tmp_path / "to"), expected, atol=1e-6)


def test_a_head_alone_that_is_not_tied_lacks_its_embedding(write):
    directory = write(options={})
    found = load_file(directory / "model.safetensors")
    del found[EMBEDDING]
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"1 tensors are missing, first {EMBEDDING}"):
        models.load(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4400\n"


@pytest.mark.parametrize("parts", [False, True])
def test_a_pointer_of_git_lfs_in_the_place_of_weights_names_git_lfs(write, parts):
    directory = write()
    (directory / "model.safetensors").write_text(POINTER)
    if parts:
        (directory / "model.safetensors").rename(directory / "part.safetensors")
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {EMBEDDING: "part.safetensors"}})
        )
    with pytest.raises(BadInput, match=r"\.safetensors: a pointer of git lfs, .*: git lfs pull$"):
        models.load(directory)


def test_a_pointer_of_git_lfs_in_the_place_of_a_judges_weights_names_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text(POINTER)
    with (
        pytest.raises(BadInput, match=r"git lfs pull$"),
        pairrm_files.opened(tmp_path / "model.safetensors", "numpy"),
    ):
        pass


def test_a_head_of_another_shape_than_the_tied_one_is_refused(write):
    directory = write(lm_head__weight=np.zeros((4, 48), np.float32))
    with pytest.raises(BadInput, match=r"lm_head\.weight has shape \(4, 48\)"):
        models.load(directory)


def test_config_json_alone_decides_where_there_are_no_weights(write):
    directory = write()
    (directory / "model.safetensors").unlink()
    assert hf.stored_architecture(directory).tied


@pytest.mark.parametrize("options", [TIED, {}])
def test_frequencies_in_the_files_are_compared_with_those_of_config_json(write, options, said):
    plain = 10_000.0 ** -(np.arange(0, 10, 2) / 10)
    directory = write("Llama", options)
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        change(directory, {FREQUENCIES.format(i): plain.astype(dtype) for i in range(3)})
        models.load(directory)
        assert said == []
    change(directory, {FREQUENCIES.format(i): plain.astype(np.float32) * 2 for i in range(3)})
    models.load(directory)
    models.load(directory)
    (line,) = said
    assert f"{FREQUENCIES.format(0)} differs from the frequencies that config.json gives" in line
    assert "for 2 more" in line


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "lm_head.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "score.weight",
    ],
)
@pytest.mark.parametrize("options", [TIED, {}])
def test_tensors_that_the_model_does_not_take_are_refused_by_name(write, options, name):
    directory = write("Llama", options)
    change(directory, {name: np.zeros((1, 48), np.float32)})
    with pytest.raises(BadInput, match=f"unknown to this architecture, first {name}"):
        models.load(directory)


def test_an_adapter_beside_the_weights_is_not_left_unread_in_silence(write, said):
    directory = write()
    (directory / "adapter_config.json").write_text("{}")
    models.load(directory)
    assert "the adapter beside the weights is not read" in said[0]


@pytest.mark.parametrize(
    ("number", "stored", "kept"),
    [
        (1e300, "float64", "float32"),
        (-1e300, "float64", "bfloat16"),
        (3.4028e38, "float32", "bfloat16"),
        (1e5, "float32", "float16"),
        (-3e38, "bfloat16", "float16"),
    ],
)
@pytest.mark.parametrize("use", ["param_dtype", "dtype"])
def test_weights_beyond_the_range_of_the_dtype_they_are_cast_to_are_refused_by_name(
    write, number, stored, kept, use
):
    directory = write()
    change(directory, {NORM: np.full(48, number, jnp.dtype(stored))})
    with pytest.raises(
        BadInput, match=rf"model\.norm\.weight holds values beyond the range of ({kept}|float32)"
    ):
        models.load(directory, **{use: jnp.dtype(kept)})


def test_a_weight_that_rounds_to_the_largest_number_of_its_dtype_is_kept(write):
    largest = float(jnp.finfo(jnp.float16).max)
    directory = write(model__norm__weight=np.full(48, largest + 1, np.float32))
    model = models.load(directory, param_dtype=jnp.float16)
    np.testing.assert_array_equal(np.asarray(model.norm[...], np.float32), largest)


def test_an_adapters_weights_beyond_float32_are_refused_by_name(write, tmp_path, one_device):
    base = models.load(write())
    lora.save(lora.attach(base, 2, jax.random.key(0), one_device), tmp_path, "base")
    tensors = load_file(tmp_path / lora.WEIGHTS)
    name = min(tensors)
    tensors[name] = tensors[name].astype(np.float64) + 1e300
    save_file(tensors, tmp_path / lora.WEIGHTS)
    with pytest.raises(BadInput, match=f"{name} holds values beyond the range of float32"):
        lora.load(base, tmp_path, one_device)
    tensors["base_model.model.lm_head.weight"] = np.zeros((102, 48), np.float32)
    save_file(tensors, tmp_path / lora.WEIGHTS)
    with pytest.raises(BadInput, match=r"unknown to this architecture, first base_model\.model\.lm_head"):
        lora.load(base, tmp_path, one_device)


@pytest.mark.parametrize("number", [3.4e38, float("nan")])
@pytest.mark.parametrize("where", ["embedding", "layers"])
def test_a_sampler_refuses_weights_that_are_not_finite_in_its_dtype(write, tokenizer, number, where):
    model = models.load(write(), dtype=jnp.bfloat16)
    settings = Sampling(responses=1, max_new_tokens=2, slots=1)
    sampler = Sampler(model, tokenizer, settings, eos=(2,))
    param = model.layers["gate"] if where == "layers" else model.embedding
    param[...] = param[...].at[(0,) * param[...].ndim].set(number)
    with pytest.raises(BadInput, match=r"damaged: .*(embedding|gate).* is not finite in bfloat16"):
        sampler.set_weights(model)
    with pytest.raises(BadInput, match="damaged"):
        Sampler(model, tokenizer, settings, eos=(2,))
    param[...] = param[...].at[(0,) * param[...].ndim].set(0)
    sampler.set_weights(model)
    assert len(sampler.generate([Prompt("x", [1, 2])], seed=0)[0].response_ids[0]) > 0
