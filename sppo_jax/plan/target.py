"""Plan target: one configuration on a mesh of absent devices, and one iteration's work there."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sppo_jax import config, sharding
from sppo_jax.config import Config
from sppo_jax.hub import names, repositories
from sppo_jax.models import Architecture, attention, hf
from sppo_jax.plan import workload
from sppo_jax.plan.chips import Chip
from sppo_jax.plan.cost import GIB
from sppo_jax.plan.lengths import Lengths
from sppo_jax.plan.workload import Workload
from sppo_jax.training import memory
from sppo_jax.training.packing import Layout

# config.json of published models, which can be planned without access to their repositories.
PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class Target:
    """A configuration on one mesh of one kind of chip."""

    config: Config
    # With the configuration's rank of adapters.
    architecture: Architecture
    chip: Chip
    mesh: Mesh
    lengths: Lengths
    # Programs are compiled for the devices of `mesh`; else these are stand-ins, and all figures are by formula.
    compiled: bool

    @cached_property
    def work(self) -> Workload:
        """The work of one iteration."""
        return workload.workload(self.config, self.lengths)

    @property
    def dtype(self) -> Any:
        """Compute dtype of the policy, as a run on these chips chooses it."""
        return sharding.compute_dtype(self.config.model.compute_dtype, self.mesh)

    @cached_property
    def kernel(self) -> str:
        """Name of the attention kernel over whole sequences. Raises BadInput where the configured one cannot serve."""
        c = self.config.model
        return attention.choose(c.attention, self.mesh, self.architecture, self.dtype).name

    @property
    def update(self) -> memory.Update:
        """The formula of an update's memory."""
        longest = max(map(max, self.work.lengths_GR))
        return memory.Update.of(self.config, self.architecture, self.mesh, longest)

    @cached_property
    def layout(self) -> Layout:
        """Layout of the updates that a run would have there."""
        return workload.layout(self.config, self.work, self.update.packing(self.limit))

    @property
    def limit(self) -> int:
        """Bytes that a program may use of a chip."""
        return int(self.chip.gib * GIB)


def architecture(c: Config) -> Architecture:
    """The policy's architecture; that of a published model is read without a download."""
    name = c.model.path.partition("@")[0]
    known = PUBLISHED / name
    if not name.startswith((".", "/")) and (known / "config.json").is_file() and not Path(name).is_dir():
        found = hf.read_architecture(known)
    elif name.startswith(config.EMBEDDED):
        found = hf.read_architecture(names.resolve(name))
    else:
        names.check_export(c.model.path)
        given = repositories.snapshot(c.model.path, None, ("config.json",))
        # A repository's weights may be in the cache in part: its config.json alone decides.
        read = hf.stored_architecture if given.revision is None else hf.read_architecture
        found = read(given.directory)
    return replace(found, lora_rank=c.model.lora_rank)


def mesh(m: config.Mesh, devices: list[Any], stand_ins: bool) -> Mesh:
    """The configuration's mesh over the devices of a slice. Raises BadInput where it does not fit them."""
    if not stand_ins:
        return sharding.make_mesh(m.data, m.fsdp, m.tensor, devices=devices)
    # jax.make_mesh would ask stand-ins for their place on the torus.
    return sharding.mesh_in_order(devices, m.data, m.fsdp, m.tensor)
