"""What a configuration needs and how long it takes on devices that are not here: memory, time and cost of each stage.

python -m sppo_jax.plan --config FILE --topology v5e:4x4 [--topology v6e:2x4 ...] [--section.key value ...]
python -m sppo_jax.plan --config FILE --device h100 --count 8

    --prompt-tokens N, --response-tokens N   mean lengths, which nobody knows before a run (default: 180 and 350)
    --price X                                of a chip for an hour
    --json                                   print one JSON object as the last line
    --write                                  put the figures into the header of FILE

For a TPU topology the real programs are compiled, on this machine's CPU, by the TPU's own compiler. It must be importable:
pip install --no-deps --target TPU libtpu==0.0.42.1, then PYTHONPATH=TPU. Without it, and for GPUs, all is computed from
formulas, and the table says so. Nothing is run, and no TPU has been timed: cycles become seconds at the clock of chips.py.
Other meshes are weighed by formula; where the configuration's own does not fit, they are compiled, the most promising first.
"""

import os

os.environ |= {  # before jax is imported; the compiler must not look for a TPU, nor for who else compiles
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

import dataclasses
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo_jax import config as configuration
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.plan import config_header
from sppo_jax.plan.chips import GPUS, TPUS, Chip, stand_ins
from sppo_jax.plan.cost import GIB, Stage
from sppo_jax.plan.workload import Lengths

ATTEMPTS = 3  # meshes that are compiled beside the configuration's own, where that does not fit
SHOWN = 3  # of the meshes that were weighed
BETTER = 0.9  # of the time, by formula, for a mesh to be worth a word


@dataclass
class Plan:
    """A configuration on one slice."""

    topology: str
    chips: int
    mesh: dict[str, int]
    stages: dict[str, Stage]
    microbatches: int  # of an update, at most,
    microbatch_tokens: int  # of all chips
    real_token_share: float
    parameters: int
    checkpoint_gb: float
    disk_gb: float
    compiled: bool
    tried: list[str] = field(default_factory=list)  # other meshes, and what came of them
    advice: str = ""  # of a mesh that would be better

    @property
    def iteration_hours(self) -> float:
        return hours(self.stages)


def hours(stages: dict[str, Stage]) -> float:
    """Of an iteration."""
    return sum(stage.hours for stage in stages.values())


def main(words: Sequence[str]) -> None:
    """Print the plan that the words ask for; raises BadInput for what is wrong with them."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    files, asked, overrides = _arguments(words)
    config = configuration.load(files, overrides)
    began = time.perf_counter()
    plans = [plan(config, name, asked) for name in asked.slices]
    for one in plans:
        print("\n".join(table(one, config, asked)))
    _say(f"planned in {time.perf_counter() - began:.0f} s")
    if asked.write:
        if len(files) != 1 or overrides:
            raise BadInput(
                "--write needs one --config and no other flags: the header tells what the file alone gives"
            )
        lines = [line for one in plans for line in summary(one, config, asked)]
        config_header.write(Path(files[0]), config, lines)
    if asked.json:
        found = [as_json(one, config, asked) for one in plans]
        print(json.dumps(found[0] if len(found) == 1 else {"plans": found}))


@dataclass
class Asked:
    """The plan's own flags."""

    slices: list[str] = field(default_factory=list)  # v5e:4x4, h100:8
    lengths: Lengths = field(default_factory=Lengths)
    price: float | None = None
    json: bool = False
    write: bool = False


def _arguments(words: Sequence[str]) -> tuple[list[str], Asked, list[str]]:
    """(--config files, our own flags, overrides of the configuration)."""
    files: list[str] = []
    rest: list[str] = []
    asked, devices, counts = Asked(), [], []
    lengths = {"--prompt-tokens": "prompt", "--response-tokens": "response"}
    todo = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while todo:
        word = todo.pop(0)
        if word in ("--json", "--write"):
            setattr(asked, word[2:], True)
            continue
        if word not in ("--config", "--topology", "--device", "--count", "--price", *lengths):
            rest.append(word)
            continue
        if not todo:
            raise BadInput(f"{word} needs a value")
        value = todo.pop(0)
        if word == "--config":
            files.append(value)
        elif word == "--topology":
            asked.slices.append(value)
        elif word == "--device":
            devices.append(value)
        elif word == "--count":
            counts.append(_count(word, value))
        elif word == "--price":
            asked.price = _number(word, value)
        else:
            asked.lengths = dataclasses.replace(asked.lengths, **{lengths[word]: _count(word, value)})
    if counts and len(counts) != len(devices):
        raise BadInput("--count: give one for each --device")
    asked.slices += [f"{name}:{n}" for name, n in zip(devices, counts or [8] * len(devices), strict=True)]
    if not asked.slices:
        raise BadInput("name a slice: --topology v5e:4x4, or --device h100 --count 8")
    return files, asked, rest


def _count(flag: str, value: str) -> int:
    found = _number(flag, value)
    if found != int(found):
        raise BadInput(f"{flag} {value}: needs a whole number")
    return int(found)


def _number(flag: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e9:
        raise BadInput(f"{flag} {value}: needs a number above 0")
    return found


def plan(config: Config, name: str, asked: Asked) -> Plan:
    """The plan of one slice. Raises BadInput for a slice that is unknown, or where nothing that was tried fits."""
    kind, _, size = name.partition(":")
    if kind in GPUS:
        if not size.isdigit() or int(size) < 1:
            raise BadInput(f"--device {kind} --count {size}: a number of cards is needed")
        return _plan(config, name, GPUS[kind], int(size), None, asked)
    if kind not in TPUS:
        raise BadInput(
            f"--topology {name}: unknown; TPUs are {', '.join(TPUS)} with a shape, as v5e:4x4; GPUs {', '.join(GPUS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        _say("libtpu is not importable: formulas instead of the compiler (see --help)")
        return _plan(config, name, TPUS[kind], _chips(name), None, asked)
    return _plan(config, name, TPUS[kind], _chips(name), _devices(name), asked)


def _chips(name: str) -> int:
    try:
        return math.prod(int(part) for part in name.split(":")[1].split("x"))
    except (ValueError, IndexError):
        raise BadInput(f"--topology {name}: a shape is needed, as v5e:4x4") from None


def _devices(name: str) -> list[Any]:
    from jax.experimental import topologies

    extra: dict[str, Any] = {}
    if name.startswith(("v4", "v5p")):  # else each chip is two devices of half its memory
        extra = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **extra).devices)
    except Exception as error:  # of the plugin's own kinds
        raise BadInput(f"--topology {name}: {str(error).splitlines()[0]}") from None


def _plan(config: Config, name: str, chip: Chip, chips: int, devices: list[Any] | None, asked: Asked) -> Plan:
    from sppo_jax.plan import compiled, stages, target

    lengths = Lengths(
        min(asked.lengths.prompt, config.prompts.max_length),
        min(asked.lengths.response, config.sampling.max_new_tokens),
    )
    a = target.architecture(config)

    def at(mesh: configuration.Mesh, real: bool) -> target.Setting:
        on = stand_ins(chip, chips) if devices is None or not real else devices
        return target.Setting(config, a, chip, target.mesh(mesh, on, not real), lengths, real)

    meshes = [config.mesh, *_others(config.mesh, chips, a.heads)]
    weighed = {mesh: _weighed(at(mesh, real=False)) for mesh in meshes}
    # The configuration's own first, whatever the formula says of it; others only where that does not fit.
    own, *others = weighed
    others = [mesh for mesh in others if weighed[mesh][0] < math.inf]
    others.sort(key=lambda mesh: weighed[mesh][0])
    tried: list[str] = []
    for mesh in [own, *others[:ATTEMPTS]]:
        s = at(mesh, devices is not None)
        _say(f"{name}: mesh {_axes(s.mesh.shape)}")
        try:
            found = stages.stages(s)
        except compiled.DoesNotFit as error:
            tried.append(f"{_axes(s.mesh.shape)}: does not fit ({error})")
            _say(f"  does not fit: {error}")
            continue
        tried += [weighed[other][1] for other in others[:SHOWN] if other != mesh]
        return _figures(name, s, found, tried, _advice(mesh, own, {m: x for m, (x, _) in weighed.items()}))
    if not tried[1:]:  # no formula let any of them be compiled
        tried += [line for mesh, (_, line) in weighed.items() if mesh != own]
    raise BadInput(
        f"{name}: nothing that was tried fits: {'; '.join(tried)}. Take more chips, or train adapters (model.lora_rank)"
    )


def _weighed(s: Any) -> tuple[float, str]:
    """By formula: hours of an iteration (infinite where it does not fit), and the same in words."""
    from sppo_jax.plan import compiled, stages

    label = _axes(s.mesh.shape)
    try:
        found = hours(stages.stages(s))
    except compiled.DoesNotFit as error:
        return math.inf, f"{label}: does not fit by formula ({error})"
    return found, f"{label}: {found:.2f} h an iteration by formula"


def _advice(mesh: Any, own: Any, weighed: dict[Any, float]) -> str:
    """A word where the plan is of another mesh than was asked, or another would be better."""
    if mesh != own:
        return f"the configuration's own mesh does not fit: {_flags(mesh)} does"
    best = min(weighed, key=lambda other: weighed[other])
    if weighed[best] >= BETTER * weighed[mesh]:
        return ""
    return (
        f"by formula {_flags(best)} takes {weighed[best]:.2f} h an iteration, and this {weighed[mesh]:.2f} h"
    )


def _flags(mesh: configuration.Mesh) -> str:
    return " ".join(f"--mesh.{axis} {n}" for axis, n in dataclasses.asdict(mesh).items())


def _figures(name: str, s: Any, stages: dict[str, Stage], tried: list[str], advice: str) -> Plan:
    from sppo_jax.training import memory

    n, trained = memory.parameters(s.architecture), memory.adapters(s.architecture)
    # Masters and second moments; exports are whole models in float32, adapters beside them.
    checkpoint, export = 8 * (trained or n) / 1e9, 4 * (n + trained) / 1e9
    at = s.layout
    return Plan(
        topology=name, chips=s.mesh.size, mesh=dict(s.mesh.shape), stages=stages, microbatches=at.microbatches,
        microbatch_tokens=at.rows * at.width, real_token_share=at.real_token_share, parameters=n, checkpoint_gb=checkpoint,
        disk_gb=s.config.iterations * (checkpoint + export) + checkpoint, compiled=s.compiled, tried=tried,
        advice=advice,
    )  # fmt: skip


def _others(own: configuration.Mesh, chips: int, heads: int) -> list[configuration.Mesh]:
    """Meshes that a plan weighs beside the configuration's own."""
    from sppo_jax import sharding

    sizes = [(data, tensor) for tensor in (1, 2, 4, 8) for data in (1, 2, 4)]
    found = [
        dataclasses.replace(own, data=data, fsdp=chips // (data * tensor), tensor=tensor)
        for data, tensor in sizes
        if chips % (data * tensor) == 0 and heads % tensor == 0
    ]
    whole = configuration.Mesh(*sharding.resolve_sizes(own.data, own.fsdp, own.tensor, chips))
    return [mesh for mesh in found if mesh not in (own, whole)]


def _axes(sizes: Any) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one chip"


def table(one: Plan, config: Config, asked: Asked) -> list[str]:
    """For people."""
    how = "compiled for it" if one.compiled else "by formula alone, nothing was compiled"
    lines = [
        "",
        f"{config.model.path} ({one.parameters / 1e9:.2f}B parameters) on {one.topology}: {one.chips} chips, mesh "
        + " x ".join(f"{axis} {n}" for axis, n in one.mesh.items())
        + f"; {how}",
        f"update: {config.fit.global_batch} prompts in {one.microbatches} microbatches of {one.microbatch_tokens} tokens, "
        f"{one.real_token_share:.0%} of which are real",
        "",
        f"{'stage':10} {'unit':34} {'GiB':>6} {'of':>6} {'TFLOP':>8} {'GB':>7} {'sent GB':>8} {'compiler':>9} {'kernels':>8} "
        f"{'links':>8} {'roofline':>9} {'time':>9} {'MFU':>5} {'MFU+':>5} {'hours':>7}",
    ]
    for name, s in one.stages.items():
        milliseconds = [s.compiler, s.left_out if s.compiler else None, s.collectives, s.roofline, s.seconds]
        compiler, kernels, links, roofline, whole = (
            "-" if x is None else f"{1e3 * x:.1f}" for x in milliseconds
        )
        alone = "-" if s.mfu_compiler is None else f"{s.mfu_compiler:.0%}"
        lines.append(
            f"{name:10} {s.unit:34} {s.peak / GIB:6.2f} {s.limit / GIB:6.2f} {s.flops / 1e12:8.3g} {s.bytes / 1e9:7.3g} "
            f"{s.sent / 1e9:8.3g} {compiler:>9} {kernels:>8} {links:>8} {roofline:>9} {whole:>9} {alone:>5} {s.mfu:5.0%} "
            f"{s.hours:7.2f}" + (f"  {s.note}" if s.note else "")
        )
        lines.append(
            f"{'':10} memory, GiB: " + ", ".join(f"{kind} {x / GIB:.2f}" for kind, x in s.memory.items())
        )
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(s.moved.items()) if size >= 1e6)
        if kinds:
            lines.append(f"{'':10} collectives, GB of results: {kinds}")
        if s.compile_seconds:
            lines.append(f"{'':10} compiled in {s.compile_seconds:.0f} s")
    lines += ["", *summary(one, config, asked), *(f"other meshes: {line}" for line in one.tried)]
    if one.compiled:
        lines.append(
            "times in ms for one unit on all chips: compiler, by its cycles alone (MFU by these); kernels, of attention, which "
            "have no cycles, and fetching of weights that outlasts products; links, collectives that are waited for; time, "
            "their sum or the roofline (MFU+)"
        )
    return lines


def summary(one: Plan, config: Config, asked: Asked) -> list[str]:
    """A few lines, as configurations carry them in their header."""
    parts = " + ".join(f"{name} {s.hours:.2f}" for name, s in one.stages.items())
    update = one.stages["fit"]
    run = config.iterations * one.iteration_hours
    cost = f", {asked.price * one.chips * run:,.0f} at {asked.price:g} a chip-hour" if asked.price else ""
    how = "" if one.compiled else ", by formula"
    pieces = "1 microbatch" if one.microbatches == 1 else f"{one.microbatches} microbatches"
    return [
        f"{one.topology} ({_axes(one.mesh)}{how}): iteration {one.iteration_hours:.2f} h = {parts}; run {run:.1f} h, "
        f"{one.chips * run:.0f} chip-hours{cost}",
        f"  memory {max(s.peak for s in one.stages.values()) / GIB:.1f} of {update.limit / GIB:.1f} GiB (update "
        f"{update.peak / GIB:.1f}); update {update.seconds:.2f} s in {pieces}, MFU {update.mfu:.0%}; checkpoint "
        f"{one.checkpoint_gb:.2g} GB, disk {one.disk_gb:.0f} GB",
        *([f"  {one.advice}"] if one.advice else []),
    ]


def as_json(one: Plan, config: Config, asked: Asked) -> dict[str, Any]:
    """What --json prints of a plan."""
    stages = {
        name: {
            "unit": s.unit, "count": s.count, "hbm_gib": s.peak / GIB, "hbm_limit_gib": s.limit / GIB,
            "memory_gib": {kind: size / GIB for kind, size in s.memory.items()}, "flops": s.flops, "bytes": s.bytes,
            "collective_bytes": s.sent, "collectives": s.moved, "seconds_compiler": s.compiler,
            "seconds_kernels": s.left_out if s.compiler else None, "seconds_collectives": s.collectives,
            "seconds_roofline": s.roofline, "seconds": s.seconds, "mfu_compiler": s.mfu_compiler, "mfu": s.mfu,
            "hours": s.hours, "compile_seconds": s.compile_seconds, "note": s.note,
        }
        for name, s in one.stages.items()
    }  # fmt: skip
    run = config.iterations * one.iteration_hours
    return {
        "topology": one.topology, "chips": one.chips, "mesh": one.mesh, "compiled": one.compiled, "stages": stages,
        "microbatches": one.microbatches, "microbatch_tokens": one.microbatch_tokens,
        "real_token_share": one.real_token_share, "parameters": one.parameters,
        "checkpoint_gb": one.checkpoint_gb, "disk_gb": one.disk_gb, "iteration_hours": one.iteration_hours,
        "run_hours": run, "chip_hours": one.chips * run, "price": asked.price and asked.price * one.chips * run,
        "lengths": dataclasses.asdict(asked.lengths), "other_meshes": one.tried, "advice": one.advice,
    }  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
