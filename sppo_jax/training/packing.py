"""How an update's sequences share rows of tokens: prompts → microbatches of equal shapes, with little padding."""

from collections.abc import Sequence
from dataclasses import dataclass

# A row is as long as the longest sequence, rounded up to a multiple of MULTIPLE tokens; above LONG tokens, of LONG_MULTIPLE.
MULTIPLE, LONG_MULTIPLE = 32, 128
LONG = 512

Rows = list[list[tuple[int, int]]]  # the sequences (prompt, response) of each row of a microbatch


@dataclass(frozen=True)
class Packing:
    """The bounds of a microbatch on a mesh.

    The number of its rows is divisible by `shards`, and they hold at most `most_tokens` tokens (None: all of an update's),
    unless one row a shard is more, or one prompt's responses need more. Without `pack`, each row holds one sequence.
    """

    shards: int = 1
    most_tokens: int | None = None
    pack: bool = True


@dataclass(frozen=True)
class Layout:
    """The shape that all microbatches of an iteration share."""

    microbatches: int  # most microbatches of an update
    prompts: int  # most prompts of a microbatch
    rows: int
    width: int  # tokens of a row
    segments: int  # most sequences of a row
    real_token_share: float  # share of the computed tokens that belong to a sequence


def arranged(
    order: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], packing: Packing
) -> tuple[list[list[tuple[list[int], Rows]]], Layout]:
    """Split each batch of prompts into microbatches (prompts, rows). Returns these and the shape of them all.

    `order`: the prompts of each batch; `lengths`: tokens of each prompt's sequences.
    """
    shards, most_tokens, pack = packing.shards, packing.most_tokens, packing.pack
    longest = max(map(max, lengths))
    multiple = MULTIPLE if longest <= LONG else LONG_MULTIPLE
    width = -(-longest // multiple) * multiple
    if most_tokens is None:
        plans = [[(sorted(batch), _rows(batch, lengths, width, pack))] for batch in order]
    else:
        most_rows = max(shards, most_tokens // width // shards * shards)
        plans = [_parts(batch, lengths, width, most_rows, pack) for batch in order]
    every = [one for plan in plans for one in plan]
    rows = -(-max(len(rows) for _, rows in every) // shards) * shards
    return plans, Layout(
        microbatches=max(map(len, plans)),
        prompts=max(len(prompts) for prompts, _ in every),
        rows=rows,
        width=width,
        segments=max(len(row) for _, rows in every for row in rows),
        real_token_share=sum(sum(lengths[i]) for batch in order for i in batch) / (len(every) * rows * width),
    )


def _parts(
    batch: Sequence[int], lengths: Sequence[Sequence[int]], width: int, most_rows: int, pack: bool
) -> list[tuple[list[int], Rows]]:
    """Split a batch's prompts, longest first, each into the first microbatch whose rows have room for its sequences."""
    parts: list[tuple[list[int], Rows]] = []
    for index in sorted(batch, key=lambda i: (-sum(lengths[i]), i)):
        for prompts, rows in parts:
            if len(more := _rows([index], lengths, width, pack, rows)) <= most_rows:
                prompts.append(index)
                rows[:] = more
                break
        else:  # one prompt may need more rows than `most_rows`: then it gets them
            parts.append(([index], _rows([index], lengths, width, pack)))
    # All sequences of a microbatch together, and not prompt by prompt, mostly need fewer rows still.
    again = [(sorted(prompts), _rows(prompts, lengths, width, pack)) for prompts, _ in parts]
    return [
        new if len(new[1]) <= len(rows) else (new[0], rows)
        for new, (_, rows) in zip(again, parts, strict=True)
    ]


def _rows(
    prompts: Sequence[int],
    lengths: Sequence[Sequence[int]],
    width: int,
    pack: bool,
    begun: Sequence[Sequence[tuple[int, int]]] = (),
) -> Rows:
    """Add the prompts' sequences to the rows of `begun`: longest first, each into the first row that has room for it."""
    rows = [list(row) for row in begun]
    room = [width - sum(lengths[index][k] for index, k in row) for row in rows]
    every = [(index, k) for index in prompts for k in range(len(lengths[index]))]
    for index, k in sorted(every, key=lambda one: (-lengths[one[0]][one[1]], one)):
        length = lengths[index][k]
        b = next((b for b, free in enumerate(room) if pack and free >= length), len(rows))
        if b == len(rows):
            rows.append([])
            room.append(width)
        rows[b].append((index, k))
        room[b] -= length
    return rows
