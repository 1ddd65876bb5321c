"""How an update's trees of tokens share rows: prompts → microbatches of one shape or two, with little padding.

A tree is a prompt with all of its responses, or with one of them, by the attention kernel (`Packing.shared`).
"""

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# A row has a multiple of MULTIPLE tokens; above LONG tokens, of LONG_MULTIPLE.
MULTIPLE, LONG_MULTIPLE = 32, 64
LONG = 512

Rows = list[list[tuple[int, int]]]  # the trees (prompt, which of its trees) of each row of a microbatch


class Shape(NamedTuple):
    """The shape of a microbatch's tokens."""

    rows: int
    width: int  # tokens of a row

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.rows * self.width


@dataclass(frozen=True)
class Packing:
    """The bounds of a microbatch on a mesh, and what its shape costs there.

    The number of its rows is divisible by `shards`, and they hold at most `most_tokens` tokens (None: all of an update's),
    unless one row a shard is more, or one prompt's responses need more.
    """

    shards: int = 1
    most_tokens: int | None = None
    # Without, each row holds one tree.
    pack: bool = True
    # Rows may be wider than the longest tree, because attention computes no scores between a row's trees, or few.
    wide: bool = True
    # A prompt's responses share its tokens: they are one tree.
    shared: bool = False
    # Cost of a token's attention for each token of its row's width, over the cost of the token's products with weights.
    attention: float = 0.0
    # Tokens that all devices could compute while a second shape is compiled.
    compiling: float = 0.0

    def trees(self, responses: int) -> list[list[int]]:
        """Return the responses of each tree of a prompt with so many."""
        every = list(range(responses))
        return [every] if self.shared else [[k] for k in every]


@dataclass(frozen=True)
class Layout:
    """The shapes of an iteration's microbatches: each has the larger one (`rows`, `width`) or the smaller one."""

    microbatches: int  # most microbatches of an update
    prompts: int  # most prompts of a microbatch
    rows: int
    width: int  # tokens of a row
    slots: int  # most responses of a row
    real_token_share: float  # share of the computed tokens that belong to a tree
    smaller: Shape | None = None
    # Share of all microbatches that have the smaller shape.
    smaller_share: float = 0.0
    # Most scored tokens of a row, of the larger shape and of the smaller one, rounded up; None: all may be.
    scored: tuple[int, int] | None = None

    def most_scored(self, shape: Shape) -> int:
        """Return the most scored tokens of a row of that shape."""
        return shape.width if self.scored is None else self.scored[shape == self.smaller]

    def mean(self, of: Callable[[Shape], float]) -> float:
        """Return the mean over all microbatches of a number that depends on the shape."""
        larger = of(Shape(self.rows, self.width))
        return larger if self.smaller is None else larger + self.smaller_share * (of(self.smaller) - larger)


@dataclass(frozen=True)
class Part:
    """A microbatch's prompts, their trees in its rows, and its shape."""

    prompts: list[int]
    rows: Rows
    shape: Shape


Series = Callable[[int], Shape]  # shapes of growing size, from 1 on


