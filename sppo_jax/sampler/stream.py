"""One `Sampler.stream` call: prompts wait, responses run in slots, and one chunk is in flight on the devices.

Each round schedules the next chunk without the tokens of the one in flight, launches it, and only then collects the
chunk before: the devices never wait for the host.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from sppo_jax import sharding
from sppo_jax.records import Prompt
from sppo_jax.sampler.capacity import bucket
from sppo_jax.sampler.decoding import START, STEPS, STOP, Order, read
from sppo_jax.sampler.paging import PAGE, AnyPages
from sppo_jax.sampler.programs import Programs
from sppo_jax.sampler.schedule import Prefix, Replica, Response

# Tokens that a response may gain by the end of a chunk that begins before the last chunk's tokens are read.
AHEAD = 2 * STEPS


@dataclass
class Stats:
    """Counts of a sampler's work so far."""

    slots: int  # the largest number of slots
    steps: int = 0  # decode steps
    slot_steps: int = 0  # slots computed, full or empty, summed over all steps
    tokens: int = 0  # kept in responses
    evicted_tokens: int = 0  # drawn, then lost because their response was preempted

    @property
    def slot_efficiency(self) -> float:
        """The share of slot steps whose token was kept in a response."""
        return self.tokens / max(1, self.slot_steps)


@dataclass(frozen=True)
class Prefill:
    """One prefill over all replicas, for prompts padded to `bucket` tokens."""

    bucket: int
    tokens: np.ndarray  # int32 [P, bucket]
    lengths: np.ndarray  # int32 [P]; 0: no prompt in this row
    table: np.ndarray  # int32 [P, W]: pages


@dataclass(frozen=True)
class Step:
    """What the devices do in one chunk: prefills, moves, orders to slots, decoding."""

    prefills: list[Prefill]
    moves: list[
        np.ndarray
    ]  # int32 [B] each: the slots that go on, where there are fewer from now on; before the orders
    orders: np.ndarray  # int32 [B, 9]: an `Order` for each slot
    table: np.ndarray  # int32 [B, W]: the pages of each slot
    running: dict[int, Response]  # by slot, counted over all replicas
    more: bool  # responses are left that could take a slot freed early


