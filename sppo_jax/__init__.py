"""sppo_jax: align a language model with Self-Play Preference Optimization (arXiv:2405.00675) in JAX."""

__version__ = "0.1.0"
