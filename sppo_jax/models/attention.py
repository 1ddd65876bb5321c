"""Attention of one layer over explicit masks: where the kernel is chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row without keys stays finite


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BSNC: Float[Array, "B S N C"],
    v_BSNC: Float[Array, "B S N C"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H C"]:
    """Grouped-query attention, scores times `scale` (None: 1/sqrt(C)), softmax in float32.

    With `softcap` c, scores become c tanh(score / c) before masking, as in Gemma-2.
    A query that may see no key gets a finite value of no meaning: padding positions are such queries.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(
            q_BTHC, k_BSNC, v_BSNC, mask=mask_BTS[:, None], scale=scale, implementation="xla"
        )
    heads, kv_heads = q_BTHC.shape[2], k_BSNC.shape[2]
    q_BTNGC = q_BTHC.reshape(*q_BTHC.shape[:2], kv_heads, heads // kv_heads, q_BTHC.shape[3])
    score_BNGTS = jnp.einsum("BTNGC,BSNC->BNGTS", q_BTNGC, k_BSNC, preferred_element_type=jnp.float32)
    score_BNGTS *= q_BTHC.shape[3] ** -0.5 if scale is None else scale
    score_BNGTS = jnp.where(mask_BTS[:, None, None], softcap * jnp.tanh(score_BNGTS / softcap), MASKED)
    weight_BNGTS = jax.nn.softmax(score_BNGTS, axis=-1).astype(v_BSNC.dtype)
    return jnp.einsum("BNGTS,BSNC->BTNGC", weight_BNGTS, v_BSNC).reshape(q_BTHC.shape)


def causal_mask(valid_BT: Bool[Array, "B T"], window: int | None) -> Bool[Array, "B T T"]:
    """May query t see key s: s is real, not later than t, and fewer than `window` places before it."""
    place = jnp.arange(valid_BT.shape[1])
    distance_TS = place[:, None] - place[None, :]
    seen_TS = distance_TS >= 0
    if window is not None:
        seen_TS &= distance_TS < window
    return seen_TS[None] & valid_BT[:, None, :]


def cache_mask(position_B: Int[Array, " B"], size: int, window: int | None) -> Bool[Array, "B 1 S"]:
    """The same for one query per row at `position_B`, over a cache whose column is the position."""
    distance_BS = position_B[:, None] - jnp.arange(size)[None, :]
    seen_BS = distance_BS >= 0
    if window is not None:
        seen_BS &= distance_BS < window
    return seen_BS[:, None, :]
