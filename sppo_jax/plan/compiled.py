"""Compiles the real programs of each stage for devices that are not here, and returns their memory and cycles."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import command, sharding
from sppo_jax.config import Config
from sppo_jax.models import Architecture, Transformer, attention, hf, lora
from sppo_jax.pairrm import deberta_attention, jax_model, mesh_judge
from sppo_jax.plan.hlo import Cost, Module
from sppo_jax.sampler import capacity
from sppo_jax.sampler.paging import PAGE
from sppo_jax.sampler.programs import Programs
from sppo_jax.sampler.weights import abstract
from sppo_jax.training.checkpoint import TrainState
from sppo_jax.training.microbatch import Microbatch
from sppo_jax.training.packing import Layout
from sppo_jax.training.update import make_programs, split


@dataclass(frozen=True)
class CompiledProgram:
    """The compiler's figures of one program, in bytes of one chip."""

    peak: int
    arguments: int
    # Arguments, results and temporaries.
    total: int
    # Seconds of compiling.
    seconds: float
    cost: Cost


class DoesNotFit(Exception):
    """A program needs more memory than a chip has; the message is the compiler's first line, or the formula's figure."""


def compile_program(
    what: str, lowered: Any, loop_counts: dict[str, float] | None = None
) -> tuple[Any, CompiledProgram]:
    """Compile a program, print how long that took, and return it with its figures. Raises DoesNotFit.

    `loop_counts`: see `hlo.Module`.
    """
    began = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).splitlines()[0]) from None
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    text = program.as_text()
    cost = Module(text, loop_counts).cost() if "estimated_cycles" in text else Cost()
    seconds = time.perf_counter() - began
    command.say(f"  {what}: compiled in {seconds:.0f} s, {memory.peak_memory_in_bytes / 2**30:.2f} GiB")
    return program, CompiledProgram(
        memory.peak_memory_in_bytes, memory.argument_size_in_bytes, total, seconds, cost
    )


def abstract_model(config: Config, a: Architecture, mesh: Mesh, dtype: Any) -> Transformer:
    """The policy with shapes for weights: no array is allocated."""
    a = replace(a, lora_rank=config.model.lora_rank)
    kernel = attention.choose(config.model.attention, mesh, a, dtype)
    weights: dict[str, Any] = dict(hf.abstract(a, mesh, dtype if a.lora_rank else jnp.float32))
    return Transformer(a, weights | (lora.abstract(a, mesh) if a.lora_rank else {}), dtype, kernel)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays or shapes on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept_bytes(config: Config, a: Architecture, mesh: Mesh, dtype: Any) -> int:
    """Bytes that stay on a chip while other stages work there: all parameters, the frozen ones included."""
    return local_bytes(nnx.split(abstract_model(config, a, mesh, dtype))[1])


@dataclass(frozen=True)
class CompiledUpdate:
    """The update's programs, and the bytes by kind that a chip uses in the program that needs most."""

    forward: CompiledProgram
    backward: CompiledProgram
    accumulate: CompiledProgram | None
    update: CompiledProgram
    memory: dict[str, float]
    # Bytes of activations that a backward pass needs.
    saved: float

    @property
    def peak(self) -> float:
        """Bytes in use at the peak."""
        return sum(self.memory.values())


