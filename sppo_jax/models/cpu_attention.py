"""Attention for CPUs over rows that hold several sequences: only blocks of queries and keys that share one are computed.

This is the flash-attention algorithm (arXiv:2205.14135, with the backward pass of arXiv:2307.08691) in plain JAX: the scores
[T, T] never exist, and most scores between different sequences are not computed.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

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

    def scores(self, q_NGQC: Array, k_NKC: Array, same_QK: Array, ahead: Array) -> tuple[Array, Array]:
        """Return float32 scores [N, G, Q, K] and their derivative by the scaled product.

        The block of keys begins `ahead` tokens before the block of queries.
        """
        score = jnp.einsum("NGQC,NKC->NGQK", q_NGQC, k_NKC, preferred_element_type=jnp.float32) * self.scale
        slope = jnp.ones(())
        if self.softcap is not None:
            curved = jnp.tanh(score / self.softcap)
            score, slope = self.softcap * curved, 1 - curved * curved
        place = jnp.arange(BLOCK)
        distance_QK = ahead + place[:, None] - place
        seen_QK = same_QK & (distance_QK >= 0)
        if self.window is not None:
            seen_QK &= distance_QK < self.window
        return jnp.where(seen_QK, score, MASKED), slope


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    segment_BT: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "B T H C"]:
    """Return causal grouped-query attention among the tokens of each segment of a row; segment 0 is padding.

    Rows are computed one after the other, so that the result of a row does not depend on the others.
    """
    length, heads, channels = q_BTHC.shape[1:]
    groups, more = heads // k_BTNC.shape[2], -length % BLOCK
    q_BTHC, k_BTNC, v_BTNC = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTHC, k_BTNC, v_BTNC)
    )
    segment_BT = jnp.pad(segment_BT, ((0, 0), (0, more)))
    rows, total = segment_BT.shape
    q_BINGQC = q_BTHC.reshape(rows, -1, BLOCK, heads // groups, groups, channels).transpose(0, 1, 3, 4, 2, 5)
    rule = Rule(channels**-0.5 if scale is None else scale, softcap, window)
    seen_BINGQC = _rows(
        q_BINGQC, _blocks(k_BTNC), _blocks(v_BTNC), segment_BT.reshape(rows, -1, BLOCK), first_blocks(segment_BT, window), rule
    )  # fmt: skip
    return seen_BINGQC.transpose(0, 1, 4, 2, 3, 5).reshape(rows, total, heads, channels)[:, :length]


def first_blocks(segment_BT: Int[Array, "B T"], window: int | None) -> Int[Array, "B I"]:
    """Return the first block of keys that each block of queries sees; for a block of padding, one beyond its own (none)."""
    place_T = jnp.arange(segment_BT.shape[1])
    begins_BT = jnp.diff(segment_BT, axis=1, prepend=segment_BT[:, :1]) != 0
    first_BI = jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)[:, ::BLOCK]
    if window is not None:
        first_BI = jnp.maximum(first_BI, place_T[::BLOCK] - window + 1)
    real_BI = jnp.any(segment_BT.reshape(len(segment_BT), -1, BLOCK) > 0, axis=2)
    return jnp.where(real_BI, first_BI // BLOCK, jnp.arange(real_BI.shape[1]) + 1)


def _blocks(x_BTNC: Array) -> Array:
    """Return x in blocks of K keys, [B, I, N, K, C]."""
    rows, _, heads, channels = x_BTNC.shape
    return x_BTNC.reshape(rows, -1, BLOCK, heads, channels).transpose(0, 1, 3, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rows(q: Array, k: Array, v: Array, segment: Array, first: Array, rule: Rule) -> Array:
    """Return the output [B, I, N, G, Q, C] for I blocks of each of B rows.

    q [B, I, N, G, Q, C]; k, v [B, I, N, K, C]; segment [B, I, Q]; first [B, I] from `first_blocks`.
    """
    return _forward(q, k, v, segment, first, rule)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, first: Array, rule: Rule
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output and the residuals of the backward pass."""

    def row(xs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, segment, first = xs

        def queries(xs: tuple[Array, ...]) -> tuple[Array, Array]:
            q_NGQC, i, first, own_Q = xs

            def keys(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                j = i - step  # the queries' own block first, so that every maximum is that of unmasked scores
                most, total, seen = carry
                score, _ = rule.scores(q_NGQC, k[j], own_Q[:, None] == segment[j], (i - j) * BLOCK)
                new = jnp.maximum(most, jnp.max(score, axis=-1))
                shrunk, weight = jnp.exp(most - new), jnp.exp(score - new[..., None])
                found = jnp.einsum(
                    "NGQK,NKC->NGQC", weight.astype(v.dtype), v[j], preferred_element_type=jnp.float32
                )
                return new, total * shrunk + jnp.sum(weight, axis=-1), seen * shrunk[..., None] + found

            zero = jnp.zeros(q_NGQC.shape[:-1], jnp.float32)
            begin = (zero + MASKED, zero, jnp.zeros(q_NGQC.shape, jnp.float32))
            most, total, seen = jax.lax.fori_loop(0, i - first + 1, keys, begin)
            total = jnp.where(total > 0, total, 1)  # a block of padding
            return (seen / total[..., None]).astype(q_NGQC.dtype), most + jnp.log(total)

        return jax.lax.map(queries, (q, jnp.arange(len(q)), first, segment))

    seen, logsumexp = checkpoint_name(jax.lax.map(row, (q, k, v, segment, first)), SAVED)
    return seen, (q, k, v, segment, first, seen, logsumexp)


def _backward(rule: Rule, kept: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    """Return the gradients by q, k and v, from the forward pass's residuals `kept`."""
    *inputs, seen, logsumexp = kept
    # Sum over keys of weight times its gradient, for each query.
    mean = jnp.sum(gradient.astype(jnp.float32) * seen.astype(jnp.float32), axis=-1)

    def row(xs: tuple[Array, ...]) -> tuple[Array, ...]:
        q, k, v, segment, first, gradient, logsumexp, mean = xs

        def queries(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q_NGQC, i, first, own_Q, gradient_NGQC, logsumexp_NGQ, mean_NGQ = xs

            def keys(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                of_k, of_v, of_q = carry
                score, slope = rule.scores(q_NGQC, k[j], own_Q[:, None] == segment[j], (i - j) * BLOCK)
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
            of_k, of_v, of_q = jax.lax.fori_loop(first, i + 1, keys, begin)
            return (of_k, of_v), of_q.astype(q.dtype)

        zero = jnp.zeros(k.shape, jnp.float32)
        blocks = (q, jnp.arange(len(q)), first, segment, gradient, logsumexp, mean)
        (of_k, of_v), of_q = jax.lax.scan(queries, (zero, zero), blocks)
        return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype)

    return *jax.lax.map(row, (*inputs, gradient, logsumexp, mean)), None, None


_rows.defvjp(_forward, _backward)
