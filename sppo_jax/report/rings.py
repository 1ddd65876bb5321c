"""Three responses to one prompt that beat each other in a ring, which no score of single responses can express."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.preferences import TIE
from sppo_jax.records import Preferences, Responses
from sppo_jax.report.samples import printable, prompt_of
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Tell

SHARDS = 8  # of an iteration that are read: a ring is an example, and not worth minutes
NAME = re.compile(r"shard-\d+-of-\d+\.parquet")


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
        for responses, p in _rows(run, t, tell):
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


def _rows(run: RunDir, t: int, tell: Tell) -> Iterator[tuple[Responses, np.ndarray]]:
    """Responses of iteration t with their P [K, K], from its first shards."""
    folder = run.iteration(t) / "preferences"
    names = files.entries(folder) if files.is_dir(folder) else []
    for name in [name for name in names if NAME.fullmatch(name)][:SHARDS]:
        path, its = folder / name, run.iteration(t) / "responses" / name
        try:
            judged, rows = records.read(path, Preferences), records.read(its, Responses)
        except BadInput as error:
            tell(str(error).replace(f"{run.root}/", ""))
            continue
        if [row.prompt_id for row in rows] != [row.prompt_id for row in judged]:
            tell(f"{path.relative_to(run.root)}: belongs to other responses")
            continue
        found = [(row, _matrix(its, row)) for row, its in zip(rows, judged, strict=True)]
        if any(p is None for _, p in found):
            tell(f"{path.relative_to(run.root)}: damaged: a row has no prompt, response or probability")
        yield from ((row, p) for row, p in found if p is not None)


def _matrix(judged: Preferences, row: Responses) -> np.ndarray | None:
    """P [K, K] of a row; None where it, or a text of the row, is not whole."""
    responses: list[Any] = row.responses or []  # of a damaged file: anything
    texts = [row.prompt, *responses]
    try:
        p = np.array(judged.probability, np.float64)
    except (TypeError, ValueError):
        return None
    whole = (
        len(texts) > 1 and all(isinstance(text, str) for text in texts) and p.shape == (len(texts) - 1,) * 2
    )
    return p if whole and np.isfinite(p).all() else None
