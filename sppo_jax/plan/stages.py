"""Stages of a plan: the cost of a unit of each, from compiled programs where there is a compiler, else from formulas.

Symbols in the tables below: N parameters of the model, A of its adapters, w bytes of a number in the compute dtype, D the
model's width, L layers, V vocabulary, M microbatches of an average update. Counts are per chip unless stated otherwise.
"""

import math
from dataclasses import dataclass
from typing import Any

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import mesh_judge
from sppo_jax.pairrm.jax_model import Deberta
from sppo_jax.plan import compiled
from sppo_jax.plan.compiled import CompiledProgram, DoesNotFit
from sppo_jax.plan.cost import GIB, UnitCost
from sppo_jax.plan.target import Target
from sppo_jax.sampler import paged_attention
from sppo_jax.sampler.capacity import bucket
from sppo_jax.sampler.decoding import STEPS
from sppo_jax.sampler.paging import PAGE
from sppo_jax.sampler.programs import Programs
from sppo_jax.training import memory

# microsoft/deberta-v3-large with PairRM's five extra tokens (llm-blender/PairRM). A plan does not read its config.json.
PAIRRM = Deberta(
    vocab=128_005, model=1024, heads=16, mlp=4096, layers=24, buckets=256, farthest=512, norm_eps=1e-7
)
# Rounds of next_token's race at top_p below 1, for the slowest of all slots.
ROUNDS = 2
# Slot efficiency of the sampler on a recorded trace (EXPERIMENTS.md).
SLOTS_USED = 0.86
# Share of the peak that attention kernels are assumed to reach: the compiler gives no cycles for them.
KERNEL = 0.4
# FLOPs of attention's backward pass over those of its forward pass: five products instead of two.
ATTENTION_BACKWARD = 2.5
# Arrays of the optimiser state's size that an update moves: the gradients are written, read for their norm and read again;
# masters and second moments are read and written.
OPTIMISER_ARRAYS = 7
# Arrays of all tokens, of the model's width and of the feed-forward's, that a forward pass is assumed to hold at once.
ACTIVATIONS = 8


def stages(target: Target) -> dict[str, UnitCost]:
    """Costs of all stages by name, in the order of an iteration. Raises DoesNotFit, and BadInput for impossible options."""
    # An attention kernel that cannot serve the model is bad input, not lack of memory: raise it here.
    _ = target.kernel
    return sampling_stages(target) | {"judge": judge_stage(target)} | fit_stages(target)


@dataclass(frozen=True)
class UpdateCounts:
    """What an average update computes on one chip."""

    microbatches: float
    # Tokens of a microbatch on average, as a share of those of the larger shape, for which programs are compiled.
    share: float
    # Tokens that belong to a sequence, and all tokens that are computed, padding included.
    real: float
    padded: float
    # FLOPs of a token in products with weights.
    forward: float
    backward: float
    # FLOPs of attention in one forward pass, and how many times as many an update computes.
    attention: float
    attention_passes: float
    # Bytes: the chip's own weights, and all weights in the compute dtype as the chip gathers them.
    resident: float
    gathered: float


