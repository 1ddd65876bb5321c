"""The plan: its figures against programs that run, its formulas, its flags, and the headers of shipped configurations."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import config, config_file, models, pairs, sharding
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.plan import compiled, config_header, cost, hlo, search, target, workload
from sppo_jax.plan.__main__ import main
from sppo_jax.plan.chips import TPUS, stand_ins
from sppo_jax.plan.lengths import Lengths
from sppo_jax.training import memory, trainer
from sppo_jax.training.batches import Batches
from sppo_jax.training.packing import Packing
from sppo_jax.training.update import make_programs, split
from tests.test_fit import pairs_of

CONFIGS = Path(__file__).parent.parent / "configs"
PODS = ("mistral_7b", "llama3_8b", "gemma2_9b")


@pytest.mark.parametrize("name", PODS)
def test_a_shipped_configurations_figures_are_of_that_configuration(name):
    """`make plan` writes the figures: run it again after a change of a knob that a plan depends on."""
    path = CONFIGS / f"{name}.yaml"
    assert config_header.planned(path) == config_header.digest(config_file.load([path]))


@pytest.mark.parametrize("name", PODS)
def test_a_header_has_each_time_once_and_none_by_formula(name):
    """Hours by formula beside the compiler's would contradict them."""
    header = (
        (CONFIGS / f"{name}.yaml")
        .read_text()
        .partition(config_header.BEGIN)[2]
        .partition(config_header.END)[0]
    )
    lines = [line for line in header.splitlines() if line.startswith("#   ")]
    slices = [line.split()[1] for line in lines if not line.startswith("#     ")]
    assert slices
    assert len(slices) == len(set(slices))
    for line in lines:
        if ": iteration " in line:
            total, *parts = (
                float(x) for x in re.findall(r"\d+\.\d+", line.partition("iteration ")[2].partition(";")[0])
            )
            assert total == pytest.approx(sum(parts), abs=0.03)
            assert "by formula" not in line
        else:
            assert not re.search(r"formula.*\d (h|min|s)\b", line)


def test_a_header_is_written_once_replaced_and_leaves_the_configuration_as_it_is(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# What it is.\n# More.\nseed: 7\n")
    before = config_file.load([path])
    config_header.write(path, before, ["one"])
    config_header.write(path, before, ["two", "three"])
    text = path.read_text()
    assert text.startswith("# What it is.\n# More.\n# Planned")
    assert text.endswith("#   two\n#   three\n# (end of the plan)\nseed: 7\n")
    assert config_file.load([path]) == before
    assert config_header.planned(path) == config_header.digest(before)
    assert config_header.digest(dataclasses.replace(before, seed=8)) == config_header.digest(before)
    other = dataclasses.replace(before, fit=dataclasses.replace(before.fit, global_batch=8))
    assert config_header.digest(other) != config_header.digest(before)


@pytest.mark.parametrize("mean", [20, 350, 1500, 2048])
def test_drawn_lengths_have_the_mean_that_is_asked_and_keep_the_limit(mean):
    found = workload.drawn(np.random.default_rng(0), 5000, mean, 2048)
    assert found.mean() == pytest.approx(mean, rel=0.02)
    assert 1 <= found.min() <= found.max() <= 2048


def test_a_workload_counts_what_an_iteration_does():
    c = config_file.load([CONFIGS / "mistral_7b.yaml"])
    work = workload.workload(c, Lengths(180, 350))
    assert work.updates == math.ceil(20_000 / 64)
    assert work.sampled_tokens == pytest.approx((20_000 * 5 + 1000 + 100 * 5) * 350, rel=0.05)
    assert work.ordered_pairs == 20_100 * 20 + 4000  # held out: both orders, against base and previous
    assert work.pair_tokens == pytest.approx(180 + 2 * 350, rel=0.05)
    at = workload.layout(c, work, Packing(16, 16 * 8192))
    assert at.microbatches == 1
    assert at.rows % 16 == 0
    assert at.real_token_share > 0.7


def test_pairs_that_are_given_are_neither_sampled_nor_judged():
    c = config_file.load(
        [CONFIGS / "mistral_7b.yaml"], ["--pairs.source", "hf:a/b-{iteration}", "--eval.probe_prompts", "1"]
    )
    work = workload.workload(c, Lengths(180, 350))
    assert work.sampled_tokens == pytest.approx((1000 + 5) * 350, rel=0.05)
    assert work.ordered_pairs == 20 + 4000
    assert work.updates == math.ceil(20_000 / 64)


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({}, 403 + 2 * 822),  # of 2048, what the prompt leaves is halved
        ({"total_tokens": 5000}, 403 + 2 * 1003),
        ({"source_tokens": 100, "candidate_tokens": 50, "total_tokens": 200}, 200),
    ],
)
def test_pairs_are_as_long_as_pairrm_reads_them(judge, expected):
    c = config_file.load([CONFIGS / "mistral_7b.yaml"])
    c = dataclasses.replace(
        c,
        judge=dataclasses.replace(c.judge, **judge),
        prompts=dataclasses.replace(c.prompts, max_length=400),
        sampling=dataclasses.replace(c.sampling, max_new_tokens=1000),
    )
    assert workload.workload(c, Lengths(400, 1000)).pair_tokens == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
