"""Results of the embedded policy and of its PairRM on the GPU against those of the CPU, which a process of its own makes."""

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_parts import SEED, At, Figure, each
from sppo_jax import models, pairrm, preferences
from sppo_jax.config import Sampling
from sppo_jax.hub import names
from sppo_jax.models import Transformer
from sppo_jax.models.logprob import response_logprob
from sppo_jax.records import Responses
from sppo_jax.sampler import Sampler
from sppo_jax.text.chat_template import load_tokenizer
from sppo_jax.tiny import world

FILE = "reference.json"
# Temperature and responses of each way to sample.
WAYS = {"greedy": (0.0, 1), "sampled": (1.0, 4)}


def reference(at: At) -> Iterator[Figure]:
    """The CPU's responses in float32, greedy and sampled, and the logits of PairRM; written into the folder."""
    found: dict[str, Any] = {name: _drawn(at, name, jnp.float32) for name in WAYS}
    rows = {name: [vars(row) for row in drawn] for name, drawn in found.items()}
    prompts, responses = compared(at)
    # The sidecar takes seconds to start: a rehearsal starts it once, in the part "judge".
    with pairrm.load("embedded:pairrm", "jax" if at.rehearse else "torch", dtype="float32") as judge:
        logits = judge.compare(prompts, responses)
    (at.folder / FILE).write_text(json.dumps(rows | {"logits": logits.tolist()}))
    yield Figure(
        "reference",
        f"the CPU's {sum(len(r.response_ids) for drawn in found.values() for r in drawn)} responses and {logits.size - logits.shape[0] * logits.shape[1]} logits",
        {"prompts": len(found["greedy"]), "judged_prompts": len(prompts)},
    )


def compared(at: At) -> tuple[list[str], list[list[str]]]:
    """Prompts and four responses to each, from the embedded world."""
    rng = random.Random(SEED)
    prompts = _prompts(4 if at.rehearse else 100)
    return prompts, [[world.sample_response(prompt, rng) for _ in range(4)] for prompt in prompts]


def sampler(at: At) -> Iterator[Figure]:
    """Ids in float32 against the CPU's, at jax's default precision and at the highest; bfloat16 by log-probabilities."""
    expected = {name: [Responses(**row) for row in _read(at)[name]] for name in WAYS}
    tries = [
        (f"{name}, float32, {precision} precision", precision, name)
        for precision in (("highest",) if at.rehearse else ("default", "highest"))
        for name in WAYS
    ]
    yield from each((title, partial(_repeated, at, title, *how, expected)) for title, *how in tries)
    names_of = [
        (f"{name}, log-probability of the CPU's text in {dtype}", name, dtype)
        for dtype in ("float32", "bfloat16")
        for name in WAYS
    ]
    yield from each(
        (title, partial(_logprobs, at, title, expected[name], dtype)) for title, name, dtype in names_of
    )


def _repeated(at: At, title: str, precision: str, way: str, expected: dict[str, list[Responses]]) -> Figure:
    """The CPU's responses drawn again on this device."""
    with jax.default_matmul_precision(precision) if precision != "default" else contextlib.nullcontext():
        return _same_ids(title, _drawn(at, way, jnp.float32), expected[way])


def _same_ids(name: str, found: list[Responses], expected: list[Responses]) -> Figure:
    """How many responses have the CPU's ids, where the others part from them, and how far log-probabilities are apart."""
    pairs = [both for a, b in zip(found, expected, strict=True) for both in zip(a.response_ids, b.response_ids, strict=True)]  # fmt: skip
    gaps = [
        abs(x - y)
        for a, b in zip(found, expected, strict=True)
        for ids, own, x, y in zip(a.response_ids, b.response_ids, a.logprobs, b.logprobs, strict=True)
        if ids == own
    ]
    parted = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in pairs
        if a != b
    ]
    gap = max(gaps, default=None)
    return Figure(
        name,
        f"{name}: {len(pairs) - len(parted)} of {len(pairs)} responses have the CPU's ids"
        + (f", the others part at token {sorted(parted)}" if parted else "")
        + ("" if gap is None else f"; log-probabilities of equal ones differ by at most {gap:.1e} nats"),
        {"responses": len(pairs), "parted_at": sorted(parted), "largest_gap": gap},
    )


