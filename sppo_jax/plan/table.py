"""A plan's figures, printed: a table for people, lines for a configuration's header, and JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sppo_jax.config import Config
from sppo_jax.plan.cost import GIB, UnitCost
from sppo_jax.plan.lengths import Lengths


@dataclass
class Plan:
    """Costs of one configuration on one slice."""

    topology: str
    chips: int
    mesh: dict[str, int]
    stages: dict[str, UnitCost]
    # Most microbatches of an update, and tokens of one over all chips.
    microbatches: int
    microbatch_tokens: int
    # Share of computed tokens that belong to a sequence.
    real_token_share: float
    parameters: int
    checkpoint_gb: float
    # All exports and checkpoints of a run.
    disk_gb: float
    compiled: bool
    # One line for each other mesh: its time, or why it does not fit.
    tried: list[str] = field(default_factory=list)
    # One line, if another mesh was planned than configured, or another would be faster.
    advice: str = ""

    @property
    def iteration_hours(self) -> float:
        """Hours of one iteration."""
        return hours(self.stages)


def hours(stages: Mapping[str, UnitCost]) -> float:
    """Hours of one iteration, all stages together."""
    return sum(stage.hours for stage in stages.values())


def unit(hours: float) -> tuple[float, str]:
    """Return (units an hour, name) of the unit in which a time is readable: hours from .2 h on, else minutes or seconds."""
    return (1, "h") if hours >= 0.2 else (60, "min") if hours >= 1 / 60 else (3600, "s")


def duration(hours: float) -> str:
    """A time in words, such as "0.52 h", "3.2 min" or "8.4 s"."""
    scale, name = unit(hours)
    return f"{scale * hours:.{2 if name == 'h' else 1}f} {name}"


def few(number: float) -> str:
    """A number from 5 on in whole, and a smaller one to two digits."""
    return f"{number:,.0f}" if number >= 5 else f"{number:.2g}"


def axes(sizes: Mapping[str, int]) -> str:
    """Mesh axes larger than 1, as "fsdp 8, tensor 2"."""
    return ", ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one chip"


def table(plan: Plan, config: Config, price: float | None) -> list[str]:
    """Lines of the table that people read. `price`: of a chip-hour, or None."""
    how = "compiled for it" if plan.compiled else "by formula alone, nothing was compiled"
    size = f"{plan.parameters / 1e9:.2f}B" if plan.parameters >= 1e9 else f"{plan.parameters / 1e6:.0f}M"
    host = plan.stages["fit"].chip.host
    lines = [
        "",
        f"{config.model.path} ({size} parameters) on {plan.topology}: {plan.chips} chip{'s' * (plan.chips > 1)}, mesh "
        + " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
        + f"; {how}",
        f"update: {config.fit.global_batch} prompts in {plan.microbatches} microbatches of {plan.microbatch_tokens} tokens, "
        f"{plan.real_token_share:.0%} of which are real",
        "",
        f"{'stage':10} {'unit':34} {'GiB':>6} {'of':>6} {'TFLOP':>8} {'GB':>7} {'sent GB':>8} {'compiler':>9} {'kernels':>8} "
        f"{'links':>8} {'roofline':>9} {'time':>9} {'MFU':>5} {'MFU+':>5} {'iteration':>10}",
    ]
    for name, stage in plan.stages.items():
        lines += _rows(name, stage)
    lines += ["", *summary(plan, config, price), *(f"other meshes: {line}" for line in plan.tried)]
    lines.append(
        "columns, of one unit on one chip: GiB in use at the peak, of those that a program may use; TFLOP and GB of memory traffic "
        "that the result needs; GB sent by collectives; seconds in ms; the time of all units of an iteration"
    )
    if plan.stages["fit"].chip.platform == "gpu" and plan.chips > host:
        lines.append(f"a host has {host} of these cards, and the network between hosts is in no figure")
    if plan.compiled:
        lines.append(
            "times: compiler, by its cycles alone (MFU is of this time); kernels, of attention, for which it gives no cycles, and "
            "weight reads longer than the matmuls that hide them; links, collectives that no computation overlaps; time, their "
            "sum or the roofline, whichever is longer (MFU+ is of this time)"
        )
    return lines


def _rows(name: str, stage: UnitCost) -> list[str]:
    """Lines of one stage: its figures, its memory by kind, its collectives and the seconds of compiling."""
    uncounted = stage.uncounted if stage.compiler else None
    seconds = [stage.compiler, uncounted, stage.collectives, stage.roofline, stage.seconds]
    compiler, kernels, links, roofline, time = ("-" if x is None else f"{1e3 * x:.1f}" for x in seconds)
    mfu = "-" if stage.mfu_compiler is None else f"{stage.mfu_compiler:.0%}"
    memory = ", ".join(f"{kind} {x / GIB:.2f}" for kind, x in stage.memory.items())
    kinds = ", ".join(f"{kind} {x / 1e9:.2f}" for kind, x in sorted(stage.moved.items()) if x >= 1e6)
    lines = [
        f"{name:10} {stage.unit:34} {stage.peak / GIB:6.2f} {stage.limit / GIB:6.2f} {stage.flops / 1e12:8.3g} "
        f"{stage.bytes / 1e9:7.3g} {stage.sent / 1e9:8.3g} {compiler:>9} {kernels:>8} {links:>8} {roofline:>9} {time:>9} "
        f"{mfu:>5} {stage.mfu:5.0%} {duration(stage.hours):>10}" + (f"  {stage.note}" if stage.note else ""),
        f"{'':10} memory, GiB: {memory}",
    ]
    if kinds:
        lines.append(f"{'':10} collectives, GB of results: {kinds}")
    if stage.compile_seconds:
        lines.append(f"{'':10} compiled in {stage.compile_seconds:.0f} s")
    return lines


def summary(plan: Plan, config: Config, price: float | None) -> list[str]:
    """The lines that go into a configuration's header."""
    scale, name = unit(plan.iteration_hours)
    parts = " + ".join(f"{stage} {scale * cost.hours:.2f}" for stage, cost in plan.stages.items())
    update = plan.stages["fit"]
    run = config.iterations * plan.iteration_hours
    each, word = unit(run)
    paid = f", {few(price * plan.chips * run)} at {price:g} a chip-hour" if price else ""
    how = "" if plan.compiled else ", by formula"
    pieces = "1 microbatch" if plan.microbatches == 1 else f"{plan.microbatches} microbatches"
    peak = max(stage.peak for stage in plan.stages.values())
    return [
        f"{plan.topology} ({axes(plan.mesh)}{how}): iteration {scale * plan.iteration_hours:.2f} {name} = {parts}; run "
        f"{each * run:.1f} {word}, {few(plan.chips * run)} chip-hours{paid}",
        f"  memory {peak / GIB:.1f} of {update.limit / GIB:.1f} GiB (update {update.peak / GIB:.1f}); update "
        f"{update.seconds:.2f} s in {pieces}, MFU {update.mfu:.0%}; checkpoint {plan.checkpoint_gb:.2g} GB, disk "
        f"{few(plan.disk_gb)} GB",
        *([f"  {plan.advice}"] if plan.advice else []),
    ]


