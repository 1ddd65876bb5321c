"""Decoding and prefill with Mistral-7B's shapes and random weights in bfloat16: tokens per second, and shares of the limits."""

import gc
from collections.abc import Iterator
from typing import Any

from sampler_device import MISTRAL, SMALL, matrices, prefill, random_model, sampler_of
from sampler_device import NEW as NEW_TOKENS
from sampler_device import K as RESPONSES
from sampler_device import decode as steps

from gpu_parts import At, Figure, each
from gpu_parts.card import architecture, sheet
from sppo_jax.models import Architecture

# Eight of the 32 layers compile in a quarter of the time, and the share of the bandwidth is nearly that of all.
LAYERS = 8
# The most telling first: a run has 512 slots, whose keys and values weigh more than the matrices.
SLOTS = (256, 64, 512, 128)


def decode(at: At) -> Iterator[Figure]:
    """Eight layers at each number of slots, and prefill."""
    model = random_model(architecture(at, LAYERS))
    for slots in (4,) if at.rehearse else SLOTS:
        yield from _both(at, model, slots, fills=slots in (4, 64))
        gc.collect()


def decode_whole(at: At) -> Iterator[Figure]:
    """All 32 layers at 256 slots, and prefill."""
    yield from _both(at, random_model(architecture(at)), 4 if at.rehearse else 256, fills=True)


def _both(at: At, model: Any, slots: int, fills: bool) -> Iterator[Figure]:
    """Decoding with so many slots, and prefill where it is asked for."""
    made: list[Any] = []  # the sampler, unless making it fails

    def decoded() -> Figure:
        made.append(sampler_of(model, slots, RESPONSES, NEW_TOKENS, "none"))
        return _decoded(at, made[0])

    tries = [(f"{slots} slots", decoded)]
    tries += [("prefill", lambda: _prefilled(at, made[0]))] if fills else []
    yield from each(tries)
    for sampler in made:
        sampler.release()


def _decoded(at: At, sampler: Any) -> Figure:
    a, chip, slots = sampler.architecture, sheet(at), sampler.stats.slots
    found = steps(sampler, chip.memory, at.rehearse, 2)
    assert sampler.programs is not None
    evicted = sampler.stats.evicted_tokens
    whole = _whole_rate(a, found, slots)
    return Figure(
        f"{slots} slots",
        f"decode, {_layers(a)}, {slots} slots, {found['live_tokens']:.0f} live tokens each: {found['tokens_per_s']:.0f} tokens/s, "
        f"{found['step_ms']:.2f} ms a step, {found['roofline_share']:.0%} of the bandwidth"
        + ("" if a.layers == MISTRAL.layers else f"; at this share all 32 layers give {whole:.0f} tokens/s")
        + (f"; {evicted} tokens were lost for lack of memory" if evicted else ""),
        found
        | {
            "layers": a.layers,
            "tokens_per_s_of_32_layers_at_this_share": whole,
            "evicted_tokens": evicted,
            "kernel": sampler.programs.kernel,
        },
    )


def _whole_rate(a: Architecture, found: dict[str, float], slots: int) -> float:
    """Tokens per second of all 32 layers if a step reached the same share of the bandwidth."""
    whole = SMALL if a.model == SMALL.model else MISTRAL
    column = 2 * 2 * whole.layers * whole.kv_heads * whole.head_dim
    bytes_ = 2 * sum(matrices(whole)) + slots * found["live_tokens"] * column
    return found["tokens_per_s"] * found["bytes_per_step"] / bytes_


def _prefilled(at: At, sampler: Any) -> Figure:
    a, found = sampler.architecture, prefill(sampler, sheet(at).flops, at.rehearse)
    return Figure(
        "prefill",
        f"prefill, {_layers(a)}, prompts of 512: {found['tokens_per_s']:.0f} tokens/s, {found['matmul_share']:.0%} of the "
        "card's FLOP/s",
        found | {"layers": a.layers},
    )


def _layers(a: Architecture) -> str:
    return f"{a.layers} of {MISTRAL.layers} layers"
