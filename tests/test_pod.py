"""The mesh of the sampler on a pod: each process on its own devices if the model fits there, else all together."""

import pytest

from sppo_jax import sharding
from sppo_jax.plan.chips import Device
from sppo_jax.sampler import capacity

ANY = range(1, 17)


@pytest.mark.parametrize(
    ("gigabytes", "tensor", "supported", "expected"),
    [
        (14.5, 1, ANY, (4, 1, 4)),  # Mistral-7B on v5e: 4 chips of a host
        (6.0, 1, ANY, (16, 1, 1)),
        (6.0, 2, ANY, (8, 1, 2)),  # no smaller than the user's own
        (140.0, 1, ANY, (1, 1, 16)),  # not on a host
        (1000.0, 1, ANY, (1, 1, 16)),  # nowhere; Capacity.shape will raise
        (18.5, 1, {8}, (2, 1, 8)),  # Gemma-2-9B: two hosts, for the kernel's sake
        (5.2, 1, {4, 8}, (4, 1, 4)),  # Gemma-2-2B
        (5.2, 1, set(), (16, 1, 1)),  # no kernel supports any
        (18.5, 16, {8}, (1, 1, 16)),  # nor any that the user leaves
    ],
)
def test_a_replica_is_as_small_as_leaves_room_and_has_a_kernel(gigabytes, tensor, supported, expected):
    devices = [Device(i, i % 4, "tpu", "") for i in range(16)]  # on 4 processes
    mesh = sharding.mesh_in_order(devices, 1, 16 // tensor, tensor)
    found = capacity.sampling_mesh(mesh, int(gigabytes * 1e9), 16_900_000_000, supported.__contains__).devices
    assert found.shape == expected
    if tensor <= expected[2] <= 4:  # a replica's devices are one process's
        assert all(len({d.process_index for d in row}) == 1 for row in found[:, 0])
