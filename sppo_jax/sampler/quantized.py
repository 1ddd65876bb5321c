"""The sampler's copy of a policy in 8 bits (sampling.quantize): int8 matrices, each with a float32 scale per output channel.

A matrix W becomes round(W / s) with s = max |W| / 127.5 over its input dimensions, computed from the float32 masters; products
are those of models.transformer.product. Norms, biases, adapters and the embedding, of which a token reads one row, stay
unchanged.
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
    """`model`, as `Transformer.unstacked` returns it, with its matrices replaced in place by 8-bit ones.

    A tied head gets a matrix of its own: it is read whole for every token, but the embedding is not.
    """
    for layer in model.layers:
        for name, (ins, _, _) in MATRICES.items():
            layer[name] = Int8(rounded(layer[name][...], len(ins)))
    head_DV = model.embedding[...].T if model.head is None else model.head[...]
    model.head = nnx.data(Int8(rounded(head_DV, 1)))
    return model


def rounded(w: Float[Array, "..."], ins: int) -> Any:
    """`w`, whose first `ins` dimensions are its inputs, as a qwix.QArray: int8, with a scale per output channel.

    Raises BadInput where qwix is not installed.
    """
    try:
        import qwix  # optional
    except ImportError:
        raise BadInput("sampling.quantize=int8 needs the package qwix: install it, or choose none") from None
    return qwix.quantize(w.astype(jnp.float32), "int8", channelwise_axes=range(ins, w.ndim))
