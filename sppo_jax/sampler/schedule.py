"""Scheduling: which response decodes in which slot, and which cache pages hold its tokens.

Plain Python on the host, one `Replica` per piece of the batch. A response is ready once its prompt is prefilled, running
once it has a slot, and ready again if it is preempted for want of pages. The pages of a prompt are shared by its
responses; the last of them, where it is not full, is copied for each.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Prefix:
    """A prompt whose keys and values, all but the last token's, are in the cache of one replica."""

    prompt: int  # index into the stream's prompts
    length: int  # tokens in the cache
    pages: list[int]
    users: int = 0  # running or ready responses to it


@dataclass(eq=False)
class Response:
    """One response, with the tokens drawn so far."""

    k: int
    limit: int  # most tokens
    prefix: Prefix
    pages: list[int] = field(default_factory=list)  # its own, after the whole pages of the prefix
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats
    slot: int = -1  # -1: not running


class Replica:
    """Slots and pages of one piece of the batch. In each piece, slots and pages are numbered from 0."""

    def __init__(self, slots: int, pages: int, page: int, ahead: int):
        """`page`: tokens of a page; `ahead`: tokens for which a response must have pages whenever a chunk begins."""
        self.slots, self.page, self.ahead = slots, page, ahead
        self.free_slots, self.free_pages = list(range(slots))[::-1], list(range(pages))[::-1]
        self.running: dict[int, Response] = {}  # by slot
        self.ready: deque[Response] = deque()

    def pages_of(self, tokens: int) -> int:
        """The number of pages that `tokens` tokens take."""
        return -(-tokens // self.page)

    def shortfall(self) -> int:
        """The number of further responses that should be ready, so that slots freed in the next two chunks can be filled."""
        return len(self.free_slots) + -(-self.slots // 8) - len(self.ready)

    def allocate(self, prompt: int, length: int) -> Prefix | None:
        """Allocate pages for a prompt's first `length` tokens; None where running responses need the free pages."""
        needed = self.pages_of(length)
        spare = self._reserve() + self.pages_of(self.ahead) + 1 if self.running or self.ready else 0
        if len(self.free_pages) < needed + spare:
            return None
        return Prefix(prompt, length, [self.free_pages.pop() for _ in range(needed)])

    def enqueue(self, prefix: Prefix, limits: dict[int, int]) -> None:
        """Make responses {k: limit} to a prompt ready to start."""
        prefix.users += len(limits)
        self.ready.extend(Response(k, limit, prefix) for k, limit in limits.items())

    def start(self) -> list[Response]:
        """Give ready responses free slots, and pages for their first tokens, while there are both. Returns them."""
        started = []
        while self.free_slots and self.ready:
            first = self.ready[0]
            needed = self._missing(first)
            if len(self.free_pages) < needed + self._reserve():
                break
            self.ready.popleft()
            first.slot = self.free_slots.pop()
            self.running[first.slot] = first
            self._take(first, needed)
            started.append(first)
        return started

    def grow(self) -> tuple[list[Response], list[Response]]:
        """Give every running response pages for its next tokens; where they run out, preempt the youngest.

        Returns (preempted, unprefilled): preempted responses restart later and draw the same tokens; the prompts of the
        others, which were ready, lost their pages and need prefill again.
        """
        preempted: list[Response] = []
        unprefilled: list[Response] = []
        for response in sorted(self.running.values(), key=lambda r: -len(r.tokens)):
            while response.slot >= 0 and len(self.free_pages) < self._missing(response):
                idle = self._idle_prefix(response)
                if idle is not None:
                    unprefilled += self._drop(idle)
                else:
                    youngest = min(self.running.values(), key=lambda r: len(r.tokens))
                    preempted.append(youngest)
                    self._leave(youngest)
                    self.ready.appendleft(Response(youngest.k, youngest.limit, youngest.prefix))
            if response.slot >= 0:
                self._take(response, self._missing(response))
        return preempted, unprefilled

    def shrink(self, slots: int) -> list[int]:
        """Go on with fewer slots, at least as many as are in use. Returns the old slot of each, -1 for a free one."""
        moved = sorted(self.running.items())
        for new, (_, response) in enumerate(moved):
            response.slot = new
        self.running = {response.slot: response for _, response in moved}
        self.slots, self.free_slots = slots, list(range(len(moved), slots))[::-1]
        return [old for old, _ in moved] + [-1] * (slots - len(moved))

    def finish(self, response: Response) -> None:
        """Free the slot and pages of a complete response, and its prompt's pages after the last response to it."""
        self._leave(response)
        self._release(response.prefix, 1)

    def page_table(self, response: Response) -> list[int]:
        """The pages of a running response in the order of its tokens."""
        return response.prefix.pages[: response.prefix.length // self.page] + response.pages

    def page_copy(self, response: Response) -> tuple[int, int]:
        """Return (source, target): the prompt's last page, if it is not full, and the response's first own; else (-1, -1)."""
        if response.prefix.length % self.page == 0:
            return -1, -1
        return response.prefix.pages[-1], response.pages[0]

    def _missing(self, response: Response) -> int:
        """The number of pages that a response lacks for its next tokens."""
        generated = min(len(response.tokens) + self.ahead, response.limit)
        whole = response.prefix.length // self.page
        return max(0, self.pages_of(response.prefix.length + generated) - whole - len(response.pages))

    def _reserve(self) -> int:
        """Pages kept free for the growth of running responses: preemption wastes work."""
        return len(self.running) // 4

    def _take(self, response: Response, pages: int) -> None:
        response.pages += [self.free_pages.pop() for _ in range(pages)]

    def _leave(self, response: Response) -> None:
        del self.running[response.slot]
        self.free_slots.append(response.slot)
        self.free_pages += response.pages
        response.slot, response.pages = -1, []

    def _idle_prefix(self, asking: Response) -> Prefix | None:
        """The cached prompt last in the queue that no running response uses."""
        in_use = {id(r.prefix) for r in self.running.values()} | {id(asking.prefix)}
        return next((r.prefix for r in reversed(self.ready) if id(r.prefix) not in in_use), None)

    def _drop(self, prefix: Prefix) -> list[Response]:
        """Free a prefix's pages. Returns the responses that were ready on it, which are so no longer."""
        dropped = [r for r in self.ready if r.prefix is prefix]
        self.ready = deque(r for r in self.ready if r.prefix is not prefix)
        self._release(prefix, len(dropped))
        return dropped

    def _release(self, prefix: Prefix, users: int) -> None:
        prefix.users -= users
        if prefix.users == 0:
            self.free_pages += prefix.pages


def pages_needed(slots: int, length: int, page: int) -> int:
    """The number of pages with which no response is ever preempted: in each slot `length` tokens and a prompt's last page."""
    return slots * (-(-length // page) + 1)