def update_counts(target: Target) -> UpdateCounts:
    """Counts of an average update on one chip.

    | term | FLOPs | why |
    |---|---|---|
    | forward, a token | 2 (N + A) | a multiplication and an addition for each weight |
    | backward, a token | 4 N | as many for the gradients of the inputs, and as many for those of the weights |
    | the same with adapters | 2 N + 4 A | frozen matrices have no gradient, only their inputs do |
    | attention forward, a row of T | 2 T² L heads head_dim | two products of 2 T², half of which the causal mask skips |
    | the same with `xla` | 4 T² L heads head_dim | XLA's attention computes the masked half, too |
    | attention, an update | 1 + 2.5 + 1 passes | forward, backward, and forward again unless remat keeps its result |
    """
    c, a, layout, lengths_GR = target.config, target.architecture, target.layout, target.work.lengths_GR
    n, extra, tensor = memory.parameters(a), memory.adapters(a), target.mesh.shape["tensor"]
    real = sum(map(sum, lengths_GR)) / len(lengths_GR) * c.fit.global_batch / target.mesh.size
    padded = real / layout.real_token_share
    microbatches = padded * target.mesh.size / layout.mean(lambda shape: shape.tokens)
    products = 2 * (2 if target.kernel == "xla" else 1)
    squares = layout.mean(lambda shape: shape.rows * shape.width**2)
    attention = squares * microbatches / sharding.batch_shards(target.mesh) * products
    # remat=attention keeps the results of these kernels alone.
    kept = c.fit.remat == "attention" and target.kernel in ("splash", "blocked")
    state = target.update.state
    return UpdateCounts(
        microbatches=microbatches,
        share=layout.mean(lambda shape: shape.tokens) / (layout.rows * layout.width),
        real=real,
        padded=padded,
        forward=2 * (n + extra),
        backward=2 * n + 4 * extra if a.lora_rank else 4 * n,
        attention=a.layers * a.heads * a.head_dim * attention / tensor,
        attention_passes=1 + ATTENTION_BACKWARD + (0 if kept else 1),
        resident=state["parameters"] + state.get("frozen", 0),
        gathered=target.dtype.itemsize * n / tensor,
    )


def fit_stages(target: Target) -> dict[str, UnitCost]:
    """Costs of the reference log-probs and of the update. Raises DoesNotFit.

    | term | bytes between memory and cores | why |
    |---|---|---|
    | a pass over one microbatch | the chip's weights + 2 w N / tensor | its weights are read; gathered ones written and read |
    | reference | M passes | forward; with fit.anchor the base's, too, but in the first iteration |
    | update | 2 M passes + 7 optimiser states | forward and backward; OPTIMISER_ARRAYS |
    """
    counts, work, chip = update_counts(target), target.work, target.chip
    m, game = counts.microbatches, target.config
    models = 2 - 1 / game.iterations if game.fit.anchor else 1.0
    one_pass = counts.resident + 2 * counts.gathered
    reference = UnitCost(
        unit=f"an update's {m:.1f} forward passes",
        count=models * work.trained_pairs / game.fit.global_batch,
        chip=chip,
        flops=counts.forward * counts.real,
        bytes=m * one_pass,
    )
    update = UnitCost(
        unit=f"an update of {m:.1f} microbatches",
        count=work.updates,
        chip=chip,
        flops=(counts.forward + counts.backward) * counts.real,
        bytes=m * 2 * one_pass + OPTIMISER_ARRAYS * target.update.state["optimiser"],
    )
    complete = _fit_compiled if target.compiled else _fit_by_formula
    complete(target, counts, reference, update)
    return {"reference": reference, "fit": update}


def _fit_compiled(target: Target, counts: UpdateCounts, reference: UnitCost, update: UnitCost) -> None:
    """Set memory and seconds of both costs from the compiled update. Raises DoesNotFit."""
    c, a, m = target.config, target.architecture, counts.microbatches
    found = compiled.compile_update(c, a, target.mesh, target.dtype, target.layout)
    if found.peak > target.limit:
        raise DoesNotFit(f"{found.peak / GIB:.2f} GiB of {target.chip.gib} at once")
    _add(reference, found.forward, m, counts.share)
    _add(update, found.forward, m, counts.share)
    _add(update, found.backward, 1, counts.share)
    if found.accumulate is not None:
        _add(update, found.accumulate, m - 1, counts.share)
    _add(update, found.update, 1)
    if target.kernel != "xla":  # XLA's attention consists of products, which have cycles
        seconds = counts.attention / (KERNEL * target.chip.flops)
        reference.uncounted, update.uncounted = seconds, counts.attention_passes * seconds
    resident = {"parameters": counts.resident, "saved activations": found.saved}
    reference.memory = _kinds(resident, found.forward.peak)
    update.memory = found.memory


