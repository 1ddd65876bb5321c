"""Three responses to one prompt that beat each other in a ring, which no score of single responses can express."""

from dataclasses import dataclass

import numpy as np

from sppo_jax.preferences import TIE
from sppo_jax.report import trained_on
from sppo_jax.report.samples import printable, prompt_of
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Tell


@dataclass(frozen=True)
class Ring:
    """`texts` to `prompt`, drawn in `iteration`; the judge prefers each to the next, the last to the first, with `chances`."""

    iteration: int
    prompt: list[dict[str, str]]
    texts: list[str]
    chances: list[float]


def strongest(run: RunDir, last: int, tell: Tell) -> Ring | None:
    """The ring with the clearest weakest preference in the last iteration that has one; None without any.

    `tell` gets a line about each shard that cannot be read.
    """
    for t in range(last, BASE, -1):
        found, best, weakest = None, 0.0, 0.5 + TIE
        for responses, p in trained_on.rows(run, t, tell):
            ring = ring_of(p)
            if ring and (best := min(ring[1])) > weakest:
                found, weakest = (responses, *ring), best
        if found:
            row, places, chances = found
            return Ring(t, prompt_of(row), [printable(row.responses[i]) for i in places], chances)
    return None


def ring_of(p: np.ndarray) -> tuple[list[int], list[float]] | None:
    """Three responses of P [K, K] that beat each other in a ring, and the three probabilities, the least of them as high as possible.

    None where no three responses do.
    """
    if len(p) < 3:
        return None
    # least[i, j, k] = min(P_ij, P_jk, P_ki)
    least = np.minimum(np.minimum(p[:, :, None], p[None, :, :]), p.T[:, None, :])
    i, j, k = (int(n) for n in np.unravel_index(least.argmax(), least.shape))
    if least[i, j, k] <= 0.5 + TIE:
        return None
    return [i, j, k], [float(p[i, j]), float(p[j, k]), float(p[k, i])]
