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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo_jax import config as configuration
from sppo_jax import header
from sppo_jax.chips import GPUS, TPUS, Chip
from sppo_jax.config import Config
from sppo_jax.errors import BadInput, call
from sppo_jax.stage import GIB, Stage
from sppo_jax.workload import Lengths, workload


@dataclass
class Plan:
    """A configuration on one slice."""

    topology: str
    chips: int
    mesh: dict[str, int]
    stages: dict[str, Stage]
    microbatches: int
    real_token_share: float
    parameters: int
    checkpoint_gb: float
    disk_gb: float
    compiled: bool
    tried: list[str] = field(default_factory=list)

    @property
    def iteration_hours(self) -> float:
        return sum(stage.hours for stage in self.stages.values())


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
        header.write(Path(files[0]), config, lines)
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
            counts.append(int(_number(word, value)))
        elif word == "--price":
            asked.price = _number(word, value)
        else:
            asked.lengths = dataclasses.replace(asked.lengths, **{lengths[word]: int(_number(word, value))})
    if counts and len(counts) != len(devices):
        raise BadInput("--count: give one for each --device")
    asked.slices += [f"{name}:{n}" for name, n in zip(devices, counts or [8] * len(devices), strict=True)]
    if not asked.slices:
        raise BadInput("name a slice: --topology v5e:4x4, or --device h100 --count 8")
    return files, asked, rest


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
    from sppo_jax import estimate

    lengths = Lengths(
        min(asked.lengths.prompt, config.prompts.max_length),
        min(asked.lengths.response, config.sampling.max_new_tokens),
    )
    work = workload(config, lengths)
    architecture = estimate.architecture(config)
    found: Plan | None = None
    tried: list[str] = []
    for mesh_config in _candidates(config, chips):
        mesh = estimate.mesh(mesh_config, chips, devices)
        label = f"mesh {dict(mesh.shape)}"
        at = estimate.layout_of(config, architecture, mesh, chip, work)
        _say(f"{name}: {label}")
        try:
            updated = estimate.fit_stages(config, architecture, mesh, chip, work, at, devices is not None)
            stages = estimate.other_stages(
                config, architecture, mesh, chip, work, lengths, devices is not None
            )
        except estimate.DoesNotFit as error:
            tried.append(f"{label}: does not fit ({error})")
            _say(f"  does not fit: {error}")
            continue
        n = estimate.parameters(architecture)
        trained = estimate.trained(config, architecture)
        checkpoint, export = 8 * trained / 1e9, 4 * n / 1e9
        found = Plan(
            topology=name, chips=chips, mesh=dict(mesh.shape), stages=stages | updated, microbatches=at.microbatches,
            real_token_share=at.real_token_share, parameters=n, checkpoint_gb=checkpoint,
            disk_gb=config.iterations * (checkpoint + export) + checkpoint, compiled=devices is not None, tried=tried,
        )  # fmt: skip
        break
    if found is None:
        raise BadInput(
            f"{name}: nothing that was tried fits: {'; '.join(tried)}. Take more chips, or train adapters (model.lora_rank)"
        )
    return found


def _candidates(config: Config, chips: int) -> Iterator[Any]:
    """Meshes to try: the configuration's own first, then others. Each has the microbatches that a run on it would have."""
    yield config.mesh
    for tensor in (2, 4, 8):
        if chips % tensor == 0 and tensor != config.mesh.tensor:
            yield dataclasses.replace(config.mesh, data=1, fsdp=-1, tensor=tensor)


