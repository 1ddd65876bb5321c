"""Best of n: from the judge's logits of n responses to the one that it takes for the best of the first m."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sppo_jax.preferences import LARGEST


def sizes(n: int) -> list[int]:
    """1, 2, 4, … and n itself."""
    if n < 1:
        raise ValueError(f"best of n needs n >= 1, found {n}")
    return sorted({2**power for power in range(n.bit_length())} | {n})


def chosen(logits: ArrayLike) -> dict[int, NDArray[np.int64]]:
    """Index [p] of each prompt's best response among its first m, for every m of `sizes(n)`, from logits [p, n, n].

    The best has the highest mean comparison score, mean_{j < m, j != i} (L_ij - L_ji) / 2: both orders averaged, as in
    the paper; among equal scores, the first. Nothing is judged again for a smaller m. L[:, i, j] is the logit that
    response i, shown first, beats response j; the diagonal is not read. Raises ValueError for another shape, or
    logits beyond float32's range, NaN included.
    """
    found = np.asarray(logits, np.float64)
    if found.ndim != 3 or found.shape[1] != found.shape[2]:
        raise ValueError(f"logits must be [prompts, n, n], found {found.shape}")
    n = found.shape[-1]
    found = np.where(np.eye(n, dtype=bool), 0, found)
    if not (np.abs(found) <= LARGEST).all():
        raise ValueError("logits must be finite numbers in float32's range")
    score = (found - np.swapaxes(found, -1, -2)) / 2
    # Divided by one number for all of a prompt's responses, the sums have the order of the means.
    return {m: score[:, :m, :m].sum(-1).argmax(-1) for m in sizes(n)}