def _logprobs(at: At, title: str, rows: list[Responses], dtype: str) -> Figure:
    """The log-probability of the CPU's texts by training's forward pass on this device, beside the CPU's sampler's."""
    model = _policy(at, jnp.dtype(dtype))
    count = np.asarray([len(ids) for row in rows for ids in row.response_ids])
    gap = (_scored(model, rows) - np.concatenate([row.logprobs for row in rows])) / count
    mean, most = float(gap.mean()), float(np.abs(gap).max())
    return Figure(
        title,
        f"{title} ({model.kernel.name}): {mean:+.1e} nats a token on average, {most:.1e} at most",
        {"kernel": model.kernel.name, "mean_gap_per_token": mean, "largest_gap_per_token": most},
    )


def _scored(model: Transformer, rows: list[Responses]) -> np.ndarray:
    """log pi(y|x) of every response."""
    texts = [(row.prompt_ids, ids) for row in rows for ids in row.response_ids]
    width = -(-max(len(x) + len(y) for x, y in texts) // 32) * 32
    tokens = np.zeros((len(texts), width), np.int32)
    for i, (x, y) in enumerate(texts):
        tokens[i, : len(x) + len(y)] = [*x, *y]
    lengths = (np.asarray([len(x) for x, _ in texts]), np.asarray([len(x) + len(y) for x, y in texts]))
    return np.asarray(jax.jit(response_logprob)(model, tokens, *lengths))


def _drawn(at: At, way: str, dtype: Any) -> list[Responses]:
    """Responses of the embedded policy on this device."""
    temperature, count = WAYS[way]
    sampling = Sampling(
        responses=count, temperature=temperature, slots=16, max_new_tokens=12 if at.rehearse else 64
    )
    drawing = Sampler(_policy(at, dtype), load_tokenizer(names.path("policy"), {}), sampling)
    return drawing.generate(_prompts(4 if at.rehearse else 32), seed=SEED)


def _policy(at: At, dtype: Any) -> Transformer:
    """The embedded policy; its first layer alone in a rehearsal, which compiles in a quarter of the time."""
    model = models.load("embedded:policy", dtype=dtype)
    if not at.rehearse:
        return model
    assert model.head is not None
    weights = {"embedding": model.embedding[...], "norm": model.norm[...], "head": model.head[...]}
    weights |= {f"layers.{name}": x[:1] for name, x in model.stacked().items()}
    return Transformer(replace(model.architecture, layers=1), weights, dtype, model.kernel)


def judge(at: At) -> Iterator[Figure]:
    """The embedded PairRM on this device, both backends, in float32 and in what a run takes, against float32 on the CPU."""
    kinds = [(backend, dtype) for backend in ("torch", "jax") for dtype in ("float32", "bfloat16")]
    # Another start of the sidecar would take a rehearsal seconds.
    kinds = [kind for kind in kinds if not at.rehearse or kind != ("torch", "bfloat16")]
    yield from each((", ".join(kind), partial(_judged, at, *kind)) for kind in kinds)


def _judged(at: At, backend: str, dtype: str) -> Figure:
    """The logits of one backend in one dtype against the CPU's."""
    expected = np.asarray(_read(at)["logits"], np.float32)
    prompts, responses = compared(at)
    with pairrm.load("embedded:pairrm", backend, dtype=dtype) as judging:
        found = judging.compare(prompts, responses)
    off = ~np.eye(expected.shape[1], dtype=bool)
    better = [preferences.probability_matrix(logits) > 0.5 for logits in (found, expected)]
    changed, count = int((better[0] != better[1])[:, off].sum() // 2), int(len(prompts) * off.sum() // 2)
    gap, spread = float(np.abs(found - expected).max()), float(expected[:, off].std())
    return Figure(
        f"{backend}, {dtype}",
        f"PairRM, {backend} in {dtype}: logits at most {gap:.1e} from the CPU's in float32 (spread {spread:.2f}); {changed} of "
        f"{count} decisions change",
        {"largest_difference": gap, "spread": spread, "changed": changed, "pairs": count},
    )


def _prompts(count: int) -> list[str]:
    lines = names.path("prompts/heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def _read(at: At) -> dict[str, Any]:
    return json.loads((at.folder / FILE).read_text())
