"""The plan: its figures against programs that run, its formulas, its flags, and the headers of what is shipped."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sppo_jax import (
    aot,
    config,
    dataset,
    estimate,
    fit,
    header,
    hlo,
    memory,
    models,
    pairs,
    plan,
    sharding,
    tiny,
    workload,
)
from sppo_jax.chips import GPUS, TPUS
from sppo_jax.errors import BadInput
from sppo_jax.workload import Lengths
from tests.test_fit import pairs_of

CONFIGS = Path(__file__).parent.parent / "configs"
PODS = ("mistral_7b", "llama3_8b")


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("mesh['axis_0'=4,'axis_1'=2,'axis_2'=3] {'axis_0','axis_2'}", 12),
    ],
)
def test_the_chips_of_a_collective_are_read_in_every_notation(groups, chips):
    line = f"  %a = f32[64]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    text = "HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {\n" + line + "\n}\n"
    assert hlo.Module(text).cost().sent == pytest.approx(256 * (chips - 1) / chips)


@pytest.mark.parametrize("name", PODS)
def test_a_shipped_configurations_figures_are_of_that_configuration(name):
    """`make plan` writes them; whoever changes a knob that a plan depends on runs it again."""
    path = CONFIGS / f"{name}.yaml"
    assert header.planned(path) == header.digest(config.load([path]))


def test_a_header_is_written_once_replaced_and_leaves_the_configuration_as_it_is(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# What it is.\n# More.\nseed: 7\n")
    before = config.load([path])
    header.write(path, before, ["one"])
    header.write(path, before, ["two", "three"])
    text = path.read_text()
    assert text.startswith("# What it is.\n# More.\n# Planned")
    assert text.endswith("#   two\n#   three\n# (end of the plan)\nseed: 7\n")
    assert config.load([path]) == before
    assert header.planned(path) == header.digest(before)
    assert header.digest(dataclasses.replace(before, seed=8)) == header.digest(before)
    other = dataclasses.replace(before, fit=dataclasses.replace(before.fit, global_batch=8))
    assert header.digest(other) != header.digest(before)


@pytest.mark.parametrize("mean", [20, 350, 1500, 2048])
def test_drawn_lengths_have_the_mean_that_is_asked_and_keep_the_limit(mean):
    found = workload.drawn(np.random.default_rng(0), 5000, mean, 2048)
    assert found.mean() == pytest.approx(mean, rel=0.02)
    assert 1 <= found.min() <= found.max() <= 2048


def test_a_workload_counts_what_an_iteration_does():
    c = config.load([CONFIGS / "mistral_7b.yaml"])
    work = workload.workload(c, Lengths(180, 350))
    assert work.updates == math.ceil(20_000 / 64)
    assert work.responses == 20_000 * 5 + 1000 + 100 * 5
    assert work.sampled_tokens == pytest.approx(work.responses * 350, rel=0.05)
    assert work.ordered_pairs == 20_100 * 20 + 4000  # held out: both orders, against base and previous
    at = workload.layout(c, work, 16, 16 * 8192)
    assert at.microbatches == 1
    assert at.rows % 16 == 0
    assert at.real_token_share > 0.7


HLO = """HloModule jit_f, entry_computation_layout={()->f32[8]}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = bf16[16,1024]{1,0} fusion(%a), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"100"}
  %all-gather.1 = bf16[4096,1024]{1,0} all-gather(%fusion.1), channel_id=1, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[] constant(32)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  %all-reduce.2 = f32[1024]{0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %fusion.9 = f32[8]{0} fusion(%w), kind=kLoop, calls=%d, backend_config={"estimated_cycles":"7"}
}
"""


def test_loops_are_counted_by_their_turns_and_collectives_by_what_leaves_a_chip():
    cost = hlo.Module(HLO).cost()
    gathered = 4096 * 1024 * 2
    assert cost.cycles == 32 * 100 + 7
    assert cost.moved == {"all-gather": 32 * gathered, "all-reduce": 4096}
    assert cost.sent == pytest.approx(32 * gathered * 3 / 4 + 4096 * 2 * 7 / 8)
    assert hlo.Module(HLO, {"while": 3}).cost().cycles == 307


@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
@pytest.mark.parametrize("most", [None, 512])
def test_the_plans_memory_of_the_update_is_that_of_the_programs_that_run(mesh, most, request):
    """Arrays and temporaries of the programs that were executed, against the plan's for shapes alone, within 10 %."""
    mesh = request.getfixturevalue(mesh)
    settings = dataclasses.replace(config.Fit(), global_batch=16, eta=10.0)
    rows = pairs_of(16, longest=40)
    model = models.load(tiny.path("policy"), mesh=mesh)
    batches = dataset.Batches(
        rows,
        global_batch=16,
        epochs=1,
        seed=0,
        iteration=1,
        shards=sharding.batch_shards(mesh),
        most_tokens=most,
    )
    programs = fit.make_programs(model.architecture, model.compute_dtype, mesh, settings, 100)
    reference = fit.logprobs(model, batches, 16, programs, mesh)
    batches._pairs = pairs.with_reference(rows, reference)
    _, params, frozen = fit.split(model)
    state = fit.TrainState(
        jax.device_put(np.int32(0), programs.shardings.step), params, programs.init_optimizer(params)
    )
    placed = list(fit.place(batches[0], mesh))
    ran = []
    logprob, pullback = programs.forward(params, frozen, placed[0])
    ran.append(programs.forward.lower(params, frozen, placed[0]).compile())
    ran.append(programs.backward.lower(params, frozen, placed[0], pullback, logprob).compile())
    del pullback
    state, _ = programs.train_step(state, frozen, placed)

    c = dataclasses.replace(config.Config(), fit=settings)
    found = aot.fitted(c, model.architecture, mesh, model.compute_dtype, batches.layout)

    def total(program):
        memory = program.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes

    for mine, theirs in zip((found.forward, found.backward), ran, strict=True):
        assert mine.total == pytest.approx(total(theirs), rel=0.1)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found.peak > held


