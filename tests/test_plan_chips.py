"""The plan's cards and slices: their figures, and the units in which times are printed."""

import json

import pytest

from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.plan import search, slices, starting_points, table
from sppo_jax.plan.__main__ import main, parse
from sppo_jax.plan.chips import GPUS, TPUS
from sppo_jax.plan.cost import UnitCost

STAGES = ("prefill", "decode", "judge", "reference", "fit")


def test_every_chip_has_its_figures():
    for name, chip in (TPUS | GPUS).items():
        assert min(chip.flops, chip.memory, chip.gib, chip.links) > 0, name
        # Between 70 and 700 operations for each byte, as all accelerators that train models have.
        assert 70 < chip.flops / chip.memory < 700, name
        # Gigabytes, not gibibytes or bits: memory is read once in 5 to 100 ms, and sent in at least 60 ms.
        assert 0.005 < chip.gib * 2**30 / chip.memory < 0.1, name
        assert 0.06 < chip.gib * 2**30 / chip.links < 3, name
    assert all(chip.cycles > 0 for chip in TPUS.values())


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_named_as_people_type_it_and_one_is_the_default(name):
    assert parse(["--device", name])[1].slices == [f"{name}:1"]
    chip, count = slices.parse(f"{name}:1")
    assert (chip, count) == (GPUS[name], 1)
    assert float(chip.capability) >= 8  # cuDNN's attention
    assert chip.platform == "gpu"


def test_geforce_cards_sum_in_float32_at_half_their_rate():
    """The published rates are 142, 330 and 419 TFLOP/s summed in float16."""
    rates = {name: GPUS[name].flops / 1e12 for name in ("rtx3090", "rtx4090", "rtx5090")}
    assert rates == pytest.approx({"rtx3090": 142 / 2, "rtx4090": 330.3 / 2, "rtx5090": 419 / 2}, rel=0.01)


@pytest.mark.parametrize("text", ["rtx4090:0", "rtx4090:many", "mi300x:1", "cpu:1"])
def test_what_cannot_be_planned_is_refused_by_name(text):
    with pytest.raises(BadInput, match=text.split(":")[0]):
        slices.parse(text)


@pytest.mark.parametrize(
    ("hours", "expected"),
    [(1.234, "1.23 h"), (0.2, "0.20 h"), (0.19, "11.4 min"), (1 / 60, "1.0 min"), (0.01, "36.0 s"), (0.0002, "0.7 s")],
)  # fmt: skip
def test_a_time_is_in_a_unit_in_which_it_is_not_zero(hours, expected):
    assert table.duration(hours) == expected


def of_hours(hours: float, chips: int = 1) -> table.Plan:
    """Return a plan of made-up stages whose iteration takes `hours`."""
    stages = {}
    for name in STAGES:
        stages[name] = UnitCost("unit", 1, GPUS["rtx4090"], flops=1e12, bytes=1e9)
        stages[name].formula = 3600 * hours / len(STAGES)
    return table.Plan("rtx4090:1", chips, {"data": 1}, stages, 1, 1024, 1.0, 10**8, 0.01, 0.1, compiled=False)


@pytest.mark.parametrize(
    ("hours", "words"),
    [
        (0.5, "iteration 0.50 h = prefill 0.10 + decode 0.10 + judge 0.10 + reference 0.10 + fit 0.10; run 1.5 h, 1.5 chip"),
        (0.05, "iteration 3.00 min = prefill 0.60 + decode 0.60 + judge 0.60 + reference 0.60 + fit 0.60; run 9.0 min, 0.15 chip"),
        (0.005, "iteration 18.00 s = prefill 3.60 + decode 3.60 + judge 3.60 + reference 3.60 + fit 3.60; run 54.0 s, 0.015 chip"),
    ],
)  # fmt: skip
def test_a_summary_has_minutes_or_seconds_where_hours_would_be_zero(hours, words):
    lines = table.summary(of_hours(hours), Config(), price=0.4)
    assert words in lines[0]
    assert " 0 at 0.4" not in lines[0]
    assert "disk 0.1 GB" in lines[1]


def test_the_table_has_a_unit_at_every_stages_time_and_a_word_on_several_hosts():
    lines = table.table(of_hours(0.05), Config(), None)
    for name in STAGES:
        assert next(line for line in lines if line.startswith(f"{name} ")).split()[1:3] == ["36.0", "s"], name
    assert not any("network" in line for line in lines)
    assert "a host has 4 of these cards" in "\n".join(table.table(of_hours(0.05, chips=8), Config(), None))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_table_fits_80_columns_and_has_the_compilers_columns_where_there_was_one(compiled):
    plan = of_hours(0.05, chips=8)
    plan.compiled, plan.tried = compiled, ["data 2, fsdp 2, tensor 2: 0.52 h an iteration by formula"] * 3
    for stage in plan.stages.values():
        stage.unit = "99 pairs of up to 2048 tokens"
        stage.memory = dict.fromkeys(
            ("parameters", "optimiser", "gradients", "saved activations", "temporaries"), 3e10
        )
        stage.moved = dict.fromkeys(
            ("all-gather", "all-reduce", "reduce-scatter", "collective-permute"), 3e11
        )
        if compiled:
            stage.compiler, stage.collectives, stage.compile_seconds = 1.5, 0.5, 9
    text = "\n".join(table.table(plan, Config(), 1.2))
    assert max(map(len, text.splitlines())) < 80
    assert ("compiler" in text) == compiled
    assert ("links" in text) == compiled


def test_a_judge_that_is_not_planned_has_a_word_and_no_figures():
    plan = of_hours(0.05)
    judge = plan.stages["judge"]
    judge.count, judge.note, judge.memory = 0, "judge.backend=rule:judge runs on the hosts", {"weights": 9e12}
    lines = table.table(plan, Config(), None)
    assert [line for line in lines if "judge" in line] == [
        "judge     judge.backend=rule:judge runs on the hosts"
    ]
    assert " of 22.1 GiB" in table.summary(plan, Config(), None)[1].removeprefix("  memory 0.0")


def test_a_small_model_on_a_consumer_card_is_planned_without_its_repository(capsys):
    words = ["--config", "configs/own.yaml", "--model.path", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    main([*words, "--device", "rtx3090", "--json"])
    shown = capsys.readouterr().out
    found = json.loads(shown.splitlines()[-1])
    assert "SmolLM2-135M-Instruct (135M parameters) on rtx3090:1: 1 chip," in shown
    assert max(map(len, shown.splitlines()[:-1])) < 80
    assert "pairs of up to" not in "\n".join(shown.splitlines()[:-1])  # its judge is a rule, not PairRM
    assert 1 < max(stage["hbm_gib"] for stage in found["stages"].values()) < 0.92 * 24
    assert found["checkpoint_gb"] == pytest.approx(8 * 0.1345, rel=0.01)


def test_a_plan_by_formula_of_the_own_mesh_is_the_commands(monkeypatch):
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda _: None)
    config, plan = starting_points.STARTS[0].plan()
    whole = search.plan(config, starting_points.STARTS[0].slice, starting_points.LENGTHS)
    assert table.summary(whole, config, None) == table.summary(plan, config, None)
