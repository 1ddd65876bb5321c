"""Stages of a plan: the figures of each, from the compiled programs where there is a compiler, else from formulas."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sppo_jax import aot, config, hub, memory, sharding, tiny, workload
from sppo_jax.aot import Compiled, DoesNotFit
from sppo_jax.chips import Chip
from sppo_jax.config import Config
from sppo_jax.dataset import Layout
from sppo_jax.decoding import PAGE, STEPS, Programs, bucket
from sppo_jax.errors import BadInput
from sppo_jax.models import Architecture, hf, lora, paged
from sppo_jax.pairrm.jax_model import Deberta
from sppo_jax.stage import GIB, Stage
from sppo_jax.workload import Lengths, Workload

PUBLISHED = (
    Path(__file__).parent / "published"
)  # options of models that one may plan for without access to them
# microsoft/deberta-v3-large with PairRM's five extra tokens: llm-blender/PairRM, whose options no plan reads.
PAIRRM = Deberta(
    vocab=128_005, model=1024, heads=16, mlp=4096, layers=24, buckets=256, farthest=512, norm_eps=1e-7
)
HOST = 4  # chips of a TPU host; a GPU node is taken to have 8
ROUNDS = 2  # of next_token's race at top_p below 1, for the slowest of all slots
SLOTS_USED = 0.86  # slot efficiency of the sampler on a recorded trace (EXPERIMENTS.md)
KERNEL = (
    0.4  # share of the peak that attention kernels are taken to reach: the compiler's cycles leave them out
)
# Where there is no compiler: shares of the peaks that programs are taken to reach.
FLOPS_REACHED, BYTES_REACHED = 0.45, 0.7

parameters = memory.parameters
__all__ = [
    "DoesNotFit",
    "architecture",
    "fit_stages",
    "layout_of",
    "mesh",
    "other_stages",
    "parameters",
    "trained",
]


def architecture(c: Config) -> Architecture:
    """The policy's options; of published models without a download."""
    name = c.model.path.partition("@")[0]
    known = PUBLISHED / name
    if not name.startswith((".", "/")) and (known / "config.json").is_file() and not Path(name).is_dir():
        return hf.read_architecture(known)
    if name.startswith(config.EMBEDDED):
        return hf.read_architecture(tiny.resolve(name))
    return hf.read_architecture(hub.snapshot(c.model.path, None, ("config.json",)).directory)


def trained(c: Config, a: Architecture) -> int:
    """Parameters with an optimiser state."""
    if not c.model.lora_rank:
        return memory.parameters(a)
    with_adapters = replace(a, lora_rank=c.model.lora_rank)
    return sum(math.prod(t.shape(with_adapters)) for t in lora.table())


