"""The sampler's compiled programs: one prefill for each length bucket, admit and decode for each number of slots."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import compilation, sharding
from sppo_jax.models.transformer import Transformer
from sppo_jax.sampler import capacity, paged_attention, paging
from sppo_jax.sampler.capacity import Shape
from sppo_jax.sampler.decoding import Decoder, Order, Slots
from sppo_jax.sampler.paging import PAGE, AnyPages

PREFILL_TOKENS = 1024  # prompt tokens, padding included, of one prefill on one replica


class Programs:
    """Compiled programs of one model on one mesh, once `compile` has run: `prefill[bucket]`, `admit[slots]`, `decode[slots]`.

    `resize[slots]` leads from the next larger number of `sizes` to `slots`. The arguments are those of `Decoder`'s functions;
    pages and slots are donated.
    """

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
        interleaved, dtype = self.kernel == "ragged", self.model.compute_dtype
        pool = paging.shapes(each, a, dtype, mesh, interleaved=interleaved, quantize=shape.quantize)
        self.pages: list[AnyPages] = [pool] * a.layers
        # Numbers of slots, descending. In 8 bits another number gives other last bits.
        several, fewest = sharding.platform(mesh) == "cpu" and not shape.quantize, capacity.fewest_slots(a)
        self.sizes = capacity.sizes(shape.slots, self.replicas, fewest) if several else (shape.slots,)
        self.prefill: dict[int, Any] = {}
        self.admit: dict[int, Any] = {}
        self.decode: dict[int, Any] = {}
        self.resize: dict[int, Any] = {}
        self._decoder = Decoder(graph, mesh, shape)

    def rows(self, bucket: int) -> int:
        """The number of prompts in one prefill on one replica."""
        return max(1, min(PREFILL_TOKENS // bucket, self.shape.slots // self.replicas))

    def slots(self, responses: int) -> int:
        """The number of slots, one of `sizes`, with which a stream of so many responses begins."""
        need = self.replicas * capacity.wanted(responses, self.replicas, self.model.architecture)
        return min([size for size in self.sizes if size >= need], default=self.shape.slots)

    def compile(self, buckets: set[int]) -> int:
        """Compile the programs that are missing for these length buckets. Returns their number.

        They are compiled in parallel, but one by one on CPU, where the compiler takes its memory from the sampler.
        """
        missing: list[tuple[dict[int, Any], int, Any]] = []
        if not self.decode:
            for larger, slots in zip((None, *self.sizes), self.sizes, strict=False):
                missing += [
                    (self.admit, slots, self.lower_admit(slots)),
                    (self.decode, slots, self.lower_decode(slots)),
                ]
                if larger is not None:
                    missing.append((self.resize, slots, self.lower_resize(larger, slots)))
        sizes = sorted(buckets - self.prefill.keys())
        missing += [(self.prefill, size, self.lower_prefill(size)) for size in sizes]
        compiled: list[Any] = []
        if sharding.platform(self.mesh) == "cpu":
            for _, _, program in missing:
                compiled.append(sharding.one_at_a_time(program.compile(), self.mesh))
                compilation.return_memory()
        else:
            with ThreadPoolExecutor() as threads:
                compiled += threads.map(lambda one: one[2].compile(), missing)
        for (programs, size, _), program in zip(missing, compiled, strict=True):
            programs[size] = program
        return len(compiled)

    def lower_admit(self, count: int | None = None) -> Any:
        """Lower the program `admit` for `count` slots (default: all), without compiling it."""
        slots = self.slots_like(count)
        seeds = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding.replicated(self.mesh))
        admit = jax.jit(
            self._decoder.admit, donate_argnums=(0, 1), out_shardings=_placed((slots, self.pages))
        )
        return admit.lower(slots, self.pages, seeds, self._ints(*slots.token.shape, len(Order._fields)))

    def lower_resize(self, larger: int, count: int) -> Any:
        """Lower the program that takes `count` of `larger` slots, without compiling it."""
        resize = jax.jit(self._decoder.resize, out_shardings=_placed(self.slots_like(count)))
        return resize.lower(self.slots_like(larger), self._ints(count))

    def lower_decode(self, count: int | None = None) -> Any:
        """Lower the program `decode` for `count` slots (default: all), without compiling it."""
        slots = self.slots_like(count)
        table = self._ints(*slots.token.shape, self.shape.width)
        outs = (*_placed((slots, self.pages)), sharding.replicated(self.mesh))
        decode = jax.jit(self._decoder.decode, donate_argnums=(1, 2), out_shardings=outs)
        return decode.lower(self.weights, slots, self.pages, table, self._ints(), self._ints())

    def lower_prefill(self, bucket: int) -> Any:
        """Lower the prefill of prompts padded to `bucket` tokens, without compiling it."""
        rows = self.rows(bucket) * self.replicas
        prefill = jax.jit(self._decoder.prefill, donate_argnums=(1,), out_shardings=_placed(self.pages))
        table = self._ints(rows, -(-bucket // PAGE))
        return prefill.lower(self.weights, self.pages, self._ints(rows, bucket), self._ints(rows), table)

    def slots_like(self, count: int | None = None) -> Slots:
        """Shapes and placement of `count` slots (default: all)."""
        b = self.shape.slots if count is None else count
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
