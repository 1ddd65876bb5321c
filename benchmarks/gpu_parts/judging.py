"""PairRM at its real size with random weights: ordered pairs per second of each backend and dtype, and their rounding."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import judge as original
import numpy as np
from flax import nnx

from gpu_parts import SEED, At, Figure, each
from gpu_parts.card import one_device, sheet
from sppo_jax import sharding
from sppo_jax.pairrm import comparisons, files, jax_model, mesh_judge, sidecar
from sppo_jax.pairrm.comparisons import Comparison
from sppo_jax.pairrm.format import TextPair

# Tokens of the prompt and of each response: a pair has 1,000, and the ordered pairs of five responses are 20.
PROMPT, RESPONSE, K = 200, 400, 5
ROUNDS = 5
Scorer = Callable[[], np.ndarray]


def torch_speed(at: At) -> Iterator[Figure]:
    """The sidecar's network and batches, without its pipe."""
    import torch

    from sppo_jax.pairrm import torch_model

    device = "cpu" if at.rehearse else "cuda"
    checkpoint, todo = _checkpoint(at), _pairs(at)

    def scorer(dtype: str) -> Scorer:
        model = torch_model.load(checkpoint, device, getattr(torch, dtype))

        def score() -> np.ndarray:
            batches = comparisons.batches(todo, sidecar.BATCH_TOKENS[device])
            return _in_order(todo, [(batch, model.logits([one.pair for one in batch])) for batch in batches])

        return score

    yield from _each(at, "torch", scorer, todo)


def jax_speed(at: At) -> Iterator[Figure]:
    """The jax backend's network and batches, dispatched one after another before the first is fetched."""
    checkpoint, todo, mesh = _checkpoint(at), _pairs(at), one_device()
    platform = sharding.platform(mesh)

    def scorer(dtype: str) -> Scorer:
        network, weights = nnx.split(jax_model.load(checkpoint, mesh, jnp.dtype(dtype)))
        program = mesh_judge.forward(network, mesh)

        def score() -> np.ndarray:
            waiting = []
            for size, batch in mesh_judge.batches(todo, platform, 1):
                arrays = mesh_judge.padded(batch, size, mesh_judge.rows(size, platform))
                waiting.append((batch, program(weights, *map(jnp.asarray, arrays))))
            return _in_order(todo, [(batch, np.asarray(x)[: len(batch)]) for batch, x in waiting])

        return score

    yield from _each(at, "jax", scorer, todo)


def _each(at: At, backend: str, scorer: Callable[[str], Scorer], todo: list[Comparison]) -> Iterator[Figure]:
    """A figure for each dtype; rounding against float32 of the same backend, which comes first."""
    exact: list[np.ndarray] = []
    for dtype in ("float32", "bfloat16", "float16"):
        yield from each([(f"{backend}, {dtype}", partial(_rated, at, backend, dtype, scorer, todo, exact))])
        gc.collect()  # the next network needs the room


def _rated(
    at: At,
    backend: str,
    dtype: str,
    scorer: Callable[[str], Scorer],
    todo: list[Comparison],
    exact: list[np.ndarray],
) -> Figure:
    """Pairs per second in one dtype. `exact`: the logits in float32, which the first call adds."""
    score = scorer(dtype)
    began = time.perf_counter()
    logits = score()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(1 if at.rehearse else ROUNDS):
        began = time.perf_counter()
        score()
        seconds.append(time.perf_counter() - began)
    exact += [] if exact else [logits]
    gap, spread = float(np.abs(logits - exact[0]).max()), float(exact[0].std())
    changed = int(((logits > 0) != (exact[0] > 0)).sum())
    rate = len(todo) / statistics.median(seconds)
    share = rate * _flops(at) / sheet(at).flops
    return Figure(
        f"{backend}, {dtype}",
        f"judge, {backend} in {dtype}: {rate:.1f} pairs/s of {len(todo[0].pair)} tokens, {share:.0%} of the card's bfloat16 FLOP/s; "
        f"logits at most {gap:.1e} from float32 (spread {spread:.2f}), {changed} of {len(todo)} signs change",
        {
            "pairs_per_s": rate, "pairs": len(todo), "tokens": len(todo[0].pair), "first_seconds": first, "flops_share": share,
            "largest_difference": gap, "spread": spread, "signs_changed": changed,
        },
    )  # fmt: skip


def _in_order(todo: list[Comparison], scored: list[tuple[list[Comparison], np.ndarray]]) -> np.ndarray:
    logits = np.zeros((1, K, K), np.float32)
    for batch, scores in scored:
        comparisons.scatter(logits, batch, scores)
    return np.asarray([logits[one.cells[0]] for one in todo])


def _pairs(at: At) -> list[Comparison]:
    """Every ordered pair of five random responses to one prompt."""
    prompt, response = (10, 20) if at.rehearse else (PROMPT, RESPONSE)
    rng = np.random.default_rng(SEED)
    source = rng.integers(10, 700, prompt).astype(np.int32)
    texts = rng.integers(10, 700, (K, response)).astype(np.int32)
    return [
        Comparison(TextPair(source, texts[i], texts[j]), [(0, i, j)])
        for i in range(K)
        for j in range(K)
        if i != j
    ]


def _flops(at: At) -> float:
    """FLOPs of one pair: products with the weights, and three kinds of scores."""
    c, layers = original.CONFIG, _layers(at)
    tokens, model = len(_pairs(at)[0].pair), c["hidden_size"]
    body = layers * (4 * model**2 + 2 * model * c["intermediate_size"])
    return 2 * body * tokens + 3 * 2 * layers * model * tokens**2


def _layers(at: At) -> int:
    return 2 if at.rehearse else 24


def _checkpoint(at: At) -> files.Checkpoint:
    """The checkpoint, which the first of the two parts writes."""
    folder = at.folder / "judge"
    if at.rehearse:
        original.CONFIG |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    if not folder.exists():
        part = Path(f"{folder}.{os.getpid()}")
        part.mkdir()
        original.make(part, _layers(at))
        part.rename(folder)
    return files.read(folder / "hf")