@pytest.mark.parametrize("most", [None, 512])
def test_the_plans_memory_of_the_update_is_that_of_the_programs_that_run(mesh, most, request):
    """Bytes of programs that were executed, against the plan's for shapes alone, within 10 %."""
    mesh = request.getfixturevalue(mesh)
    settings = dataclasses.replace(config.Fit(), global_batch=16, eta=10.0)
    rows = pairs_of(16, longest=40)
    model = models.load(names.path("policy"), mesh=mesh)
    batches = Batches(
        rows,
        global_batch=16,
        epochs=1,
        seed=0,
        iteration=1,
        packing=Packing(sharding.batch_shards(mesh), most),
    )
    programs = make_programs(model.architecture, model.compute_dtype, mesh, settings, 100)
    reference = trainer.logprobs(model, batches, 16, programs, mesh)
    batches._pairs = pairs.with_reference(rows, reference)
    _, params, frozen = split(model)
    state = programs.first_state(params)
    placed = list(batches[0].placed(mesh))
    ran = []
    logprob, pullback = programs.forward(params, frozen, placed[0])
    ran.append(programs.forward.lower(params, frozen, placed[0]).compile())
    ran.append(programs.backward.lower(params, frozen, placed[0], pullback, logprob).compile())
    del pullback
    state, _ = programs.train_step(state, frozen, placed)

    c = dataclasses.replace(config.Config(), fit=settings)
    found = compiled.compile_update(c, model.architecture, mesh, model.compute_dtype, batches.layout)

    def total(program):
        memory = program.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes

    for mine, theirs in zip((found.forward, found.backward), ran, strict=True):
        assert mine.total == pytest.approx(total(theirs), rel=0.1)
    assert found.memory["parameters"] == compiled.local_bytes(state.params)
    assert found.memory["optimiser"] == compiled.local_bytes(state.opt_state)
    assert found.memory.get("gradients", 0) in [n * compiled.local_bytes(state.params) for n in (0, 1, 2)]
    arguments = ran[1].memory_analysis().argument_size_in_bytes
    assert found.saved == pytest.approx(arguments - compiled.local_bytes(state.params), rel=0.1)
    assert found.peak > compiled.local_bytes(state)


def update_of(c: config.Config, chips: int, **knobs: Any) -> memory.Update:
    on = stand_ins(TPUS["v5e"], chips)
    mesh = target.mesh(c.mesh, on, stand_ins=True)
    base = memory.Update(target.architecture(c), mesh, width=2, kernel="splash", remat="layer", longest=2560)
    return dataclasses.replace(base, **knobs)