def _fit_by_formula(target: Target, counts: UpdateCounts, reference: UnitCost, update: UnitCost) -> None:
    """Set memory and seconds of both costs by formula. Raises DoesNotFit.

    | collective | bytes that leave a chip | why |
    |---|---|---|
    | gathers | M w N / tensor (1 - 1/fsdp) | all weights in each pass over a microbatch, less the chip's own part |
    | sums | 4 L w D padded (tensor - 1) | all-reduce of two products a layer, over padded tensor tokens of the group |
    | gradients over fsdp | 2 gathers | an all-reduce, as the compiler for v5e makes of it; none with adapters |
    | gradients over data | 2 M (1 - 1/data) optimiser | an all-reduce of float32 gradients, as large as the optimiser's state |

    The reference has one pass; an update gathers in its forward and backward pass, and sums in these and when the layers
    are computed again.
    """
    a, layout, shape, width = target.architecture, target.layout, target.mesh.shape, target.dtype.itemsize
    m, padded = counts.microbatches, counts.padded
    tokens = layout.rows * layout.width / sharding.batch_shards(target.mesh)
    update.memory = target.update.kinds(tokens, layout.microbatches > 1)
    if update.peak > target.limit:
        raise DoesNotFit(f"{update.peak / GIB:.1f} GiB by formula, of {target.chip.gib}")
    reference.memory = {
        kind: size for kind, size in update.memory.items() if kind not in ("gradients", "optimiser")
    }
    gathers = m * counts.gathered * (1 - 1 / shape["fsdp"])
    sums = 4 * a.layers * width * a.model * padded * (shape["tensor"] - 1)
    gradients = 0 if a.lora_rank else 2 * gathers
    gradients += m * 2 * (1 - 1 / shape["data"]) * target.update.state["optimiser"]
    reference.estimate(counts.forward * padded + counts.attention, gathers + sums, width)
    # The layers are computed again in the backward pass.
    products = (2 * counts.forward + counts.backward) * padded
    computed = products + counts.attention_passes * counts.attention
    update.estimate(computed, 2 * gathers + 3 * sums + gradients, width)


@dataclass(frozen=True)
class SamplerCounts:
    """The sampler's programs, and what one of its replicas holds."""

    programs: Programs
    # Slots and chips of a replica.
    slots: int
    chips: int
    # Slots of a replica that have pages for a response of mean length, and the mean columns of such a response.
    filled: float
    columns: float
    # Bytes on a chip: weights, keys and values of one column, and by kind all that stays while the sampler works.
    weights: float
    column: float
    resident: dict[str, float]


