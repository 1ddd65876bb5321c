"""Stage 4: pairs → fixed-shape token batches whose order is a function of (seed, iteration, step).

An update's prompts come in microbatches of one shape or two, each with all the responses of its prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from sppo_jax.records import Pair
from sppo_jax.training.microbatch import Microbatch
from sppo_jax.training.packing import Packing, Part, arranged


@dataclass(frozen=True)
class Batch:
    """The prompts of one update, on the host."""

    microbatches: list[Microbatch]
    # For each microbatch, the index of each prompt's pair; filler where the prompt is not real.
    pairs: list[Int[np.ndarray, " G"]]

    @property
    def prompts(self) -> int:
        """Number of real prompts."""
        return sum(int(np.sum(part.real)) for part in self.microbatches)

    def placed(self, mesh: Mesh) -> Iterator[Microbatch]:
        """Copy the microbatches to the devices one by one, as they are asked for."""
        return (part.placed(mesh) for part in self.microbatches)


class Batches:
    """The batches of an iteration: `len`, `[step]`, and `from_step` for a stream that prepares them ahead."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        global_batch: int,
        epochs: int,
        seed: int,
        iteration: int,
        packing: Packing = Packing(),  # noqa: B008  (frozen)
    ):
        """Lay out `steps_per_epoch * epochs` batches of `global_batch` prompts; every epoch is shuffled anew."""
        self._pairs = pairs
        self._trees = packing.trees(len(pairs[0].response_ids))
        scored = [[sum(len(p.response_ids[k]) for k in tree) for tree in self._trees] for p in pairs]
        lengths = [[len(p.prompt_ids) + n for n in row] for p, row in zip(pairs, scored, strict=True)]
        # Not seed + iteration: grain adds 1 to its seed with every epoch.
        mixed = int(np.random.SeedSequence((seed, iteration)).generate_state(1)[0])
        order = (
            grain.MapDataset.source(range(len(pairs)))
            .shuffle(seed=mixed)
            .batch(global_batch, batch_fn=list)
            .repeat(epochs)
        )
        self.steps_per_epoch = steps_per_epoch(pairs, global_batch)
        self._plans, self.layout = arranged(list(order), lengths, packing, scored, len(self._trees[0]))
        steps = grain.MapDataset.source(range(len(order)))
        self._dataset: grain.MapDataset[Batch] = steps.map(self._batch)

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self._pairs)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, step: int) -> Batch:
        """Make the batch of one update."""
        return self._dataset[step]

    def from_step(self, step: int) -> grain.IterDataset[Batch]:
        """Batches from `step` on, prepared ahead in threads."""
        return self._dataset[step:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))

    def _batch(self, step: int) -> Batch:
        plan = self._plans[step]
        total = sum(len(part.prompts) for part in plan)
        return Batch(
            [self._microbatch(part, total) for part in plan],
            [self._filled(part.prompts, np.int32) for part in plan],
        )

    def _microbatch(self, part: Part, total: int) -> Microbatch:
        at, responses = self.layout, len(self._pairs[0].response_ids)
        tokens, segment, branch, position = np.zeros((4, *part.shape), np.int32)
        before, label, slot = np.zeros((3, part.shape.rows, at.most_scored(part.shape)), np.int32)
        place = np.zeros((at.prompts, responses), np.int32)
        prompt_slot = {index: g for g, index in enumerate(part.prompts)}
        for b, row in enumerate(part.rows):
            begin = count = said = 0
            for s, (index, t) in enumerate(row):
                pair = self._pairs[index]
                size = len(pair.prompt_ids)
                end = begin + size
                tokens[b, begin:end], position[b, begin:end] = pair.prompt_ids, np.arange(size)
                for n, k in enumerate(self._trees[t], 1):
                    ids, count = pair.response_ids[k], count + 1
                    own, to = slice(end, end + len(ids)), slice(said, said + len(ids))
                    tokens[b, own], branch[b, own], position[b, own] = ids, n, size + np.arange(len(ids))
                    before[b, to] = [begin + size - 1, *range(end, own.stop)][: len(ids)]
                    label[b, to], slot[b, to] = ids, count
                    place[prompt_slot[index], k] = b * at.slots + count - 1
                    end, said = own.stop, to.stop
                segment[b, begin:end] = s + 1
                begin = end
        chosen = [self._pairs[index] for index in part.prompts]
        return Microbatch(
            tokens=tokens,
            segment=segment,
            branch=branch,
            position=position,
            before=before,
            label=label,
            slot=slot,
            slots=np.arange(1, at.slots + 1, dtype=np.int32),
            place=place,
            ref_logprob=self._filled([p.ref_logprob for p in chosen], np.float32),
            base_logprob=self._filled([p.base_logprob or [np.nan] * responses for p in chosen], np.float32),
            payoff=self._filled([p.payoff for p in chosen], np.float32),
            baseline=self._filled([p.baseline for p in chosen], np.float32),
            probability=self._filled([p.chosen_probs for p in chosen], np.float32),
            real=self._filled([True] * len(chosen), np.bool_),
            share=np.asarray(len(part.prompts) / total, np.float32),
        )

    def _filled(self, values: Sequence[Any], dtype: type[np.generic]) -> np.ndarray:
        """One value per prompt of a microbatch, with zeros for the prompts that it lacks."""
        array = np.asarray(values, dtype)
        return np.pad(array, [(0, self.layout.prompts - len(array))] + [(0, 0)] * (array.ndim - 1))


def steps_per_epoch(pairs: Sequence[Pair], global_batch: int) -> int:
    """Number of updates in one pass over the pairs; the last one may have fewer prompts."""
    return -(-len(pairs) // global_batch)