def test_the_formula_of_the_updates_memory_shrinks_the_microbatch_until_it_fits():
    c = config_file.load([CONFIGS / "mistral_7b.yaml"])
    assert memory.parameters(target.architecture(c)) == 7_241_732_096
    update = update_of(c, 16)
    many, few = update.most_tokens(95 * 2**30), update.most_tokens(12 * 2**30)
    assert many == 16 * memory.MOST
    assert 16 * memory.FEWEST < few < many
    assert sum(update.kinds(few / 16, accumulated=True).values()) <= memory.FILLED * 12 * 2**30


def test_the_formula_depends_on_remat_kernel_and_compute_dtype():
    c = config_file.load([CONFIGS / "mistral_7b.yaml"])
    layer = update_of(c, 16).kinds(4096, accumulated=False)
    attention = update_of(c, 16, remat="attention").kinds(4096, accumulated=False)
    wide = update_of(c, 16, width=4).kinds(4096, accumulated=False)
    plain, scores = (update_of(c, 16, kernel=k).kinds(16_384, accumulated=False) for k in ("splash", "xla"))
    saved = 4096 * 32 * 4096 * 2  # tokens, layers, width, bytes
    behind = 4096 * 4096  # after the last layer: one array in float32 and three in the compute dtype
    assert layer["saved activations"] == saved + 10 * behind
    sums = 4096 * 32 * 32 * 4  # of each head's softmax
    assert attention["saved activations"] == 2 * saved + 10 * behind + sums
    assert wide["saved activations"] == 2 * saved + 16 * behind
    assert wide["parameters"] == layer["parameters"]
    assert scores["temporaries"] - plain["temporaries"] == 16_384 * 2560 * 32 * 4 * 2


# A column has weights and, three times, the logits of 128 tokens; a gathered one also its gradient.
@pytest.mark.parametrize(("fsdp", "column"), [(1, 2 * 4096 + 3 * 4 * 128), (4, (2 + 8) * 4096 + 3 * 4 * 128)])
def test_the_formula_has_the_whole_head_where_tensor_does_not_divide_the_vocabulary(fsdp, column):
    c = config_file.load([CONFIGS / "mistral_7b.yaml"])
    a, mesh = target.architecture(c), sharding.make_mesh(1, fsdp, 2, devices=jax.devices()[: 2 * fsdp])
    even, odd = (
        update_of(c, 1, a=dataclasses.replace(a, vocab=vocab), mesh=mesh).kinds(128, accumulated=False)
        for vocab in (400_000, 400_001)
    )
    assert odd["temporaries"] - even["temporaries"] == pytest.approx(200_000 * column, rel=1e-4)


def test_adapters_alone_have_masters_moments_and_gradients():
    """The formula against the shapes of what would be trained."""
    c = config_file.load([CONFIGS / "mistral_7b.yaml"], ["--model.lora_rank", "16"])
    update = update_of(c, 4)
    model = compiled.abstract_model(c, update.a, update.mesh, jnp.dtype(jnp.bfloat16))
    _, params, frozen = split(model)
    kinds = update.kinds(1024, accumulated=False)
    assert kinds["parameters"] == kinds["optimiser"] == kinds["gradients"] == compiled.local_bytes(params)
    assert kinds["frozen"] == compiled.local_bytes(frozen)
    whole = update_of(config_file.load([CONFIGS / "mistral_7b.yaml"]), 4)
    limit = 31.25 * 2**30
    assert update.most_tokens(limit) == 4 * memory.MOST > whole.most_tokens(limit)


@functools.cache
def by_formula(*words: str, count: int = 8, others: bool = False) -> dict[str, Any]:
    """Return what the command prints as JSON for Mistral-7B on `count` H100, or on the --topology of `words`; other meshes are weighed if asked."""
    base = ["--config", str(CONFIGS / "mistral_7b.yaml"), "--json"]
    cards = [] if "--topology" in words else ["--device", "h100", "--count", str(count)]
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.MonkeyPatch.context() as patch:
        if not others:  # seconds for each, of a model of 7B
            patch.setattr(search, "_others", lambda *_: [])
        main([*base, *cards, *words])
    return json.loads(shown.getvalue().splitlines()[-1])


