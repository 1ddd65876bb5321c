"""The mesh of devices, and the one table from logical axes to mesh axes, by which every array of the package is placed.

Logical axes are the letters that name array dimensions everywhere in this package:
B batch, T time, K candidates, D model, H query heads, N kv heads, C channels of a head, F feed-forward,
V vocabulary, L layers, R rank of an adapter (in training code: responses of a prompt).
"""

import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sppo_jax.errors import BadInput, one_line

MESH_AXES = ("data", "fsdp", "tensor")
AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

# Logical axis -> mesh axis. Dimensions of other letters stay whole on every device.
TABLE: dict[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": "fsdp",
    "H": "tensor",
    "N": "tensor",
    "F": "tensor",
    "V": "tensor",
}


def resolve_sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The three sizes of a mesh over so many devices; a size of -1 becomes what the other two leave.

    Raises BadInput unless the product is the number of devices.
    """
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = devices // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise BadInput(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} does not fit {devices} devices: make data x fsdp x tensor = "
            f"{devices}, with sizes of at least 1; one of them may be -1, for what the others leave"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: list | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor` over `devices` (default: all), placed to suit their network.

    Sizes and errors as in `resolve_sizes`.
    """
    devices = all_devices() if devices is None else devices
    sizes = resolve_sizes(data, fsdp, tensor, len(devices))
    # jax.make_mesh would default to Explicit axes.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=AXIS_TYPES, devices=devices)


def all_devices(*, of_this_process: bool = False) -> list:
    """JAX's devices, of all processes or of this one. Raises BadInput where JAX cannot start what JAX_PLATFORMS names."""
    try:
        return jax.local_devices() if of_this_process else jax.devices()
    except (AssertionError, RuntimeError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.values["jax_platforms"]
        named = f"JAX_PLATFORMS={asked}" if asked else "the accelerator"
        told = f" ({one_line(error)[:300]})" if str(error) else ""
        raise BadInput(
            f"{named}: JAX cannot start it{told}; install JAX for it, or set JAX_PLATFORMS=cpu"
        ) from None


def mesh_in_order(devices: Iterable[Any], data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh with its devices in the order given, where jax.make_mesh would place them by the torus alone."""
    ordered = np.asarray([*devices], object)
    sizes = resolve_sizes(data, fsdp, tensor, ordered.size)
    return Mesh(ordered.reshape(sizes), MESH_AXES, axis_types=AXIS_TYPES)


def spec(letters: str, mesh: Mesh, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """The partition of an array whose dimensions are `letters`, such as "LDHC" or "BT"; "." is a dimension without a name.

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
    """The partition of `spec` as a sharding on `mesh`, by which arrays are placed."""
    return NamedSharding(mesh, spec(letters, mesh, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def spread(mesh: Mesh) -> NamedSharding:
    """The placement of an array whose first dimension is cut over all devices of the mesh."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def put(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Copy an array, which every process of the mesh has whole, to its devices."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    # jax.device_put would compare the processes' copies, bit by bit, over the network.
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def whole(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """The array on the host, also where it is cut over several processes, all of which call this together."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(_copied(mesh)(x).addressable_data(0))


def one_at_a_time(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program; on CPUs of several processes with a wait for its results after each call.

    There the collectives of two programs at once may wait for each other for ever (jaxlib 0.10, over Gloo).
    """
    if platform(mesh) != "cpu" or not mesh.is_multi_process:
        return program
    return lambda *args: jax.block_until_ready(program(*args))


@functools.cache
def _copied(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def shards(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of pieces that a dimension over these mesh axes is cut into; 1 for None."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def batch_shards(mesh: Mesh) -> int:
    """The number of pieces that a batch is cut into: batch sizes must be divisible by it."""
    return shards(mesh, TABLE["B"])


def tensor_shards(mesh: Mesh) -> int:
    """The number of devices over which one layer's heads and feed-forward are cut."""
    return shards(mesh, TABLE["N"])


def platform(mesh: Mesh) -> str:
    """The platform of the mesh: cpu, gpu or tpu. The default device may be another, in ahead-of-time compilation."""
    return mesh.devices.flat[0].platform


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that a program may use of each device, read from this process's first one; None on CPUs."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def compute_dtype(name: str, mesh: Mesh) -> np.dtype:
    """The dtype of matrix products on a mesh: `name` itself, or for auto float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)
