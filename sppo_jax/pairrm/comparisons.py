"""Stage 2, between text and network: which ordered pairs of K to score, in which batches, and where the logits go.

Nothing here changes a score; it only avoids work. Pairs with equal ids are scored once and copied, so that two equal
answers have the same logit in both orders and hence a preference of exactly one half.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sppo_jax.pairrm.format import Formatter, Pair, PromptPairs

Cell = tuple[int, int, int]  # prompt, first, second: a place in logits [n, K, K]


@dataclass(frozen=True)
class Work:
    """One pair to score and every place its logit belongs to (several when responses are equal)."""

    pair: Pair
    cells: list[Cell]


def shape(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> tuple[int, int]:
    """(n, K) of prompts [n] and responses [n][K]; raises ValueError unless each prompt has equally many."""
    n, k = len(prompts), len(responses[0]) if responses else 0
    if len(responses) != n or any(len(row) != k for row in responses):
        raise ValueError(f"{n} prompts need {n} rows of equally many responses")
    return n, k


def plan(formatter: Formatter, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> list[Work]:
    """All ordered pairs i != j of each prompt's K responses; both orders, off the diagonal, are in the list."""
    return distinct(read(formatter, prompts, responses))


def read(
    formatter: Formatter, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[PromptPairs]:
    """Tokenise prompts [n] and responses [n][K]."""
    return [formatter.prompt(p, list(texts)) for p, texts in zip(prompts, responses, strict=True)]


def distinct(texts: Sequence[PromptPairs]) -> list[Work]:
    """What to score so that each ordered pair i != j has its logit: equal ids once, within a prompt and across."""
    works: dict[tuple[bytes, bytes, bytes], Work] = {}
    for n, segments in enumerate(texts):
        source = segments.source.tobytes()
        groups: dict[bytes, list[int]] = {}
        for i, ids in enumerate(segments.as_first):
            groups.setdefault(ids.tobytes(), []).append(i)
        for a, first in groups.items():
            for b, second in groups.items():
                if cells := [(n, i, j) for i in first for j in second if i != j]:
                    new = Work(segments.pair(first[0], second[0]), [])
                    works.setdefault((source, a, b), new).cells.extend(cells)
    return list(works.values())


def in_order(works: Sequence[Work]) -> list[Work]:
    """Longest first (running out of memory shows at once), the two orders of a pair next to each other."""
    return sorted(works, key=lambda work: (-len(work.pair), _couple(work)))


def batches(works: Sequence[Work], batch_tokens: int) -> Iterator[list[Work]]:
    """Batches of like length, longest first, each at most `batch_tokens` tokens after padding, or a single pair where
    one alone is longer. The two orders of a pair share a batch wherever they fit into one."""
    batch: list[Work] = []
    for _, both in itertools.groupby(in_order(works), _couple):
        couple = list(both)
        for part in [couple] if len(couple) * len(couple[0].pair) <= batch_tokens else [[w] for w in couple]:
            if batch and (len(batch) + len(part)) * len(batch[0].pair) > batch_tokens:
                yield batch
                batch = []
            batch = batch + part
    if batch:
        yield batch


def _couple(work: Work) -> Cell:
    """The same for the two orders of a pair, which `distinct` always finds together and in the same prompt."""
    n, i, j = work.cells[0]
    return n, min(i, j), max(i, j)


def scatter(logits: np.ndarray, batch: Sequence[Work], scores: np.ndarray) -> int:
    """Write scores [len(batch)] to their cells of logits [n, K, K]; returns the number of cells written."""
    written = 0
    for work, score in zip(batch, scores, strict=True):
        for cell in work.cells:
            logits[cell] = score
        written += len(work.cells)
    return written
