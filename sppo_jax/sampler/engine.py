"""Draw K responses per prompt from the policy: a fixed number of slots, refilled while the devices decode.

A response is a function of (weights, seed, iteration, prompt, k) alone: a prompt is padded by its own length only, the
programs have one shape whatever is in the slots, a slot's arithmetic does not see its neighbours, and the random key of each
token folds (seed, iteration, prompt_id, k, position).
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sppo_jax import sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models import hf, lora
from sppo_jax.models.transformer import Transformer
from sppo_jax.records import Prompt, Responses
from sppo_jax.sampler import paging, programs, schedule
from sppo_jax.sampler.paging import Pages
from sppo_jax.sampler.programs import PAGE, Programs, Shape, bucket
from sppo_jax.sampler.quantized import Int8, quantized
from sppo_jax.sampler.schedule import Prefix, Replica, Response
from sppo_jax.text.chat_template import chat_prompt, own_eos_ids, response_text

FILLED = 0.85  # share of a device's memory that weights and pages may take together

# What a chunk added: prompts finished, tokens drawn; and how many slots are in use.
Progress = Callable[[int, int, int], None]


@dataclasses.dataclass
class Stats:
    """What a sampler has done so far."""

    slots: int
    steps: int = 0  # decode steps, each of all slots
    tokens: int = 0  # of responses
    evicted_tokens: int = 0  # drawn, and thrown away for want of pages

    @property
    def slot_efficiency(self) -> float:
        """Share of the slots' steps that gave a token of a response."""
        return self.tokens / max(1, self.steps * self.slots)


