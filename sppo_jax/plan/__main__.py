"""`python -m sppo_jax.plan`."""

from sppo_jax.command import call
from sppo_jax.plan.search import main

if __name__ == "__main__":
    call(main)
