"""config.json as transformers reads it: which keys are noted, which are refused, and what the others mean."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from sppo_jax import export, models
from sppo_jax.errors import BadInput
from sppo_jax.hub import names, repositories
from sppo_jax.models import hf
from sppo_jax.models.architecture import FAMILIES, FULL, SLIDING, Rope, read_architecture
from sppo_jax.models.config_json import known
from sppo_jax.text import chat_template
from tests import families
from tests.test_families import LLAMA3, make, worst

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
# Keys of other model types and of tools; some are one letter away from a key that counts.
FOREIGN = {
    "is_llama_config": True, "rope_interleaved": True, "transformers.js_config": {"dtype": "q4"}, "max_sequence_length": 2048,
    "neftune_noise_alpha": 5.0, "unsloth_fixed": True, "attention_multiplier": 3.0, "logits_scaling": 4.0, "clip_qkv": 0.1,
    "query_pre_attn_scalar": 7, "final_logit_softcapping": 1.0, "use_qk_norm": True, "no_rope_layers": [0, 0, 0], "num_experts": 4,
    "rope_tetha": 5.0, "sliding_windows": 3, "auto_map": {"AutoModelForCausalLM": "modeling.Own"}, "_flash_attn_2_enabled": True,
}  # fmt: skip


def written(directory, change, family="Llama", options=None):
    """Write a small random model, and then `change` into its config.json."""
    make(family, {"head_dim": 8} | (options or {}), directory)
    edit(directory, change)
    return directory


def edit(directory, change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def alone(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_transformers_reads_them(name, tmp_path):
    raw = PUBLISHED[name]
    a, theirs = alone(tmp_path, raw), AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters
    assert (a.vocab, a.model, a.mlp, a.layers) == (
        raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"],
    )  # fmt: skip
    assert (a.heads, a.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert a.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert (a.norm_eps, a.tied, a.max_positions) == (
        theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.max_position_embeddings,
    )  # fmt: skip
    assert (a.rope.theta, a.rope.kind) == (rope["rope_theta"], rope["rope_type"])
    assert a.rope.factor == rope.get("factor", 1.0)
    if a.rope.kind == "llama3":
        numbers = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        assert (a.rope.low, a.rope.high, a.rope.original) == tuple(rope[key] for key in numbers)
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or [SLIDING if window else FULL] * a.layers
    assert a.window == (window if SLIDING in kinds else None)
    assert [a.window_of(i) is not None for i in range(a.layers)] == [kind == SLIDING for kind in kinds]


@pytest.mark.parametrize(
    ("name", "window", "theta", "parameters"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.1", 4096, 1e4, 7.24e9),
        ("mistralai/Mistral-7B-Instruct-v0.3", None, 1e6, 7.25e9),
        ("meta-llama/Llama-3.2-1B-Instruct", None, 5e5, 1.24e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", None, 1e5, 1.345e8),
        ("google/gemma-2-9b-it", 4096, 1e4, 9.24e9),
        ("Qwen/Qwen2.5-7B-Instruct", None, 1e6, 7.62e9),
        ("Qwen/Qwen3-8B", None, 1e6, 8.19e9),
    ],
)
def test_published_configurations_have_the_sizes_of_their_models(name, window, theta, parameters, tmp_path):
    a = alone(tmp_path, PUBLISHED[name])
    sizes = [t.shape(a) for t in hf.table(a)]
    found = sum(int(torch.tensor(shape).prod()) for shape in sizes)
    assert (a.window, a.rope.theta) == (window, theta)
    assert found == pytest.approx(parameters, rel=5e-3)


def test_what_fine_tuning_tools_leave_in_config_json_is_taken(tmp_path):
    left = {
        "_name_or_path": "base", "unsloth_version": "2025.1.1", "unsloth_fixed": True, "use_cache": False, "neftune_noise_alpha": 5,
        "pretraining_tp": 2, "dtype": "bfloat16", "torch_dtype": "float16", "attention_dropout": 0.1, "initializer_range": 0.5,
        "architectures": ["LlamaForCausalLM"], "id2label": {"0": "A"}, "label2id": {"A": 0}, "num_labels": 1, "temperature": 0.6,
        "top_k": 3, "output_attentions": True, "pad_token_id": 0, "quantization_config": None, "problem_type": None,
        "gradient_checkpointing": True, "tokenizer_class": "LlamaTokenizer", "transformers_version": "5.0.0", "max_length": 20,
        "rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    }  # fmt: skip
    base = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]
    said = []
    (tmp_path / "config.json").write_text(json.dumps(base | left))
    assert read_architecture(tmp_path, said.append) == alone(tmp_path, base)
    (line,) = said
    assert line.endswith(
        "LlamaConfig has no such key: neftune_noise_alpha, unsloth_fixed, unsloth_version"
    )  # the others have a meaning, but none for what is computed


SAME = {
    "foreign keys": ("Llama", {}, FOREIGN),
    "biases that Mistral has not": ("Mistral", {"sliding_window": 5}, {"attention_bias": True, "mlp_bias": True, "max_window_layers": 1}),
    "biases that Qwen2 always has": ("Qwen2", {}, {"attention_bias": False, "use_mrope": True}),
    "activation of another name": ("Gemma2", {"sliding_window": 5}, {"hidden_act": "relu", "sliding_window_size": 9}),
    "causal, and whole heads rotated": ("Llama", {}, {"is_causal": True, "partial_rotary_factor": 1.0, "mlp_bias": False}),
    "full layers": ("Llama", {}, {"layer_types": ["full_attention"] * 3, "sliding_window": 5}),
    "full layers of old name": ("Llama", {}, {"layer_types": ["attention"] * 3}),
    "a window beyond all positions": ("Llama", {}, {"sliding_window": 128}),
    "no window in any layer": ("Mistral", {"sliding_window": 5}, {"layer_types": ["full_attention"] * 3}),
    "a window in one layer": ("Mistral", {"sliding_window": 5}, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "two equal ropes": ("Llama", {"rope_parameters": LINEAR}, {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 1000}),
    "an empty old rope": ("Llama", {"rope_parameters": LINEAR}, {"rope_scaling": {}}),
    "factors left over": ("Llama", {}, {"rope_parameters": {"rope_type": "default", "factor": 8.0, "mscale": 2, "original_max_position_embeddings": 16}}),
    "original length outside": ("Llama", {"rope_parameters": LLAMA3}, {"original_max_position_embeddings": 64}),
    "plans for devices, and outputs left out": (
        "Llama", {},
        {"base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"}, "base_model_pp_plan": {}, "keys_to_ignore_at_inference": ["x"]},
    ),
    "no window, and its size 0": ("Qwen2", {}, {"use_sliding_window": False, "sliding_window": 0}),
    "no window of Qwen3, and its size below 0": ("Qwen3", {"head_dim": 12}, {"sliding_window": -1}),
    "original length without use": ("Llama", {}, {"original_max_position_embeddings": 64}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_keys_that_are_taken_mean_what_they_mean_to_transformers(case, tmp_path):
    family, options, change = SAME[case]
    written(tmp_path, change, family, options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert worst(models.load(tmp_path), theirs, "left") < 1e-3


@pytest.mark.parametrize("keys", [["is_llama_config"], ["rope_tetha", "sliding_windows"], sorted(FOREIGN)])
def test_keys_that_the_class_does_not_know_are_named_in_one_line(keys, tmp_path, capsys):
    written(tmp_path, {key: FOREIGN[key] for key in keys})
    capsys.readouterr()
    models.load(tmp_path)
    line = f"config.json: ignored, since transformers' LlamaConfig has no such key: {', '.join(keys)}\n"
    assert capsys.readouterr().err == f"note: {tmp_path}/{line}"
    hf.load(tmp_path)  # as a run loads it again and again
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp_bias": True}, "option mlp_bias=True is not computed here; give a checkpoint with mlp_bias=False"),
        ({"is_causal": False}, "option is_causal=False is not computed here"),
        ({"is_encoder_decoder": True}, "option is_encoder_decoder=True is not computed here"),
        ({"partial_rotary_factor": 0.5}, "option partial_rotary_factor=0.5 is not computed here"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "option partial_rotary_factor=0.5 is not computed here"),
        ({"sliding_window": 5}, "option sliding_window=5 is not computed here"),
        ({"attention_chunk_size": 4}, "option attention_chunk_size=4"),
        ({"per_layer_config": {"1": {"head_dim": 4}}}, "option per_layer_config="),
        ({"text_config": {"num_hidden_layers": 1}}, "option text_config="),
        ({"transformers_weights": "other.safetensors"}, "option transformers_weights='other.safetensors'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, r"quantization_config \(bitsandbytes\)"),
        ({"quantization_config": {}}, "quantization_config .*quantised weights are not read"),
        ({"compression_config": {"quant_method": "fp8"}}, r"compression_config \(fp8\)"),
        ({"model_type": "mistral"}, "architectures names LlamaForCausalLM, but model_type is 'mistral'"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types names sliding_attention, but no sliding_window"),
        ({"layer_types": ["full_attention"] * 2}, "for each of 3 layers"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types must name"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; at most 10000 are computed here"),
        ({"num_hidden_layers": 2**64}, "at most 10000 are computed here"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type is 'yarn'; computed here: default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type is 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, r"layers of one kind \(full_attention\)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling and rope_parameters differ"),
    ],
)  # fmt: skip
def test_a_key_that_changes_what_transformers_computes_is_refused_by_name(change, said, tmp_path):
    config = PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"] | {
        "num_hidden_layers": 3,
        "max_position_embeddings": 64,
    }
    config["rope_parameters"] = {"rope_theta": 100000, "rope_type": "default"}
    assert alone(tmp_path, config).rope == Rope(100000)
    with pytest.raises(BadInput, match=said) as refused:
        alone(tmp_path, config | change)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


# Keys that transformers looks up in a configuration without its class having them, and that change nothing there.
LOOKED_UP = {
    "auto_map", "embed_dim", "num_heads", "mlp_layer_types", "mtp_layer_types", "sep_token_id", "vision_aspect_ratio",
    "vision_feature_layer", "vision_feature_select_strategy", "unpadded_vocab_size", "logits_mup_width_multiplier",
}  # fmt: skip
# Keys that are read by `read_architecture` itself.
READ = {"rope_theta", "sliding_window", "layer_types", "original_max_position_embeddings", "head_dim"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_looks_up_is_judged(family, tmp_path, monkeypatch):
    """A newer transformers that looks for further keys fails here: judge them in config_json.py."""
    name = family.removesuffix("ForCausalLM")
    rope = {} if name == "Gemma2" else {"rope_parameters": LLAMA3}
    make(name, {"head_dim": 8} | rope, tmp_path)
    kind, asked = getattr(transformers, f"{name}Config"), set()

    def missing(self, key):
        asked.add(key)
        raise AttributeError(key)

    monkeypatch.setattr(kind, "__getattr__", missing, raising=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([[3, 4, 5, 6]])
    model(tokens, labels=tokens)
    model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    keys = known(FAMILIES[family][0])
    judged = keys.elsewhere | keys.neutral.keys() | LOOKED_UP | READ
    assert "is_causal" in asked
    assert {key for key in asked - judged if not key.startswith("_")} == set()


@pytest.fixture
def policy(tmp_path):
    """A small model with the tokenizer of a family, as a directory."""
    directory = families.write(families.FAMILIES["qwen_2.5"], tmp_path / "policy")
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    return written(directory, {}, "Qwen2", {"vocab_size": vocab})


@pytest.mark.parametrize("spelled", ["auto", "torch.bfloat16", "bf16", "bfloat16"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtypes_in_config_json_are_read_in_every_spelling(key, spelled, policy):
    config = json.loads((policy / "config.json").read_text())
    config.pop("dtype")
    plain = chat_template.load_tokenizer(policy)
    (policy / "config.json").write_text(json.dumps(config | {key: spelled}))
    read = chat_template.load_tokenizer(policy)
    assert (type(read), read.get_vocab()) == (type(plain), plain.get_vocab())
    assert export.own_dtype(policy) == ("float32" if spelled == "auto" else "bfloat16")
    assert read_architecture(policy).layers == 3


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": "none"},
        {"initializer_range": None, "torch_dtype": "auto"},
        {"num_hidden_layers": 3.0},
    ],
)
def test_values_that_transformers_refuses_are_not_blamed_on_the_tokenizer(change, policy):
    edit(policy, change)
    with pytest.raises(BadInput, match=r"config\.json: transformers refuses it: .*" + next(iter(change))):
        chat_template.load_tokenizer(policy)


def test_the_line_about_ignored_keys_is_safe_and_short(tmp_path):
    said = []
    keys = {f"key_{i:03}": 0 for i in range(30)} | {"a\nb\x1b[31m[/red]": 1, "": 1}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-8B"] | keys))
    read_architecture(tmp_path, said.append)
    (line,) = said
    assert line.isprintable()
    assert line.endswith("key_016, key_017, and 12 more")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("beside", [[], ["config.json"], ["config.json", "tokenizer_config.json"]])
def test_an_adapter_as_the_model_is_refused_with_the_command_that_merges_it(
    beside, policy, tmp_path, monkeypatch
):
    import peft

    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(policy)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(adapter)
    if "tokenizer_config.json" in beside:
        for file in (*policy.glob("tokenizer*"), policy / "chat_template.jinja"):
            (adapter / file.name).write_bytes(file.read_bytes())
    if "config.json" in beside:
        (adapter / "config.json").write_bytes((policy / "config.json").read_bytes())
    for read in (names.fetch, hf.load, models.load):
        with pytest.raises(BadInput, match=r"an adapter \(PEFT\) of .*, not a model; merge it") as refused:
            read(str(adapter))
    _, _, line = str(refused.value).partition("adapter-merged: ")
    command = shlex.split(line)
    assert command[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(command[2], {"sys": sys})
    merged = adapted.merge_and_unload().eval()
    assert worst(models.load("adapter-merged"), merged, "left") < 1e-4
    assert chat_template.load_tokenizer(tmp_path / "adapter-merged").chat_template


def test_an_adapter_of_a_run_as_the_model_names_the_export_beside_it(tmp_path):
    for file in ("adapter/adapter_config.json", "export/config.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("{}")
    with pytest.raises(BadInput, match=f"{tmp_path}/export is the model with it"):
        names.fetch(str(tmp_path / "adapter"))


def test_an_adapter_on_the_hub_as_the_model_is_refused_under_its_name_there(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    monkeypatch.setattr(repositories, "_download", lambda repo, revision, files: tmp_path)
    with pytest.raises(
        BadInput, match=r"^owner/it: an adapter \(PEFT\) of owner/base, not a model"
    ) as refused:
        names.fetch("owner/it")
    assert str(refused.value).endswith(" owner/it owner/base it-merged")
    assert "adapter_config.json" in repositories.FETCHED