def table(one: Plan, config: Config, asked: Asked) -> list[str]:
    """For people."""
    how = "compiled for it" if one.compiled else "by formula alone, nothing was compiled"
    lines = [
        "",
        f"{config.model.path} ({one.parameters / 1e9:.2f}B parameters) on {one.topology}: {one.chips} chips, mesh "
        + " x ".join(f"{axis} {n}" for axis, n in one.mesh.items())
        + f"; {how}",
        f"update: {config.fit.global_batch} prompts in {one.microbatches} microbatches, {one.real_token_share:.0%} of the "
        "computed tokens are real",
        "",
        f"{'stage':10} {'unit':34} {'GiB':>6} {'of':>6} {'TFLOP':>8} {'GB':>7} {'sent GB':>8} {'compiler':>9} {'links':>8} "
        f"{'roofline':>9} {'MFU':>5} {'MFU+':>5} {'hours':>7}",
    ]
    for name, s in one.stages.items():
        compiler, links = (f"{1e3 * x:.1f}" if x is not None else "-" for x in (s.compiler, s.collectives))
        mfu, with_links = mfus(s, one)
        lines.append(
            f"{name:10} {s.unit:34} {s.peak / GIB:6.2f} {s.limit / GIB:6.2f} {s.flops / 1e12:8.3g} {s.bytes / 1e9:7.3g} "
            f"{s.sent / 1e9:8.3g} {compiler:>9} {links:>8} {1e3 * s.roofline:9.1f} {mfu or 0:5.0%} {with_links or 0:5.0%} "
            f"{s.hours:7.2f}" + (f"  {s.note}" if s.note else "")
        )
        kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(s.moved.items()) if size >= 1e6)
        if kinds:
            lines.append(
                f"{'':10} collectives, GB of results: {kinds}; compiled in {s.compile_seconds:.0f} s"
            )
    lines += ["", *summary(one, config, asked), *(f"tried: {line}" for line in one.tried)]
    lines.append(
        "times in ms for one unit on all chips; MFU by the compiler's cycles, MFU+ with the collectives that are waited for"
    )
    return lines


def mfus(s: Stage, one: Plan) -> tuple[float | None, float | None]:
    """Model FLOPs utilisation by the compiler's cycles, and with the collectives waited for."""
    kind = one.topology.split(":")[0]
    peak = (GPUS | TPUS)[kind].flops
    alone = s.flops / peak / s.compiler if s.compiler else None
    return alone, s.flops / peak / s.seconds if s.seconds else None


def summary(one: Plan, config: Config, asked: Asked) -> list[str]:
    """A few lines, as configurations carry them in their header."""
    hours = " + ".join(f"{name} {s.hours:.2f}" for name, s in one.stages.items())
    fit_ = one.stages["fit"]
    mfu = mfus(fit_, one)[1] or 0
    run = config.iterations * one.iteration_hours
    cost = f", {asked.price * one.chips * run:,.0f} at {asked.price:g} a chip-hour" if asked.price else ""
    how = "" if one.compiled else ", by formula"
    axes = ", ".join(f"{axis} {n}" for axis, n in one.mesh.items() if n > 1)
    return [
        f"{one.topology} ({axes}{how}): iteration {one.iteration_hours:.2f} h = {hours}; run {run:.1f} h, {one.chips * run:.0f} "
        f"chip-hours{cost}",
        f"  memory {max(s.peak for s in one.stages.values()) / GIB:.1f} of {fit_.limit / GIB:.1f} GiB; update {fit_.seconds:.2f} s "
        f"in {one.microbatches} microbatches, MFU {mfu:.0%}; checkpoint {one.checkpoint_gb:.0f} GB, disk {one.disk_gb:.0f} GB",
    ]


def as_json(one: Plan, config: Config, asked: Asked) -> dict[str, Any]:
    """What --json prints of a plan."""
    stages = {}
    for name, s in one.stages.items():
        alone, with_links = mfus(s, one)
        stages[name] = {
            "unit": s.unit, "count": s.count, "hbm_gib": s.peak / GIB, "hbm_limit_gib": s.limit / GIB, "flops": s.flops,
            "bytes": s.bytes, "collective_bytes": s.sent, "collectives": s.moved, "seconds_compiler": s.compiler,
            "seconds_collectives": s.collectives, "seconds_roofline": s.roofline, "mfu_compiler": alone, "mfu": with_links,
            "hours": s.hours, "compile_seconds": s.compile_seconds, "note": s.note,
        }  # fmt: skip
    run = config.iterations * one.iteration_hours
    return {
        "topology": one.topology, "chips": one.chips, "mesh": one.mesh, "compiled": one.compiled, "stages": stages,
        "microbatches": one.microbatches, "real_token_share": one.real_token_share, "parameters": one.parameters,
        "checkpoint_gb": one.checkpoint_gb, "disk_gb": one.disk_gb, "iteration_hours": one.iteration_hours,
        "run_hours": run, "chip_hours": one.chips * run, "price": asked.price and asked.price * one.chips * run,
        "lengths": dataclasses.asdict(asked.lengths), "tried": one.tried,
    }  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    call(main)
