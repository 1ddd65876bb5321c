"""The policy's network and its Hugging Face form."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sppo_jax.command import say
from sppo_jax.hub import names
from sppo_jax.models import hf
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.hf import save
from sppo_jax.models.transformer import Transformer

__all__ = ["Architecture", "Transformer", "load", "save"]


def load(
    name: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: str = "auto",
) -> Transformer:
    """Load the model that `name` means on the command line, sharded over `mesh` (default: one device).

    `name` is `embedded:NAME`, a Hugging Face directory, or `owner/repo[@revision]` on the hub. `dtype` is that of the
    matrix products, `param_dtype` that of the parameters, `attention` the kernel (models/attention.py).
    Raises BadInput for a name that cannot be fetched, and as `models.hf.load` does.
    """
    directory = names.fetch(str(name)).directory
    hf.stored_architecture(directory, tell=say)
    return hf.load(directory, mesh=mesh, dtype=dtype, param_dtype=param_dtype, attention=attention)
