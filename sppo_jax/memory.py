"""Bytes of a device's memory that the update needs, by formula: for the size of a microbatch, and for plans without a compiler."""

import math

from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.models import Architecture, hf
from sppo_jax.models.logprob import chunk_size

FILLED = 0.9  # share of a device's memory that the formula may fill: it is good to a tenth
FEWEST, MOST = 1024, 16_384  # tokens of a microbatch on one device


def parameters(a: Architecture) -> int:
    return sum(math.prod(t.shape(a)) for t in hf.table(a))


def state_bytes(a: Architecture, mesh: Mesh, accumulated: bool) -> float:
    """float32 masters, second moments and gradients, and their sum over microbatches where there is one; a device's pieces."""
    pieces = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return (16 if accumulated else 12) * parameters(a) / pieces


def update_bytes(a: Architecture, mesh: Mesh, width: int, tokens: float, accumulated: bool) -> float:
    """The most that an update holds on a device for `tokens` tokens at once, computing in numbers of `width` bytes."""
    tensor = mesh.shape["tensor"]
    layer = (2 * a.heads + 2 * a.kv_heads) * a.head_dim * a.model + 3 * a.mlp * a.model
    gathered = 2 * layer * width / tensor  # one in use, the next on its way
    gradient = layer * 4 / tensor
    saved = a.layers * a.model * width  # each layer's input, for every token
    inner = (
        2 * width * ((2 * a.heads + 2 * a.kv_heads) * a.head_dim + 3 * a.mlp) / tensor + 6 * width * a.model
    )
    head = (
        2 * a.model * a.vocab * width / tensor + 3 * 4 * min(tokens, chunk_size(a.vocab)) * a.vocab / tensor
    )
    return state_bytes(a, mesh, accumulated) + gathered + gradient + head + tokens * (saved + inner)


def most_tokens(a: Architecture, mesh: Mesh, width: int, limit: float | None) -> int:
    """Of a microbatch, over all devices: as many as fit into `limit` bytes of each (None: a CPU), within reason.

    More at once makes nothing faster once the products are large; fewer means that weights are gathered more often.
    """
    tokens = 4 * FEWEST if limit is None else MOST
    while limit is not None and tokens > FEWEST:
        if update_bytes(a, mesh, width, tokens, accumulated=True) <= FILLED * limit:
            break
        tokens //= 2
    return tokens * sharding.batch_shards(mesh)
