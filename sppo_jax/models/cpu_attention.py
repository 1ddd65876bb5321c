"""Attention for CPUs over rows that hold several sequences: only blocks of queries and keys that share one are computed.

This is the flash-attention algorithm (arXiv:2205.14135, with the backward pass of arXiv:2307.08691) in plain JAX: the scores
[T, T] never exist, and most scores between different sequences are not computed.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sppo_jax.models.trees import Trees, begins, related

# Tokens; larger blocks compute more masked scores, smaller ones have more overhead between products.
BLOCK = 64
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without keys stays finite
SAVED = "attention"  # checkpoint name of attention's output, which a backward pass may keep


@dataclass(frozen=True)
class Rule:
    """How a score is computed from a query and a key, and which pairs are masked."""

    scale: float
    softcap: float | None
    window: int | None

    def scores(
        self, q_NGQC: Array, k_NKC: Array, query: Trees, key: Trees, ahead: Array
    ) -> tuple[Array, Array]:
        """Return float32 scores [N, G, Q, K] and their derivative by the scaled product.

        The block of keys begins `ahead` tokens before the block of queries.
        """
        score = jnp.einsum("NGQC,NKC->NGQK", q_NGQC, k_NKC, preferred_element_type=jnp.float32) * self.scale
        slope = jnp.ones(())
        if self.softcap is not None:
            curved = jnp.tanh(score / self.softcap)
            score, slope = self.softcap * curved, 1 - curved * curved
        place = jnp.arange(BLOCK)
        seen_QK = related(query, key) & (ahead + place[:, None] >= place)
        if self.window is not None:
            seen_QK &= query.position[:, None] - key.position < self.window
        return jnp.where(seen_QK, score, MASKED), slope


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    trees: Trees,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "B T H C"]:
    """Return causal grouped-query attention among the tokens of each tree of a row.

    Rows are computed one after the other, so that the result of a row does not depend on the others.
    """
    length, heads, channels = q_BTHC.shape[1:]
    groups, more = heads // k_BTNC.shape[2], -length % BLOCK
    q_BTHC, k_BTNC, v_BTNC = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTHC, k_BTNC, v_BTNC)
    )
    trees = Trees(*(jnp.pad(x, ((0, 0), (0, more))) for x in trees))
    rows, total = trees.segment.shape
    q_BINGQC = q_BTHC.reshape(rows, -1, BLOCK, heads // groups, groups, channels).transpose(0, 1, 3, 4, 2, 5)
    rule = Rule(channels**-0.5 if scale is None else scale, softcap, window)
    blocks = Trees(*(x.reshape(rows, -1, BLOCK) for x in trees))
    seen_BINGQC = _rows(q_BINGQC, _blocks(k_BTNC), _blocks(v_BTNC), blocks, visits(trees, window), rule)
    return seen_BINGQC.transpose(0, 1, 4, 2, 3, 5).reshape(rows, total, heads, channels)[:, :length]


class Visits(NamedTuple):
    """The blocks of keys that a block of queries i sees: i, i - 1, ... `own` of them, then `last`, last - 1, ..."""

    own: Array  # those of its first token's branch, and all later ones
    last: Array  # the last block of that token's prompt before these
    every: Array  # number of all blocks; 0 for a block of padding

    def block(self, i: Array, step: Array) -> Array:
        """The block of keys that is visited at a step, from 0 on."""
        return jnp.where(step < self.own, i - step, self.last - (step - self.own))


def visits(trees: Trees, window: int | None) -> Visits:
    """Return the blocks of keys that each block of queries sees, arrays [B, I].

    The first token of a block decides: whatever else it may see begins within the block, or is in the same prompt.
    """
    segment_BT, branch_BT, position_BT = trees
    place_T = jnp.arange(segment_BT.shape[1])
    tree_BT = begins(segment_BT)
    # Adjacent branches differ in one of the two numbers.
    own_BT = jnp.maximum(tree_BT, begins(branch_BT))
    prompt_BT = tree_BT
    if window is not None:  # the prompt's tokens have their positions' places
        own_BT = jnp.maximum(own_BT, place_T - window + 1)
        prompt_BT = tree_BT + jnp.maximum(0, position_BT - window + 1)
    # Within a tree, the last token so far that is the prompt's.
    last_BT = jax.lax.cummax(jnp.where(branch_BT == 0, place_T, 0), axis=1)
    cut = (len(segment_BT), -1, BLOCK)
    real_BIQ = segment_BT.reshape(cut) > 0
    real_BI, index_I = jnp.any(real_BIQ, axis=2), place_T[::BLOCK] // BLOCK
    own_BI = jnp.where(real_BI, index_I - own_BT[:, ::BLOCK] // BLOCK + 1, 0)
    last_BI = jnp.minimum(last_BT[:, ::BLOCK] // BLOCK, index_I - own_BI)
    # A branch that begins within the block may see more of the prompt through its window than the first token does.
    first_BI = jnp.min(jnp.where(real_BIQ, prompt_BT.reshape(cut), len(place_T)), axis=2) // BLOCK
    return Visits(own_BI, last_BI, own_BI + jnp.where(real_BI, jnp.maximum(last_BI - first_BI + 1, 0), 0))


def _blocks(x_BTNC: Array) -> Array:
    """Return x in blocks of K keys, [B, I, N, K, C]."""
    rows, _, heads, channels = x_BTNC.shape
    return x_BTNC.reshape(rows, -1, BLOCK, heads, channels).transpose(0, 1, 3, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rows(q: Array, k: Array, v: Array, trees: Trees, visited: Visits, rule: Rule) -> Array:
    """Return the output [B, I, N, G, Q, C] for I blocks of each of B rows.

    q [B, I, N, G, Q, C]; k, v [B, I, N, K, C]; trees [B, I, Q]; visited [B, I].
    """
    return _forward(q, k, v, trees, visited, rule)[0]


def _forward(
    q: Array, k: Array, v: Array, trees: Trees, visited: Visits, rule: Rule
) -> tuple[Array, tuple[Any, ...]]:
    """Return the output and the residuals of the backward pass."""

    def row(xs: tuple[Any, ...]) -> tuple[Array, Array]:
        q, k, v, trees, visited = xs

        def queries(xs: tuple[Any, ...]) -> tuple[Array, Array]:
            q_NGQC, i, visited, own = xs

            def keys(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                # The queries' own block comes first, so that every maximum is that of unmasked scores.
                j = visited.block(i, step)
                most, total, seen = carry
                score, _ = rule.scores(q_NGQC, k[j], own, Trees(*(x[j] for x in trees)), (i - j) * BLOCK)
                new = jnp.maximum(most, jnp.max(score, axis=-1))
                shrunk, weight = jnp.exp(most - new), jnp.exp(score - new[..., None])
                found = jnp.einsum(
                    "NGQK,NKC->NGQC", weight.astype(v.dtype), v[j], preferred_element_type=jnp.float32
                )
                return new, total * shrunk + jnp.sum(weight, axis=-1), seen * shrunk[..., None] + found

            zero = jnp.zeros(q_NGQC.shape[:-1], jnp.float32)
            begin = (zero + MASKED, zero, jnp.zeros(q_NGQC.shape, jnp.float32))
            most, total, seen = jax.lax.fori_loop(0, visited.every, keys, begin)
            total = jnp.where(total > 0, total, 1)  # a block of padding
            return (seen / total[..., None]).astype(q_NGQC.dtype), most + jnp.log(total)

        return jax.lax.map(queries, (q, jnp.arange(len(q)), visited, trees))

    seen, logsumexp = checkpoint_name(jax.lax.map(row, (q, k, v, trees, visited)), SAVED)
    return seen, (q, k, v, trees, visited, seen, logsumexp)


def _backward(rule: Rule, kept: tuple[Any, ...], gradient: Array) -> tuple[Array | None, ...]:
    """Return the gradients by q, k and v, from the forward pass's residuals `kept`."""
    *inputs, seen, logsumexp = kept
    # Sum over keys of weight times its gradient, for each query.
    mean = jnp.sum(gradient.astype(jnp.float32) * seen.astype(jnp.float32), axis=-1)

    def row(xs: tuple[Any, ...]) -> tuple[Array, ...]:
        q, k, v, trees, visited, gradient, logsumexp, mean = xs

        def queries(carry: tuple[Array, Array], xs: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
            q_NGQC, i, visited, own, gradient_NGQC, logsumexp_NGQ, mean_NGQ = xs

            def keys(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                j = visited.block(i, step)
                of_k, of_v, of_q = carry
                score, slope = rule.scores(q_NGQC, k[j], own, Trees(*(x[j] for x in trees)), (i - j) * BLOCK)
                weight = jnp.exp(score - logsumexp_NGQ[..., None])
                of_weight = jnp.einsum(
                    "NGQC,NKC->NGQK", gradient_NGQC, v[j], preferred_element_type=jnp.float32
                )
                of_score = (weight * (of_weight - mean_NGQ[..., None]) * slope * rule.scale).astype(q.dtype)
                to = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
                of_q += to("NGQK,NKC->NGQC", of_score, k[j])
                of_k = of_k.at[j].add(to("NGQK,NGQC->NKC", of_score, q_NGQC))
                of_v = of_v.at[j].add(to("NGQK,NGQC->NKC", weight.astype(gradient.dtype), gradient_NGQC))
                return of_k, of_v, of_q

            begin = (*carry, jnp.zeros(q_NGQC.shape, jnp.float32))
            of_k, of_v, of_q = jax.lax.fori_loop(0, visited.every, keys, begin)
            return (of_k, of_v), of_q.astype(q.dtype)

        zero = jnp.zeros(k.shape, jnp.float32)
        blocks = (q, jnp.arange(len(q)), visited, trees, gradient, logsumexp, mean)
        (of_k, of_v), of_q = jax.lax.scan(queries, (zero, zero), blocks)
        return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype)

    return *jax.lax.map(row, (*inputs, gradient, logsumexp, mean)), None, None


_rows.defvjp(_forward, _backward)
