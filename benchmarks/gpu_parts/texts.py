"""Results of the embedded policy and of its PairRM on the GPU against those of the CPU, which a process of its own makes."""

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_parts import SEED, At, Figure
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
    """The CPU's responses in float32, greedy and sampled, and the logits of PairRM in PyTorch; written into the folder."""
    found: dict[str, Any] = {name: _drawn(at, name, jnp.float32) for name in WAYS}
    rows = {name: [vars(row) for row in drawn] for name, drawn in found.items()}
    prompts, responses = compared(at)
    with pairrm.load("embedded:pairrm", "torch", dtype="float32") as judge:
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
    for precision in (None, "highest"):
        scope = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        for name, rows in expected.items():
            with scope:
                found = _drawn(at, name, jnp.float32)
            yield _same_ids(f"{name}, float32, {precision or 'default'} precision", found, rows)
    yield from _logprobs(expected)


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
    gap = max(gaps, default=float("nan"))
    return Figure(
        name,
        f"{name}: {len(pairs) - len(parted)} of {len(pairs)} responses have the CPU's ids"
        + (f", the others part at token {sorted(parted)}" if parted else "")
        + f"; log-probabilities of equal ones differ by at most {gap:.1e} nats",
        {"responses": len(pairs), "parted_at": sorted(parted), "largest_gap": gap},
    )


def _logprobs(expected: dict[str, list[Responses]]) -> Iterator[Figure]:
    """The log-probability of the CPU's texts by the training's forward pass on this device, in both dtypes."""
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.load("embedded:policy", dtype=dtype)
        for name, rows in expected.items():
            own = _scored(model, rows)
            theirs = np.concatenate([row.logprobs for row in rows])
            count = np.asarray([len(ids) for row in rows for ids in row.response_ids])
            gap = (own - theirs) / count
            title = f"{name}, log-probability of the CPU's text in {jnp.dtype(dtype)}"
            yield Figure(
                title,
                f"{title} ({model.kernel.name}): {gap.mean():+.1e} nats a token on average, {np.abs(gap).max():.1e} at most",
                {"kernel": model.kernel.name, "mean_gap_per_token": float(gap.mean()), "largest_gap_per_token": float(np.abs(gap).max())},
            )  # fmt: skip


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
    directory = names.path("policy")
    drawing = Sampler(models.load("embedded:policy", dtype=dtype), load_tokenizer(directory, {}), sampling)
    return drawing.generate(_prompts(4 if at.rehearse else 32), seed=SEED)


def judge(at: At) -> Iterator[Figure]:
    """The embedded PairRM on this device, both backends, in float32 and in what a run takes, against float32 on the CPU."""
    expected = np.asarray(_read(at)["logits"], np.float32)
    decided = preferences.probability_matrix(expected) > 0.5
    prompts, responses = compared(at)
    off = ~np.eye(expected.shape[1], dtype=bool)
    for backend in ("torch", "jax"):
        for dtype in ("float32", "bfloat16"):
            with pairrm.load("embedded:pairrm", backend, dtype=dtype) as judging:
                found = judging.compare(prompts, responses)
            changed = int((decided != (preferences.probability_matrix(found) > 0.5))[:, off].sum() // 2)
            gap = float(np.abs(found - expected).max())
            count = len(prompts) * off.sum() // 2
            yield Figure(
                f"{backend}, {dtype}",
                f"PairRM, {backend} in {dtype}: logits at most {gap:.1e} from the CPU's float32 (spread {expected[:, off].std():.2f}); {changed} of {count} decisions change",
                {"largest_difference": gap, "spread": float(expected[:, off].std()), "changed": changed, "pairs": int(count)},
            )  # fmt: skip


def _prompts(count: int) -> list[str]:
    lines = names.path("prompts/heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def _read(at: At) -> dict[str, Any]:
    return json.loads((at.folder / FILE).read_text())
