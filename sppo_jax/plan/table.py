"""A plan's figures, printed: a table for people, lines for a configuration's header, and JSON."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sppo_jax.config import Config
from sppo_jax.plan.cost import GIB, UnitCost
from sppo_jax.plan.lengths import Lengths

WIDTH = 79  # characters of a line that people read
INDENT = " " * 10


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
    planned = {name: stage for name, stage in plan.stages.items() if stage.count}
    lines = [
        "",
        f"{config.model.path} ({size} parameters) on {plan.topology}: {plan.chips} chip{'s' * (plan.chips > 1)},",
        "mesh " + " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) + f"; {how}",
        *_wrapped(
            f"update: {config.fit.global_batch} prompts in {_microbatches(plan)} of {plan.microbatch_tokens} tokens, "
            f"{plan.real_token_share:.0%} of which are real"
        ),
        "",
        f"{'stage':9} {'iteration':>9} {'a unit':>9} {'MFU':>4} {'GiB':>6}  unit",
    ]
    for name, stage in plan.stages.items():
        lines += _rows(name, stage) if stage.count else _wrapped(stage.note, f"{name:9} ")
    lines += [f"GiB at the peak on a chip, of {plan.stages['fit'].limit / GIB:.2f}", ""]
    lines += _causes(planned, plan.compiled)
    for line in [*summary(plan, config, price), *(f"other meshes: {line}" for line in plan.tried)]:
        lines += _wrapped(line)
    lines += _wrapped(
        "columns: iteration, the time of all its units; the others are of one unit on one chip: its time, the share of the "
        "chip's FLOP/s that it needs (MFU), TFLOP and GB of memory traffic that the result needs, GB sent by collectives, and ms by cause"
    )
    if plan.stages["fit"].chip.platform == "gpu" and plan.chips > host:
        lines += _wrapped(f"a host has {host} of these cards, and the network between hosts is in no figure")
    if plan.compiled:
        lines += _wrapped(
            "times: compiler, by its cycles alone (MFU beside it is of this time); kernels, of attention, for which it gives no "
            "cycles, and weight reads longer than the matmuls that hide them; links, collectives that no computation overlaps; "
            "a unit takes their sum or the roofline, whichever is longer"
        )
    return lines


def nothing_fits(
    name: str, config: Config, least: Mapping[str, Mapping[str, float]], limit: float, tried: Sequence[str]
) -> str:
    """The error where no mesh fits. `limit`: bytes that a program may use of a chip.

    `least`: bytes by kind that a chip holds in sampling and in training, on the mesh where they are fewest. Where these
    are too many, they are the cause, and not the lengths or the batch that the formulas of `tried` stumble over.
    """
    why = f"tried: {'; '.join(tried)}"
    for work, kinds in least.items():
        if (held := sum(kinds.values())) > limit:
            listed = " + ".join(f"{kind} {size / GIB:.1f}" for kind, size in kinds.items() if size)
            why = f"{work} keeps {held / GIB:.1f} GiB on each chip ({listed}) before any text, and {limit / GIB:.1f} may be used"
            break
    train = "" if config.model.lora_rank else ", or train adapters (--model.lora_rank 16)"
    return f"{name}: no mesh fits: {why}. Take more chips, chips with more memory or a smaller model{train}"


def _rows(name: str, stage: UnitCost) -> list[str]:
    """Lines of one stage: its figures, its memory by kind, its collectives and the seconds of compiling."""
    memory = ", ".join(f"{kind} {x / GIB:.2f}" for kind, x in stage.memory.items())
    kinds = ", ".join(f"{kind} {x / 1e9:.2f}" for kind, x in sorted(stage.moved.items()) if x >= 1e6)
    first = f"{name:9} {duration(stage.hours):>9} {1e3 * stage.seconds:>6.1f} ms {stage.mfu:4.0%} {stage.peak / GIB:6.2f}"
    lines = [f"{first}  {stage.unit}"]
    if stage.note:
        lines += _wrapped(stage.note, INDENT)
    lines += _wrapped(f"memory, GiB: {memory}", INDENT)
    if kinds:
        lines += _wrapped(f"collectives, GB of results: {kinds}", INDENT)
    if stage.compile_seconds:
        lines.append(f"{INDENT}compiled in {stage.compile_seconds:.0f} s")
    return lines


def _causes(stages: Mapping[str, UnitCost], compiled: bool) -> list[str]:
    """Lines of the second table, what a unit needs and, where programs were compiled, where its time goes."""
    head = f"{'a unit':9} {'TFLOP':>8} {'GB':>7} {'sent GB':>8} {'roofline':>9}"
    lines = [head + f" {'compiler':>9} {'kernels':>8} {'links':>8} {'MFU':>5}" * compiled]
    for name, stage in stages.items():
        line = (
            f"{name:9} {stage.flops / 1e12:8.3g} {stage.bytes / 1e9:7.3g} {stage.sent / 1e9:8.3g} "
            f"{1e3 * stage.roofline:9.1f}"
        )
        if compiled:
            uncounted = stage.uncounted if stage.compiler else None
            causes = (stage.compiler, uncounted, stage.collectives)
            compiler, kernels, links = ("-" if x is None else f"{1e3 * x:.1f}" for x in causes)
            mfu = "-" if stage.mfu_compiler is None else f"{stage.mfu_compiler:.0%}"
            line += f" {compiler:>9} {kernels:>8} {links:>8} {mfu:>5}"
        lines.append(line)
    return [*lines, ""]


def _wrapped(text: str, before: str = "") -> list[str]:
    """The text in lines of at most WIDTH characters; `before` begins the first, and as much space the others."""
    begin = before or text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text, WIDTH, initial_indent=before, subsequent_indent=" " * (len(begin) or 2), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _microbatches(plan: Plan) -> str:
    return "1 microbatch" if plan.microbatches == 1 else f"{plan.microbatches} microbatches"


def summary(plan: Plan, config: Config, price: float | None) -> list[str]:
    """The lines that go into a configuration's header."""
    scale, name = unit(plan.iteration_hours)
    planned = {stage: cost for stage, cost in plan.stages.items() if cost.count}
    parts = " + ".join(f"{stage} {scale * cost.hours:.2f}" for stage, cost in planned.items())
    update = plan.stages["fit"]
    run = config.iterations * plan.iteration_hours
    each, word = unit(run)
    paid = f", {few(price * plan.chips * run)} at {price:g} a chip-hour" if price else ""
    how = "" if plan.compiled else ", by formula"
    peak = max(stage.peak for stage in planned.values())
    return [
        f"{plan.topology} ({axes(plan.mesh)}{how}): iteration {scale * plan.iteration_hours:.2f} {name} = {parts}; run "
        f"{each * run:.1f} {word}, {few(plan.chips * run)} chip-hours{paid}",
        f"  memory {peak / GIB:.1f} of {update.limit / GIB:.1f} GiB (update {update.peak / GIB:.1f}); update "
        f"{update.seconds:.2f} s in {_microbatches(plan)}, MFU {update.mfu:.0%}; checkpoint {plan.checkpoint_gb:.2g} GB, disk "
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
