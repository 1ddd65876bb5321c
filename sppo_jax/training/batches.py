"""Stage 4: pairs → fixed-shape token batches whose order is a function of (seed, iteration, step).

Several sequences (a prompt and one of its responses) share a row of tokens, told apart by their segment, so that little
of what is computed is padding. An update's prompts come in microbatches of equal shapes, each with all the responses
of its prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from sppo_jax.records import Pair

MULTIPLE, LONG_MULTIPLE = (
    32,
    128,
)  # rows are as long as the longest sequence, rounded up; above 512 by the latter
LONG = 512

Batch = dict[str, Any]  # arrays
Rows = list[list[tuple[int, int]]]  # of a microbatch: the sequences (prompt, response) of each row


@dataclass(frozen=True)
class Layout:
    """What all batches of an iteration have in common."""

    microbatches: int  # of an update, at most
    prompts: int  # of a microbatch
    rows: int
    width: int  # tokens of a row
    segments: int  # sequences of a row, at most
    real_token_share: float  # of the tokens computed, those that belong to a sequence


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
        shards: int = 1,
        most_tokens: int | None = None,
        pack: bool = True,
    ):
        """`steps_per_epoch * epochs` batches of `global_batch` prompts; every epoch is shuffled anew.

        A microbatch's rows are divisible by `shards` and hold at most `most_tokens` tokens (None: all of an update's),
        unless one row a shard is more, or one prompt's responses need more. Without `pack`, each row holds one sequence.
        """
        self._pairs = pairs
        lengths = [[len(p.prompt_ids) + len(ids) for ids in p.response_ids] for p in pairs]
        mixed = int(
            np.random.SeedSequence((seed, iteration)).generate_state(1)[0]
        )  # epochs add 1 to their seed
        order = (
            grain.MapDataset.source(range(len(pairs)))
            .shuffle(seed=mixed)
            .batch(global_batch, batch_fn=list)
            .repeat(epochs)
        )
        self.steps_per_epoch = steps_per_epoch(pairs, global_batch)
        self._plans, self.layout = arranged(
            list(order), lengths, shards=shards, most_tokens=most_tokens, pack=pack
        )
        steps = grain.MapDataset.source(range(len(order)))
        self._dataset: grain.MapDataset[Batch] = steps.map(self._batch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, step: int) -> Batch:
        """M microbatches of B rows of T tokens, G prompts with R responses each (best first, worst last), S segments.

        tokens, segment (0: padding, else from 1 on in each row), scored (is the token part of a response?) [M, B, T];
        place [M, G, R]: row * S + segment - 1 of each response; segments [M, S]: 1 to S; ref_logprob, win_rate [M, G, R];
        baseline, probability, real, pair (its index) [M, G]; share [M]: of the update's real prompts. Where `real` is
        False nothing else means anything.
        """
        return self._dataset[step]

    def from_step(self, step: int) -> grain.IterDataset[Batch]:
        """Batches from `step` on, prepared ahead in threads."""
        return self._dataset[step:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))

    def _batch(self, step: int) -> Batch:
        plan = self._plans[step]
        total = sum(len(prompts) for prompts, _ in plan)
        parts = [self._microbatch(prompts, rows, total) for prompts, rows in plan]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def _microbatch(self, prompts: Sequence[int], rows: Rows, total: int) -> Batch:
        at, r = self.layout, len(self._pairs[0].response_ids)
        tokens, segment = np.zeros((2, at.rows, at.width), np.int32)
        scored = np.zeros((at.rows, at.width), bool)
        where = np.zeros((at.prompts, r), np.int32)
        slot = {index: g for g, index in enumerate(prompts)}
        for b, row in enumerate(rows):
            begin = 0
            for s, (index, k) in enumerate(row):
                pair = self._pairs[index]
                ids = [*pair.prompt_ids, *pair.response_ids[k]]
                end = begin + len(ids)
                tokens[b, begin:end], segment[b, begin:end] = ids, s + 1
                scored[b, begin + len(pair.prompt_ids) : end] = True
                where[slot[index], k] = b * at.segments + s
                begin = end
        chosen = [self._pairs[index] for index in prompts]

        def filled(values: Sequence[Any], dtype: Any) -> np.ndarray:
            found = np.asarray(values, dtype)
            return np.pad(found, [(0, at.prompts - len(found))] + [(0, 0)] * (found.ndim - 1))

        return {
            "tokens": tokens,
            "segment": segment,
            "scored": scored,
            "place": where,
            "segments": np.arange(1, at.segments + 1, dtype=np.int32),
            "ref_logprob": filled([p.ref_logprob for p in chosen], np.float32),
            "win_rate": filled([p.win_rate for p in chosen], np.float32),
            "baseline": filled([p.baseline for p in chosen], np.float32),
            "probability": filled([p.chosen_probs for p in chosen], np.float32),
            "real": filled([True] * len(chosen), bool),
            "pair": filled(prompts, np.int32),
            "share": np.float32(len(prompts) / total),
        }


def steps_per_epoch(pairs: Sequence[Pair], global_batch: int) -> int:
    return -(-len(pairs) // global_batch)


def arranged(
    order: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    *,
    shards: int,
    most_tokens: int | None,
    pack: bool,
) -> tuple[list[list[tuple[list[int], Rows]]], Layout]:
    """Each batch of prompts as microbatches (prompts, rows) of at most `most_tokens` tokens, and the shape of all.

    `order`: the prompts of each batch; `lengths`: tokens of each prompt's sequences.
    """
    longest = max(map(max, lengths))
    multiple = MULTIPLE if longest <= LONG else LONG_MULTIPLE
    width = -(-longest // multiple) * multiple
    if most_tokens is None:
        plans = [[(sorted(batch), _rows(batch, lengths, width, pack))] for batch in order]
    else:
        most_rows = max(shards, most_tokens // width // shards * shards)
        plans = [_parts(batch, lengths, width, most_rows, pack) for batch in order]
    every = [one for plan in plans for one in plan]
    rows = -(-max(len(rows) for _, rows in every) // shards) * shards
    return plans, Layout(
        microbatches=max(map(len, plans)),
        prompts=max(len(prompts) for prompts, _ in every),
        rows=rows,
        width=width,
        segments=max(len(row) for _, rows in every for row in rows),
        real_token_share=sum(sum(lengths[i]) for batch in order for i in batch) / (len(every) * rows * width),
    )


def _parts(
    batch: Sequence[int], lengths: Sequence[Sequence[int]], width: int, most_rows: int, pack: bool
) -> list[tuple[list[int], Rows]]:
    """A batch's prompts by microbatch: the longest first, each into the first one whose rows have room for all of its own."""
    parts: list[tuple[list[int], Rows]] = []
    for index in sorted(batch, key=lambda i: (-sum(lengths[i]), i)):
        for prompts, rows in parts:
            if len(more := _rows([index], lengths, width, pack, rows)) <= most_rows:
                prompts.append(index)
                rows[:] = more
                break
        else:  # its own responses may need more rows than that: then it has them
            parts.append(([index], _rows([index], lengths, width, pack)))
    # All sequences of a microbatch together, and not prompt by prompt, mostly need fewer rows still.
    again = [(sorted(prompts), _rows(prompts, lengths, width, pack)) for prompts, _ in parts]
    return [
        new if len(new[1]) <= len(rows) else (new[0], rows)
        for new, (_, rows) in zip(again, parts, strict=True)
    ]


def _rows(
    prompts: Sequence[int],
    lengths: Sequence[Sequence[int]],
    width: int,
    pack: bool,
    begun: Sequence[Sequence[tuple[int, int]]] = (),
) -> Rows:
    """`begun` and the sequences of some prompts by row: the longest first, each into the first row that has room for it."""
    rows = [list(row) for row in begun]
    room = [width - sum(lengths[index][k] for index, k in row) for row in rows]
    every = [(index, k) for index in prompts for k in range(len(lengths[index]))]
    for index, k in sorted(every, key=lambda one: (-lengths[one[0]][one[1]], one)):
        length = lengths[index][k]
        b = next((b for b, free in enumerate(room) if pack and free >= length), len(rows))
        if b == len(rows):
            rows.append([])
            room.append(width)
        rows[b].append((index, k))
        room[b] -= length
    return rows