def test_the_formula_of_the_updates_memory_shrinks_the_microbatch_until_it_fits():
    c = config.load([CONFIGS / "mistral_7b.yaml"])

    a = estimate.architecture(c)
    assert memory.parameters(a) == 7_241_732_096
    mesh = estimate.mesh(c.mesh, 16, None)
    many = memory.most_tokens(a, mesh, 2, 95 * 2**30)
    few = memory.most_tokens(a, mesh, 2, 12 * 2**30)
    assert many == 16 * memory.MOST
    assert 16 * memory.FEWEST <= few < many
    assert (
        memory.update_bytes(a, mesh, 2, few / 16, True) <= memory.FILLED * 12 * 2**30
        or few == 16 * memory.FEWEST
    )


def test_a_plan_by_formula_says_so_and_scales(capsys):
    words = ["--config", str(CONFIGS / "mistral_7b.yaml"), "--json", "--price", "2"]
    found = []
    for count in ("8", "16"):
        plan.main([*words, "--device", "h100", "--count", count])
        out = capsys.readouterr().out
        assert "by formula alone" in out
        found.append(json.loads(out.splitlines()[-1]))
    eight, sixteen = found
    assert set(eight["stages"]) == {"prefill", "decode", "judge", "reference", "fit"}
    for stage in eight["stages"].values():
        assert 0 < stage["hbm_gib"] <= stage["hbm_limit_gib"]
        assert {"flops", "bytes", "collective_bytes", "seconds_compiler", "seconds_collectives", "seconds_roofline",
                "mfu_compiler", "mfu"} <= set(stage)  # fmt: skip
    assert eight["run_hours"] == pytest.approx(3 * eight["iteration_hours"])
    assert eight["price"] == pytest.approx(2 * eight["chip_hours"])
    assert sixteen["iteration_hours"] < 0.65 * eight["iteration_hours"]
    assert sixteen["stages"]["fit"]["hbm_gib"] < eight["stages"]["fit"]["hbm_gib"]


def test_a_slice_that_is_too_small_is_refused_with_what_was_tried():
    with pytest.raises(BadInput, match=r"nothing that was tried fits: .*Take more chips, or train adapters"):
        plan.main(["--config", str(CONFIGS / "mistral_7b.yaml"), "--device", "a100", "--count", "1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a slice"),
        (["--topology", "v9:2x2"], "unknown; TPUs are v4, v5e, v5p, v6e"),
        (["--topology", "v5e"], "a shape is needed"),
        (["--device", "h100", "--count", "some"], "needs a number"),
        (["--device", "h100", "--price"], "needs a value"),
        (["--device", "h100", "--fit.eat", "3"], "fit.eat"),
    ],
)
def test_what_is_wrong_with_the_flags_is_said_in_one_line(words, said):
    with pytest.raises(BadInput, match=said):
        plan.main(["--config", str(CONFIGS / "mistral_7b.yaml"), *words])


def test_every_chip_has_its_figures():
    for chip in (TPUS | GPUS).values():
        assert min(chip.flops, chip.memory, chip.gib, chip.links) > 0
    assert all(chip.cycles > 0 for chip in TPUS.values())


def test_a_small_model_is_compiled_for_a_tpu_that_is_not_here(tmp_path):
    """With libtpu on PYTHONPATH: the whole command, in a process of its own, on two layers of a narrow Mistral."""
    pytest.importorskip("libtpu")
    options = json.loads((estimate.PUBLISHED / "mistralai/Mistral-7B-Instruct-v0.2/config.json").read_text())
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(options | small))
    words = [
        "--config",
        str(CONFIGS / "mistral_7b.yaml"),
        "--topology",
        "v5e:2x2",
        "--json",
        "--model.path",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sppo_jax.plan", *words], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"]
    assert found["chips"] == 4
    for stage in found["stages"].values():
        assert 0 < stage["hbm_gib"] < stage["hbm_limit_gib"] == 15.75
        assert stage["seconds_compiler"] > 0
        assert stage["compile_seconds"] > 0
    moved = found["stages"]["fit"]["collectives"]
    layers = 2 * (512 * 128 * 16 + 3 * 512 * 1024) * 2  # bytes of all layers' matrices in bfloat16
    assert moved["all-gather"] >= 2 * layers  # forward and backward
    assert "compiled in" in done.stderr
