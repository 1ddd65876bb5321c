"""The sampler's books: which response is decoded in which slot, and which pages of the cache hold its tokens.

Plain Python on the host, one `Replica` per piece of the batch. Pages of a prompt are shared by its responses; the last
of them, where it is not full, is copied for each.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass
class Prefix:
    """A prompt whose keys and values are in the cache of one replica, all but those of its last token."""

    prompt: int  # index into the prompts asked
    length: int  # tokens in the cache
    pages: list[int]
    users: int = 0  # responses that read it, or wait to


@dataclass(eq=False)
class Response:
    """One response on its way."""

    k: int
    limit: int  # most tokens
    prefix: Prefix
    pages: list[int] = field(default_factory=list)  # its own, after the whole pages of the prefix
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1  # none yet, or no longer


class Replica:
    """Slots and pages of one piece of the batch. Slots and page numbers count from 0 in each."""

    def __init__(self, slots: int, pages: int, page: int, ahead: int):
        """`page`: tokens of a page; `ahead`: tokens for which a response must have pages whenever a chunk begins."""
        self.slots, self.page, self.ahead = slots, page, ahead
        self.free_slots, self.free_pages = list(range(slots))[::-1], list(range(pages))[::-1]
        self.live: dict[int, Response] = {}
        self.ready: deque[Response] = deque()

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def short_of(self) -> int:
        """How many more responses should be ready, so that slots that end in the next two chunks find one."""
        return len(self.free_slots) + -(-self.slots // 8) - len(self.ready)

    def take_prefix(self, prompt: int, length: int) -> Prefix | None:
        """Pages for a prompt of which `length` tokens are kept, or None where live responses would miss them."""
        needed = self.pages_of(length)
        spare = self._reserve() + self.pages_of(self.ahead) + 1 if self.live or self.ready else 0
        if len(self.free_pages) < needed + spare:
            return None
        return Prefix(prompt, length, [self.free_pages.pop() for _ in range(needed)])

    def wait(self, prefix: Prefix, limits: dict[int, int]) -> None:
        """Responses {k: limit} to a prompt are ready to start."""
        prefix.users += len(limits)
        self.ready.extend(Response(k, limit, prefix) for k, limit in limits.items())

    def start(self) -> list[Response]:
        """Give free slots to ready responses, with pages for their first tokens, as far as both go."""
        started = []
        while self.free_slots and self.ready:
            first = self.ready[0]
            needed = self._missing(first)
            if len(self.free_pages) < needed + self._reserve():
                break
            self.ready.popleft()
            first.slot = self.free_slots.pop()
            self.live[first.slot] = first
            self._take(first, needed)
            started.append(first)
        return started

    def grow(self) -> tuple[list[Response], list[Response]]:
        """Pages for the next tokens of every live response. Where they run out, the youngest make room.

        Returns the responses thrown out of their slots, which start again later and will say the same, and those whose
        prompt was thrown out of the cache, which must be asked for anew.
        """
        evicted: list[Response] = []
        again: list[Response] = []
        for response in sorted(self.live.values(), key=lambda r: -len(r.tokens)):
            while response.slot >= 0 and len(self.free_pages) < self._missing(response):
                idle = self._idle_prefix(response)
                if idle is not None:
                    again += self._drop(idle)
                else:
                    youngest = min(self.live.values(), key=lambda r: len(r.tokens))
                    evicted.append(youngest)
                    self._leave(youngest)
                    self.ready.appendleft(Response(youngest.k, youngest.limit, youngest.prefix))
            if response.slot >= 0:
                self._take(response, self._missing(response))
        return evicted, again

    def end(self, response: Response) -> None:
        """A response is complete: its slot and pages are free, and its prompt's pages with the last of them."""
        self._leave(response)
        self._release(response.prefix, 1)

    def row(self, response: Response) -> list[int]:
        """The pages of a live response in the order of its tokens."""
        return response.prefix.pages[: response.prefix.length // self.page] + response.pages

    def copied(self, response: Response) -> tuple[int, int]:
        """(from, to): the prompt's last page where it is not full, and the response's own; -1 where there is none."""
        if response.prefix.length % self.page == 0:
            return -1, -1
        return response.prefix.pages[-1], response.pages[0]

    def _missing(self, response: Response) -> int:
        """Pages that a response lacks for its next tokens."""
        said = min(len(response.tokens) + self.ahead, response.limit)
        whole = response.prefix.length // self.page
        return max(0, self.pages_of(response.prefix.length + said) - whole - len(response.pages))

    def _reserve(self) -> int:
        """Pages kept free for the growth of what is live: a response thrown out is work lost."""
        return len(self.live) // 4

    def _take(self, response: Response, pages: int) -> None:
        response.pages += [self.free_pages.pop() for _ in range(pages)]

    def _leave(self, response: Response) -> None:
        del self.live[response.slot]
        self.free_slots.append(response.slot)
        self.free_pages += response.pages
        response.slot, response.pages = -1, []

    def _idle_prefix(self, asking: Response) -> Prefix | None:
        """The prefix that waits last of those that no live response reads."""
        read = {id(r.prefix) for r in self.live.values()} | {id(asking.prefix)}
        return next((r.prefix for r in reversed(self.ready) if id(r.prefix) not in read), None)

    def _drop(self, prefix: Prefix) -> list[Response]:
        """Throw a prefix out of the cache; the responses that waited for it."""
        waiting = [r for r in self.ready if r.prefix is prefix]
        self.ready = deque(r for r in self.ready if r.prefix is not prefix)
        self._release(prefix, len(waiting))
        return waiting

    def _release(self, prefix: Prefix, users: int) -> None:
        prefix.users -= users
        if prefix.users == 0:
            self.free_pages += prefix.pages


def pages_needed(slots: int, length: int, page: int) -> int:
    """Pages with which no response has to make room: slots full of `length` tokens, and as many prompts' last pages."""
    return slots * (-(-length // page) + 1)
