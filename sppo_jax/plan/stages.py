"""Stages of a plan: the figures of each, from the compiled programs where there is a compiler, else from formulas."""

import math

import jax.numpy as jnp

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import mesh_judge
from sppo_jax.pairrm.jax_model import Deberta
from sppo_jax.plan import compiled
from sppo_jax.plan.compiled import Compiled, DoesNotFit
from sppo_jax.plan.cost import GIB, Stage
from sppo_jax.plan.target import Setting
from sppo_jax.sampler import paged_attention
from sppo_jax.sampler.capacity import bucket
from sppo_jax.sampler.decoding import STEPS
from sppo_jax.sampler.paging import PAGE
from sppo_jax.training import memory

# microsoft/deberta-v3-large with PairRM's five extra tokens: llm-blender/PairRM, whose options no plan reads.
PAIRRM = Deberta(
    vocab=128_005, model=1024, heads=16, mlp=4096, layers=24, buckets=256, farthest=512, norm_eps=1e-7
)
ROUNDS = 2  # of next_token's race at top_p below 1, for the slowest of all slots
SLOTS_USED = 0.86  # slot efficiency of the sampler on a recorded trace (EXPERIMENTS.md)
KERNEL = (
    0.4  # share of the peak that attention kernels are taken to reach: the compiler's cycles leave them out
)


def stages(s: Setting) -> dict[str, Stage]:
    """All of them. Raises DoesNotFit, and BadInput for what no chip could do."""
    _ = s.kernel  # one that is named and does not serve is no matter of room
    return sampling_stages(s) | {"judge": judge_stage(s)} | fit_stages(s)


def fit_stages(s: Setting) -> dict[str, Stage]:
    """Reference log-probs and the update. Raises DoesNotFit."""
    c, a, at, work, width = s.config, s.architecture, s.layout, s.work, s.dtype.itemsize
    n, extra, tensor, fsdp = memory.parameters(a), memory.adapters(a), s.mesh.shape["tensor"], s.mesh.shape["fsdp"]  # fmt: skip
    # Tokens of an update, of one chip, that belong to a sequence, and how many microbatches they come to on average.
    real = sum(map(sum, work.lengths_GR)) / len(work.lengths_GR) * c.fit.global_batch / s.mesh.size
    m = real / at.real_token_share / (at.rows * at.width / s.mesh.size)
    whole, state = width * n / tensor, s.update.state  # the weights as a chip sees them pass
    kept = state["parameters"] + state.get("frozen", 0)
    # Frozen matrices have no gradient, which is half of a backward pass; the factors beside them do.
    forward, backward = 2 * (n + extra), 2 * n + 4 * extra if a.lora_rank else 4 * n
    reference = Stage(
        f"an update's {m:.1f} forward passes", work.trained_pairs / c.fit.global_batch, s.chip, forward * real,
        m * (kept + 2 * whole),
    )  # fmt: skip
    update = Stage(
        f"an update of {m:.1f} microbatches", work.updates, s.chip, (forward + backward) * real,
        m * (2 * kept + 4 * whole) + 7 * state["optimiser"],
    )  # fmt: skip
    # Of attention in all layers, one forward pass of an update on one chip; backward is 2.5 times that. A kernel leaves
    # out what lies after the query.
    seen = 2 * at.rows * at.width**2 * m / sharding.batch_shards(s.mesh) * (2 if s.kernel == "xla" else 1)
    scores = a.layers * a.heads * a.head_dim * seen / tensor
    spared = c.fit.remat == "attention" and s.kernel in ("splash", "blocked")  # of the others nothing is kept
    again = 0 if spared else 1
    if s.compiled:
        found = compiled.fitted(c, a, s.mesh, s.dtype, at)
        if found.peak > s.limit:
            raise DoesNotFit(f"{found.peak / GIB:.2f} GiB of {s.chip.gib} at once")
        _add(reference, found.forward, m)
        _add(update, found.forward, m)
        _add(update, found.backward, 1)
        if found.accumulate is not None:
            _add(update, found.accumulate, m - 1)
        _add(update, found.update, 1)
        if s.kernel != "xla":  # whose products have cycles
            seconds = scores / (KERNEL * s.chip.flops)
            reference.left_out, update.left_out = seconds, (3.5 + again) * seconds
        reference.memory = _kinds({"parameters": kept, "saved activations": found.saved}, found.forward.peak)
        update.memory = found.memory
        return {"reference": reference, "fit": update}
    padded = real / at.real_token_share
    update.memory = s.update.kinds(at.rows * at.width / sharding.batch_shards(s.mesh), at.microbatches > 1)
    if update.peak > s.limit:
        raise DoesNotFit(f"{update.peak / GIB:.1f} GiB by formula, of {s.chip.gib}")
    reference.memory = {
        kind: size for kind, size in update.memory.items() if kind not in ("gradients", "optimiser")
    }
    # What leaves a chip: a gather of the weights, the sums of a layer's two products that `tensor` cuts, the gradients'
    # sums over fsdp, as the compiler for v5e has them, and over data.
    passed = m * whole * (1 - 1 / fsdp)
    summed = 4 * a.layers * width * a.model * padded * (tensor - 1)
    gradients = (0 if a.lora_rank else 2 * passed) + m * 2 * (1 - 1 / s.mesh.shape["data"]) * state[
        "optimiser"
    ]
    reference.by_formula(forward * padded + scores, passed + summed, width)
    update.by_formula(
        (2 * forward + backward) * padded + (3.5 + again) * scores, 2 * passed + 3 * summed + gradients, width
    )
    return {"reference": reference, "fit": update}


