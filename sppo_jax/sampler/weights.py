"""The sampler's copy of a policy: an array per layer, matrices in the compute dtype or in 8 bits, on the devices that sample."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.models import hf, lora
from sppo_jax.models.lora import MATRICES
from sppo_jax.models.transformer import ByOutput, Transformer
from sppo_jax.sampler.quantized import Int8, quantized


def serving_model(model: Transformer, int8: bool, by_output: bool = False) -> Transformer:
    """A copy of `model` for decoding: an array per layer, its matrices in 8 bits or in the compute dtype.

    `by_output`: matrices that are not in 8 bits have their output dimensions first.
    """
    model = quantized(model.unstacked()) if int8 else model.unstacked()
    if by_output and not int8:
        _turn(model)
    graph, *states = nnx.split(model, Int8, ...)
    rounded, rest = states
    dtype = model.compute_dtype
    # Norm scales and biases keep training's dtype: Gemma adds 1 to them in float32.
    return nnx.merge(graph, rounded, jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, rest))


def _turn(model: Transformer) -> None:
    """Put the output dimensions of an unstacked model's matrices and adapters first, in place."""
    for layer in model.layers:
        for name, param in layer.items():
            if (ins := _inputs(name)) is not None:
                w = param[...]
                layer[name] = type(param)(ByOutput(jnp.transpose(w, [*range(ins, w.ndim), *range(ins)])))
    if model.head is not None:
        model.head = nnx.Param(ByOutput(model.head[...].T))


def _inputs(name: str) -> int | None:
    """The number of input dimensions of a layer's matrix or adapter; None for a norm or a bias."""
    matrix = name.removesuffix("_lora_a")
    return len(MATRICES[matrix][0]) if matrix in MATRICES else 1 if name.endswith("_lora_b") else None


def _by_output(mesh: Mesh) -> bool:
    """Whether the matrices of a model that decodes on `mesh` have their output dimensions first: on CPUs."""
    return sharding.platform(mesh) == "cpu"


def serving_bytes(model: Transformer, int8: bool = False) -> int:
    """Bytes of the serving model's weights, summed over all devices of a replica."""
    serving = nnx.state(nnx.eval_shape(lambda model: serving_model(model, int8), model))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(serving))


def abstract(model: Transformer, mesh: Mesh, int8: bool = False) -> tuple[Any, Any]:
    """The serving model's graph, and the shapes and placements of its weights on `mesh`.

    Allocates nothing; `model` may itself consist of shapes.
    """
    turned = _by_output(mesh) and not int8
    serving, shapes = nnx.split(nnx.eval_shape(lambda model: serving_model(model, int8, turned), model))
    placed = _shardings(model, shapes, mesh, turned)
    return serving, jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed
    )


def placed(model: Transformer, whole: Mesh, own: Mesh, int8: bool) -> tuple[Any, Any]:
    """The serving model's graph and weights on the mesh `own`, which is `whole` or this process's part of it.

    Raises BadInput for a weight that is not finite in the compute dtype.
    """
    graph, weights = nnx.split(model)
    serving, shapes = abstract(model, whole, int8)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    converted = _converted(weights, graph=graph, int8=int8, by_output=_by_output(whole))
    if bad := [name for name, ok in jax.device_get(_finite(converted)).items() if not ok]:
        raise BadInput(
            f"the policy's weights are damaged: {bad[0]} is not finite in {model.compute_dtype}, in which it is sampled"
        )
    put = sharding.one_at_a_time(jax.device_put, whole)
    found = jax.tree.map(put, converted, shardings)
    del converted
    if own == whole:
        return serving, found

    def local(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        place = NamedSharding(own, x.sharding.spec)
        pieces = {shard.device: shard.data for shard in x.addressable_shards}
        arrays = [pieces[device] for device in own.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, place, arrays)

    return serving, jax.tree.map(local, found)


@functools.partial(jax.jit, static_argnames=("graph", "int8", "by_output"))
def _converted(weights: Any, *, graph: Any, int8: bool, by_output: bool) -> Any:
    """The serving model's weights, placed as the compiler chooses."""
    return nnx.split(serving_model(nnx.merge(graph, weights), int8, by_output))[1]


@jax.jit
def _finite(serving: Any) -> dict[str, jax.Array]:
    """Whether each of the serving model's weights is finite. Its extremes are NaN if any number is."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): jnp.isfinite(x.max()) & jnp.isfinite(x.min())
        for path, x in jax.tree_util.tree_leaves_with_path(serving)
        if jnp.issubdtype(x.dtype, jnp.floating)
    }


def _shardings(model: Transformer, unstacked: Any, mesh: Mesh, turned: bool) -> Any:
    """The placement of each array of an unstacked model: the stacked one's, less its first dimension.

    `turned`: the matrices have their output dimensions first. The scales of a matrix in 8 bits are placed like the matrix, but a dimension of length 1 stays whole.
    """
    a = dataclasses.replace(model.architecture, tied=False)  # in 8 bits a tied head is a matrix of its own
    stacked = hf.abstract(a, mesh) | (lora.abstract(a, mesh) if a.lora_rank else {})

    def place(path: tuple, x: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        found = next(name for name in stacked if name.removeprefix("layers.") in names)
        spec = stacked[found].sharding.spec[1 if "layers" in names else 0 :]
        ins = (1 if found == "head" else _inputs(found.removeprefix("layers."))) if turned else None
        spec = spec if ins is None else (*spec[ins:], *spec[:ins])
        axes = [axis if n > 1 else None for axis, n in zip(spec, x.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, unstacked)
