"""Stage 2, between text and network: which ordered pairs of K responses to score, in which batches, and where the logits go.

Nothing here changes a score; it only avoids work. Pairs with equal ids are scored once and their logit is copied, so that
two equal responses have the same logit in both orders and hence a preference of exactly one half.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sppo_jax.pairrm.format import Formatter, PromptPairs, TextPair

Cell = tuple[int, int, int]  # prompt, first, second: a place in logits [n, K, K]


@dataclass(frozen=True)
class Comparison:
    """One pair to score, and every cell that its logit belongs to (several when responses are equal)."""

    pair: TextPair
    cells: list[Cell]


def shape(prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return (n, K) for prompts [n] and responses [n][K]. Raises ValueError unless every prompt has K responses."""
    n, k = len(prompts), len(responses[0]) if responses else 0
    if len(responses) != n or any(len(row) != k for row in responses):
        raise ValueError(f"{n} prompts need {n} rows of equally many responses")
    return n, k


def plan(
    formatter: Formatter, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[Comparison]:
    """Return the comparisons that give every ordered pair i != j of each prompt's K responses its logit."""
    return distinct(tokenise(formatter, prompts, responses))


def tokenise(
    formatter: Formatter, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[PromptPairs]:
    """Tokenise prompts [n] and responses [n][K] into one PromptPairs per prompt."""
    return [formatter.prompt(p, list(texts)) for p, texts in zip(prompts, responses, strict=True)]


def distinct(texts: Sequence[PromptPairs]) -> list[Comparison]:
    """Return one comparison for each different input among the ordered pairs i != j, within a prompt and across."""
    todo: dict[tuple[bytes, bytes, bytes], Comparison] = {}
    for n, segments in enumerate(texts):
        source = segments.source.tobytes()
        groups: dict[bytes, list[int]] = {}
        for i, ids in enumerate(segments.as_first):
            groups.setdefault(ids.tobytes(), []).append(i)
        for a, first in groups.items():
            for b, second in groups.items():
                if cells := [(n, i, j) for i in first for j in second if i != j]:
                    new = Comparison(segments.pair(first[0], second[0]), [])
                    todo.setdefault((source, a, b), new).cells.extend(cells)
    return list(todo.values())


def in_order(todo: Sequence[Comparison]) -> list[Comparison]:
    """Sort comparisons: longest first (so that lack of memory shows at once), the two orders of a pair side by side."""
    return sorted(todo, key=lambda comparison: (-len(comparison.pair), _couple(comparison)))


def batches(todo: Sequence[Comparison], batch_tokens: int) -> Iterator[list[Comparison]]:
    """Yield batches of similar length, longest first, each of at most `batch_tokens` tokens after padding.

    A pair that is longer than that is a batch by itself. The two orders of a pair share a batch wherever they fit.
    """
    batch: list[Comparison] = []
    for _, both in itertools.groupby(in_order(todo), _couple):
        couple = list(both)
        for part in (
            [couple] if len(couple) * len(couple[0].pair) <= batch_tokens else [[one] for one in couple]
        ):
            if batch and (len(batch) + len(part)) * len(batch[0].pair) > batch_tokens:
                yield batch
                batch = []
            batch = batch + part
    if batch:
        yield batch


def _couple(comparison: Comparison) -> Cell:
    """Return a key that the two orders of a pair share; `distinct` always finds both, in the same prompt."""
    n, i, j = comparison.cells[0]
    return n, min(i, j), max(i, j)


def scatter(logits: np.ndarray, batch: Sequence[Comparison], scores: np.ndarray) -> int:
    """Write scores [len(batch)] into their cells of logits [n, K, K]; return the number of cells written."""
    written = 0
    for comparison, score in zip(batch, scores, strict=True):
        for cell in comparison.cells:
            logits[cell] = score
        written += len(comparison.cells)
    return written
