"""The sampler's compiled programs: one prefill for each length bucket, admit and decode."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import compilation, sharding
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler import paged_attention, paging
from sppo_jax.sampler.capacity import Shape
from sppo_jax.sampler.decoding import Decoder, Order, Slots
from sppo_jax.sampler.paging import PAGE, Pages

PREFILL_TOKENS = 1024  # prompt tokens, padding included, of one prefill on one replica


class Programs:
    """Compiled programs of one model on one mesh: `admit`, `decode` and `prefill[bucket]`, once `compile` has run.

    Their arguments are those of `Decoder`'s functions; pages and slots are donated.
    """

    admit: Any = None
    decode: Any = None

    def __init__(
        self, graph: Any, weights: Any, mesh: Mesh, shape: Shape, kernel: paged_attention.Kernel | None = None
    ):
        """Describe the programs' arguments. `weights`: the serving model's state, arrays or their shapes.

        `kernel`: the kernel for attention over pages; default: the one that matches the model's own on this platform.
        """
        self.graph, self.mesh, self.shape = graph, mesh, shape
        self.weights = jax.tree.map(_described, weights)
        self.model: Transformer = nnx.merge(graph, self.weights)
        self.kernel = paged_attention.kernel_of(self.model, mesh) if kernel is None else kernel
        self.replicas = sharding.batch_shards(mesh)
        a = self.model.architecture
        each = shape.pages // self.replicas
        pool = paging.shapes(each, a, self.model.compute_dtype, mesh, quantize=shape.quantize)
        self.pages: list[Pages] = [pool] * a.layers
        self.prefill: dict[int, Any] = {}
        self._decoder = Decoder(graph, mesh, shape, self.kernel)

    def rows(self, bucket: int) -> int:
        """The number of prompts in one prefill on one replica."""
        return max(1, min(PREFILL_TOKENS // bucket, self.shape.slots // self.replicas))

    def compile(self, buckets: set[int]) -> int:
        """Compile the programs that are missing for these length buckets. Returns their number.

        They are compiled in parallel, but one by one on CPU, where the compiler takes its memory from the sampler.
        """
        sizes = sorted(buckets - self.prefill.keys())
        lowered = [] if self.decode is not None else [self.lower_admit(), self.lower_decode()]
        lowered += [self.lower_prefill(size) for size in sizes]
        compiled: list[Any] = []
        if sharding.platform(self.mesh) == "cpu":
            for program in lowered:
                compiled.append(sharding.one_at_a_time(program.compile(), self.mesh))
                compilation.return_memory()
        else:
            with ThreadPoolExecutor() as threads:
                compiled += threads.map(lambda program: program.compile(), lowered)
        self.prefill |= dict(zip(sizes, compiled[len(compiled) - len(sizes) :], strict=True))
        if self.decode is None:
            self.admit, self.decode = compiled[:2]
        return len(compiled)

    def lower_admit(self) -> Any:
        """Lower the program `admit`, without compiling it."""
        slots = self.slots_like()
        seeds = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding.replicated(self.mesh))
        admit = jax.jit(
            self._decoder.admit, donate_argnums=(0, 1), out_shardings=_placed((slots, self.pages))
        )
        return admit.lower(slots, self.pages, seeds, self._ints(self.shape.slots, len(Order._fields)))

    def lower_decode(self) -> Any:
        """Lower the program `decode`, without compiling it."""
        slots, table = self.slots_like(), self._ints(self.shape.slots, self.shape.width)
        outs = (*_placed((slots, self.pages)), sharding.replicated(self.mesh))
        decode = jax.jit(self._decoder.decode, donate_argnums=(1, 2), out_shardings=outs)
        return decode.lower(self.weights, slots, self.pages, table, self._ints())

    def lower_prefill(self, bucket: int) -> Any:
        """Lower the prefill of prompts padded to `bucket` tokens, without compiling it."""
        rows = self.rows(bucket) * self.replicas
        prefill = jax.jit(self._decoder.prefill, donate_argnums=(1,), out_shardings=_placed(self.pages))
        table = self._ints(rows, -(-bucket // PAGE))
        return prefill.lower(self.weights, self.pages, self._ints(rows, bucket), self._ints(rows), table)

    def slots_like(self) -> Slots:
        """Shapes and placement of the slots."""
        b = self.shape.slots
        like: dict[str, Any] = {name: self._ints(b) for name in ("token", "position", "generated", "limit")}
        like["active"] = jax.ShapeDtypeStruct((b,), jnp.bool_, sharding=sharding.named("B", self.mesh))
        keys = jax.ShapeDtypeStruct((b, 2), jnp.uint32, sharding=sharding.named("BT", self.mesh))
        return Slots(**like, key=keys)

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An int32 argument, its first dimension cut over the replicas."""
        letters = ("", "B", "BT")[len(shape)]
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.named(letters, self.mesh))


def _placed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _described(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
