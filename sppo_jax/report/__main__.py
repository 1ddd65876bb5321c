"""`python -m sppo_jax.report --run OUT`."""

from sppo_jax.command import call
from sppo_jax.report.page import main

if __name__ == "__main__":
    call(main)