def test_an_update_of_adapters_computes_two_thirds_and_an_anchor_asks_the_base_in_two_iterations_of_three():
    whole, adapters = by_formula(), by_formula("--model.lora_rank", "16", "--fit.anchor", "0.5")
    passes = [plan["stages"]["reference"]["count"] for plan in (whole, adapters)]
    assert passes[1] == pytest.approx(passes[0] * (1 + 2 / 3))
    share = adapters["stages"]["fit"]["flops"] / whole["stages"]["fit"]["flops"]
    assert share == pytest.approx(4 / 6, rel=0.02)
    assert adapters["checkpoint_gb"] < 0.02 * whole["checkpoint_gb"]
    assert adapters["stages"]["decode"]["memory_gib"]["masters"] == pytest.approx(
        whole["stages"]["decode"]["memory_gib"]["masters"] / 2, rel=0.1
    )


def test_cudnns_rows_hold_one_sequence_and_those_of_xla_many():
    alone, packed = by_formula(), by_formula("--model.attention", "xla")
    assert alone["real_token_share"] < 0.3
    assert packed["real_token_share"] > 0.7
    assert alone["stages"]["fit"]["flops"] == packed["stages"]["fit"]["flops"]
    assert alone["stages"]["fit"]["seconds"] > 2 * packed["stages"]["fit"]["seconds"]


@pytest.mark.parametrize(("kernel", "column"), [("cudnn", 3), ("triton", 4)])
def test_the_terms_of_a_gpus_utilisation_are_those_of_the_docs_and_multiply_to_it(kernel, column):
    words = ["--model.attention", kernel, "--mesh.fsdp", "8"]
    found = by_formula(*words)
    page = (CONFIGS.parent / "docs" / "performance.md").read_text()
    rows = page.partition("| term | why | `cudnn` | `triton` |\n")[2].partition("\n\n")[0].splitlines()[1:]
    *terms, total = (int(row.split("|")[column].removesuffix(" % ")) for row in rows)
    assert terms[0] == round(100 * found["real_token_share"])
    assert total == round(100 * found["stages"]["fit"]["mfu"])
    assert math.prod(x / 100 for x in terms) == pytest.approx(found["stages"]["fit"]["mfu"], rel=0.04)


def test_float32_takes_twice_the_time_and_activations():
    wide = by_formula("--model.compute_dtype", "float32", "--model.attention", "xla")
    narrow = by_formula("--model.attention", "xla")
    a, b = wide["stages"]["fit"], narrow["stages"]["fit"]
    assert a["seconds"] > 1.8 * b["seconds"]
    per_token = [
        x["stages"]["fit"]["memory_gib"]["saved activations"] / x["microbatch_tokens"] for x in (wide, narrow)
    ]
    assert per_token[0] == pytest.approx(2 * per_token[1], rel=0.05)


def test_eight_bits_and_a_given_cache_are_in_the_samplers_memory():
    plain = by_formula()["stages"]["decode"]
    small = by_formula("--sampling.quantize", "int8", "--sampling.cache_tokens", "65536")["stages"]["decode"]
    assert small["memory_gib"]["weights"] == pytest.approx(plain["memory_gib"]["weights"] / 2, rel=0.05)
    column = 2 * 32 * 8 * (128 + 4)  # keys and values of all layers and heads, each with a scale
    assert small["memory_gib"]["keys and values"] == pytest.approx(65536 / 8 * column / 2**30)


