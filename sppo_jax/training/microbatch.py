"""A microbatch: rows of tokens that the update's programs compute on at once, and the loss's inputs for their prompts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int32

from sppo_jax import sharding
from sppo_jax.training.packing import Layout, Shape

if TYPE_CHECKING:
    Leaf = Any  # all leaves of one microbatch are of one kind
else:
    Leaf = Array | np.ndarray | jax.ShapeDtypeStruct  # on the devices, on the host, or a shape alone


@dataclass(frozen=True)
class Microbatch:
    """B rows of T tokens with S responses at most, that hold G prompts of R responses each (best first, worst last).

    Several trees (a prompt and its responses, or one of them) share a row. U tokens of a row are scored at most. Where
    `real` is False, the other fields of that prompt are filler.
    """

    tokens: Int32[Leaf, "B T"]
    segment: Int32[Leaf, "B T"]  # this and the next two: models.trees.Trees
    branch: Int32[Leaf, "B T"]
    position: Int32[Leaf, "B T"]
    before: Int32[Leaf, "B U"]  # this and the next two: models.logprob.Scored, all responses' tokens
    label: Int32[Leaf, "B U"]
    slot: Int32[Leaf, "B U"]
    slots: Int32[Leaf, " S"]  # 1 to S
    place: Int32[Leaf, "G R"]  # where each response is: row * S + slot - 1
    ref_logprob: Float32[Leaf, "G R"]
    base_logprob: Float32[Leaf, "G R"]  # NaN without fit.anchor
    payoff: Float32[Leaf, "G R"]
    baseline: Float32[Leaf, " G"]
    probability: Float32[Leaf, " G"]  # P(best > worst)
    real: Bool[Leaf, " G"]
    share: Float32[Leaf, ""]  # the share of the update's real prompts that are in this microbatch

    def placed(self, mesh: Mesh) -> "Microbatch":
        """Copy the arrays to the devices: rows are cut over the mesh's batch axes, the rest is on every device."""
        return Microbatch(
            **{name: sharding.put(getattr(self, name), _sharding(name, mesh)) for name in _DIMENSIONS}
        )

    @staticmethod
    def abstract(mesh: Mesh, layout: Layout, responses: int) -> "Microbatch":
        """Shapes, dtypes and shardings of a placed microbatch whose prompts have `responses` responses each."""
        sizes = {
            "B": layout.rows,
            "T": layout.width,
            "U": layout.most_scored(Shape(layout.rows, layout.width)),
            "S": layout.slots,
            "G": layout.prompts,
            "R": responses,
        }
        return Microbatch(
            **{
                name: jax.ShapeDtypeStruct(
                    [sizes[letter] for letter in letters], dtype, sharding=_sharding(name, mesh)
                )
                for name, (letters, dtype) in _DIMENSIONS.items()
            }
        )


def _dimensions() -> dict[str, tuple[str, str]]:
    """{field: (letters of its dimensions, dtype)}, from the annotations."""
    found: dict[str, tuple[str, str]] = {}
    for field in dataclasses.fields(Microbatch):
        annotation: Any = get_args(field.type)[0]
        found[field.name] = annotation.dim_str.replace(" ", ""), annotation.dtypes[0]
    return found


def _sharding(name: str, mesh: Mesh) -> jax.sharding.NamedSharding:
    letters, _ = _DIMENSIONS[name]
    return sharding.named(letters if "B" in letters else "", mesh)


def _children(microbatch: Microbatch) -> tuple[list[Any], None]:
    return [getattr(microbatch, name) for name in _NAMES], None


def _rebuilt(_: None, children: Sequence[Any]) -> Microbatch:
    """A microbatch made without `__init__`, which tests check against the annotations: jax also fills trees with non-arrays."""
    microbatch = object.__new__(Microbatch)
    microbatch.__dict__.update(zip(_NAMES, children, strict=True))
    return microbatch


_DIMENSIONS = _dimensions()
_NAMES = sorted(_DIMENSIONS)  # the order of a program's arguments
jax.tree_util.register_pytree_node(Microbatch, _children, _rebuilt)