def sampler_counts(target: Target) -> SamplerCounts:
    """The sampler that a run would have on the target. Raises DoesNotFit where a response does not fit."""
    c, a = target.config, target.architecture
    try:
        p = compiled.sampling_programs(c, a, target.mesh, target.dtype, target.limit)
    except BadInput as error:
        raise DoesNotFit(str(error)) from None
    slots = p.shape.slots // p.replicas
    # A response is half done on average, and its last page half full.
    columns = target.lengths.prompt + target.lengths.response / 2
    weights = compiled.local_bytes(p.weights)
    return SamplerCounts(
        programs=p,
        slots=slots,
        chips=p.mesh.size // p.replicas,
        filled=min(slots, p.shape.pages // p.replicas * PAGE / (columns + PAGE / 2)),
        columns=columns,
        weights=weights,
        column=compiled.page_bytes(p),
        resident={
            "weights": weights,
            "keys and values": compiled.local_bytes(p.pages),
            "masters": compiled.kept_bytes(c, a, target.mesh, target.dtype),
        },
    )


def sampling_stages(target: Target) -> dict[str, UnitCost]:
    """Costs of prefill and decode, by the programs that the sampler would make there. Raises DoesNotFit."""
    counts = sampler_counts(target)
    decode = _decode(target, counts)
    prefill = _prefill(target, counts)
    for stage in (prefill, decode):
        if stage.peak > target.limit:
            raise DoesNotFit(f"{stage.peak / GIB:.2f} GiB of {target.chip.gib} while sampling")
    return {"prefill": prefill, "decode": decode}


def _decode(target: Target, counts: SamplerCounts) -> UnitCost:
    """Cost of one decode step on one replica, the others working beside it.

    | term | per chip of the replica | why |
    |---|---|---|
    | FLOPs needed | 2 N filled / chips | a token of each filled slot |
    | FLOPs computed | 2 N slots / chips | empty slots are computed, too |
    | bytes | weights + filled columns | all weights, and the keys and values of all live columns, are read |
    | bytes sent | 4 L w D (1 - 1/chips) slots | all-reduce of two products a layer |
    """
    a, chip, p, width = target.architecture, target.chip, counts.programs, target.dtype.itemsize
    n, filled, chips = memory.parameters(a), counts.filled, counts.chips
    step = UnitCost(
        unit=f"a step of {counts.slots} slots on {chips} chips",
        count=target.work.sampled_tokens / (filled * p.replicas * SLOTS_USED),
        chip=chip,
        flops=2 * n * filled / chips,
        bytes=counts.weights + filled * counts.columns * counts.column,
    )
    if target.compiled:
        loop_counts: dict[str, float] = {
            r"^jit\(decode\)/while$": STEPS,
            "live_pages": math.ceil(filled * (counts.columns / PAGE + 0.5) / paged_attention.GROUP),
            "while/body": ROUNDS,
        }
        program = compiled.compile_program("decode", p.lower_decode(), loop_counts)[1]
        _add(step, program, 1 / STEPS)
        step.memory = _kinds(counts.resident, program.peak + counts.resident["masters"])
        # Weights are fetched while products run, so the slower of the two sets the time.
        step.uncounted = max(0.0, counts.weights / chip.memory - (step.compiler or 0))
        if p.kernel == "ragged":  # reads whole blocks of pages
            read = filled * (counts.columns + paged_attention.PAGES_PER_BLOCK * PAGE / 2) * counts.column
            step.uncounted += read / chip.memory / chip.reached
    else:
        sent = 4 * a.layers * width * a.model * (1 - 1 / chips) * counts.slots
        step.estimate(2 * n * counts.slots / chips, sent, width)
        step.memory = counts.resident | {"temporaries": _decode_temporaries(target, counts)}
    step.note = f"{filled * p.replicas / step.seconds / p.mesh.size:.0f} tokens/s per chip"
    return step


def _decode_temporaries(target: Target, counts: SamplerCounts) -> float:
    """Bytes of a decode step's temporaries by formula, on one chip.

    | term, a slot | bytes | why |
    |---|---|---|
    | logits | 2 x 4 V | float32, and a copy of them |
    | attention with `xla` | 2 x 4 pages heads (head_dim + 2) | keys, values, scores and their softmax; one column a page |
    """
    a, p = target.architecture, counts.programs
    wide = 4 * a.vocab + 4 * (p.shape.width * a.heads * (a.head_dim + 2) if p.kernel == "xla" else 0)
    return 2 * counts.slots * wide / counts.chips


def _prefill(target: Target, counts: SamplerCounts) -> UnitCost:
    """Cost of one prefill of prompts of mean length on one replica, the others working beside it.

    | term | per chip of the replica | why |
    |---|---|---|
    | FLOPs needed | 2 N tokens / chips | the prompts' own tokens |
    | FLOPs computed | 2 N rows size / chips | prompts are padded to the bucket's size |
    | bytes | weights | all weights are read |
    | bytes sent | 4 L w D (1 - 1/chips) rows size | all-reduce of two products a layer |
    | temporaries | 8 rows size w (D + feed-forward / chips) | ACTIVATIONS |
    | attention | 2 rows size² L heads head_dim / chips | as in an update; the compiler gives no cycles for kernels |
    """
    a, chip, p, width = target.architecture, target.chip, counts.programs, target.dtype.itemsize
    n, chips = memory.parameters(a), counts.chips
    size = bucket(max(32, target.lengths.prompt - 1))
    rows = p.rows(size)
    tokens = rows * target.lengths.prompt
    fill = UnitCost(
        unit=f"{rows} prompts of up to {size} tokens",
        count=target.work.prompt_tokens / (tokens * p.replicas),
        chip=chip,
        flops=2 * n * tokens / chips,
        bytes=counts.weights,
    )
    if target.compiled:
        program = compiled.compile_program(f"prefill of {size}", p.lower_prefill(size))[1]
        _add(fill, program, 1)
        fill.memory = _kinds(counts.resident, program.peak + counts.resident["masters"])
        if p.model.kernel.name != "xla":
            attention = 2 * a.layers * a.heads * a.head_dim * rows * size**2 / chips
            fill.uncounted = attention / (KERNEL * chip.flops)
    else:
        sent = 4 * a.layers * width * a.model * (1 - 1 / chips) * rows * size
        fill.estimate(2 * n * rows * size / chips, sent, width)
        activations = ACTIVATIONS * rows * size * width * (a.model + a.mlp / chips)
        fill.memory = counts.resident | {"temporaries": activations}
    return fill


def judge_stage(target: Target) -> UnitCost:
    """Cost of a batch of PairRM on the mesh. For another backend, zero batches with a note. Raises DoesNotFit.

    | term | FLOPs or bytes | why |
    |---|---|---|
    | body | L (4 D² + 2 D feed-forward) weights | q, k, v and output of attention; two matrices of the feed-forward |
    | FLOPs of a token | 2 body | a multiplication and an addition for each weight |
    | scores | 3 x 2 L D rows size² | content to content, and two spread tables of relative positions |
    | temporaries | 8 rows size w (D + feed-forward) | ACTIVATIONS |

    FLOPs needed are those of the pairs' own tokens; FLOPs computed those of rows padded to the bucket's size.
    """
    c, d, platform = target.config, PAIRRM, target.chip.platform
    dtype = sharding.compute_dtype(c.judge.compute_dtype, target.mesh)
    body = d.layers * (4 * d.model**2 + 2 * d.model * d.mlp)
    weights = dtype.itemsize * (body + d.vocab * d.model)
    tokens = target.work.pair_tokens
    size = mesh_judge.bucket(tokens, platform)
    rows = mesh_judge.rows(size, platform)
    scores = 3 * 2 * d.layers * d.model * rows * size * size
    stage = UnitCost(
        unit=f"{rows * target.mesh.size} pairs of up to {size} tokens",
        count=target.work.ordered_pairs / rows / target.mesh.size,
        chip=target.chip,
        flops=2 * body * rows * tokens + scores * (tokens / size) ** 2,
        bytes=weights,
    )
    masters = compiled.kept_bytes(c, target.architecture, target.mesh, target.dtype)
    resident: dict[str, float] = {"weights": weights, "masters": masters}
    if c.judge.backend != "jax":
        stage.count = 0
        stage.note = (
            f"judge.backend={c.judge.backend} runs on the hosts, which are not planned: see docs/judges.md"
        )
    if target.compiled and c.judge.backend == "jax":
        program = compiled.judge_program(d, target.mesh, dtype, tokens)
        _add(stage, program, 1)
        stage.uncounted = scores / (KERNEL * target.chip.flops)
        stage.memory = _kinds(resident, program.peak + masters)
    else:
        stage.estimate(2 * body * rows * size + scores, 0, dtype.itemsize)
        activations = ACTIVATIONS * rows * size * dtype.itemsize * (d.model + d.mlp)
        stage.memory = resident | {"temporaries": activations}
    if stage.peak > target.limit:
        raise DoesNotFit(f"{stage.peak / GIB:.2f} GiB of {target.chip.gib} while judging")
    return stage


def _add(stage: UnitCost, program: CompiledProgram, times: float, computed: float = 1.0) -> None:
    if not program.cost.cycles:
        raise BadInput("this libtpu prints no cycle estimates: install libtpu==0.0.42.1")
    stage.add(program.cost, times, program.seconds, computed)


def _kinds(resident: dict[str, float], peak: float) -> dict[str, Any]:
    """`resident` bytes by kind; the rest of `peak` is temporaries. A program's peak leaves out weights that it does not use."""
    return resident | {"temporaries": max(0.0, peak - sum(resident.values()))}
