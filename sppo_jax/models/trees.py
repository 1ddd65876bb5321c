"""Trees of tokens: a prompt and its responses in one row, of which each response sees the prompt and itself alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Trees(NamedTuple):
    """Where each token of B rows of T tokens belongs. The tokens of a tree are contiguous: its prompt, then its responses."""

    segment: Int[Array, "B T"]  # the tree, from 1 on in each row; 0: padding, on either side
    branch: Int[Array, "B T"]  # 0: the prompt; from 1 on: its responses, each contiguous
    position: Int[
        Array, "B T"
    ]  # of a response from its prompt's length on, whichever its place (for padding: any)

    @staticmethod
    def of(segment_BT: Int[Array, "B T"]) -> "Trees":
        """Return trees without branches: each segment is one sequence."""
        return Trees(segment_BT, jnp.zeros_like(segment_BT), positions(segment_BT))

    def mask(self, window: int | None) -> Bool[Array, "B T T"]:
        """Return whether query t sees key s: s is real, in t's tree, in its prompt or t's own branch, not later than t, and
        within `window` positions."""
        place = jnp.arange(self.segment.shape[1])
        seen_BTS = (place[:, None] >= place)[None] & related(self, self)
        if window is not None:
            seen_BTS &= self.position[:, :, None] - self.position[:, None, :] < window
        return seen_BTS & (self.segment > 0)[:, None, :]


def related(query: Trees, key: Trees) -> Bool[Array, "... Q K"]:
    """Return whether queries [..., Q] have keys [..., K] in their tree, in its prompt or in their own branch."""
    branch = key.branch[..., None, :]
    same = key.segment[..., None, :] == query.segment[..., None]
    return same & ((branch == 0) | (branch == query.branch[..., None]))


def positions(segment_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return each token's place in its segment, from 0 (for padding: unspecified but finite)."""
    return jnp.arange(segment_BT.shape[1]) - begins(segment_BT)


def begins(group_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the place where each token's run of equal numbers begins."""
    place_T = jnp.arange(group_BT.shape[1])
    new_BT = jnp.diff(group_BT, axis=1, prepend=group_BT[:, :1]) != 0
    return jax.lax.cummax(jnp.where(new_BT, place_T, 0), axis=1)