def as_json(plan: Plan, config: Config, lengths: Lengths, price: float | None) -> dict[str, Any]:
    """The object that --json prints for a plan. `lengths`: the mean lengths that the plan assumes."""
    run = config.iterations * plan.iteration_hours
    return {
        "topology": plan.topology, "chips": plan.chips, "mesh": plan.mesh, "compiled": plan.compiled,
        "stages": {name: _stage_json(stage) for name, stage in plan.stages.items()},
        "microbatches": plan.microbatches, "microbatch_tokens": plan.microbatch_tokens,
        "real_token_share": plan.real_token_share, "parameters": plan.parameters,
        "checkpoint_gb": plan.checkpoint_gb, "disk_gb": plan.disk_gb, "iteration_hours": plan.iteration_hours,
        "run_hours": run, "chip_hours": plan.chips * run, "price": price and price * plan.chips * run,
        "lengths": dataclasses.asdict(lengths), "other_meshes": plan.tried, "advice": plan.advice,
    }  # fmt: skip


def _stage_json(stage: UnitCost) -> dict[str, Any]:
    """The figures of one stage."""
    return {
        "unit": stage.unit, "count": stage.count, "hbm_gib": stage.peak / GIB, "hbm_limit_gib": stage.limit / GIB,
        "memory_gib": {kind: size / GIB for kind, size in stage.memory.items()}, "flops": stage.flops,
        "bytes": stage.bytes, "collective_bytes": stage.sent, "collectives": stage.moved,
        "seconds_compiler": stage.compiler, "seconds_kernels": stage.uncounted if stage.compiler else None,
        "seconds_collectives": stage.collectives, "seconds_roofline": stage.roofline, "seconds": stage.seconds,
        "mfu_compiler": stage.mfu_compiler, "mfu": stage.mfu, "hours": stage.hours,
        "compile_seconds": stage.compile_seconds, "note": stage.note,
    }  # fmt: skip
