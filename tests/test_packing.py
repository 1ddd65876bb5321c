"""The shapes of an iteration's microbatches: little padding, few shapes, and rows no wider than attention allows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sppo_jax import config_file
from sppo_jax.config import Model
from sppo_jax.models import cpu_attention
from sppo_jax.plan import target, workload
from sppo_jax.plan.chips import GPUS, TPUS, stand_ins
from sppo_jax.plan.lengths import Lengths
from sppo_jax.training import memory
from sppo_jax.training import packing as rules
from sppo_jax.training.packing import Packing, Shape, arranged

CONFIG = config_file.load([Path(__file__).parent.parent / "configs" / "mistral_7b.yaml"])


def shuffled(count, size, epochs=1):
    """Batches of `size` of `count` prompts."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(count).tolist() for _ in range(epochs)]
    return [order[i : i + size] for order in orders for i in range(0, count, size)]


def drawn(count, mean=180, spread=40, most=288):
    """Lengths of two sequences of each prompt, by default those of SmolLM2-135M-Instruct's answers."""
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(mean, spread, (count, 2)).round(), 16, most).astype(int).tolist()


def rule(kind, sizes, longest, count, **model):
    """The packing that a run of Mistral-7B would have on a mesh of that kind of chip."""
    c = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))
    chip = (TPUS | GPUS)[kind]
    mesh = target.mesh(dataclasses.replace(c.mesh, **sizes), stand_ins(chip, count), stand_ins=True)
    return memory.Update.of(c, target.architecture(c), mesh, longest).packing(chip.gib * 2**30)


def share(plans, lengths):
    """The share of the computed tokens that belong to a sequence."""
    every = [part for plan in plans for part in plan]
    real = sum(sum(lengths[i]) for part in every for i in part.prompts)
    return real / sum(part.shape.tokens for part in every)


def check(plans, order, lengths, at):
    """Every sequence of every batch lies in one row, and no row has more tokens than its width."""
    for plan, batch in zip(plans, order, strict=True):
        assert sorted(i for part in plan for i in part.prompts) == sorted(batch)
        for part in plan:
            assert part.shape in ((at.rows, at.width), at.smaller)
            assert len(part.rows) <= part.shape.rows
            assert sorted(one for row in part.rows for one in row) == [
                (i, k) for i in part.prompts for k in (0, 1)
            ]
            assert all(sum(lengths[i][k] for i, k in row) <= part.shape.width for row in part.rows)
    assert at.real_token_share == pytest.approx(share(plans, lengths))


@pytest.mark.parametrize("compiling", [0, 1e9])
def test_the_lengths_of_a_small_model_on_a_cpu_leave_less_than_a_tenth_of_padding(compiling):
    """As wide as the longest sequence, rows of SmolLM2's 128 pairs held 63 % of real tokens, in updates of 16 pairs."""
    order, lengths = shuffled(128, 16), drawn(128)
    plans, at = arranged(order, lengths, Packing(1, 4096, compiling=compiling))
    check(plans, order, lengths, at)
    assert at.real_token_share > (0.9 if compiling else 0.95)
    assert (at.smaller is None) == (
        compiling > 0
    )  # two programs, but not where compiling takes longer than it saves


@pytest.mark.parametrize(("sizes", "chips"), [({"fsdp": 16}, 16), ({"data": 4, "fsdp": 4, "tensor": 4}, 64)])
def test_a_7b_model_on_tpus_computes_at_most_eight_percent_of_padding(sizes, chips):
    work = workload.workload(CONFIG, Lengths(180, 350))
    packing = rule("v5e", sizes, max(map(max, work.lengths_GR)), chips)
    at = workload.layout(CONFIG, work, packing)
    assert at.microbatches == 1
    assert at.real_token_share >= 0.92
    assert (at.rows, at.smaller.rows) == (
        16,
        16,
    )  # one row a shard, wider than two of the longest sequence's width
    assert 4096 < at.smaller.width < at.width < 2 * max(map(max, work.lengths_GR))


def test_rows_are_as_wide_as_the_longest_sequence_where_attention_computes_whole_rows():
    order, lengths = shuffled(64, 16), drawn(64, 600, 200, 1000)
    wide = arranged(order, lengths, Packing(2, 16_000))[1]
    assert wide.rows == 2
    assert wide.width > 4000
    for packing in (Packing(2, 16_000, wide=False), Packing(2, 16_000, attention=0.1)):
        plans, at = arranged(order, lengths, packing)
        check(plans, order, lengths, at)
        assert at.width < 1300
        assert at.rows > 2 * 4


@pytest.mark.parametrize(
    ("kind", "model", "longest", "pack", "wide"),
    [
        ("v5e", {}, 2560, True, True),
        ("v5e", {"attention": "xla"}, 2560, True, False),
        ("h100", {}, 2560, False, False),
        ("h100", {"attention": "xla"}, 2560, True, False),
    ],
)
def test_the_kernel_decides_how_rows_are_packed(kind, model, longest, pack, wide):
    found = rule(kind, {"fsdp": 8}, longest, 8, **model)
    assert (found.pack, found.wide) == (pack, wide)
    assert (found.attention > 0) == wide


def test_on_a_cpu_short_rows_stay_short(one_device):
    """They have dense attention, which is faster for them than a loop over blocks of a wide row."""
    c = dataclasses.replace(CONFIG, model=Model(path="embedded:policy"))
    a, block = target.architecture(c), cpu_attention.BLOCK
    found = [memory.Update.of(c, a, one_device, n).packing(None) for n in (2 * block, 2 * block + 1)]
    assert [packing.wide for packing in found] == [False, True]
    assert all(packing.attention == 0 and packing.pack for packing in found)
    order, lengths = shuffled(32, 8), drawn(32, 60, 20, 100)
    assert arranged(order, lengths, found[0])[1].width == 128


def test_a_batch_that_needs_several_microbatches_is_split_evenly():
    lengths = [[100, 100]] * 12
    plans, at = arranged([list(range(12)), list(range(6))], lengths, Packing(1, 1000))
    assert [[len(part.prompts) for part in plan] for plan in plans] == [[4, 4, 4], [3, 3]]
    assert ((at.rows, at.width), at.smaller) == ((1, 832), Shape(1, 640))
    alone = arranged([list(range(12))], lengths, Packing(1, 100))[0]  # a prompt gets the row that it needs
    assert [part.prompts for part in alone[0]] == [[i] for i in range(12)]


def cost_of(found, of):
    """Tokens that an arrangement costs, attention included; None where there is none."""
    parts = [part for plan in found for part in plan]
    second = of.compiling if len({part.shape for part in parts}) > 1 else 0.0
    return sum(p.shape.tokens * (1 + of.attention * p.shape.width) for p in parts) + second


@pytest.mark.parametrize("seed", range(12))
def test_no_series_of_shapes_costs_less_than_the_one_that_is_taken(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(150, 300, (24, 2)).tolist()
    order, of = (
        [list(range(0, 12)), list(range(12, 24))],
        Packing(attention=10.0 ** -rng.integers(2, 5), compiling=500.0),
    )
    taken, every = rules.arranged(order, lengths, of)[0], rules._series
    series = list(
        every(of, max(map(max, lengths)), max(sum(map(sum, lengths[:12])), sum(map(sum, lengths[12:]))))
    )
    costs = []
    for one in series:
        monkeypatch.setattr(rules, "_series", lambda *_, one=one: iter([one]))
        costs.append(cost_of(rules.arranged(order, lengths, of)[0], of))
    assert len(costs) > 5
    assert cost_of(taken, of) == min(costs)
