"""Several games and one report: configurations × seeds, played one after another (`python -m sppo_jax.compare`)."""
