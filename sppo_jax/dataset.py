"""Stage 4: pairs → fixed-shape token batches whose order is a function of (seed, iteration, step)."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from sppo_jax.records import Pair

MULTIPLE = 32  # sequences are padded to the longest of the iteration, rounded up to this many tokens

Batch = dict[str, Any]  # arrays


def batches(
    pairs: Sequence[Pair], *, global_batch: int, epochs: int, seed: int, iteration: int
) -> grain.MapDataset[Batch]:
    """A random-access dataset of `steps_per_epoch * epochs` batches; index it by step.

    Every epoch is shuffled anew and its last batch filled up with rows where `real` is False. G prompts,
    R responses each (best first, worst last), T tokens:
    tokens [G, R, T] right-padded, prompt_length [G], length [G, R] (prompt and response), ref_logprob,
    win_rate [G, R], baseline, probability, real, row [G] (the pair's index).
    """
    longest = max(len(p.prompt_ids) + len(ids) for p in pairs for ids in p.response_ids)
    width = -(-longest // MULTIPLE) * MULTIPLE
    rows = grain.MapDataset.source(range(len(pairs)))
    mixed = int(np.random.SeedSequence((seed, iteration)).generate_state(1)[0])  # epochs add 1 to their seed
    return (
        rows.shuffle(seed=mixed)
        .map(lambda row: _example(pairs[row], row, width))
        .batch(global_batch, batch_fn=lambda examples: _filled(examples, global_batch))
        .repeat(epochs)
    )


def steps_per_epoch(pairs: Sequence[Pair], global_batch: int) -> int:
    return -(-len(pairs) // global_batch)


def from_step(dataset: grain.MapDataset[Batch], step: int) -> grain.IterDataset[Batch]:
    """Batches from `step` on, prepared ahead in threads."""
    return dataset[step:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


def _example(pair: Pair, row: int, width: int) -> Batch:
    tokens = np.zeros((len(pair.response_ids), width), np.int32)
    for i, ids in enumerate(pair.response_ids):
        sequence = [*pair.prompt_ids, *ids]
        tokens[i, : len(sequence)] = sequence
    return {
        "tokens": tokens,
        "prompt_length": np.int32(len(pair.prompt_ids)),
        "length": np.array([len(pair.prompt_ids) + len(ids) for ids in pair.response_ids], np.int32),
        "ref_logprob": np.asarray(pair.ref_logprob, np.float32),
        "win_rate": np.asarray(pair.win_rate, np.float32),
        "baseline": np.float32(pair.baseline),
        "probability": np.float32(pair.chosen_probs),
        "real": np.bool_(True),
        "row": np.int32(row),
    }


def _filled(examples: Sequence[Batch], size: int) -> Batch:
    stacked = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
    short = size - len(examples)
    return {key: np.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) for key, x in stacked.items()}
