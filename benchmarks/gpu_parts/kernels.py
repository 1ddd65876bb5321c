"""Attention over whole sequences: the kernel that a run takes on this device against XLA's in float32, and its speed."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampler_replay import best_seconds

from gpu_parts import SEED, At, Figure, each
from gpu_parts.card import architecture, one_device, sheet
from sppo_jax.config import Config
from sppo_jax.models import attention
from sppo_jax.models.attention import Kernel
from sppo_jax.models.trees import Trees
from sppo_jax.training import memory

# A kernel in bfloat16 may be this many times as far from float32 as XLA's attention in bfloat16 is.
TOLERANCE = 2.0


@dataclass(frozen=True)
class Case:
    """One shape; `packed`: several sequences share a row, where the kernel takes that."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any = jnp.bfloat16
    window: int | None = None
    packed: bool = False


CASES = (
    Case("grouped queries, 128 channels", 32, 8, 128),
    Case("64 channels", 9, 3, 64),
    Case("256 channels", 8, 8, 256),
    Case("window", 32, 8, 128, window=256),
    Case("packed rows", 32, 8, 128, packed=True),
    Case("float32", 32, 8, 128, dtype=jnp.float32),
)
ROWS, WIDTH = 4, 1024
# Rows and width of the timed shape.
TIMED = 8, 2048


def kernels(at: At) -> Iterator[Figure]:
    """Values and gradients of each case, then the speed of the kernel and of XLA's attention."""
    mesh, cases = one_device(), CASES
    if at.rehearse:
        cases = tuple(replace(c, heads=4, kv_heads=2, head_dim=16, window=c.window and 8) for c in CASES[3:])
    size = (2, 48) if at.rehearse else (ROWS, WIDTH)
    yield from each((case.name, partial(_compared, case, mesh, *size)) for case in cases)
    yield from each([("speed", partial(_timed, at, mesh))])


def _compared(case: Case, mesh: Any, rows: int, width: int) -> Figure:
    a = replace(
        architecture(At(rehearse=False, folder=None)),  # type: ignore[arg-type]
        heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, window=case.window,
    )  # fmt: skip
    kernel = attention.choose("auto", mesh, a, jnp.dtype(case.dtype))
    packs = memory.Update.of(Config(), a, mesh, width).packing(None).pack if kernel.name != "xla" else True
    if case.packed and not packs:
        kernel = Kernel("xla", mesh)  # what model.attention=xla takes
    segment = _segments(rows, width, several=case.packed)
    rng = np.random.default_rng(SEED)
    shapes = [(rows, width, n, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    *qkv, cotangent = (jnp.asarray(rng.standard_normal(s, np.float32), case.dtype) for s in shapes)
    with jax.default_matmul_precision("highest"):
        exact = _results(Kernel("xla", mesh), segment, case.window, [x.astype(jnp.float32) for x in qkv], cotangent)  # fmt: skip
    found = _errors(_results(kernel, segment, case.window, qkv, cotangent), exact)
    xla = _errors(_results(Kernel("xla", mesh), segment, case.window, qkv, cotangent), exact)
    fine = max(found.values()) <= TOLERANCE * max(max(xla.values()), 1e-6)
    return Figure(
        case.name,
        f"{case.name}: {kernel.name} in {jnp.dtype(case.dtype)} is "
        + ", ".join(f"{error:.1e} ({name})" for name, error in found.items())
        + f" off float32; XLA's at most {max(xla.values()):.1e}: {'fine' if fine else 'NOT FINE'}"
        + ("; cuDNN takes one sequence a row" if case.packed and not packs else ""),
        {"kernel": kernel.name, "errors": found, "xla_errors": xla, "fine": fine},
    )


def _segments(rows: int, width: int, several: bool) -> jax.Array:
    """Segments of rows with padding on the right: one in each row, or three."""
    segment = np.zeros((rows, width), np.int32)
    for b in range(rows):
        end = width - b * width // (2 * rows)
        cuts = [0, end // 5, end // 2, end] if several else [0, end]
        for s, (begin, stop) in enumerate(itertools.pairwise(cuts)):
            segment[b, begin:stop] = s + 1
    return jnp.asarray(segment)


def _results(
    kernel: Kernel, segment: jax.Array, window: int | None, qkv: list[jax.Array], cotangent: jax.Array
) -> dict[str, jax.Array]:
    """Output and gradients in float32; padding is 0."""
    real = (segment > 0)[..., None, None]

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        def seen(*qkv: jax.Array) -> jax.Array:
            return attention.whole(Trees.of(segment), (window,), kernel)(0, *qkv)

        out, pullback = jax.vjp(seen, q, k, v)
        return jnp.where(real, out, 0), *pullback(jnp.where(real, cotangent, 0).astype(out.dtype))

    names = ("values", "dq", "dk", "dv")
    return {name: x.astype(jnp.float32) for name, x in zip(names, _where(run, real)(*qkv), strict=True)}


def _where(
    run: Callable[..., tuple[jax.Array, ...]], real: jax.Array
) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(lambda *qkv: tuple(jnp.where(real, x, 0) for x in run(*qkv)))


def _errors(found: dict[str, jax.Array], exact: dict[str, jax.Array]) -> dict[str, float]:
    """Relative errors: the norm of the difference over the norm."""
    return {name: float(jnp.linalg.norm(x - exact[name]) / jnp.linalg.norm(exact[name])) for name, x in found.items()}  # fmt: skip


def _timed(at: At, mesh: Any) -> Figure:
    """Milliseconds of forward and backward of one layer, and the share of the card's FLOP/s."""
    a, chip = architecture(at), sheet(at)
    rows, width = (2, 64) if at.rehearse else TIMED
    segment = jnp.ones((rows, width), jnp.int32)
    keys = jax.random.split(jax.random.key(SEED), 3)
    heads = (a.heads, a.kv_heads, a.kv_heads)
    qkv = [jax.random.normal(key, (rows, width, n, a.head_dim), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)]  # fmt: skip
    flops = 2 * width**2 * rows * a.heads * a.head_dim * 3.5
    values: dict[str, float] = {}
    chosen = attention.choose("auto", mesh, a, jnp.bfloat16)
    for kernel in (chosen, Kernel("xla", mesh)):
        seen = attention.whole(Trees.of(segment), (None,), kernel)
        both = jax.jit(jax.grad(lambda qkv, seen=seen: seen(0, *qkv).astype(jnp.float32).sum()))
        values[kernel.name] = 1e3 * best_seconds(both, qkv)
    share = flops / chip.flops / (values[chosen.name] / 1e3)
    return Figure(
        "speed",
        f"forward and backward of a layer, {rows} rows of {width}: "
        + ", ".join(f"{name} {ms:.2f} ms" for name, ms in values.items())
        + f"; {chosen.name} at {share:.0%} of the card's FLOP/s",
        {"milliseconds": values, "flops_share": share, "rows": rows, "width": width},
    )