def sampling_stages(s: Setting) -> dict[str, Stage]:
    """Prefill and decode: the programs that the sampler would make there, compiled or not. Raises DoesNotFit."""
    c, a, chip, work = s.config, s.architecture, s.chip, s.work
    try:
        p = compiled.sampling_programs(c, a, s.mesh, s.dtype, s.limit)
    except BadInput as error:
        raise DoesNotFit(str(error)) from None
    own, each = p.shape.slots // p.replicas, p.mesh.size // p.replicas  # slots and chips of a replica
    n, live = memory.parameters(a), s.lengths.prompt + s.lengths.response / 2
    weights, column, pool = (
        compiled.local_bytes(p.weights),
        compiled.page_bytes(p),
        compiled.local_bytes(p.pages),
    )
    lies: dict[str, float] = {
        "weights": weights,
        "keys and values": pool,
        "masters": compiled.kept_bytes(c, a, s.mesh, s.dtype),
    }
    # Slots that have pages at mean length.
    held = min(own, p.shape.pages // p.replicas * PAGE / (live + PAGE / 2))
    step = Stage(
        f"a step of {own} slots on {each} chips", work.sampled_tokens / (held * p.replicas * SLOTS_USED), chip,
        2 * n * held / each, weights + held * live * column,
    )  # fmt: skip
    size = bucket(max(32, s.lengths.prompt - 1))
    rows = p.rows(size)
    tokens = rows * s.lengths.prompt
    fill = Stage(
        f"{rows} prompts of up to {size} tokens", work.prompt_tokens / (tokens * p.replicas), chip,
        2 * n * tokens / each, weights,
    )  # fmt: skip
    if s.compiled:
        turns: dict[str, float] = {
            r"^jit\(decode\)/while$": STEPS,
            "live_pages": math.ceil(held * (live / PAGE + 0.5) / paged_attention.GROUP),
            "while/body": ROUNDS,
        }
        program = compiled.compiled("decode", p.lower_decode(), turns)[1]
        _add(step, program, 1 / STEPS)
        step.memory = _kinds(lies, program.peak + lies["masters"])
        # Weights are fetched while products run, so the slower of the two counts.
        step.left_out = max(0.0, weights / chip.memory - (step.compiler or 0))
        if p.kernel == "ragged":  # reads whole blocks
            read = held * (live + paged_attention.PAGES_PER_BLOCK * PAGE / 2) * column
            step.left_out += read / chip.memory / chip.reached
        program = compiled.compiled(f"prefill of {size}", p.lower_prefill(size))[1]
        _add(fill, program, 1)
        fill.memory = _kinds(lies, program.peak + lies["masters"])
        if p.model.kernel.name != "xla":
            scores = 2 * a.layers * a.heads * a.head_dim * rows * size**2 / each
            fill.left_out = scores / (KERNEL * chip.flops)
    else:
        wide = 4 * a.vocab + 4 * (p.shape.width * a.heads * (a.head_dim + 2) if p.kernel == "xla" else 0)
        summed = 4 * a.layers * s.dtype.itemsize * a.model * (1 - 1 / each)
        step.by_formula(2 * n * own / each, summed * own, s.dtype.itemsize)
        fill.by_formula(2 * n * rows * size / each, summed * rows * size, s.dtype.itemsize)
        step.memory = lies | {"temporaries": 2 * own * wide / each}
        fill.memory = lies | {"temporaries": 8 * rows * size * s.dtype.itemsize * (a.model + a.mlp / each)}
    step.note = f"{held * p.replicas / step.seconds / p.mesh.size:.0f} tokens/s per chip"
    for stage in (fill, step):
        if stage.peak > s.limit:
            raise DoesNotFit(f"{stage.peak / GIB:.2f} GiB of {chip.gib} while sampling")
    return {"prefill": fill, "decode": step}


def judge_stage(s: Setting) -> Stage:
    """PairRM on the mesh; another judge is not planned, and says so. Raises DoesNotFit."""
    c, d, platform = s.config, PAIRRM, s.chip.platform
    dtype = jnp.dtype("bfloat16" if c.judge.compute_dtype == "auto" else c.judge.compute_dtype)
    body = d.layers * (4 * d.model**2 + 2 * d.model * d.mlp)
    weights = dtype.itemsize * (body + d.vocab * d.model)
    size = mesh_judge.bucket(s.work.pair_tokens, platform)
    rows = mesh_judge.rows(size, platform)
    # Content to content, and the two spread tables of distances.
    scores = 3 * 2 * d.layers * d.model * rows * size * size
    flops = 2 * body * rows * s.work.pair_tokens + scores * (s.work.pair_tokens / size) ** 2
    stage = Stage(
        f"{rows * s.mesh.size} pairs of up to {size} tokens", s.work.ordered_pairs / rows / s.mesh.size, s.chip,
        flops, weights,
    )  # fmt: skip
    lies: dict[str, float] = {
        "weights": weights,
        "masters": compiled.kept_bytes(c, s.architecture, s.mesh, s.dtype),
    }
    if c.judge.backend != "jax":
        stage.count = 0
        stage.note = (
            f"judge.backend={c.judge.backend} runs on the hosts, which are not planned: see docs/judges.md"
        )
    if s.compiled and c.judge.backend == "jax":
        program = compiled.judge_program(d, s.mesh, dtype, s.work.pair_tokens)
        _add(stage, program, 1)
        stage.left_out = scores / (KERNEL * s.chip.flops)
        stage.memory = _kinds(lies, program.peak + lies["masters"])
    else:
        stage.by_formula(2 * body * rows * size + scores, 0, dtype.itemsize)
        stage.memory = lies | {"temporaries": 8 * rows * size * dtype.itemsize * (d.model + d.mlp)}
    if stage.peak > s.limit:
        raise DoesNotFit(f"{stage.peak / GIB:.2f} GiB of {s.chip.gib} while judging")
    return stage


def _add(stage: Stage, program: Compiled, times: float) -> None:
    if not program.cost.cycles:
        raise BadInput("this libtpu does not tell what it expects: install libtpu==0.0.42.1")
    stage.add(program.cost, times, program.seconds)


def _kinds(lies: dict[str, float], peak: float) -> dict[str, float]:
    """What lies there, and what else a program's peak has. Weights that a program does not use are no part of its peak."""
    return lies | {"temporaries": max(0.0, peak - sum(lies.values()))}
