"""What a plan is about: a configuration on a mesh of devices that are not here, with the work that it has there."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sppo_jax import config, sharding
from sppo_jax.config import Config
from sppo_jax.hub import names, repositories
from sppo_jax.models import Architecture, attention, hf
from sppo_jax.plan import workload
from sppo_jax.plan.chips import Chip
from sppo_jax.plan.cost import GIB
from sppo_jax.plan.workload import Lengths, Workload
from sppo_jax.training import memory
from sppo_jax.training.batches import Layout

PUBLISHED = (
    Path(__file__).parent / "published"
)  # options of models that one may plan for without access to them


@dataclass(frozen=True)
class Setting:
    """A configuration on one mesh of one kind of chip."""

    config: Config
    architecture: Architecture  # with its rank of adapters
    chip: Chip
    mesh: Mesh
    lengths: Lengths
    compiled: bool  # for the devices of `mesh`; else they are stand-ins, and all is by formula

    @cached_property
    def work(self) -> Workload:
        return workload.workload(self.config, self.lengths)

    @property
    def dtype(self) -> Any:
        """That the policy computes in, as a run on these chips chooses it."""
        name = self.config.model.compute_dtype
        return jnp.dtype(jnp.bfloat16 if name == "auto" else name)

    @cached_property
    def kernel(self) -> str:
        """Of attention over whole sequences. Raises BadInput where the one that is named does not serve."""
        c = self.config.model
        return attention.choose(c.attention, self.mesh, self.architecture, self.dtype).name

    @property
    def update(self) -> memory.Update:
        c = self.config.fit
        longest = max(map(max, self.work.lengths_GR))
        return memory.Update(self.architecture, self.mesh, self.dtype.itemsize, self.kernel, c.remat, longest)

    @cached_property
    def layout(self) -> Layout:
        """The shape of the updates that a run would have there: cuDNN takes one sequence a row."""
        most = self.update.most_tokens(self.limit)
        shards = sharding.batch_shards(self.mesh)
        return workload.layout(self.config, self.work, shards, most, self.kernel != "cudnn")

    @property
    def limit(self) -> int:
        """Bytes that a program may use of a chip."""
        return int(self.chip.gib * GIB)


def architecture(c: Config) -> Architecture:
    """The policy's options; of published models without a download."""
    name = c.model.path.partition("@")[0]
    known = PUBLISHED / name
    if not name.startswith((".", "/")) and (known / "config.json").is_file() and not Path(name).is_dir():
        found = hf.read_architecture(known)
    elif name.startswith(config.EMBEDDED):
        found = hf.read_architecture(names.resolve(name))
    else:
        found = hf.read_architecture(repositories.snapshot(c.model.path, None, ("config.json",)).directory)
    return replace(found, lora_rank=c.model.lora_rank)


def mesh(m: config.Mesh, devices: list[Any], stand_ins: bool) -> Mesh:
    """The configuration's mesh over the devices of a slice. Raises BadInput where it does not fit them."""
    if not stand_ins:
        return sharding.make_mesh(m.data, m.fsdp, m.tensor, devices=devices)
    # jax.make_mesh would ask stand-ins for their place on the torus.
    return sharding.mesh_in_order(devices, m.data, m.fsdp, m.tensor)
