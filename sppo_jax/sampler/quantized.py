"""The sampler's copy of a policy in 8 bits (sampling.quantize): int8 matrices, each with a float32 scale per output channel.

A matrix W becomes round(W / s) with s = max |W| / 127.5 over what it is summed over, made from the masters; the products are
models.transformer.product's. Norms, biases, adapters and the embedding, of which a token reads one row, stay as they are.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sppo_jax.errors import BadInput
from sppo_jax.models.lora import MATRICES
from sppo_jax.models.transformer import Transformer


class Int8(nnx.Param):
    """A matrix in 8 bits: a qwix.QArray."""


def quantized(model: Transformer) -> Transformer:
    """`model`, which `Transformer.unstacked` has made, with its matrices in 8 bits, in place.

    A tied head gets a matrix of its own: it is read whole for every token, and its embedding is not.
    """
    for layer in model.layers:
        for name, (ins, _, _) in MATRICES.items():
            layer[name] = Int8(rounded(layer[name][...], len(ins)))
    head_DV = model.embedding[...].T if model.head is None else model.head[...]
    model.head = nnx.data(Int8(rounded(head_DV, 1)))
    return model


def rounded(w: Float[Array, "..."], ins: int) -> Any:
    """The qwix.QArray of a matrix whose first `ins` dimensions are summed over."""
    try:
        import qwix  # not before it is needed
    except ImportError:
        raise BadInput("sampling.quantize=int8 needs the package qwix: install it, or choose none") from None
    return qwix.quantize(w.astype(jnp.float32), "int8", channelwise_axes=range(ins, w.ndim))