def test_a_plan_by_formula_says_so_and_scales(capsys, monkeypatch):
    monkeypatch.setattr(search, "_others", lambda *_: [])
    words = ["--config", str(CONFIGS / "mistral_7b.yaml"), "--json", "--price", "2"]
    found = []
    for count in ("8", "16"):
        main([*words, "--device", "h100", "--count", count])
        out = capsys.readouterr().out
        assert "by formula alone" in out
        found.append(json.loads(out.splitlines()[-1]))
    eight, sixteen = found
    assert set(eight["stages"]) == {"prefill", "decode", "judge", "reference", "fit"}
    for one in eight["stages"].values():
        assert 0 < one["hbm_gib"] <= one["hbm_limit_gib"]
        assert {"flops", "bytes", "collective_bytes", "seconds_compiler", "seconds_collectives", "seconds_roofline",
                "mfu_compiler", "mfu"} <= set(one)  # fmt: skip
        assert sum(one["memory_gib"].values()) == pytest.approx(one["hbm_gib"])
        assert one["mfu_compiler"] is None
        assert one["seconds"] >= one["seconds_roofline"] > 0
    assert eight["run_hours"] == pytest.approx(3 * eight["iteration_hours"])
    assert eight["price"] == pytest.approx(2 * eight["chip_hours"])
    assert sixteen["iteration_hours"] < 0.65 * eight["iteration_hours"]
    kinds = [x["stages"]["fit"]["memory_gib"] for x in found]
    assert kinds[1]["optimiser"] == pytest.approx(kinds[0]["optimiser"] / 2, rel=0.01)


def test_where_a_mesh_does_not_fit_the_fastest_that_does_is_planned():
    """Eight whole copies of the masters do not fit; the plan is of a mesh that does, with its microbatches."""
    found = by_formula("--mesh.data", "8", "--mesh.fsdp", "1", others=True)
    assert found["mesh"] != {"data": 8, "fsdp": 1, "tensor": 1}
    assert found["other_meshes"][0].startswith("data 8: does not fit (")
    assert found["advice"].startswith("the configuration's own mesh does not fit: --mesh.data ")
    assert found["stages"]["fit"]["hbm_gib"] < found["stages"]["fit"]["hbm_limit_gib"]
    own = by_formula(*(w for axis, n in found["mesh"].items() for w in (f"--mesh.{axis}", str(n))))
    assert own["iteration_hours"] == found["iteration_hours"]
    assert found["iteration_hours"] <= by_formula()["iteration_hours"]


def test_a_mesh_that_is_much_slower_than_another_gets_advice():
    found = by_formula("--mesh.fsdp", "1", "--mesh.tensor", "8", others=True)
    assert found["mesh"] == {
        "data": 1,
        "fsdp": 1,
        "tensor": 8,
    }  # the configuration names it, so it is planned
    better = found["advice"]
    assert better.startswith("by formula --mesh.data ")
    flags = better.removeprefix("by formula ").partition(" takes")[0].split()
    share = by_formula(*flags)["iteration_hours"] / found["iteration_hours"]
    assert share < 0.9
    assert better.endswith(f" takes {share:.0%} of this mesh's time")


def test_where_the_configuration_names_no_mesh_a_much_faster_one_is_planned():
    """Mistral-7B has too few tokens an update for rows on 64 chips: with fsdp 64, most of each row would be padding."""
    found = by_formula("--topology", "v5e:8x8", others=True)
    assert (found["chips"], found["mesh"]["tensor"]) == (64, 4)
    flags = found["advice"].removeprefix("take ").partition(":")[0]
    assert f"take {flags}: by formula the default mesh takes " in found["advice"]
    named = by_formula("--topology", "v5e:8x8", *flags.split())
    assert named["iteration_hours"] == found["iteration_hours"]
    assert named["advice"] == ""


