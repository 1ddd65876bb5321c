"""The policy's network and its Hugging Face form."""

from sppo_jax.models.architecture import Architecture
from sppo_jax.models.hf import load, save
from sppo_jax.models.transformer import Transformer

__all__ = ["Architecture", "Transformer", "load", "save"]