class Sampler:
    """A policy ready to decode: weights cast once, programs compiled before the first token and kept for every call."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        sampling: Sampling,
        mesh: Mesh | None = None,
        *,
        eos: Sequence[int] | None = None,
        longest: int = 0,
    ):
        """`mesh`: where the model lies; decoding takes its devices as replicas (decoding.sampling_mesh).

        `eos`: ids that end a response; default: those that the tokenizer and its template tell. `longest`: tokens of the
        longest prompt that will be asked, where that is known; otherwise a longer prompt means new programs.
        """
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
        self.tokenizer, self.architecture = tokenizer, model.architecture
        self.eos = tuple(int(i) for i in (own_eos_ids(tokenizer) if eos is None else eos))
        self._int8 = sampling.quantize == "int8"
        self._limit = _memory(mesh).get("bytes_limit")
        self._whole = programs.sampling_mesh(model, mesh, serving_bytes(model, self._int8), self._limit)
        self.mesh = sharding.own_part(self._whole)
        self.replicas = sharding.batch_shards(self.mesh)
        self.sampling = of_processes(sampling, self.mesh)
        self.stats = Stats(max(1, self.sampling.slots // self.replicas) * self.replicas)
        self._longest = longest
        self.programs: Programs | None = None
        self.pages: list[Any] | None = None
        self._streaming = False
        self.set_weights(model)

    @property
    def alone(self) -> bool:
        """True where this process samples on its own devices: it may be asked other prompts than the others.

        False where a replica spans processes: all of them must ask for the same.
        """
        return jax.process_count() == 1 or self.mesh.size < self._whole.size

    def set_weights(self, model: Transformer) -> None:
        """Sample from another model of the same architecture from now on; its matrices are cast or rounded once, here."""
        self._check_idle()
        self.weights = None  # free the old ones first
        self.graph, self.weights = _placed(model, self._whole, self.mesh, self._int8)

    def release(self) -> None:
        """Free the devices' memory; `set_weights` must come before the next prompt. Programs are kept."""
        self._check_idle()
        self.weights = self.pages = None

    def generate(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int,
        iteration: int = 0,
        responses: int | None = None,
        on_progress: Progress | None = None,
    ) -> list[Responses]:
        """K `responses` (default: sampling.responses) for each prompt, in the order given; errors as `stream`'s."""
        found = dict(
            self.stream(prompts, seed=seed, iteration=iteration, responses=responses, on_progress=on_progress)
        )
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int,
        iteration: int = 0,
        responses: int | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[tuple[int, Responses]]:
        """(index, K responses) of each prompt as soon as its last response has ended: roughly in the order given.

        `limits[i][k]` caps single responses below max_new_tokens, to replay recorded lengths. Raises BadInput, before
        anything is sampled, for a prompt that leaves no room for max_new_tokens in the model's context.
        """
        self._check_idle()
        if not 0 <= seed < 2**32:
            raise BadInput(f"seed {seed} must lie in [0, 2**32)")
        records = [chat_prompt(self.tokenizer, p) if isinstance(p, str) else p for p in prompts]
        self._check(records)
        count, most = responses or self.sampling.responses, self.sampling.max_new_tokens
        rows = limits or [[most] * count] * len(records)
        if len(rows) != len(records) or not all(row and min(row) >= 1 for row in rows):
            raise BadInput("limits need a row for each prompt, and in it a number above 0 for each response")
        asked = [{k: min(limit, most) for k, limit in enumerate(row)} for row in rows]
        if not records:
            return iter(())
        self.warm_up([len(record.ids) for record in records])
        return self._stream(records, asked, np.asarray([seed, iteration], np.uint32), on_progress)

    def warm_up(self, lengths: Sequence[int]) -> int:
        """Compile all that prompts of these lengths in tokens need. Returns how many programs that were."""
        self._check_idle()
        buckets = {bucket(length - 1) for length in lengths}
        longest = max(*lengths, self._longest)
        if self.programs is None or longest > self._longest or self.graph != self.programs.graph:
            self._longest = min(bucket(longest), self.architecture.max_positions)
            self.programs, self.pages = None, None
            self.programs = Programs(self.graph, self.weights, self.mesh, self._shape())
        with self._room():
            if self.pages is None:
                self.pages = self._empty_pages()
            return self.programs.compile(buckets)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Running out of the devices' memory is one line. Raises BadInput."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            assert self.programs is not None
            raise BadInput(
                f"the devices have no memory for {self.stats.slots} slots and {self.programs.shape.pages * PAGE} tokens of "
                "keys and values: lower sampling.slots or sampling.cache_tokens"
            ) from None

    def _empty_pages(self) -> list[Pages]:
        programs = self.programs
        assert programs is not None
        each, quantize = programs.shape.pages // self.replicas, programs.shape.quantize
        dtype = programs.model.compute_dtype
        return [
            paging.empty(each, self.architecture, dtype, self.mesh, quantize=quantize)
            for _ in range(self.architecture.layers)
        ]

    def _shape(self) -> Shape:
        free = None
        if self._limit is not None:
            free = FILLED * self._limit - _memory(self.mesh)["bytes_in_use"]
        model = nnx.merge(self.graph, self.weights)
        together = (lambda pages: pages) if self.alone else _fewest
        return shape(
            self.sampling, model, self.mesh, longest=self._longest, eos=self.eos, free=free, together=together
        )

    def _stream(
        self,
        records: list[Prompt],
        asked: list[dict[int, int]],
        seeds: np.ndarray,
        on_progress: Progress | None,
    ) -> Iterator[tuple[int, Responses]]:
        self._check_idle()
        self._streaming, whole = True, False
        try:
            with self._room():
                run = _Run(self, records, asked, seeds)
            while True:
                with self._room():
                    more = run.advance()
                if not more:
                    break
                for i in run.finished:
                    yield i, self._record(records[i], run.done.pop(i))
                if on_progress is not None:  # last: who stops us there has what was finished
                    on_progress(len(run.finished), run.new_tokens, run.in_use)
            whole = True
        finally:
            self._streaming = False
            if not whole:  # the pages may have been given away to a program that never ran
                self.pages = None

    def _check_idle(self) -> None:
        if self._streaming:
            raise RuntimeError("this sampler is in the middle of a stream: finish or close that one first")

    def _check(self, prompts: Sequence[Prompt]) -> None:
        a, new = self.architecture, self.sampling.max_new_tokens
        for prompt in prompts:
            if not prompt.ids:
                raise BadInput(f"the prompt {prompt.text[:80]!r} has no tokens")
            if len(prompt.ids) + new > a.max_positions:
                raise BadInput(
                    f"a prompt of {len(prompt.ids)} tokens and sampling.max_new_tokens={new} exceed the model's "
                    f"{a.max_positions} positions"
                )
            if max(prompt.ids) >= a.vocab:
                raise BadInput(
                    f"a prompt holds token id {max(prompt.ids)}, and the model has {a.vocab} tokens"
                )

    def _record(self, prompt: Prompt, found: dict[int, Response]) -> Responses:
        rows = [found[k] for k in sorted(found)]
        return Responses(
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            prompt_ids=list(prompt.ids),
            response_ids=[row.tokens for row in rows],
            responses=[response_text(self.tokenizer, row.tokens) for row in rows],
            finish_reason=["stop" if row.tokens[-1] in self.eos else "length" for row in rows],
            logprobs=[math.fsum(row.logprobs) for row in rows],
        )


