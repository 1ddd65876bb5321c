"""The devices of the mesh: those that JAX finds, or one line."""

import jax
import pytest

from sppo_jax import sharding
from sppo_jax.errors import BadInput, one_line


@pytest.mark.parametrize("of_this_process", [False, True])
@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ("cuda", AssertionError(), "JAX_PLATFORMS=cuda: JAX cannot start it; install JAX for it"),
        (
            "tpu",
            RuntimeError("Unable to initialize\nbackend 'tpu'"),
            "it (Unable to initialize backend 'tpu'); install",
        ),
        ("nonsense", RuntimeError("not in the list of known backends"), "JAX_PLATFORMS=nonsense: "),
        ("", RuntimeError("Unable to initialize backend 'cuda'"), "JAX_PLATFORMS=cpu"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(named, error, said, of_this_process, monkeypatch):
    def refuse():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", named)
    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setattr(jax, "local_devices", refuse)
    with pytest.raises(BadInput) as raised:
        sharding.all_devices(of_this_process=of_this_process)
    assert said in str(raised.value)
    assert one_line(raised.value) == str(raised.value)