def compile_update(config: Config, a: Architecture, mesh: Mesh, dtype: Any, at: Layout) -> CompiledUpdate:
    """Compile the training step as `fit` runs it: four programs whose arrays stay on the devices between them.

    Raises DoesNotFit where a program has no room.
    """
    model = abstract_model(config, a, mesh, dtype)
    programs = make_programs(
        model.architecture, jnp.dtype(dtype), mesh, config.fit, 100, config.model.attention
    )
    _, params, frozen = split(model)
    responses = 2 if config.pairs.select == "best_worst" else config.sampling.responses
    batch = Microbatch.abstract(mesh, at, responses)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=programs.shardings.step),
        params,
        jax.tree.map(_struct, jax.eval_shape(programs.init_optimizer, params), programs.shardings.opt_state),
    )
    lowered = programs.forward.lower(params, frozen, batch)  # type: ignore[attr-defined]
    program, forward = compile_program("forward", lowered)
    logprob, pullback = jax.tree.map(_struct, lowered.out_info, program.output_shardings)
    logprob = _struct(logprob, sharding.replicated(mesh))  # as its gradient is placed
    given = (params, frozen, batch, pullback, logprob)
    backward = compile_program("backward", programs.backward.lower(*given))[1]  # type: ignore[attr-defined]
    accumulate = None
    if at.microbatches > 1:
        accumulate = compile_program("backward, added up", programs.accumulate.lower(params, *given))[1]  # type: ignore[attr-defined]
    update = compile_program("update", programs.update.lower(state, params))[1]  # type: ignore[attr-defined]
    # Resident arrays count with each program, even where they are not its arguments.
    trained, fixed, moments = (local_bytes(x) for x in (params, frozen, state.opt_state))
    resident = {"parameters": trained, "frozen": fixed, "optimiser": moments}
    saved = {"saved activations": max(0, backward.arguments - trained - fixed)}
    several = at.microbatches > 1
    moments_in_use = [
        (forward.peak + moments + several * trained, resident | saved | {"gradients": several * trained}),
        (backward.peak + moments, resident | saved | {"gradients": trained}),
        (update.peak + fixed, resident | {"gradients": trained}),
    ]
    if accumulate is not None:  # a microbatch's gradients, in the compute dtype, beside their sum
        both = trained + trained * jnp.dtype(dtype).itemsize // 4
        moments_in_use.append((accumulate.peak + moments, resident | saved | {"gradients": both}))
    peak, held = max(moments_in_use, key=lambda moment: moment[0])
    kinds = {kind: float(size) for kind, size in held.items() if size}
    kinds["temporaries"] = peak - sum(held.values())
    return CompiledUpdate(forward, backward, accumulate, update, kinds, saved["saved activations"])


def sampling_programs(config: Config, a: Architecture, mesh: Mesh, dtype: Any, limit: int) -> Programs:
    """The sampler's programs, with the replicas, slots and pages that it would choose with `limit` bytes a chip.

    Raises BadInput where a response does not fit.
    """
    model = abstract_model(config, a, mesh, dtype)
    # The compiler requires all devices of a slice, so all processes' replicas are in one program here; they share nothing.
    chosen = capacity.choose(model, mesh, config.sampling, limit)
    graph, weights = abstract(model, chosen.mesh, chosen.int8)
    in_use = local_bytes(weights) + kept_bytes(config, a, mesh, dtype)
    shape = chosen.shape(longest=chosen.longest_prompt(config.prompts.max_length), eos=(2,), in_use=in_use)
    return Programs(graph, weights, chosen.mesh, shape)


def page_bytes(p: Programs) -> int:
    """Bytes of one token's keys and values in all layers, on one chip."""
    pages = p.shape.pages // p.replicas
    return local_bytes(p.pages) // (pages * PAGE)


def judge_program(deberta: jax_model.Deberta, mesh: Mesh, dtype: Any, tokens: int) -> CompiledProgram:
    """Compile PairRM's forward over one full batch of pairs of `tokens` tokens. Raises DoesNotFit."""
    platform = sharding.platform(mesh)
    size = mesh_judge.bucket(tokens, platform)
    rows = mesh.size * mesh_judge.rows(size, platform)
    form = deberta_attention.form_of(mesh)
    network, weights = nnx.split(
        jax_model.PairRM(deberta, jax_model.shapes(deberta, jnp.dtype(dtype)), dtype, form)
    )
    whole, spread = sharding.replicated(mesh), sharding.spread(mesh)
    weights = jax.tree.map(lambda x: _struct(x, whole), weights)
    inputs = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=spread) for s in ((rows, size), (rows,), (rows, 3))]
    return compile_program("judge", mesh_judge.forward(network, mesh).lower(weights, *inputs))[1]  # type: ignore[attr-defined]


def _struct(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
