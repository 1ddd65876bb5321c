"""The sampler's sizes: which devices form a replica, and how many slots and pages each replica has.

The run (engine.py) and the plan (plan/compiled.py) both call `choose` and then `Capacity.shape`, so a plan's programs are
the run's.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler import paged_attention, paging, schedule
from sppo_jax.sampler.paging import PAGE
from sppo_jax.sampler.weights import serving_bytes

FILLED = 0.85  # share of a device's memory that everything resident and the pages may take together
SMALLEST_BUCKET = 32  # tokens
# On CPUs a step of fewer slots hardly takes less time. A norm of fewer numbers is summed in another order.
FEWEST_SLOTS, FEWEST_NUMBERS = 16, 4096
SHARES = (1, 0.75, 0.5, 0.25)  # of its slots with which a stream on a CPU goes on as its responses end
# Multiplications with a square matrix of the model's width from which more rows are hardly faster per row on CPUs.
ENOUGH = 26_000_000


@dataclass(frozen=True)
class Shape:
    """The sizes that the programs are compiled for, over all replicas, and the constants compiled into them."""

    slots: int
    pages: int
    width: int  # most pages of one response, its prompt's included
    eos: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    quantize: bool = False  # int8 pages


@dataclass(frozen=True)
class Capacity:
    """The devices that sample, as replicas, and the facts that decide how many slots and pages fit on them."""

    mesh: Mesh  # data x 1 x tensor: `data` replicas of `tensor` devices
    sampling: Sampling  # as configured: slots and cache_tokens are per process
    architecture: Architecture
    dtype: Any
    kernel: paged_attention.Kernel
    limit: int | None  # bytes of each device; None: unlimited

    @property
    def int8(self) -> bool:
        """Whether matrices are rounded to 8 bits."""
        return self.sampling.quantize == "int8"

    @property
    def replicas(self) -> int:
        """The number of replicas on the mesh."""
        return sharding.batch_shards(self.mesh)

    @property
    def slots(self) -> int:
        """Slots over all replicas: the configured number per process, rounded down to the replicas, at least 1 each."""
        slots = _processes(self.mesh) * self.sampling.slots
        return max(1, slots // self.replicas) * self.replicas

    def own(self) -> "Capacity":
        """The capacity of this process's replicas alone; that of all replicas where one spans processes."""
        return dataclasses.replace(self, mesh=own_part(self.mesh))

    def longest_prompt(self, length: int) -> int:
        """The longest prompt, in tokens, that programs made for prompts of `length` tokens accept."""
        return min(bucket(length), self.architecture.max_positions)

    def slots_for(self, responses: int | None) -> int:
        """Slots over all replicas for a stream of so many responses (None: unknown): all of them, but on CPUs only those in use.

        A step costs an accelerator the same for few slots as for many. A CPU computes every slot, full or empty.
        """
        found = self.slots // self.replicas
        # In 8 bits, another number of slots gives other last bits.
        if responses is not None and sharding.platform(self.mesh) == "cpu" and not self.int8:
            a = self.architecture
            least = max(fewest_slots(a), min(wanted(responses, self.replicas, a), enough_slots(a)))
            while found // 2 >= least:
                found //= 2
        return found * self.replicas

    def shape(
        self,
        *,
        longest: int,
        eos: tuple[int, ...],
        in_use: float,
        responses: int | None = None,
        agree: Callable[[int], int] = int,
    ) -> Shape:
        """The sizes of the programs for prompts of up to `longest` tokens.

        `in_use`: bytes of each device that are taken already, the serving weights included; `responses`: their number, if
        known; `agree`: turns the page count that fits this process into one that fits every process. Raises BadInput where one whole response does not fit.
        """
        sampling, replicas = self.sampling, self.replicas
        longest += sampling.max_new_tokens
        slots, cache_tokens = self.slots_for(responses), _processes(self.mesh) * sampling.cache_tokens
        # The TPU's kernel cannot read int8 keys with a scale each; with it, only matrices are in 8 bits.
        quantize = self.int8 and self.kernel == "xla"
        pages, least = (schedule.pages_needed(n, longest, PAGE) for n in (slots // replicas, 1))
        if cache_tokens:
            pages = min(pages, cache_tokens // PAGE // replicas)
            if pages < least:
                raise BadInput(
                    f"sampling.cache_tokens={cache_tokens}: sampling.cache_tokens must be at least "
                    f"{least * PAGE * replicas}"
                )
        elif self.limit is not None:
            free, each = FILLED * self.limit - in_use, self._page_bytes(quantize)
            pages = agree(min(pages, max(0, int(free / each))))
            if pages < least:
                raise BadInput(
                    f"a response of {longest} tokens, prompt included, needs {least * each / 1e9:.1f} GB of keys and "
                    f"values, and {max(0, free) / 1e9:.1f} GB are left on each device: lower sampling.max_new_tokens"
                )
        return Shape(
            slots=slots,
            pages=pages * replicas,
            width=-(-longest // PAGE),
            eos=eos,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            quantize=quantize,
        )

    def _page_bytes(self, quantize: bool) -> float:
        """Bytes that one page takes on one device, in all layers."""
        a, tensor = self.architecture, sharding.tensor_shards(self.mesh)
        pieces = 1 if a.kv_heads % tensor else tensor
        return paging.bytes_per_page(a, self.dtype, quantize) / pieces


def choose(model: Transformer, mesh: Mesh, sampling: Sampling, limit: int | None) -> Capacity:
    """The devices of `mesh` as replicas that sample from `model` (arrays or shapes), with `limit` bytes in each device.

    On a pod this is every process's replicas; `own` restricts it to this process's.
    """
    forced, a, dtype = model.kernel.name, model.architecture, model.compute_dtype
    supported = paged_attention.supported(mesh, forced, a, dtype)
    replicas = sampling_mesh(mesh, serving_bytes(model, sampling.quantize == "int8"), limit, supported)
    return Capacity(replicas, sampling, a, dtype, paged_attention.kernel_of(model, replicas), limit)


def sampling_mesh(mesh: Mesh, weights: int, limit: int | None, supported: Callable[[int], bool]) -> Mesh:
    """The devices of `mesh` as data x 1 x tensor for decoding: replicas that share nothing, each as small as can be.

    A replica has at least the mesh's own `tensor` devices, and so many that `weights` bytes spread over them leave three
    fifths of each device's `limit` bytes (None: unlimited) for keys and values. In order of preference: sizes that a
    kernel supports; sizes within one process's devices, so that no process waits for another; the smallest.
    """
    local = _local_devices(mesh)
    sizes = [
        tensor
        for count in ((local, mesh.size) if local < mesh.size else (local,))
        for tensor in range(sharding.tensor_shards(mesh), count + 1)
        if count % tensor == 0 and (limit is None or weights / tensor <= 0.4 * limit)
    ]
    return _by_process(mesh.devices.flat, next(filter(supported, sizes), (*sizes, mesh.size)[0]))


def own_part(mesh: Mesh) -> Mesh:
    """This process's replicas of a sampling mesh; the whole mesh where a replica spans processes."""
    own = [row for row in mesh.devices[:, 0] if all(d.process_index == jax.process_index() for d in row)]
    tensor = sharding.tensor_shards(mesh)
    if not own or len(own) * tensor < _local_devices(mesh):
        return mesh
    return _by_process([d for row in own for d in row], tensor)


def fewest(pages: int) -> int:
    """Minimum of `pages` over processes: they all run one program, so all need the same page count."""
    return int(multihost_utils.process_allgather(np.asarray(pages)).min())


def memory_in_use(mesh: Mesh) -> int:
    """Bytes in use on this process's first device of `mesh`; 0 on CPUs, which do not report it."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_in_use", 0)


def fewest_slots(a: Architecture) -> int:
    """The least number of slots of a replica to which a CPU comes down."""
    return max(FEWEST_SLOTS, -(-FEWEST_NUMBERS // a.model))


def enough_slots(a: Architecture) -> int:
    """The number of slots of a replica beyond which a CPU is hardly faster per slot, and keys and values only take memory."""
    return max(2 * fewest_slots(a), ENOUGH // a.model**2)


def wanted(responses: int, replicas: int, a: Architecture) -> int:
    """The number of slots of each replica for so many responses on CPUs: a slot for two of them, or for each if they are few.

    When a response ends early its slot has another one to take, and products with more rows are hardly faster per row.
    """
    each = -(-responses // replicas)
    return min(each, max(-(-each // 2), 2 * fewest_slots(a)))


def sizes(slots: int, replicas: int, fewest: int) -> tuple[int, ...]:
    """The numbers of slots, over all replicas, to which a CPU comes down as responses end: SHARES of `slots`, or fewer of them."""
    found = [int(share * slots) // replicas for share in SHARES]
    return tuple(each * replicas for each in (found[0], *(n for n in found[1:] if n >= fewest)))


def bucket(length: int) -> int:
    """The power of two, at least 32, to which a prompt of `length` tokens is padded: by its own length alone."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return size


def _processes(mesh: Mesh) -> int:
    """The number of processes with devices in `mesh`; each has equally many."""
    return mesh.size // _local_devices(mesh)


def _local_devices(mesh: Mesh) -> int:
    """The number of this process's devices in `mesh`.

    `Mesh.local_mesh` would require that they form one block of the mesh, and on a torus they may not.
    """
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


def _by_process(devices: Iterable[Any], tensor: int) -> Mesh:
    """Replicas of `tensor` devices each, in the order of processes."""
    ordered = sorted(devices, key=lambda d: d.process_index)
    return sharding.mesh_in_order(ordered, len(ordered) // tensor, 1, tensor)
