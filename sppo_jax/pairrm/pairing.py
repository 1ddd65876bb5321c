"""Stage 2, between text and network: which ordered pairs of K to score, in which batches, and where the logits go.

Nothing here changes a score; it only avoids work. Responses with equal ids are scored once and copied, so that two equal
answers have the same logit in both orders and hence a preference of exactly one half.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sppo_jax.pairrm.format import Formatter, Pair

Cell = tuple[int, int, int]  # prompt, first, second: a place in logits [n, K, K]


@dataclass(frozen=True)
class Work:
    """One pair to score and every place its logit belongs to (several when responses are equal)."""

    pair: Pair
    cells: list[Cell]


def plan(formatter: Formatter, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[Work]:
    """All ordered pairs i != j of each prompt's K responses; both orders, off the diagonal, are in the list."""
    works: list[Work] = []
    for n, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
        segments = formatter.prompt(prompt, list(texts))
        groups: dict[bytes, list[int]] = {}
        for i, ids in enumerate(segments.as_first):
            groups.setdefault(ids.tobytes(), []).append(i)
        for first in groups.values():
            for second in groups.values():
                cells = [(n, i, j) for i in first for j in second if i != j]
                if cells:
                    works.append(Work(segments.pair(first[0], second[0]), cells))
    return works


def batches(works: Sequence[Work], batch_tokens: int) -> Iterator[list[Work]]:
    """Batches of like length, longest first (running out of memory shows at once), each at most `batch_tokens`
    tokens after padding, or a single pair where one alone is longer."""
    batch: list[Work] = []
    for work in sorted(works, key=lambda work: len(work.pair), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].pair) > batch_tokens:
            yield batch
            batch = []
        batch.append(work)
    if batch:
        yield batch


def scatter(logits: np.ndarray, batch: Sequence[Work], scores: np.ndarray) -> int:
    """Write scores [len(batch)] to their cells of logits [n, K, K]; returns the number of cells written."""
    written = 0
    for work, score in zip(batch, scores, strict=True):
        for cell in work.cells:
            logits[cell] = score
        written += len(work.cells)
    return written
