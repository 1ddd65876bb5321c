"""Search for a mesh: plans a configuration on its own mesh or, where it names none or that does not fit, on the most promising."""

import dataclasses
import importlib.util
import math
from typing import Any

from jax.experimental import topologies

from sppo_jax import command
from sppo_jax.config import Config, Mesh
from sppo_jax.errors import BadInput
from sppo_jax.plan import compiled, slices, stages, table, target
from sppo_jax.plan.chips import Chip, stand_ins
from sppo_jax.plan.compiled import DoesNotFit
from sppo_jax.plan.cost import GIB, UnitCost
from sppo_jax.plan.lengths import Lengths
from sppo_jax.plan.table import Plan, axes, duration, hours
from sppo_jax.plan.target import Target
from sppo_jax.training import memory

# Meshes that are planned beside the configuration's own, where that does not fit.
ATTEMPTS = 3
# Other meshes that a plan prints.
SHOWN = 3
# Another mesh is planned, or is worth advice, if its time by formula is below this share of that of the configuration's own.
BETTER = 0.9


def plan(config: Config, name: str, lengths: Lengths) -> Plan:
    """Plan a configuration on one slice, such as "v5e:4x4" or "h100:8".

    `lengths`: mean tokens of prompts and responses. Raises BadInput for an unknown slice, or where no mesh that was tried
    fits.
    """
    chip, chips = slices.parse(name)
    if chip.platform == "gpu":
        return _plan(config, name, chip, chips, None, lengths)
    if importlib.util.find_spec("libtpu") is None:
        command.say("libtpu is not importable: formulas instead of the compiler (see --help)")
        return _plan(config, name, chip, chips, None, lengths)
    return _plan(config, name, chip, chips, _devices(name), lengths)


def by_formula(config: Config, name: str, lengths: Lengths) -> Plan:
    """Return the plan of a configuration on its own mesh, by formula, whatever compiler there is.

    Raises BadInput for an unknown slice, and DoesNotFit.
    """
    chip, chips = slices.parse(name)
    mesh = target.mesh(config.mesh, stand_ins(chip, chips), stand_ins=True)
    at = Target(config, target.architecture(config), chip, mesh, _within(lengths, config), compiled=False)
    return _figures(name, at, stages.stages(at), [], "")


def _within(lengths: Lengths, config: Config) -> Lengths:
    """The mean lengths, at most the largest ones that the configuration allows."""
    return Lengths(
        min(lengths.prompt, config.prompts.max_length), min(lengths.response, config.sampling.max_new_tokens)
    )


def _devices(name: str) -> list[Any]:
    """Devices of a topology, as the TPU's compiler describes them."""
    extra: dict[str, Any] = {}
    # Without these options each chip is two devices of half its memory.
    if name.startswith(("v4", "v5p")):
        extra = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **extra).devices)
    except Exception as error:  # the plugin raises types of its own
        raise BadInput(f"--topology {name}: {str(error).splitlines()[0]}") from None


def _plan(
    config: Config, name: str, chip: Chip, chips: int, devices: list[Any] | None, lengths: Lengths
) -> Plan:
    """The plan of the first mesh that fits. `devices`: those to compile for; None: everything by formula."""
    lengths = _within(lengths, config)
    architecture = target.architecture(config)

    def at(mesh: Mesh, real: bool) -> Target:
        on = stand_ins(chip, chips) if devices is None or not real else devices
        return Target(config, architecture, chip, target.mesh(mesh, on, not real), lengths, real)

    meshes = [config.mesh, *_others(config.mesh, chips, architecture.heads)]
    weighed = {mesh: _weighed(at(mesh, real=False)) for mesh in meshes}
    own, *others = weighed
    others = [mesh for mesh in others if weighed[mesh][0] < math.inf]
    others.sort(key=lambda mesh: weighed[mesh][0])
    # A mesh that the configuration names comes first, whatever its time by formula; one that it does not name gives way.
    order = [own, *others[:ATTEMPTS]]
    if own == Mesh() and others and weighed[others[0]][0] < BETTER * weighed[own][0] < math.inf:
        order = [*others[:ATTEMPTS], own]
    tried: list[str] = []
    for mesh in order:
        candidate = at(mesh, devices is not None)
        label = axes(candidate.mesh.shape)
        command.say(f"{name}: mesh {label}")
        try:
            costs = stages.stages(candidate)
        except DoesNotFit as error:
            tried.append(f"{label}: does not fit ({error})")
            if devices is not None:  # the next mesh takes a while
                command.say(f"  does not fit: {error}")
            continue
        tried += [weighed[other][1] for other in others[:SHOWN] if other != mesh]
        times = {other: time for other, (time, _) in weighed.items()}
        return _figures(name, candidate, costs, tried, _advice(mesh, own, times))
    if not tried[1:]:  # no other mesh fits by formula, so none was tried
        tried += [line for mesh, (_, line) in weighed.items() if mesh != own]
    kept = [_kept(at(mesh, real=False)) for mesh in weighed]
    least = {
        work: min((one[work] for one in kept), key=lambda kinds: sum(kinds.values())) for work in kept[0]
    }
    raise BadInput(table.nothing_fits(name, config, least, chip.gib * GIB, tried))