def shape(
    sampling: Sampling,
    model: Transformer,
    mesh: Mesh,
    *,
    longest: int,
    eos: tuple[int, ...],
    free: float | None,
    together: Callable[[int], int] = int,
) -> Shape:
    """The sizes of the programs on `mesh` for prompts of up to `longest` tokens.

    `free`: bytes of a device that pages may take (None: there is no limit); `together`: from the pages that this process
    has room for to those that all have. Raises BadInput where one whole response does not fit.
    """
    replicas, longest = sharding.batch_shards(mesh), longest + sampling.max_new_tokens
    own = max(1, sampling.slots // replicas)
    # The TPU's kernel reads no keys in 8 bits with a scale each; there the matrices alone are.
    quantize = sampling.quantize == "int8" and programs.kernel_of(model, mesh) == "xla"
    pages, least = (schedule.pages_needed(n, longest, PAGE) for n in (own, 1))
    if sampling.cache_tokens:
        pages = min(pages, sampling.cache_tokens // PAGE // replicas)
        if pages < least:
            raise BadInput(
                f"sampling.cache_tokens={sampling.cache_tokens}: sampling.cache_tokens must be at least "
                f"{least * PAGE * replicas}"
            )
    elif free is not None:
        a, tensor = model.architecture, mesh.shape["tensor"]
        pieces = 1 if a.kv_heads % tensor else tensor
        each = paging.bytes_per_page(a, model.compute_dtype, quantize) / pieces
        pages = together(min(pages, max(0, int(free / each))))
        if pages < least:
            raise BadInput(
                f"a response of {longest} tokens, prompt included, needs {least * each / 1e9:.1f} GB of keys and "
                f"values, and {max(0, free) / 1e9:.1f} GB are left on each device: lower sampling.max_new_tokens"
            )
    return Shape(
        slots=own * replicas,
        pages=pages * replicas,
        width=-(-longest // PAGE),
        eos=eos,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        quantize=quantize,
    )


def _fewest(pages: int) -> int:
    """Of all processes: they run one program."""
    return int(multihost_utils.process_allgather(np.asarray(pages)).min())


class _Run:
    """One stream: what waits, what is in the slots, and the chunk whose tokens are not known yet."""

    def __init__(
        self, sampler: Sampler, records: list[Prompt], asked: list[dict[int, int]], seeds: np.ndarray
    ):
        assert sampler.programs is not None
        self.sampler, self.records, self.programs = sampler, records, sampler.programs
        self.waiting = deque(enumerate(asked))
        self.wanted = [len(row) for row in asked]
        self.done: dict[int, dict[int, Response]] = {}
        shape, r = self.programs.shape, sampler.replicas
        self.each = shape.slots // r
        self.replicas = [Replica(self.each, shape.pages // r, PAGE, programs.AHEAD) for _ in range(r)]
        self.flying: tuple[Any, dict[int, Response]] | None = None
        self.finished: list[int] = []
        self.new_tokens = self.in_use = 0
        like = self.programs.slots_like()
        self.slots = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)
        self.seeds = self._put(seeds, PartitionSpec())
        self.quota = self._put(np.int32(max(1, shape.slots // 32)), PartitionSpec())
        self.unlimited = self._put(np.int32(shape.slots + 1), PartitionSpec())

    def advance(self) -> bool:
        """Send the next chunk on its way, then read the one before. False: there was neither."""
        with jax.transfer_guard("disallow"):  # nothing crosses but what is put and got here
            flying, self.flying = self.flying, self._dispatch()
            self.finished, self.new_tokens = [], 0
            if flying is not None:
                self._harvest(*flying)
        self.in_use = sum(len(replica.live) for replica in self.replicas)
        return flying is not None or self.flying is not None

    def _dispatch(self) -> tuple[Any, dict[int, Response]] | None:
        """Refill the slots and start a chunk: what it will tell, and who is in which slot."""
        orders = np.zeros((self.programs.shape.slots, programs.ORDERS), np.int32)
        for r, replica in enumerate(self.replicas):
            before = {response: slot for slot, response in replica.live.items()}
            evicted, again = replica.grow()
            for response in evicted:
                orders[r * self.each + before[response], programs.ORDER] = programs.STOP
                self.sampler.stats.tokens -= len(response.tokens)
                self.sampler.stats.evicted_tokens += len(response.tokens)
            for prompt, group in itertools.groupby(again, key=lambda response: response.prefix.prompt):
                self.waiting.appendleft((prompt, {response.k: response.limit for response in group}))
        while self._prefill():
            pass
        for r, replica in enumerate(self.replicas):
            for response in replica.start():
                self._order(orders[r * self.each + response.slot], replica, response)
        s = self.sampler
        if orders.any():
            self.slots, s.pages = self.programs["admit"](
                self.slots, s.pages, self.seeds, self._put(orders, PartitionSpec(sharding.TABLE["B"]))
            )
        live = {
            r * self.each + i: x for r, replica in enumerate(self.replicas) for i, x in replica.live.items()
        }
        if not live:
            return None
        more = self.waiting or any(replica.ready for replica in self.replicas)
        self.slots, s.pages, found = self.programs["decode"](
            s.weights, self.slots, s.pages, self._table(), self.quota if more else self.unlimited
        )
        return found, live

    def _order(self, row: np.ndarray, replica: Replica, response: Response) -> None:
        """Fill in a slot's order to start: its first forward is of the prompt's last token."""
        prompt = self.records[response.prefix.prompt]
        high, low = np.asarray([prompt.prompt_id >> 32, prompt.prompt_id & 0xFFFFFFFF], np.uint32).view(
            np.int32
        )
        source, target = replica.copied(response)
        row[:] = (
            programs.START,
            prompt.ids[-1],
            len(prompt.ids) - 1,
            response.limit,
            response.k,
            high,
            low,
            source,
            target,
        )

    def _prefill(self) -> bool:
        """Run prompts of one length bucket where a replica will soon be short of responses. False: there were none."""
        if not self.waiting or all(replica.short_of() <= 0 for replica in self.replicas):
            return False
        size = bucket(self._kept(self.waiting[0][0]))
        rows = self.programs.rows(size)
        batch = self._batch(size, rows)
        tokens = np.zeros((len(self.replicas), rows, size), np.int32)
        lengths = np.zeros((len(self.replicas), rows), np.int32)
        table = np.zeros((len(self.replicas), rows, -(-size // PAGE)), np.int32)
        for r, prefixes in enumerate(batch):
            for row, prefix in enumerate(prefixes):
                tokens[r, row, : prefix.length] = self.records[prefix.prompt].ids[:-1]
                lengths[r, row] = prefix.length
                table[r, row, : len(prefix.pages)] = prefix.pages
        s, place = self.sampler, PartitionSpec(sharding.TABLE["B"])
        if any(batch):
            inputs = [self._put(x.reshape(-1, *x.shape[2:]), place) for x in (tokens, lengths, table)]
            s.pages = self.programs[size](s.weights, s.pages, *inputs)
        return any(batch)

    def _batch(self, size: int, rows: int) -> list[list[Prefix]]:
        """For each replica up to `rows` prompts of the bucket `size`, from the front of those that wait."""
        batch: list[list[Prefix]] = [[] for _ in self.replicas]
        passed: list[tuple[int, dict[int, int]]] = []
        while self.waiting and len(passed) < 4 * rows and any(len(part) < rows for part in batch):
            i, limits = self.waiting.popleft()
            prefix = None
            for r in sorted(range(len(batch)), key=lambda r: (len(batch[r]), -self.replicas[r].short_of())):
                if prefix is None and len(batch[r]) < rows and bucket(self._kept(i)) == size:
                    prefix = self.replicas[r].take_prefix(i, self._kept(i))
                    if prefix is not None:
                        batch[r].append(prefix)
                        self.replicas[r].wait(prefix, limits)
            if prefix is None:
                passed.append((i, limits))
        self.waiting.extendleft(reversed(passed))
        return batch

    def _kept(self, i: int) -> int:
        """Tokens of prompt i whose keys and values its responses share: all but the last."""
        return len(self.records[i].ids) - 1

    def _table(self) -> Any:
        """[B, W]: the pages of each slot."""
        table = np.zeros((self.programs.shape.slots, self.programs.shape.width), np.int32)
        for r, replica in enumerate(self.replicas):
            for i, response in replica.live.items():
                row = replica.row(response)
                table[r * self.each + i, : len(row)] = row
        return self._put(table, PartitionSpec(sharding.TABLE["B"]))

    def _harvest(self, found: Any, live: dict[int, Response]) -> None:
        """Read a chunk's tokens: the one transfer from the devices."""
        tokens, logprobs, counts, active, steps = programs.read(jax.device_get(found))
        stats = self.sampler.stats
        stats.steps += steps
        for slot, response in live.items():
            if response.slot < 0:  # thrown out since
                stats.evicted_tokens += int(counts[slot])
                continue
            n = counts[slot]
            response.tokens += tokens[slot, :n].tolist()
            response.logprobs += logprobs[slot, :n].tolist()
            self.new_tokens += int(n)
            if not active[slot]:
                self.replicas[slot // self.each].end(response)
                self._complete(response)
        stats.tokens += self.new_tokens

    def _complete(self, response: Response) -> None:
        i = response.prefix.prompt
        self.done.setdefault(i, {})[response.k] = response
        if len(self.done[i]) == self.wanted[i]:
            self.finished.append(i)

    def _put(self, x: Any, spec: PartitionSpec) -> Any:
        # Piece by piece: of one array for all, device_put would have the processes of a mesh compare their own.
        place, x = NamedSharding(self.sampler.mesh, spec), np.asarray(x)
        pieces = place.addressable_devices_indices_map(x.shape).items()
        arrays = [jax.device_put(x[index], device) for device, index in pieces]
        return jax.make_array_from_single_device_arrays(x.shape, place, arrays)


def _serving(model: Transformer, int8: bool) -> Transformer:
    """The model that decodes: an array per layer, its matrices in 8 bits or in the compute dtype."""
    model = quantized(model.unstacked()) if int8 else model.unstacked()
    graph, *states = nnx.split(model, Int8, ...)
    rounded, rest = states
    dtype = model.compute_dtype
    # Norm scales and biases stay what training has: Gemma adds 1 to them in float32.
    return nnx.merge(graph, rounded, jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, rest))


def abstract(model: Transformer, mesh: Mesh, int8: bool = False) -> tuple[Any, Any]:
    """The graph of the model that decodes, and its weights on `mesh` as shapes: also of a model that is shapes itself."""
    serving, shapes = nnx.split(nnx.eval_shape(lambda model: _serving(model, int8), model))
    placed = _shardings(model, shapes, mesh)
    return serving, jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed
    )


def _placed(model: Transformer, whole: Mesh, own: Mesh, int8: bool) -> tuple[Any, Any]:
    """The serving model's graph and weights, on the mesh `own`, a part of `whole`."""
    graph, weights = nnx.split(model)
    serving, shapes = abstract(model, whole, int8)
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    found = jax.device_put(_converted(weights, graph=graph, int8=int8), placed)
    if own == whole:
        return serving, found

    def mine(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        place = NamedSharding(own, x.sharding.spec)
        pieces = {shard.device: shard.data for shard in x.addressable_shards}
        arrays = [pieces[device] for device in own.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, place, arrays)

    return serving, jax.tree.map(mine, found)


@functools.partial(jax.jit, static_argnames=("graph", "int8"))
def _converted(weights: Any, *, graph: Any, int8: bool) -> Any:
    """The serving model's weights, wherever the compiler likes them."""
    return nnx.split(_serving(nnx.merge(graph, weights), int8))[1]


def _shardings(model: Transformer, unstacked: Any, mesh: Mesh) -> Any:
    """Where each array of an unstacked model lies: as the table says of the stacked one, less its first dimension.

    The scales of a matrix in 8 bits lie as the matrix does, whole where they have one number for a dimension.
    """
    a = dataclasses.replace(model.architecture, tied=False)  # in 8 bits a tied head is a matrix of its own
    stacked = hf.abstract(a, mesh) | (lora.abstract(a, mesh) if a.lora_rank else {})

    def place(path: tuple, x: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        found = next(name for name in stacked if name.removeprefix("layers.") in names)
        spec = stacked[found].sharding.spec[1 if "layers" in names else 0 :]
        axes = [axis if n > 1 else None for axis, n in zip(spec, x.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, unstacked)


def of_processes(sampling: Sampling, mesh: Mesh) -> Sampling:
    """`sampling` with the slots and columns of all processes that `mesh` lies on: a configuration has one process's."""
    n = sharding.processes(mesh)
    return dataclasses.replace(sampling, slots=n * sampling.slots, cache_tokens=n * sampling.cache_tokens)


def serving_bytes(model: Transformer, int8: bool = False) -> int:
    """Of the serving model's weights, over all devices."""
    serving = nnx.state(nnx.eval_shape(lambda model: _serving(model, int8), model))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(serving))


def _memory(mesh: Mesh) -> dict[str, int]:
    """What the first of this process's devices says of its memory; nothing on CPUs."""
    return mesh.local_devices[0].memory_stats() or {}
