"""The sampler: K responses per prompt from one policy."""

from sppo_jax.sampler.engine import Sampler, Stats

__all__ = ["Sampler", "Stats"]
