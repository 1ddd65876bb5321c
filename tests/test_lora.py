"""Adapters: their product, their training, and the files that PEFT and transformers read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sppo_jax import export, main, models, records, sharding
from sppo_jax.config import Fit
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.hub import names
from sppo_jax.models import hf, lora
from sppo_jax.training import update
from sppo_jax.training.microbatch import Microbatch
from tests import test_fit
from tests.small_game import words
from tests.test_families import FAMILIES, make, reference, texts

# 2026-11: peft 0.21 reads a property of transformers 5.23 by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(directory, mesh, **options):
    """A checkpoint with adapters whose B is not 0."""
    model = lora.attach(models.load(directory, mesh=mesh, **options), 3, jax.random.key(1), mesh)
    rng = np.random.default_rng(0)
    for name, param in sorted(model.layers.items()):
        if name.endswith("_lora_b"):
            drawn = 0.1 * rng.standard_normal(param[...].shape, np.float32)
            param[...] = jax.device_put(drawn, param[...].sharding)
    return model


def logits(model, side="left"):
    tokens, valid = texts(side)
    return np.asarray(jax.jit(lambda m, t, v: m(t, v))(model, jnp.asarray(tokens), jnp.asarray(valid))), valid


def test_a_fresh_adapter_changes_nothing(tmp_path, one_device):
    make("Llama", {}, tmp_path)
    model = models.load(tmp_path)
    fresh = lora.attach(model, 3, jax.random.key(0), one_device)
    np.testing.assert_array_equal(logits(fresh)[0], logits(model)[0])
    assert fresh.layers["q_lora_a"][...].std() > 0


@pytest.mark.parametrize("name", ["mistral-v0.1", "gemma-2", "qwen2", "qwen3"])
def test_peft_and_the_merged_export_compute_the_same(name, tmp_path, eight_devices):
    family, options = FAMILIES[name]
    base, adapter, whole = (tmp_path / part for part in ("base", "adapter", "merged"))
    make(family, options, base)
    model = adapted(base, eight_devices)
    adapter.mkdir()
    whole.mkdir()
    lora.save(model, adapter, "owner/base")
    models.save(model, whole)
    (whole / "config.json").write_bytes((base / "config.json").read_bytes())
    ours, valid = logits(model)
    tokens, _ = texts("left")
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    before = reference(plain, tokens, valid)
    peft = PeftModel.from_pretrained(plain, adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole, attn_implementation="eager").eval()
    assert np.abs(ours - before)[valid].max() > 0.05
    for theirs in (peft, merged):
        np.testing.assert_allclose(ours[valid], reference(theirs, tokens, valid)[valid], atol=1e-3)
    again = lora.load(models.load(base, mesh=eight_devices), adapter, eight_devices)
    np.testing.assert_array_equal(logits(again)[0], ours)


def batch(mesh, groups=2, width=16):
    """Return a microbatch in which each response has a row of its own."""
    tokens = np.random.default_rng(0).integers(3, 102, (2 * groups, width)).astype(np.int32)
    rows = Microbatch(
        tokens=tokens,
        segment=np.ones((2 * groups, width), np.int32),
        branch=np.zeros((2 * groups, width), np.int32),
        position=np.tile(np.arange(width, dtype=np.int32), (2 * groups, 1)),
        before=np.tile(np.arange(3, width - 1, dtype=np.int32), (2 * groups, 1)),
        label=tokens[:, 4:],
        slot=np.ones((2 * groups, width - 4), np.int32),
        slots=np.ones(1, np.int32),
        place=np.arange(2 * groups, dtype=np.int32).reshape(groups, 2),
        ref_logprob=np.zeros((groups, 2), np.float32),
        base_logprob=np.full((groups, 2), np.nan, np.float32),
        payoff=np.tile(np.float32([0.8, 0.3]), (groups, 1)),
        baseline=np.full(groups, 0.5, np.float32),
        probability=np.full(groups, 0.8, np.float32),
        real=np.ones(groups, bool),
        share=np.ones((), np.float32),
    )
    return rows.placed(mesh)


def test_gradients_are_the_full_gradients_seen_through_the_factors(tmp_path, one_device):
    make("Mistral", {}, tmp_path / "base")
    model = adapted(tmp_path / "base", one_device)
    (tmp_path / "merged").mkdir()
    models.save(model, tmp_path / "merged")
    (tmp_path / "merged/config.json").write_bytes((tmp_path / "base/config.json").read_bytes())
    cotangent = jnp.asarray([[1.0, -0.5], [0.3, 2.0]])

    def gradients(model):
        graph, params, frozen = update.split(model)

        def pulled(params, frozen, rows):
            pullback = update.forward(params, frozen, rows, graph=graph, remat="layer")[1]
            return update.backward(params, frozen, rows, pullback, cotangent)

        return jax.jit(pulled)(params, frozen, batch(one_device))["layers"]

    low, whole = gradients(model), gradients(models.load(tmp_path / "merged"))
    assert set(low) == {t.path.removeprefix("layers.") for t in lora.table()}
    for name, (ins, outs, _) in lora.MATRICES.items():
        a, b = (np.asarray(model.layers[f"{name}_lora_{side}"][...]) for side in "ab")
        dw = np.asarray(whole[name][...])
        da = 2 * np.einsum(f"L{ins}{outs},LR{outs}->L{ins}R", dw, b)
        db = 2 * np.einsum(f"L{ins}{outs},L{ins}R->LR{outs}", dw, a)
        for side, expected in (("a", da), ("b", db)):
            found = np.asarray(low[f"{name}_lora_{side}"][...])
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_are_trained_and_the_frozen_weights_keep_the_compute_dtype(tmp_path, one_device, dtype):
    make("Mistral", {}, tmp_path)
    frozen_model = models.load(tmp_path, dtype=dtype, param_dtype=dtype)
    model = lora.attach(frozen_model, 3, jax.random.key(0), one_device)
    settings = Fit(learning_rate=1e-2, warmup=0.0, eta=10.0)
    programs = update.make_programs(model.architecture, model.compute_dtype, one_device, settings, 4)
    _, params, frozen = update.split(model)
    assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {dtype}
    before = jax.tree.map(np.asarray, (params, frozen))
    state = programs.first_state(params)
    rows = batch(one_device)
    rows = dataclasses.replace(rows, ref_logprob=programs.forward(params, frozen, rows)[0])
    for step in range(3):
        state, metrics = programs.train_step(state, frozen, [rows])
        assert step > 0 or float(metrics["max_log_ratio"]) == 0
    moved = [bool((np.asarray(x) != y).any()) for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(before[0]), strict=True)]  # fmt: skip
    assert all(moved)
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(before[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)
    sizes = {x.size for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert max(sizes) < 3 * 80 * 48  # no array of the optimiser has the size of a whole matrix


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 5}, r"lora_alpha 6; needed lora_alpha = 2 r"),
        ({"r": 5, "lora_alpha": 10}, "config.json makes it"),
        ({"r": None}, "r is None"),
    ],
)
def test_an_adapter_of_another_make_is_one_line(tmp_path, one_device, change, said):
    make("Llama", {}, tmp_path)
    model = adapted(tmp_path, one_device)
    lora.save(model, tmp_path, "base")
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=said):
        lora.load(models.load(tmp_path), tmp_path, one_device)


def test_a_game_of_adapters_goes_on_from_its_files_with_the_same_bits(tmp_path, monkeypatch):
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: devices[:1])
    options = {"model__lora_rank": 4, "fit__learning_rate": 1e-3, "fit__anchor": 0.5}
    main.main(words(tmp_path / "whole", iterations=2, **options))
    main.main(words(tmp_path / "parts", iterations=1, **options))
    main.main(
        words(tmp_path / "parts", iterations=2, **options)
    )  # its policy is loaded from base and adapter
    for name in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        one, two = (tmp_path / run / "iter_2" / name for run in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes()
    run = tmp_path / "whole"
    first, second = (records.read(run / f"iter_{t}/pairs.parquet", records.Pair) for t in (1, 2))
    assert all(pair.base_logprob == pair.ref_logprob for pair in first)
    assert all(pair.base_logprob != pair.ref_logprob for pair in second)
    described = json.loads((run / "iter_2/adapter" / lora.CONFIG).read_text())
    assert (described["base_model_name_or_path"], described["r"]) == ("embedded:policy", 4)
    mesh = sharding.make_mesh(1, 1, 1, devices=devices[:1])
    model = lora.load(models.load(names.path("policy")), run / "iter_2/adapter", mesh)
    table = {t.path: t for t in hf.table(model.architecture)}
    exported = models.load(run / "iter_2/export").layers["gate"][...]
    ours = [entry.read() for entry in hf.entries(model, table["layers.gate"], np.dtype(np.float32))]
    np.testing.assert_allclose(np.stack([x.T for x in ours]), np.asarray(exported), atol=1e-7)
    assert np.abs(np.asarray(exported - models.load(names.path("policy")).layers["gate"][...])).max() > 1e-4
    tokens = np.arange(3, 20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(run / "iter_2/export").eval()
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(names.path("policy")).eval(), run / "iter_2/adapter"
    )
    with torch.no_grad():
        expected, found = (m(torch.tensor(tokens)).logits.numpy() for m in (theirs, peft))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_adapters_stopped_in_the_middle_of_training_go_on_to_the_same_bits(tmp_path, one_device, monkeypatch):
    load = models.load

    def adapted_load(path, *, mesh, dtype):
        return lora.attach(load(path, mesh=mesh, dtype=dtype, param_dtype=dtype), 2, jax.random.key(0), mesh)

    monkeypatch.setattr(test_fit.models, "load", adapted_load)
    rows = test_fit.pairs_of(16)
    settings = dataclasses.replace(test_fit.SETTINGS, learning_rate=1e-2)
    whole = test_fit.train(tmp_path / "whole", rows, settings, one_device)
    with pytest.raises(Terminated):
        test_fit.train(tmp_path / "parts", rows, settings, one_device, stop_at=2)
    again = test_fit.train(tmp_path / "parts", rows, settings, one_device)
    for a, b in zip(test_fit.leaves(whole), test_fit.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(whole.layers["q_lora_b"][...])).max() > 0


@pytest.mark.parametrize(("stored", "kept"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_frozen_weights_lose_nothing_of_what_the_files_hold(stored, kept, tmp_path, monkeypatch):
    """Frozen weights are kept in bfloat16 only if the checkpoint is bfloat16; else exports would be rounded."""
    base = tmp_path / "base"
    export.export(models.load(names.path("policy")), names.path("policy"), base, dtype=stored)
    seen = []

    def attach(model, rank, key, mesh):
        seen.append({str(x.dtype) for x in jax.tree.leaves(model)})
        raise BadInput("enough")

    monkeypatch.setattr(lora, "attach", attach)
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: devices[:1])
    with pytest.raises(BadInput, match="enough"):
        main.main(
            words(tmp_path / "run", model__path=base, model__lora_rank=2, model__compute_dtype="bfloat16")
        )
    assert seen == [{kept}]
