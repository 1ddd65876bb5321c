"""The mesh, and the one table from logical axes to mesh axes: every array of the package is placed by it.

Logical axes are the letters that name array dimensions everywhere in this package:
B batch, T time, K candidates, D model, H query heads, N kv heads, C channels of a head, F feed-forward,
V vocabulary, L layers, R rank of an adapter (in training code: responses of a prompt).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sppo_jax.errors import BadInput

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. Letters that are absent stay whole on every device.
TABLE: dict[str, str | tuple[str, ...]] = {
    "B": BATCH_AXES,
    "D": "fsdp",
    "H": "tensor",
    "N": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: list | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor` over `devices` (default: all); one size may be -1, for what is left.

    Raises BadInput if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise BadInput(f"mesh {sizes}: sizes are at least 1, and at most one of them is -1")
    if free and len(devices) % given == 0:
        sizes[free[0]] = len(devices) // given
    elif given != len(devices) or free:
        raise BadInput(
            f"mesh {sizes} does not fit {len(devices)} devices: make data x fsdp x tensor = {len(devices)}"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)  # jax.make_mesh would default to Explicit axes
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=auto, devices=devices)


def sampling_mesh(mesh: Mesh, weights: int, limit: int | None, served: Callable[[int], bool]) -> Mesh:
    """The devices of `mesh` as data x 1 x tensor, for decoding: replicas that share nothing, each as small as can be.

    A replica is a number of devices, at least the mesh's own `tensor`, over which `weights` bytes leave three fifths of
    the `limit` bytes of each (None: there is no limit) for keys and values. Those numbers that are `served` by a kernel
    come before those that are not, and then those that fit on one process's devices, so that none waits for another.
    """
    local = _local(mesh)
    sizes = [
        tensor
        for count in ((local, mesh.size) if local < mesh.size else (local,))
        for tensor in range(mesh.shape["tensor"], count + 1)
        if count % tensor == 0 and (limit is None or weights / tensor <= 0.4 * limit)
    ]
    return _in_order(mesh.devices.flat, next(filter(served, sizes), (*sizes, mesh.size)[0]))


def own_part(mesh: Mesh) -> Mesh:
    """This process's replicas of a sampling mesh; all of it where a replica spans processes."""
    mine = [row for row in mesh.devices[:, 0] if all(d.process_index == jax.process_index() for d in row)]
    if not mine or len(mine) * mesh.shape["tensor"] < _local(mesh):
        return mesh
    return _in_order([d for row in mine for d in row], mesh.shape["tensor"])


def processes(mesh: Mesh) -> int:
    """How many processes have devices of `mesh`, each the same number."""
    return mesh.size // _local(mesh)


def _local(mesh: Mesh) -> int:
    """This process's devices in a mesh; Mesh.local_mesh wants them to lie together there, and on a torus they may not."""
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


def _in_order(devices: Iterable[Any], tensor: int) -> Mesh:
    """Replicas of `tensor` devices each, process by process: jax.make_mesh would look at the torus alone."""
    ordered = np.asarray(sorted(devices, key=lambda d: d.process_index), object)
    return Mesh(ordered.reshape(-1, 1, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(letters: str, mesh: Mesh, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """The partition of an array whose dimensions are `letters`, such as "LDHC" or "BT"; "." is anonymous.

    Vectors of a layer (norm scales, biases) are replicated: they are too small to pay for a gather.
    With `shape`, a dimension that its mesh axis does not divide stays whole (2 kv heads over 4 devices).
    """
    axes: list[str | tuple[str, ...] | None] = [TABLE.get(letter) for letter in letters]
    if len(letters.replace("L", "")) == 1 and letters != "B":
        axes = [None] * len(letters)
    if shape is not None:
        axes = [a if n % shards(mesh, a) == 0 else None for a, n in zip(axes, shape, strict=True)]
    return PartitionSpec(*axes)


def named(letters: str, mesh: Mesh, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """`spec` bound to its mesh."""
    return NamedSharding(mesh, spec(letters, mesh, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread(mesh: Mesh) -> NamedSharding:
    """The first dimension cut over all devices, whatever axis they lie on."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def shards(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """How many pieces a dimension over these mesh axes is cut into."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def batch_shards(mesh: Mesh) -> int:
    """How many pieces a batch is cut into: what batch sizes must be divisible by."""
    return shards(mesh, TABLE["B"])


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu: of the mesh, not of the default device, which ahead-of-time compilation differs from."""
    return mesh.devices.flat[0].platform


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that a program may use of each device, by the first of this process's own; None on CPUs."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def compute_dtype(name: str, mesh: Mesh) -> np.dtype:
    """The dtype of matrix products on a mesh: `name` itself, or for auto float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)
