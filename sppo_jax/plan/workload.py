"""Work of one iteration of a configuration: counts of tokens, pairs and updates.

Lengths of prompts and responses are unknown before a run; they are drawn, from a fixed seed, with the given means.
"""

import math
from dataclasses import dataclass

import numpy as np

from sppo_jax.config import Config, Judge
from sppo_jax.pairrm.format import Limits
from sppo_jax.plan.lengths import Lengths
from sppo_jax.training.packing import Layout, Packing, arranged

# Standard deviation of the lengths' logarithm; that of recorded lengths lies between .6 and 1.
SPREAD = 0.8
# Most prompts whose lengths are drawn.
SAMPLE = 20_000
# Special tokens around each text that PairRM reads.
FRAME = 3


@dataclass(frozen=True)
class Workload:
    """Work of one iteration."""

    # Tokens of all responses, those to held-out prompts included.
    sampled_tokens: float
    # Tokens that are prefilled.
    prompt_tokens: float
    # Ordered pairs that the judge scores, and the mean tokens that it reads of one.
    ordered_pairs: int
    pair_tokens: int
    trained_pairs: int
    updates: int
    # Tokens of the drawn sequences that are trained on, prompt included: R responses of G prompts.
    lengths_GR: list[list[int]]


def drawn(rng: np.random.Generator, count: int, mean: float, most: int) -> np.ndarray:
    """`count` integer lengths in [1, most] from a lognormal cut at `most`, with this mean; all are `most` if mean >= most."""
    if mean >= most:
        return np.full(count, most)
    noise = np.exp(SPREAD * rng.standard_normal(count))
    low, high = 0.0, float(most)
    for _ in range(50):  # the cut lowers the mean: find the scale that restores it
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(noise * middle, most).mean() < mean else (low, middle)
    return np.clip(np.rint(noise * high), 1, most).astype(int)


def workload(config: Config, lengths: Lengths) -> Workload:
    """The work of one iteration of a configuration."""
    s, p, k = config.sampling, config.prompts.per_iteration, config.sampling.responses
    kept = 2 if config.pairs.select == "best_worst" else k
    # A fixed seed: the plan of a configuration does not depend on its seed.
    rng = np.random.default_rng(0)
    count = min(p, max(SAMPLE, config.fit.global_batch))
    prompt_G = drawn(rng, count, lengths.prompt, config.prompts.max_length)
    response_GR = drawn(rng, count * kept, lengths.response, s.max_new_tokens).reshape(count, kept)
    probed = min(config.eval.probe_prompts, config.eval.prompts)
    judged = 0 if config.pairs.source else p  # given pairs are neither sampled nor judged
    played = 0 if config.responses.source else judged  # given responses are judged alone
    responses = played * k + config.eval.prompts + probed * k
    return Workload(
        sampled_tokens=responses * float(response_GR.mean()),
        prompt_tokens=(played + config.eval.prompts + probed) * float(prompt_G.mean()),
        ordered_pairs=(judged + probed) * k * (k - 1) + 4 * config.eval.prompts,
        pair_tokens=_read(config.judge, prompt_G, response_GR),
        trained_pairs=p,
        updates=math.ceil(p / config.fit.global_batch) * config.fit.epochs,
        lengths_GR=(prompt_G[:, None] + response_GR).tolist(),
    )


def _read(judge: Judge, prompt_G: np.ndarray, response_GR: np.ndarray) -> int:
    """Mean tokens of a pair after PairRM's cuts, by the rule of pairrm.format.Limits.

    Lengths are assumed to be the same in PairRM's tokenizer and in the policy's.
    """
    limits = Limits(judge.source_tokens, judge.candidate_tokens, judge.total_tokens).of({})
    prompt_G = np.minimum(prompt_G + FRAME, limits.source)
    room_G = (limits.total - prompt_G) // 2
    return round(float((prompt_G + 2 * np.minimum(response_GR + FRAME, room_G[:, None]).mean(axis=1)).mean()))


def layout(config: Config, work: Workload, packing: Packing) -> Layout:
    """Layout of the updates, by the packing that training does."""
    size = config.fit.global_batch
    indices = range(len(work.lengths_GR) // size * size or len(work.lengths_GR))
    order = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
    return arranged(order, work.lengths_GR, packing)[1]
