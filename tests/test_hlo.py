"""Reading a compiled program's text: cycles, loops, branches, and collectives wherever the compiler prints them."""

import pytest

from sppo_jax.plan import hlo


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("{}", 16),
        ("mesh['axis_0'=4,'axis_1'=2,'axis_2'=3] {'axis_0','axis_2'}", 12),
    ],
)
def test_the_chips_of_a_collective_are_read_in_every_notation(groups, chips):
    line = f"  %a = f32[64]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    text = "HloModule m, num_partitions=16\n\nENTRY %main (a: f32[8]) -> f32[8] {\n" + line + "\n}\n"
    assert hlo.Module(text).cost().sent == pytest.approx(256 * (chips - 1) / chips)


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


def test_loops_are_multiplied_out_and_collectives_counted_by_the_bytes_that_leave_a_chip():
    cost = hlo.Module(HLO).cost()
    gathered = 4096 * 1024 * 2
    assert cost.cycles == 32 * 100 + 7
    assert cost.moved == {"all-gather": 32 * gathered, "all-reduce": 4096}
    assert cost.sent == pytest.approx(32 * gathered * 3 / 4 + 4096 * 2 * 7 / 8)


def test_a_loops_own_constant_comes_before_the_given_counts():
    assert hlo.Module(HLO, {"while": 3}).cost().cycles == 32 * 100 + 7


@pytest.mark.parametrize(
    "condition",
    [
        "compare(%i, %n), direction=LT",  # with a computed number
        "and(%lt, %constant.5)",  # with another condition beside the counter's
        "fusion(%i, %constant.5, %left), kind=kLoop, calls=%c",
    ],
)
def test_loops_of_unknown_length_have_a_given_count_or_are_refused(condition):
    text = HLO.replace("compare(%i, %constant.5), direction=LT", condition)
    assert hlo.Module(text, {"other": 5, r"^jit\(f\)/while$": 3}).cost().cycles == 307
    with pytest.raises(ValueError, match=r"loop jit\(f\)/while is not known"):
        hlo.Module(text).cost()


def test_the_longest_branch_of_a_conditional_counts():
    text = """HloModule jit_f

%short (p: f32[8]) -> f32[8] {
  ROOT %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"5"}
}

%long (p: f32[8]) -> f32[8] {
  ROOT %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"9"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} conditional(%i, %a, %a), BRANCHES
}
"""
    for branches in (
        "branch_computations={%short, %long}",
        "true_computation=%long, false_computation=%short",
    ):
        assert hlo.Module(text.replace("BRANCHES", branches)).cost().cycles == 9


# As the compiler for v5e prints a gather that runs beside a product, and that for v6e a scattered sum of gradients.
CHAIN = """HloModule jit_f, is_scheduled=true, num_partitions=16

%begin (p: bf16[256,1024]) -> (bf16[256,1024], bf16[4096,1024], u32[]) {
  %all-gather.1 = bf16[4096,1024]{1,0} all-gather(%p), channel_id=4, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %custom-call.6 = (bf16[256,1024]{1,0}, bf16[4096,1024]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p: bf16[256,1024]) -> (f32[8], bf16[256,1024], bf16[4096,1024], u32[]) {
  %all-gather.2 = bf16[4096,1024]{1,0} all-gather(%p), channel_id=4, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %t = (f32[8], bf16[256,1024], bf16[4096,1024], u32[]) tuple(%c, %p, %all-gather.2, %u)
}

%end (p: bf16[256,1024]) -> bf16[4096,1024] {
  %all-gather.3 = bf16[4096,1024]{1,0} all-gather(%p), channel_id=4, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %custom-call.8 = bf16[4096,1024]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (p: bf16[4096,1024]) -> bf16[256,1024] {
  %all-reduce.9 = bf16[4096,1024]{1,0} all-reduce(%p), channel_id=4, replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %dynamic-slice.1 = bf16[256,1024]{1,0} dynamic-slice(%all-reduce.9, %i, %z), dynamic_slice_sizes={256,1024}
}

ENTRY %main (a: bf16[256,1024]) -> f32[8] {
  %s = (bf16[256,1024], bf16[4096,1024], u32[]) fusion(%a), kind=kCustom, calls=%begin
  %f = (f32[8], bf16[256,1024], bf16[4096,1024], u32[]) fusion(%s), kind=kOutput, calls=%async_collective_fusion.3, backend_config={"estimated_cycles":"40"}
  %d = bf16[4096,1024]{1,0} fusion(%f), kind=kCustom, calls=%end
  %r = bf16[256,1024]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %r.2 = bf16[256,1024]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_a_collective_that_runs_beside_products_counts_once_and_adds_no_waiting():
    cost = hlo.Module(CHAIN).cost()
    gathered, scattered = 4096 * 1024 * 2, 256 * 1024 * 2
    assert cost.cycles == 40
    assert cost.moved == {"all-gather": gathered, "reduce-scatter": 2 * scattered}
    assert cost.waited == pytest.approx(2 * scattered * 15)
    assert cost.sent == pytest.approx(gathered * 15 / 16 + cost.waited)
    assert cost.collectives == 2


def test_an_async_start_has_its_collective_in_the_computation_that_it_calls():
    text = """HloModule jit_f, num_partitions=4

%c (p: f32[64]) -> f32[16] {
  ROOT %reduce-scatter.1 = f32[16]{0} reduce-scatter(%p), channel_id=2, replica_groups={}, to_apply=%add
}

ENTRY %main (a: f32[64]) -> f32[16] {
  %s = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%a), calls=%c
  ROOT %d = f32[16]{0} async-done(%s)
}
"""
    cost = hlo.Module(text).cost()
    assert (cost.sent, cost.waited) == (64 * 3, 0)