def test_one_utilisation_is_of_the_cycles_alone_and_the_other_of_all_seconds():
    chip = dataclasses.replace(TPUS["v5e"], latency=0.0)
    one = cost.UnitCost("unit", 1, chip, flops=0.5 * chip.flops, bytes=0.0)
    one.add(
        hlo.Cost(cycles=chip.cycles, sent=chip.links, waited=0.5 * chip.links), times=1, compile_seconds=3
    )
    one.uncounted = 0.25
    assert one.mfu_compiler == pytest.approx(0.5)
    assert one.seconds == pytest.approx(1 + 0.25 + 0.5)
    assert one.mfu == pytest.approx(0.5 / 1.75)
    one.sent = 2 * chip.links  # beside products, and longer than they
    assert one.seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("device", "rank", "cause"),
    [
        ("a100", "0", "no mesh fits: tried: one chip: does not fit (109.9 GiB by formula, of 73.6"),
        ("l40s", "0", "training keeps 54.0 GiB on each chip (parameters 27.0 + optimiser 27.0) before any text, and 41.4 may"),
        ("rtx3090", "16", "sampling keeps 27.1 GiB on each chip (masters 13.6 + the sampler's weights 13.5) before any text, and 22.1 may"),
    ],
)  # fmt: skip
def test_a_slice_that_is_too_small_is_refused_once_with_the_cause(device, rank, cause, capsys):
    words = ["--config", str(CONFIGS / "mistral_7b.yaml"), "--device", device, "--model.lora_rank", rank]
    with pytest.raises(BadInput) as refused:
        main(words)
    assert cause in str(refused.value)
    assert ("train adapters" in str(refused.value)) == (rank == "0")
    assert "fit" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a slice"),
        (["--topology", "v9:2x2"], "unknown; TPUs are v4, v5e, v5p, v6e"),
        (["--topology", "v5e"], "a shape is needed"),
        (["--device", "h100", "--count", "some"], "needs a number"),
        (["--device", "h100", "--price"], "needs a value"),
        (["--device", "h100", "--fit.eat", "3"], "fit.eat"),
        (["--device", "h100", "--count", "8", "--mesh.tensor", "3"], "does not fit 8 devices"),
        (["--device", "h100", "--count", "8", "--mesh.tensor", "0"], "does not fit 8 devices"),
        (["--device", "rtx490"], "did you mean 'rtx4090'"),
        (["--device", "cpu"], "play one iteration of a few prompts"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(words, message):
    with pytest.raises(BadInput, match=message):
        main(["--config", str(CONFIGS / "mistral_7b.yaml"), *words])


def test_only_the_command_changes_the_environment():
    """Importing a plan's modules, in a notebook say, does not choose jax's platform; the command does before jax is imported."""
    code = (
        "import os, sys; before = dict(os.environ); import sppo_jax.plan; assert 'jax' not in sys.modules; "
        "import sppo_jax.plan.search, sppo_jax.plan.__main__; assert dict(os.environ) == before; "
        "import runpy; sys.argv = ['plan', '--help']; "
        "runpy.run_module('sppo_jax.plan', run_name='__main__'); assert os.environ['JAX_PLATFORMS'] == 'cpu'"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m sppo_jax.plan --config FILE --topology v5e:4x4" in done.stdout


def test_a_small_model_is_compiled_for_a_tpu_that_is_not_here(tmp_path):
    """Needs libtpu on PYTHONPATH. Runs the whole command in a process of its own, on two layers of a narrow Mistral."""
    pytest.importorskip("libtpu")
    options = json.loads((target.PUBLISHED / "mistralai/Mistral-7B-Instruct-v0.2/config.json").read_text())
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    small |= {"hidden_size": 512, "intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(options | small))
    options = ["--config", str(CONFIGS / "mistral_7b.yaml"), "--model.path", str(tmp_path)]
    command = [sys.executable, "-m", "sppo_jax.plan", "--topology", "v5e:2x2", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"]
    assert found["chips"] == 4
    for one in found["stages"].values():
        assert 0 < one["hbm_gib"] < one["hbm_limit_gib"] == 15.75
        assert one["seconds_compiler"] > 0
        assert one["compile_seconds"] > 0
        assert one["memory_gib"]["temporaries"] >= 0
    assert set(found["stages"]["fit"]["memory_gib"]) >= {"parameters", "optimiser", "temporaries"}
    moved = found["stages"]["fit"]["collectives"]
    layers = 2 * (512 * 128 * 16 + 3 * 512 * 1024) * 2  # bytes of all layers' matrices in bfloat16
    assert moved["all-gather"] >= 2 * layers  # forward and backward
    assert "compiled in" in done.stderr
