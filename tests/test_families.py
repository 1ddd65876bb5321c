"""Every family's decoder and files against transformers: fixed awkward shapes, then random configurations."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sppo_jax import models
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models import hf
from sppo_jax.models.architecture import ACTIVATIONS, FULL, SLIDING
from sppo_jax.records import Prompt
from sppo_jax.sampler import Sampler

SIZES = {
    "vocab_size": 102, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Texts have 40 tokens: more than every window and the original length.
FAMILIES = {
    "mistral-v0.1": ("Mistral", {"sliding_window": 7}),
    "mistral-v0.2": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "llama-2": ("Llama", {"num_key_value_heads": 6, "head_dim": 8}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": ("Llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "attention_bias": True}),
    "gemma-2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": 8}),
    "qwen2.5": ("Qwen2", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen3": ("Qwen3", {}),
}  # fmt: skip
ATOL = {"Gemma2": 1e-3}


def make(family, options, directory, seed=0, **saving):
    """Return a transformers model with random weights, norms and biases too, saved as a published one."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **(SIZES | options), initializer_range=0.2, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory, **saving)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """Return (directory, transformers model, tolerance of its logits)."""
    family, options = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, make(family, options, directory), ATOL.get(family, 1e-4)


def texts(side, lengths=(40, 23, 9, 5), width=40, vocab=102):
    tokens = np.random.default_rng(0).integers(0, vocab, (len(lengths), width))
    valid = np.zeros(tokens.shape, bool)
    for row, n in enumerate(lengths):
        valid[row, slice(width - n, None) if side == "left" else slice(n)] = True
    return tokens, valid


def reference(model, tokens, valid):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(int))).logits.numpy()


def worst(model, theirs, side):
    """Return the largest difference of a logit at real positions."""
    tokens, valid = texts(side, vocab=model.architecture.vocab)
    ours = np.asarray(jax.jit(lambda m, t, v: m(t, v))(model, jnp.asarray(tokens), jnp.asarray(valid)))
    expected = reference(theirs, tokens, valid)
    assert expected[valid].std() > 0.3  # logits differ enough to compare
    return np.abs(ours - expected)[valid].max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(checkpoint, side):
    directory, theirs, atol = checkpoint
    assert worst(models.load(directory), theirs, side) < atol


def test_logits_equal_transformers_on_eight_devices(checkpoint, eight_devices):
    directory, theirs, atol = checkpoint
    assert worst(models.load(directory, mesh=eight_devices), theirs, "left") < atol


def test_greedy_generation_is_transformers_token_for_token(checkpoint, tokenizer):
    directory, theirs, _ = checkpoint
    model, new = models.load(directory), 24  # 30 tokens at the end: more than every window
    sampler = Sampler(
        model, tokenizer, Sampling(temperature=0.0, max_new_tokens=new, responses=1, slots=3), eos=(2,)
    )
    rng = np.random.default_rng(3)
    prompts = [Prompt(f"{n}", rng.integers(3, 102, n).tolist()) for n in (6, 11, 17)]
    for prompt, answer in zip(prompts, sampler.generate(prompts, seed=0), strict=True):
        with torch.no_grad():
            ids = theirs.generate(
                torch.tensor([prompt.ids]), attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
                do_sample=False, max_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
        assert answer.response_ids[0] == ids[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("files", ["one file", "several files"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loaded_and_exported_it_is_the_same_checkpoint_bit_for_bit(
    checkpoint, files, dtype, tmp_path, monkeypatch, eight_devices
):
    directory, original, _ = checkpoint
    given_, written = tmp_path / "given", tmp_path / "written"
    several, kind = files == "several files", getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=kind)
    model.save_pretrained(given_, max_shard_size="40kB" if several else "1GB")
    assert (len(list(given_.glob("*.safetensors"))) > 1) == several
    written.mkdir()
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000 if several else hf.SHARD_BYTES)
    models.save(models.load(given_, mesh=eight_devices), written, dtype)
    assert (len(list(written.glob("*.safetensors"))) > 1) == several
    shutil.copy(given_ / "config.json", written)
    again = AutoModelForCausalLM.from_pretrained(written, dtype="auto").state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == kind
        assert torch.equal(tensor, again[name]), name


SMALL = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(20, 50),
        "intermediate_size": st.integers(3, 40),
        "num_hidden_layers": st.integers(1, 3),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-3]),
    }
)
BIAS = {"attention_bias": st.booleans()}
ROPE = {
    "rope_parameters": st.sampled_from(
        [{"rope_theta": 100.0}, LLAMA3, {"rope_type": "linear", "factor": 2.5}]
    )
}
WINDOW = {"sliding_window": st.none() | st.integers(1, 50)}
LAYERED = WINDOW | {"use_sliding_window": st.booleans(), "max_window_layers": st.integers(0, 3)}
CAP = st.none() | st.floats(0.5, 20)
OWN = {
    "Mistral": ROPE | WINDOW | {"hidden_act": st.sampled_from(["silu", "gelu"])},
    "Llama": ROPE | BIAS,
    "Gemma2": BIAS | {"sliding_window": st.integers(1, 50), "query_pre_attn_scalar": st.integers(1, 300), "attn_logit_softcapping": CAP, "final_logit_softcapping": CAP},
    "Qwen2": ROPE | LAYERED,
    "Qwen3": ROPE | LAYERED | BIAS,
}  # fmt: skip


@pytest.mark.parametrize("family", OWN)
def test_random_configurations_of_each_family(family, tmp_path):
    heads = st.sampled_from([(1, 1), (4, 2), (6, 3), (3, 1), (4, 4)])

    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate],
    )
    @given(SMALL, st.fixed_dictionaries(OWN[family]), heads, st.integers(1, 4), st.integers(0, 99))
    def check(small, own, heads, half, seed):
        # Qwen2 has no head_dim of its own: it is hidden_size / heads there.
        sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 2 * half + 2}
        sizes["hidden_size"] = heads[0] * (2 * half + 2 if family == "Qwen2" else 7)
        theirs = make(family, SIZES | small | own | sizes, tmp_path, seed=seed)
        with torch.no_grad():
            theirs.lm_head.weight *= 2  # logits of small models hardly differ
        theirs.save_pretrained(tmp_path)
        tokens, valid = texts("left", vocab=small["vocab_size"])
        ours = models.load(tmp_path)(jnp.asarray(tokens), jnp.asarray(valid))
        expected = reference(theirs, tokens, valid)
        np.testing.assert_allclose(
            np.asarray(ours)[valid], expected[valid], atol=ATOL.get(family, 1e-4), rtol=1e-4
        )

    check()


# Published options, with small sizes. Some keys are no longer written by transformers 5.
PUBLISHED = {
    "Mistral-7B-Instruct-v0.2": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
        "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
    },
    "Meta-Llama-3-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 128009,
        "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1, "rope_scaling": None,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "eos_token_id": [128001, 128008, 128009],
        "mlp_bias": False, "model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "gemma-2-9b-it": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "model_type": "gemma2", "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "bfloat16",
    },
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 28, "model_type": "qwen2", "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_as_published_are_read_as_transformers_reads_them(name, tmp_path):
    config = SIZES | PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = hf.read_architecture(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert a.rope.theta == theirs.rope_parameters["rope_theta"]
    assert a.rope.kind == theirs.rope_parameters["rope_type"]
    assert a.tied == theirs.tie_word_embeddings
    layers = (
        getattr(theirs, "layer_types", None)
        or ["sliding_attention" if theirs.to_dict().get("sliding_window") else "full_attention"] * 3
    )
    assert [kind == "sliding_attention" for kind in layers] == list(a.windowed or [a.window is not None] * 3)


@pytest.mark.parametrize("family", OWN)
def test_absent_options_have_the_defaults_of_transformers(family, tmp_path):
    """A config.json that has only sizes, as a hand-made one; transformers itself writes every key."""
    sizes = {
        "vocab_size": 102, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 30,
        "num_attention_heads": 32, "max_position_embeddings": 512, "architectures": [f"{family}ForCausalLM"],
    }  # fmt: skip
    for own in [{}, {"use_sliding_window": True}] if family.startswith("Qwen") else [{}]:
        (tmp_path / "config.json").write_text(json.dumps(sizes | own | {"model_type": family.lower()}))
        a, theirs = hf.read_architecture(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
        c = theirs.to_dict()
        activation = c.get("hidden_activation") or c["hidden_act"]
        assert (a.kv_heads, a.norm_eps, a.tied) == (
            c["num_key_value_heads"],
            c["rms_norm_eps"],
            c["tie_word_embeddings"],
        )
        assert a.head_dim == (c.get("head_dim") or 64 // 32)
        assert a.activation == ACTIVATIONS[activation]
        assert a.rope.theta == c["rope_parameters"]["rope_theta"]
        assert a.rope.kind == c["rope_parameters"]["rope_type"]
        assert a.qkv_bias == (family == "Qwen2" or c.get("attention_bias", False))
        assert (a.attention_softcap, a.logit_softcap) == (
            c.get("attn_logit_softcapping"),
            c.get("final_logit_softcapping"),
        )
        scale = c.get("query_pre_attn_scalar")
        assert a.query_scale == (None if scale is None else scale**-0.5)
        window = c.get("sliding_window")
        kinds = c.get("layer_types") or [FULL if window is None else SLIDING] * 30
        assert a.window == (window if SLIDING in kinds else None)
        assert list(a.windowed or [a.window is not None] * 30) == [kind == SLIDING for kind in kinds]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_causal": False}, "is_causal=False is not computed"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling and rope_parameters differ"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"mlp_bias": True}, "mlp_bias=True is not computed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; computed here: silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'; computed here: default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": [1]}, "needed an object"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; needed a whole number"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4 kv heads"),
        ({"head_dim": 9}, "head_dim is 9"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; needed true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 103}, r"has shape \(102, 48\), config.json makes it \(103, 48\)"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_name(change, said, tmp_path):
    make("Llama", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=said):
        models.load(tmp_path)


def test_quantised_tensors_are_refused_by_name(tmp_path):
    make("Llama", {}, tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        BadInput, match=r"model\.norm\.weight is F8_E4M3; give a checkpoint that is not quantised"
    ):
        models.load(tmp_path)


def test_options_that_say_what_is_computed_anyway_are_taken(tmp_path):
    make("Llama", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"is_causal": True, "mlp_bias": False, "_extra": 1})
    )
    assert hf.read_architecture(tmp_path).heads == 6


@pytest.mark.parametrize("before", ["one file", "several files"])
def test_a_checkpoint_saved_over_another_leaves_nothing_of_it(before, tmp_path, monkeypatch):
    make("Llama", {}, tmp_path / "base")
    model, to = models.load(tmp_path / "base"), tmp_path / "to"
    to.mkdir()
    few, many = hf.SHARD_BYTES, 20_000
    for limit in (many, few) if before == "several files" else (few, many):
        monkeypatch.setattr(hf, "SHARD_BYTES", limit)
        model.norm[...] = model.norm[...] + 1
        models.save(model, to)
    shutil.copy(tmp_path / "base/config.json", to)
    np.testing.assert_array_equal(models.load(to).norm[...], model.norm[...])
    theirs = AutoModelForCausalLM.from_pretrained(to).model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(theirs, model.norm[...])


def test_what_a_dtype_cannot_hold_is_not_written(tmp_path):
    make("Llama", {}, tmp_path)
    model = models.load(tmp_path)
    model.norm[...] = model.norm[...].at[3].set(1e5)
    with pytest.raises(BadInput, match=r"model\.norm\.weight is not finite, or not in float16's range"):
        models.save(model, tmp_path, "float16")
