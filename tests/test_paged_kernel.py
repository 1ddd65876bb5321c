"""The TPU's kernel for attention over pages itself, computed by Pallas' interpreter on a CPU, against dense attention."""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.sharding import Mesh

from tests.test_paged import LAYER, attend, dense, random_batch

KERNEL = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel")
SIZES = dataclasses.replace(LAYER, heads=4, kv_heads=2, head_dim=128)  # the kernel needs whole tiles


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jax 0.10.2's interpreter take the kernel, which is written for a TPU's memories and has no such switch.

    A store at a fixed place asks its index for a shape, as of an array, and gets an int: the interpreter's mistake.
    """
    whole = KERNEL.pl.pallas_call

    def pallas_call(*args: Any, **options: Any) -> Any:
        return whole(*args, **options | {"interpret": True})

    monkeypatch.setattr(KERNEL.pl, "pallas_call", pallas_call)
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 3.0, "scale": 0.5}])
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_equals_dense_attention(one_device: Mesh, options: dict[str, Any]) -> None:
    batch = random_batch(9, a=SIZES)[np.arange(11)]  # a block of queries that is not full, too
    batch.active[5:7] = False
    out, _ = attend(one_device, batch, a=SIZES, kernel="ragged", **options)
    assert np.isfinite(out).all()
    live = batch[batch.active]
    np.testing.assert_allclose(out[batch.active], dense(live, **options), atol=2e-5)


@pytest.mark.usefixtures("interpreted")
def test_the_kernel_equals_plain_xla_in_bfloat16(one_device: Mesh) -> None:
    batch = random_batch(10, a=SIZES)[np.arange(8)]
    for name in ("q", "keys", "values"):
        setattr(batch, name, np.asarray(getattr(batch, name), jnp.bfloat16))
    found, plain = (
        np.asarray(attend(one_device, batch, a=SIZES, kernel=kernel)[0], np.float32)
        for kernel in ("ragged", "xla")
    )
    np.testing.assert_allclose(found, plain, atol=0.03)
