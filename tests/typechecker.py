"""What checks the annotations of a call while tests run: beartype, to which an int is a float as it is to mypy."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Rooms and modules whose annotations of shapes and dtypes are checked at every call (tests/conftest.py installs the hook;
# tests/test_annotations.py fails when a module with annotations is not covered).
CHECKED = (
    "sppo_jax.fit",
    "sppo_jax.losses",
    "sppo_jax.models",
    "sppo_jax.pairrm.deberta_attention",
    "sppo_jax.pairrm.jax_model",
    "sppo_jax.sampler",
    # Not the whole room: packing calls small functions of lists a million times.
    "sppo_jax.training.batches",
    "sppo_jax.training.microbatch",
    "sppo_jax.training.update",
)
