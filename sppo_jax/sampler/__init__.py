"""The sampler: K responses per prompt from one policy."""

from sppo_jax.sampler.engine import Sampler
from sppo_jax.sampler.stream import Stats

__all__ = ["Sampler", "Stats"]