def _weighed(candidate: Target) -> tuple[float, str]:
    """Return the hours of an iteration by formula (infinite where it does not fit), and the same in words."""
    label = axes(candidate.mesh.shape)
    try:
        time = hours(stages.stages(candidate))
    except DoesNotFit as error:
        return math.inf, f"{label}: does not fit by formula ({error})"
    return time, f"{label}: {duration(time)} an iteration by formula"


def _kept(candidate: Target) -> dict[str, dict[str, float]]:
    """Bytes by kind that a chip holds at least, in sampling and in training, whatever the lengths and the batch."""
    c, a = candidate.config, candidate.architecture
    width = 1 if c.sampling.quantize == "int8" else candidate.dtype.itemsize
    masters = compiled.kept_bytes(c, a, candidate.mesh, candidate.dtype)
    copy = width * memory.parameters(a) / candidate.mesh.size
    return {
        "sampling": {"masters": masters, "the sampler's weights": copy},
        "training": candidate.update.state,
    }


def _advice(mesh: Mesh, own: Mesh, times: dict[Mesh, float]) -> str:
    """One line of advice if another mesh than the configuration's `own` was planned, or another would be faster; else "".

    It has ratios of two formulas and no hours: beside the compiler's figures these would contradict them.
    """
    if mesh != own and times[own] < math.inf:
        return f"take {_flags(mesh)}: by formula the default mesh takes {times[own] / times[mesh]:.1f} times as long"
    if mesh != own:
        return f"the configuration's own mesh does not fit: {_flags(mesh)} does"
    best = min(times, key=lambda other: times[other])
    if times[best] >= BETTER * times[mesh]:
        return ""
    return f"by formula {_flags(best)} takes {times[best] / times[mesh]:.0%} of this mesh's time"


def _flags(mesh: Mesh) -> str:
    """The flags that choose a mesh."""
    return " ".join(f"--mesh.{axis} {n}" for axis, n in dataclasses.asdict(mesh).items())


def _figures(name: str, at: Target, costs: dict[str, UnitCost], tried: list[str], advice: str) -> Plan:
    """The plan of a target whose stages' costs are known."""
    n, adapters = memory.parameters(at.architecture), memory.adapters(at.architecture)
    # Float32 masters and second moments of the trained parameters; exports are whole models in float32, adapters beside them.
    checkpoint, export = 8 * (adapters or n) / 1e9, 4 * (n + adapters) / 1e9
    return Plan(
        topology=name,
        chips=at.mesh.size,
        mesh=dict(at.mesh.shape),
        stages=costs,
        microbatches=at.layout.microbatches,
        microbatch_tokens=at.layout.rows * at.layout.width,
        real_token_share=at.layout.real_token_share,
        parameters=n,
        checkpoint_gb=checkpoint,
        disk_gb=at.config.iterations * (checkpoint + export) + checkpoint,
        compiled=at.compiled,
        tried=tried,
        advice=advice,
    )


def _others(own: Mesh, chips: int, heads: int) -> list[Mesh]:
    """Meshes that a plan weighs beside the configuration's own."""
    from sppo_jax import sharding

    sizes = [(data, tensor) for tensor in (1, 2, 4, 8) for data in (1, 2, 4)]
    found = [
        dataclasses.replace(own, data=data, fsdp=chips // (data * tensor), tensor=tensor)
        for data, tensor in sizes
        if chips % (data * tensor) == 0 and heads % tensor == 0
    ]
    whole = Mesh(*sharding.resolve_sizes(own.data, own.fsdp, own.tensor, chips))
    return [mesh for mesh in found if mesh not in (own, whole)]