def arranged(
    order: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    packing: Packing,
    scored: Sequence[Sequence[int]] | None = None,
    responses: int = 1,
) -> tuple[list[list[Part]], Layout]:
    """Split each batch of prompts into microbatches. Returns these, and the shapes of them all.

    `order`: the prompts of each batch; `lengths`: tokens of each prompt's trees; `scored`: how many of these are responses'
    (None: all may be, which a plan assumes); `responses`: those of a tree.
    """
    totals = [sum(sum(lengths[index]) for index in batch) for batch in order]
    most, limit = max(totals), packing.most_tokens
    # As few microbatches as have room: each gathers every weight again. A smaller batch has its share of them.
    count = 1 if limit is None else -(-most // limit)
    while True:
        split = [
            _split(batch, lengths, -(-total * count // most))
            for batch, total in zip(order, totals, strict=True)
        ]
        found = _cheapest(split, lengths, packing)
        if found is not None:
            break
        count += 1
    every = [part for plan in found for part in plan]
    counts = Counter(part.shape for part in every)
    largest = max(counts, key=lambda shape: shape.tokens)
    smaller = next((shape for shape in counts if shape != largest), None)
    shapes = (largest, smaller or largest)
    return found, Layout(
        microbatches=max(map(len, found)),
        prompts=max(len(part.prompts) for part in every),
        rows=largest.rows,
        width=largest.width,
        slots=responses * max(len(row) for part in every for row in part.rows),
        real_token_share=sum(totals) / sum(part.shape.tokens for part in every),
        smaller=smaller,
        smaller_share=0.0 if smaller is None else counts[smaller] / len(every),
        scored=None
        if scored is None
        else (_scored(every, shapes[0], scored), _scored(every, shapes[1], scored)),
    )


def _scored(every: Sequence[Part], shape: Shape, scored: Sequence[Sequence[int]]) -> int:
    """Return the most scored tokens of a row in microbatches of that shape, rounded up as a width is."""
    rows = (row for part in every if part.shape == shape for row in part.rows)
    most = max(1, max(sum(scored[index][k] for index, k in row) for row in rows))
    return min(shape.width, -(-most // _multiple(most)) * _multiple(most))


def _split(batch: Sequence[int], lengths: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Split a batch's prompts into `count` lists of about as many tokens: longest first, each into the emptiest list."""
    parts: list[list[int]] = [[] for _ in range(min(count, len(batch)))]
    tokens = [0] * len(parts)
    for index in sorted(batch, key=lambda i: (-sum(lengths[i]), i)):
        at = tokens.index(min(tokens))
        parts[at].append(index)
        tokens[at] += sum(lengths[index])
    return [sorted(part) for part in parts]


@dataclass(frozen=True)
class _Need:
    """A microbatch's prompts, their trees from the longest on, and what these need at least."""

    prompts: list[int]
    trees: list[tuple[int, int]]
    tokens: int
    rows: int


def _need(prompts: list[int], lengths: Sequence[Sequence[int]], pack: bool) -> _Need:
    every = [(index, k) for index in prompts for k in range(len(lengths[index]))]
    every.sort(key=lambda one: (-lengths[one[0]][one[1]], one))
    return _Need(prompts, every, sum(sum(lengths[index]) for index in prompts), 0 if pack else len(every))


def _cheapest(
    split: Sequence[Sequence[list[int]]], lengths: Sequence[Sequence[int]], packing: Packing
) -> list[list[Part]] | None:
    """Lay out the microbatches of each batch by the series of shapes that costs least; None where none has room."""
    longest = max(map(max, lengths))
    limit = math.inf if packing.most_tokens is None else packing.most_tokens
    every = [_need(prompts, lengths, packing.pack) for plan in split for prompts in plan]

    def fits(sizes: Sequence[int], series: Series) -> bool:
        several = [size for need, size in zip(every, sizes, strict=True) if len(need.prompts) > 1]
        return not several or series(max(several)).tokens <= max(limit, series(1).tokens)

    # Of each series a bound from below, without a look at single trees: most need no closer one.
    bounded = []
    for number, series in enumerate(_series(packing, longest, max(need.tokens for need in every))):
        least = _least_sizes(every, series)
        if fits(least, series):
            bounded.append((_chosen(Counter(least), series, packing)[0], number, series, least))
    best: list[list[Part]] | None = None
    lowest: tuple[float, int] = (math.inf, 0)
    for bound, number, series, least in sorted(bounded, key=lambda one: one[:2]):
        if (bound, number) >= lowest:
            continue
        found = [
            _smallest(need, size, lengths, series, packing.pack)
            for need, size in zip(every, least, strict=True)
        ]
        sizes = [size for size, _ in found]
        if not fits(sizes, series):
            continue
        cost, chosen = _chosen(Counter(sizes), series, packing)
        if (cost, number) < lowest:
            lowest = cost, number
            parts = iter(
                Part(need.prompts, rows, series(min(other for other in chosen if other >= size)))
                for need, (size, rows) in zip(every, found, strict=True)
            )
            best = [[next(parts) for _ in plan] for plan in split]
    return best


def _least_sizes(every: Sequence[_Need], series: Series) -> list[int]:
    """The smallest size for each microbatch that has as many tokens and rows as it needs at least."""
    tokens, rows = max(need.tokens for need in every), max(need.rows for need in every)
    shapes = [series(1)]
    while shapes[-1].tokens < tokens or shapes[-1].rows < rows:
        shapes.append(series(len(shapes) + 1))
    by_tokens, by_rows = [shape.tokens for shape in shapes], [shape.rows for shape in shapes]
    return [
        1 + max(bisect.bisect_left(by_tokens, need.tokens), bisect.bisect_left(by_rows, need.rows))
        for need in every
    ]


def _series(packing: Packing, longest: int, tokens: int) -> Iterator[Series]:
    """Series of shapes for microbatches of up to `tokens` tokens: of wider and wider rows, or of more and more rows."""
    least = -(-longest // _multiple(longest)) * _multiple(longest)
    if not (packing.wide and packing.pack):
        yield lambda size: Shape(size * packing.shards, least)
        return
    # The fewest rows have the least padding; more are worth trying only where attention over wide rows costs something.
    most = max(1, tokens // packing.shards // least) if packing.attention else 1
    for rows in range(1, most + 1):
        yield lambda size, rows=rows: Shape(rows * packing.shards, _width(least, size))  # type: ignore[misc]


def _multiple(width: int) -> int:
    return MULTIPLE if width <= LONG else LONG_MULTIPLE


def _width(least: int, size: int) -> int:
    """The width of that size, from 1 on, where `least` is the first."""
    short = max(0, (LONG - least) // MULTIPLE)
    return least + MULTIPLE * min(size - 1, short) + LONG_MULTIPLE * max(0, size - 1 - short)


def _smallest(
    need: _Need, size: int, lengths: Sequence[Sequence[int]], series: Series, pack: bool
) -> tuple[int, Rows]:
    """Return the smallest size, from `size` on, whose rows hold a microbatch's trees, and these rows."""
    while (rows := _filled(need.trees, lengths, series(size), pack)) is None:
        size += 1
    return size, rows


def _filled(
    every: Sequence[tuple[int, int]], lengths: Sequence[Sequence[int]], shape: Shape, pack: bool
) -> Rows | None:
    """Put the trees, longest first, each into the fullest row that has room for it; None where one has no room."""
    rows: Rows = [[] for _ in range(shape.rows)]
    free = [(shape.width, b) for b in range(shape.rows)]  # (tokens, row), in order
    for index, k in every:
        length = lengths[index][k]
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            return None
        left, b = free.pop(at)
        rows[b].append((index, k))
        if pack:
            bisect.insort(free, (left - length, b))
    return rows


def _chosen(sizes: Counter[int], series: Series, packing: Packing) -> tuple[float, tuple[int, ...]]:
    """Return the cost in tokens of the cheapest one or two sizes for microbatches of at least `sizes`, and these."""

    def cost(size: int) -> float:
        shape = series(size)
        return shape.tokens * (1 + packing.attention * shape.width)

    largest, whole = max(sizes), sum(sizes.values())
    options: list[tuple[float, tuple[int, ...]]] = [(whole * cost(largest), (largest,))]
    for size in sizes:
        below = sum(n for other, n in sizes.items() if other <= size)
        if size != largest:
            both = below * cost(size) + (whole - below) * cost(largest)
            options.append((both + packing.compiling, (size, largest)))
    return min(options)