def mesh(m: Any, chips: int, devices: list[Any] | None) -> Any:
    """The mesh of a slice; without devices one that has sizes alone. Raises BadInput where it does not fit."""
    if devices is not None:
        return sharding.make_mesh(m.data, m.fsdp, m.tensor, devices=devices)
    sizes = {"data": m.data, "fsdp": m.fsdp, "tensor": m.tensor}
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(1, chips // math.prod(n for other, n in sizes.items() if other != axis))
    if math.prod(sizes.values()) != chips:
        raise BadInput(f"mesh {sizes} does not fit {chips} chips")
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def layout_of(c: Config, a: Architecture, mesh: Any, chip: Chip, work: Workload) -> Layout:
    """The shape of the updates that a run would have there."""
    most = memory.most_tokens(a, mesh, 2, chip.gib * GIB)
    return workload.layout(c, work, sharding.batch_shards(mesh), most)


def fit_stages(
    c: Config, a: Architecture, mesh: Any, chip: Chip, work: Workload, at: Layout, compile_: bool
) -> dict[str, Stage]:
    """Reference log-probs and the update. Raises DoesNotFit."""
    n, chips, limit = memory.parameters(a), mesh.size, chip.gib * GIB
    # Tokens of an update, of one chip, that belong to a sequence, and how many microbatches they come to on average.
    real = sum(map(sum, work.lengths_GR)) / len(work.lengths_GR) * c.fit.global_batch / chips
    computed = at.rows * at.width / chips  # of a microbatch
    held, m = memory.state_bytes(a, mesh, at.microbatches > 1), real / at.real_token_share / computed
    pieces = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = 2 * n / mesh.shape["tensor"]  # the weights as a chip sees them pass, in bfloat16
    passes = work.trained_pairs / c.fit.global_batch
    reference = Stage(
        f"an update's {m:.1f} forward passes", passes, 0, limit, 2 * n * real,
        m * (4 * n / pieces + 2 * whole), 0 if compile_ else m * whole * (1 - 1 / pieces),
    )  # fmt: skip
    update = Stage(
        f"an update of {m:.1f} microbatches", work.updates, 0, limit, 6 * n * real,
        m * (2 * 4 * n / pieces + 4 * whole) + 7 * 4 * n / pieces, 0 if compile_ else m * 4 * whole * (1 - 1 / pieces),
    )  # fmt: skip
    if not compile_:
        peak = memory.update_bytes(a, mesh, 2, computed, at.microbatches > 1)
        if peak > limit:
            raise DoesNotFit(f"{peak / GIB:.1f} GiB by formula, of {chip.gib}")
        for stage, held_ in ((reference, peak - held + 4 * n / pieces), (update, peak)):
            stage.peak = held_
            by_formula(stage, chip)
        return {"reference": reference, "fit": update}
    found = aot.fitted(c, a, mesh, jnp.bfloat16, at)
    if found.peak > limit:
        raise DoesNotFit(f"{found.peak / GIB:.2f} GiB of {chip.gib} at once")
    # Attention's kernels, whose cycles the compiler does not tell: backward is 2.5 times forward, which may be computed again.
    again = 3.5 if c.fit.remat == "layer" else 2.5
    pairs = at.rows * at.width**2 / 2 / sharding.batch_shards(mesh)
    kernel = 4 * a.layers * a.heads * a.head_dim * pairs / mesh.shape["tensor"] / (KERNEL * chip.flops)
    add(reference, found.forward, chip, m, kernel * m)
    reference.peak = found.forward.peak
    add(update, found.forward, chip, m, kernel * m)
    add(update, found.backward, chip, 1, again * kernel)
    if found.accumulate is not None:
        add(update, found.accumulate, chip, m - 1, again * kernel * (m - 1))
    add(update, found.update, chip, 1, 0)
    update.peak = found.peak
    for stage in (reference, update):
        roofline(stage, chip)
    return {"reference": reference, "fit": update}


def other_stages(
    c: Config, a: Architecture, mesh: Any, chip: Chip, work: Workload, lengths: Lengths, compile_: bool
) -> dict[str, Stage]:
    """Prefill, decode and the judge."""
    if compile_:
        programs = aot.sampling_programs(c, a, mesh, jnp.bfloat16, int(chip.gib * GIB))
        stages = _sampling_compiled(c, programs, chip, work, lengths, mesh.size)
    else:
        stages = _sampling_by_formula(c, a, chip, work, lengths, mesh.size)
    return stages | {"judge": _judge(c, mesh, chip, work, compile_)}


def _sampling_compiled(
    c: Config, p: Programs, chip: Chip, work: Workload, lengths: Lengths, chips: int
) -> dict[str, Stage]:
    a, own = p.model.architecture, p.shape.slots // p.replicas
    each = p.mesh.size // p.replicas  # chips of a replica
    replicas, limit = chips // each, chip.gib * GIB
    live = lengths.prompt + lengths.response / 2
    weights, column = aot.local_bytes(p.weights), aot.page_bytes(p)
    masters = 4 * memory.parameters(a) / chips  # which lie there, too
    held = min(
        own, p.shape.pages // p.replicas * PAGE / (live + PAGE / 2)
    )  # slots that have pages at mean length
    turns: dict[str, float] = {
        r"^jit\(decode\)/while$": STEPS,
        "live_pages": math.ceil(held * (live / PAGE + 0.5) / paged.GROUP),
        "while/body": ROUNDS,
    }
    program = aot.compiled("decode", p.lower("decode"), turns)[1]
    step = Stage(
        f"a step of {own} slots on {each} chips", work.sampled_tokens / (held * replicas * SLOTS_USED), program.peak + masters, limit,
        2 * memory.parameters(a) * held / each, weights + held * live * column,
    )  # fmt: skip
    add(step, program, chip, 1 / STEPS, 0)
    attention = 0.0
    if p.kernel == "ragged":  # reads whole blocks
        attention = held * (live + paged.PAGES_PER_BLOCK * PAGE / 2) * column / chip.memory / chip.reached
    # Weights are fetched while products run, so the slower of the two counts.
    step.compiler = max(step.compiler or 0, weights / chip.memory) + attention
    step.note = f"{held * replicas / step.seconds / chips:.0f} tokens/s per chip" if step.seconds else ""
    roofline(step, chip)
    size = bucket(max(32, lengths.prompt - 1))
    program = aot.compiled(f"prefill of {size}", p.lower(size))[1]
    rows = p.rows(size)
    tokens = rows * lengths.prompt
    fill = Stage(
        f"{rows} prompts of up to {size} tokens", work.prompt_tokens / (tokens * replicas), program.peak + masters, limit,
        2 * memory.parameters(a) * tokens / each, weights,
    )  # fmt: skip
    add(fill, program, chip, 1, 0)
    roofline(fill, chip)
    return {"prefill": fill, "decode": step}


def _sampling_by_formula(
    c: Config, a: Architecture, chip: Chip, work: Workload, lengths: Lengths, chips: int
) -> dict[str, Stage]:
    n, limit = memory.parameters(a), chip.gib * GIB
    host = min(chips, HOST if chip.cycles else 8)
    fits = [t for t in range(c.mesh.tensor, host + 1) if host % t == 0 and 2 * n / t <= 0.4 * limit]
    each = fits[0] if fits else chips
    replicas = chips // each
    own = max(1, c.sampling.slots * each // host)
    live = lengths.prompt + lengths.response / 2
    column = 4 * a.layers * a.kv_heads * a.head_dim / each
    held = min(own, (0.85 * limit - 2 * n / each) / (column * (live + PAGE / 2)))
    step = Stage(
        f"a step of {own} slots on {each} chips", work.sampled_tokens / (held * replicas * SLOTS_USED),
        min(0.85 * limit, 2 * n / each + own * (lengths.prompt + c.sampling.max_new_tokens) * column), limit,
        2 * n * held / each, 2 * n / each + held * live * column,
        4 * held * a.model * 2 * a.layers * (1 - 1 / each),
    )  # fmt: skip
    rows = max(1, 1024 // bucket(lengths.prompt))
    fill = Stage(
        f"{rows} prompts of {lengths.prompt} tokens", work.prompt_tokens / (rows * lengths.prompt * replicas), step.peak, limit,
        2 * n * rows * lengths.prompt / each, 2 * n / each, 4 * rows * lengths.prompt * a.model * 2 * a.layers * (1 - 1 / each),
    )  # fmt: skip
    for stage in (fill, step):
        by_formula(stage, chip)
    step.note = f"{held * replicas / step.roofline / chips:.0f} tokens/s per chip"
    return {"prefill": fill, "decode": step}


def _judge(c: Config, mesh: Any, chip: Chip, work: Workload, compile_: bool) -> Stage:
    d, limit = PAIRRM, chip.gib * GIB
    body = d.layers * (4 * d.model**2 + 2 * d.model * d.mlp)
    weights = 2 * (body + d.vocab * d.model)
    rows, size, program = mesh.size * max(1, 4096 // work.pair_tokens), work.pair_tokens, None
    if c.judge.backend == "jax" and compile_:
        program, rows, size = aot.judge_program(d, mesh, jnp.bfloat16, work.pair_tokens)
    tokens = rows * work.pair_tokens / mesh.size
    # Content to content, and the two spread tables of distances.
    flops = 2 * body * tokens + 3 * 4 * d.layers * d.model * tokens * work.pair_tokens / 2
    stage = Stage(
        f"{rows} pairs of up to {size} tokens", work.ordered_pairs / rows, weights, limit, flops, weights
    )
    if c.judge.backend != "jax":
        stage.count, stage.note = (
            0,
            f"judge.backend={c.judge.backend} runs on the hosts, which are not planned: see docs/judges.md",
        )
    if program is None:
        by_formula(stage, chip)
        return stage
    stage.peak = program.peak
    scores = 3 * 2 * d.layers * d.model * tokens * size / (KERNEL * chip.flops)
    add(stage, program, chip, 1, scores)
    roofline(stage, chip)
    return stage


def add(stage: Stage, program: Compiled, chip: Chip, times: float, kernel: float) -> None:
    """A program's cost, run so many times in a unit, and `kernel` seconds that its cycles leave out."""
    cost = program.cost
    if not cost.cycles:
        raise BadInput("this libtpu does not tell what it expects: install libtpu==0.0.42.1")
    stage.compiler = (stage.compiler or 0) + times * cost.cycles / chip.cycles + kernel
    waited = cost.waited / chip.links + cost.collectives * chip.latency
    stage.collectives = (stage.collectives or 0) + times * waited
    stage.compile_seconds += program.seconds
    for kind, size in cost.moved.items():
        stage.moved[kind] = stage.moved.get(kind, 0) + times * size
    stage.sent += times * cost.sent


def roofline(stage: Stage, chip: Chip) -> None:
    stage.roofline = max(stage.flops / chip.flops, stage.bytes / chip.memory, stage.sent / chip.links)


def by_formula(stage: Stage, chip: Chip) -> None:
    """Without a compiler: the roofline, at the shares of the peaks that programs are taken to reach."""
    reached = max(stage.flops / chip.flops / FLOPS_REACHED, stage.bytes / chip.memory / BYTES_REACHED)
    stage.roofline = max(reached, stage.sent / chip.links)
