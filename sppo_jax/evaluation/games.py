"""The game between policies: from their matrix of win rates to the von Neumann winner and to cycles. Float64."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from sppo_jax.preferences import TIE

_ASYMMETRY = 1e-9  # P + P^T may differ from 1 by this much: rounding of means
_TOLERANCES = (1e-10, 1e-9, 1e-7)  # of the solver, which sometimes gives up at the finest one

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """A mixture of policies: weights [m] that sum to 1, its lowest win rate against any policy, and its duality gap."""

    weights: list[float]
    value: float
    gap: float


def mixture(matrix: ArrayLike) -> Mixture:
    """The von Neumann winner of win rates P [m, m]: the mixture w that no policy beats.

    max_w min_j (w^T P)_j by linear programming; the game is symmetric, so this is 1/2. gap = max_i (P w)_i -
    min_j (w^T P)_j over the policies, 0 at the optimum. Where several mixtures are optimal, the uniform one is given
    if it is among them, else a vertex of their set; the same matrix always gives the same one. Raises ValueError unless
    P is square with entries in [0, 1] and P + P^T = 1, so 1/2 on the diagonal.
    """
    advantage = _advantage(matrix)
    m = len(advantage)
    found = np.full(m, 1 / m)
    if _gap(advantage, found) > 1e-12:
        found = min(_candidates(advantage), key=lambda weights: _gap(advantage, weights))
    gap = _gap(advantage, found)
    return Mixture(found.tolist(), 0.5 - gap / 2, gap)


def cycle(matrix: ArrayLike) -> list[int]:
    """A shortest ring of policies, each of which beats the next and the last the first; empty if there is none.

    i beats j where P[i, j] > 1/2 + preferences.TIE, as in preferences.has_cycle; rings of more than three appear where
    ties leave no shorter one. The ring begins with its lowest index. Raises ValueError as `mixture` does.
    """
    beats = [np.flatnonzero(row > TIE).tolist() for row in _advantage(matrix)]
    rings = [ring for first in range(len(beats)) if (ring := _ring(beats, first))]
    return min(rings, key=len, default=[])  # of equally short ones the first, so no lower index is in it


def _ring(beats: list[list[int]], first: int) -> list[int]:
    """A shortest ring through `first`, by breadth-first search over who beats whom; empty if there is none."""
    before: dict[int, int] = {}
    waiting = deque([first])
    while waiting:
        at = waiting.popleft()
        for beaten in beats[at]:
            if beaten == first:
                ring = [at]
                while ring[-1] != first:
                    ring.append(before[ring[-1]])
                return ring[::-1]
            if beaten not in before:
                before[beaten] = at
                waiting.append(beaten)
    return []


def _candidates(advantage: Matrix) -> list[Matrix]:
    """The linear program's weights [m], as the solver leaves them and polished beyond its tolerance."""
    scaled = advantage / np.abs(advantage).max()  # or near ties would be below the tolerance
    raw = _solved(scaled)
    return [raw] + [_polished(scaled, raw, floor) for floor in (0.0, 1e-12, 1e-9)]


def _solved(scaled: Matrix) -> Matrix:
    """Weights w [m] of the program: minimise t subject to A w <= t, w >= 0, sum(w) = 1."""
    m = len(scaled)
    for tolerance in _TOLERANCES:
        found = linprog(
            np.eye(m + 1)[m],
            A_ub=np.hstack([scaled, -np.ones((m, 1))]),
            b_ub=np.zeros(m),
            A_eq=np.r_[np.ones(m), 0][None],
            b_eq=[1.0],
            bounds=[(0, 1)] * m + [(None, None)],
            method="highs-ds",
            options={"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance},
        )
        if found.success:
            return _normalised(found.x[:m])
    raise ArithmeticError(f"the mixture's linear program has no solution: {found.message}")


def _polished(scaled: Matrix, weights: Matrix, floor: float) -> Matrix:
    """The nearest weights for which all policies on the support (weights above the floor) are equally good."""
    support = np.flatnonzero(weights > floor)
    equations = np.vstack([scaled[np.ix_(support, support)], np.ones(len(support))])
    wanted = np.r_[np.zeros(len(support)), 1.0]
    start = weights[support]
    polished = np.zeros_like(weights)
    polished[support] = start + np.linalg.lstsq(equations, wanted - equations @ start)[0]
    return _normalised(polished)


def _normalised(weights: Matrix) -> Matrix:
    weights = np.maximum(weights, 0)
    return weights / weights.sum()


def _gap(advantage: Matrix, weights: Matrix) -> float:
    """max_i (P w)_i - min_j (w^T P)_j: twice the largest advantage of a policy over the mixture, never below 0."""
    return max(0.0, 2 * float((advantage @ weights).max()))


def _advantage(matrix: ArrayLike) -> Matrix:
    """P - 1/2 [m, m], antisymmetric to the last bit. Raises ValueError if P is not a symmetric zero-sum game."""
    p = np.asarray(matrix, np.float64)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or not p.size:
        raise ValueError(f"win rates between policies must be a matrix [m, m], found {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():  # NaN too
        raise ValueError("win rates must lie in [0, 1]")
    if np.abs(p + p.T - 1).max() > _ASYMMETRY:
        raise ValueError(
            "win rates of two policies against each other must sum to 1: P + P^T = 1, 1/2 on the diagonal"
        )
    return (p - p.T) / 2