class Stream:
    """Draws responses to prompts. It owns the pages while it runs; take them back from `pages` when it has ended.

    A stream that breaks off leaves no usable pages, as they may have been given to a program that never ran.
    """

    def __init__(
        self,
        programs: Programs,
        weights: Any,
        pages: list[AnyPages],
        stats: Stats,
        prompts: Sequence[Prompt],
        limits: Sequence[dict[int, int]],
        seeds: np.ndarray,
    ):
        """`limits`: for each prompt {k: most tokens}; `seeds`: uint32, seed and iteration; `stats` is updated in place."""
        self.programs, self.weights, self.pages, self.stats = programs, weights, pages, stats
        self.prompts, self.asked = prompts, [len(row) for row in limits]
        self.waiting = deque(enumerate(limits))  # prompts that are not prefilled yet
        # The prompts that the last round finished: (index, responses by k).
        self.finished: list[tuple[int, dict[int, Response]]] = []
        self.new_tokens = self.running = 0  # tokens of the last round; slots in use after it
        shape, count = programs.shape, programs.replicas
        self.slots = programs.slots(sum(self.asked))  # at present
        self._per_replica = self.slots // count
        self._replicas = [Replica(self._per_replica, shape.pages // count, PAGE, AHEAD) for _ in range(count)]
        self._in_flight: tuple[Any, dict[int, Response]] | None = None
        self._done: dict[int, dict[int, Response]] = {}  # ended responses, by k, of unfinished prompts
        self._rows, self._whole = sharding.named("B", programs.mesh), sharding.replicated(programs.mesh)
        like = programs.slots_like(self.slots)
        self._slots = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)
        self._seeds = self._put(seeds, self._whole)
        self._quota = {size: self._put(np.int32(max(1, size // 32)), self._whole) for size in programs.sizes}
        self._no_quota = self._put(np.int32(shape.slots + 1), self._whole)
        self._keep = {n: self._put(np.int32(n), self._whole) for n in (0, *programs.sizes)}

    def advance(self) -> bool:
        """Launch the next chunk, then collect the one before it. Returns False if there was neither."""
        with jax.transfer_guard("disallow"):  # only `_put` and `collect` may transfer
            before, self._in_flight = self._in_flight, self.launch(self.schedule())
            self.finished, self.new_tokens = [], 0
            if before is not None:
                self.collect(*before)
        self.running = sum(len(replica.running) for replica in self._replicas)
        return before is not None or self._in_flight is not None

    def schedule(self) -> Step:
        """Decide the next chunk: preempt, queue prefills, fill free slots. Touches no device."""
        stopped: list[int] = []
        for r, replica in enumerate(self._replicas):
            slots = {response: slot for slot, response in replica.running.items()}
            preempted, unprefilled = replica.grow()
            for response in preempted:
                stopped.append(r * self._per_replica + slots[response])
                self.stats.tokens -= len(response.tokens)
                self.stats.evicted_tokens += len(response.tokens)
            for prompt, group in itertools.groupby(unprefilled, key=lambda response: response.prefix.prompt):
                self.waiting.appendleft((prompt, {response.k: response.limit for response in group}))
        moves = self._shrink()
        orders = np.zeros((self.slots, len(Order._fields)), np.int32)
        if not moves:  # which leave stopped responses behind
            orders[stopped] = Order(STOP)
        prefills = []
        while (prefill := self._prefill()) is not None:
            prefills.append(prefill)
        for r, replica in enumerate(self._replicas):
            for response in replica.start():
                orders[r * self._per_replica + response.slot] = self._order(replica, response)
        running = {
            r * self._per_replica + i: response
            for r, replica in enumerate(self._replicas)
            for i, response in replica.running.items()
        }
        more = bool(self.waiting) or any(replica.ready for replica in self._replicas)
        return Step(prefills, moves, orders, self._table(), running, more)

    def _shrink(self) -> list[np.ndarray]:
        """Go on with fewer slots once they are enough for all responses that have not ended."""
        moves = []
        waiting = sum(len(limits) for _, limits in self.waiting)
        each = [len(replica.running) + len(replica.ready) for replica in self._replicas]
        need = max(max(each), -(-(waiting + sum(each)) // len(each)))
        for size in self.programs.sizes:
            if need * len(each) <= size < self.slots:
                self.slots, self._per_replica = size, size // len(each)
                found = [replica.shrink(self._per_replica) for replica in self._replicas]
                moves.append(np.asarray(found, np.int32).reshape(-1))
        return moves

    def launch(self, step: Step) -> tuple[Any, dict[int, Response]] | None:
        """Start a step on the devices. Returns decode's third result and {slot: response}; None if all slots are free."""
        programs = self.programs
        for prefill in step.prefills:
            inputs = [self._put(x, self._rows) for x in (prefill.tokens, prefill.lengths, prefill.table)]
            self.pages = programs.prefill[prefill.bucket](self.weights, self.pages, *inputs)
        for move in step.moves:
            self._slots = programs.resize[len(move)](self._slots, self._put(move, self._rows))
        if step.orders.any():
            orders = self._put(step.orders, self._rows)
            self._slots, self.pages = programs.admit[len(orders)](
                self._slots, self.pages, self._seeds, orders
            )
        if not step.running:
            return None
        count = len(step.table)
        # A chunk ends early for freed slots if there are responses to fill them with, or if the next number of slots is enough.
        quota = self._quota[count] if step.more else self._no_quota
        keep = self._keep[0 if step.more else self._smaller(count)]
        table = self._put(step.table, self._rows)
        self._slots, self.pages, found = programs.decode[count](
            self.weights, self._slots, self.pages, table, quota, keep
        )
        return found, step.running

    def _smaller(self, count: int) -> int:
        """The next number of slots below `count`; 0 where there is none, and where `_shrink` could refuse it to a replica."""
        return max((n for n in self.programs.sizes if n < count and len(self._replicas) == 1), default=0)

    def collect(self, found: Any, running: dict[int, Response]) -> None:
        """Read a chunk's tokens, the one transfer from the devices, and finish the responses that ended."""
        drawn, stats = read(jax.device_get(found)), self.stats
        each = len(drawn.counts) // len(self._replicas)  # slots of a replica in that chunk
        stats.steps += drawn.steps
        stats.slot_steps += drawn.steps * len(drawn.counts)
        for slot, response in running.items():
            count = int(drawn.counts[slot])
            if response.slot < 0:  # preempted while the chunk ran
                stats.evicted_tokens += count
                continue
            response.tokens += drawn.tokens[slot, :count].tolist()
            response.logprobs += drawn.logprobs[slot, :count].tolist()
            self.new_tokens += count
            if not drawn.active[slot]:
                self._replicas[slot // each].finish(response)
                self._complete(response)
        stats.tokens += self.new_tokens

    def _complete(self, response: Response) -> None:
        i = response.prefix.prompt
        self._done.setdefault(i, {})[response.k] = response
        if len(self._done[i]) == self.asked[i]:
            self.finished.append((i, self._done.pop(i)))

    def _order(self, replica: Replica, response: Response) -> Order:
        """The order that starts a response: its first decode step feeds the prompt's last token."""
        prompt = self.prompts[response.prefix.prompt]
        halves = np.asarray([prompt.prompt_id >> 32, prompt.prompt_id & 0xFFFFFFFF], np.uint32)
        high, low = halves.view(np.int32)
        source, target = replica.page_copy(response)
        return Order(
            action=START,
            token=prompt.ids[-1],
            position=len(prompt.ids) - 1,
            limit=response.limit,
            k=response.k,
            id_high=high,
            id_low=low,
            source=source,
            target=target,
        )

    def _prefill(self) -> Prefill | None:
        """Return the next prefill, of one length bucket, if a replica will soon be short of responses; else None."""
        if not self.waiting or all(replica.shortfall() <= 0 for replica in self._replicas):
            return None
        size = bucket(self._cached_tokens(self.waiting[0][0]))
        rows = self.programs.rows(size)
        batch = self._batch(size, rows)
        if not any(batch):
            return None
        tokens = np.zeros((len(batch) * rows, size), np.int32)
        lengths = np.zeros(len(batch) * rows, np.int32)
        table = np.zeros((len(batch) * rows, -(-size // PAGE)), np.int32)
        for r, prefixes in enumerate(batch):
            for row, prefix in enumerate(prefixes, r * rows):
                tokens[row, : prefix.length] = self.prompts[prefix.prompt].ids[:-1]
                lengths[row] = prefix.length
                table[row, : len(prefix.pages)] = prefix.pages
        return Prefill(size, tokens, lengths, table)

    def _batch(self, size: int, rows: int) -> list[list[Prefix]]:
        """Take up to `rows` prompts of the bucket `size` for each replica, from the front of the queue."""
        batch: list[list[Prefix]] = [[] for _ in self._replicas]
        passed: list[tuple[int, dict[int, int]]] = []
        while self.waiting and len(passed) < 4 * rows and any(len(part) < rows for part in batch):
            i, limits = self.waiting.popleft()
            prefix, length = None, self._cached_tokens(i)
            for r in sorted(range(len(batch)), key=lambda r: (len(batch[r]), -self._replicas[r].shortfall())):
                if prefix is None and len(batch[r]) < rows and bucket(length) == size:
                    prefix = self._replicas[r].allocate(i, length)
                    if prefix is not None:
                        batch[r].append(prefix)
                        self._replicas[r].enqueue(prefix, limits)
            if prefix is None:
                passed.append((i, limits))
        self.waiting.extendleft(reversed(passed))
        return batch

    def _cached_tokens(self, i: int) -> int:
        """The number of tokens of prompt i whose keys and values its responses share: all but the last."""
        return len(self.prompts[i].ids) - 1

    def _table(self) -> np.ndarray:
        """int32 [B, W]: the pages of each slot."""
        table = np.zeros((self.slots, self.programs.shape.width), np.int32)
        for r, replica in enumerate(self._replicas):
            for i, response in replica.running.items():
                pages = replica.page_table(response)
                table[r * self._per_replica + i, : len(pages)] = pages
        return table

    def _put(self, x: Any, place: NamedSharding) -> Any:
        # Piece by piece: given the whole array, device_put would have the processes of a mesh compare theirs.
        x = np.asarray(x)
        pieces = place.addressable_devices_indices_map(x.shape).items()
        arrays = [jax.device_put(x[index], device) for device, index in pieces]
        return jax.make_array_from_single_device_arrays(x.shape, place, arrays)
