"""Reads a compiled TPU program's text: the compiler's cycles and the bytes that collectives move, with loops multiplied out.

jax's `Compiled.cost_analysis` counts the body of a loop once, however often it runs.
"""

import math
import re
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


def sent(kind: str, result: float, group: int) -> float:
    """Bytes that leave a chip in a collective over `group` chips whose result has `result` bytes on each."""
    share = (group - 1) / group
    factors = {
        "all-reduce": 2 * share,
        "all-gather": share,
        "all-to-all": share,
        "reduce-scatter": group - 1,
        "collective-permute": 1,
    }
    return result * factors[kind]


@dataclass
class Cost:
    """Cycles of a program on one chip, and its collectives."""

    cycles: float = 0.0
    # Bytes of results, by kind of collective.
    moved: dict[str, float] = field(default_factory=dict)
    # Bytes that leave the chip in collectives, and in the collectives among them that no computation overlaps.
    sent: float = 0.0
    waited: float = 0.0
    # Number of collectives that no computation overlaps.
    collectives: float = 0.0
    # MiB of each copy inside a loop, from 1 MiB on, by the type of its result.
    copies: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Cost", times: float = 1) -> None:
        """Add the cost of a computation that runs `times` times."""
        self.cycles += times * other.cycles
        self.sent += times * other.sent
        self.waited += times * other.waited
        self.collectives += times * other.collectives
        for kind, size in other.moved.items():
            self.moved[kind] = self.moved.get(kind, 0.0) + times * size
        self.copies |= other.copies


class Module:
    """A program's text, as `compiled.as_text()` returns it."""

    def __init__(self, text: str, loop_counts: dict[str, float] | None = None):
        """`loop_counts`: {regex on op_name: iterations} for loops without a constant bound; the first match wins."""
        self.loop_counts = loop_counts or {}
        head = text.partition("\n")[0]
        self.chips = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head))
        self.computations: dict[str, list[str]] = {}
        for line in text.splitlines():
            if begins := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = "ENTRY" if begins[1] else begins[2]
                self.computations[name] = []
            elif line.startswith("  "):
                self.computations[name].append(line.strip())

    def cost(self, name: str = "ENTRY") -> Cost:
        """Cost of running a computation once. Raises ValueError for a loop whose length is unknown."""
        total = Cost()
        # Collectives that run beside the instructions after them, by kind and channel.
        started: set[tuple[str, str]] = set()
        for line in self.computations[name]:
            if (parts := _instruction(line)) is None:
                continue
            result, operation = parts
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                total.cycles += int(cycles[1])
            if (kind := operation.removesuffix("-start")) in KINDS:
                # The result of a `-start` has the operand, too; that of several collectives in one is a tuple.
                beside = operation.endswith("-start")
                total.add(self._collective(kind, size(result, every=not beside), line, beside))
            if operation in ("fusion", "async-start"):
                called = _part(r"calls=%([\w.-]+)", line)
                total.add(self._inside(called, result, started, beside=operation == "async-start"))
            # A copy-start moves between memories, and does not count.
            if operation == "copy" and name != "ENTRY" and size(result) >= 2**20:
                total.copies[result.split("{")[0]] = size(result) / 2**20
            if operation == "while":
                total.add(self.cost(_part(r"body=%([\w.-]+)", line)), self._loop_count(line))
            if operation == "call":
                total.add(self.cost(_part(r"to_apply=%([\w.-]+)", line)))
            if operation == "conditional":  # the longest of its branches
                branches = re.findall(r"%([\w.-]+)", line.partition("computation")[2])
                costs = [self.cost(name) for name in branches if name in self.computations]
                total.add(max(costs, key=lambda cost: cost.cycles))
        return total

    def _inside(self, name: str, result: str, started: set[tuple[str, str]], beside: bool) -> Cost:
        """Cost of the collectives in a fused computation, whose other instructions are in the fusion's own estimate.

        A collective that runs beside products is printed in each fusion of its chain: where it starts, in the fusions
        that it runs beside, and where it ends. `started` holds the collectives counted so far. A fusion that keeps a
        slice of an all-reduce is a reduce-scatter.
        """
        lines, total = self.computations.get(name, []), Cost()
        chain = name.startswith("async_collective_fusion") or any(
            'custom_call_target="AsyncCollective' in line for line in lines
        )
        for line in lines:
            parts = _instruction(line)
            if parts is None or (kind := parts[1].removesuffix("-start")) not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            if chain and channel is not None:
                if (kind, channel[1]) in started:
                    continue
                started.add((kind, channel[1]))
            if name.startswith("all-reduce-scatter"):
                total.add(self._collective("reduce-scatter", size(result, every=True), line, beside or chain))
            else:
                total.add(self._collective(kind, size(parts[0], every=True), line, beside or chain))
        return total

    def _collective(self, kind: str, moved: int, line: str, beside: bool) -> Cost:
        """Cost of one collective with a result of `moved` bytes; `beside`: it runs beside computation."""
        out = sent(kind, moved, _group(line) or self.chips)
        return Cost(
            moved={kind: moved},
            sent=out,
            waited=0.0 if beside else out,
            collectives=0 if beside else 1,
        )

    def _loop_count(self, line: str) -> float:
        """Iterations of a loop: the constant that its counter is compared with, else the entry of `loop_counts`."""
        condition = self.computations[_part(r"condition=%([\w.-]+)", line)]
        if bound := _bound(condition):
            return bound
        name = _part(r'op_name="([^"]*)"', line) if "op_name=" in line else ""
        for pattern, count in self.loop_counts.items():
            if re.search(pattern, name):
                return count
        raise ValueError(f"the length of the loop {name or line[:80]} is not known")


def _instruction(line: str) -> tuple[str, str] | None:
    """(type of the result, operation) of an instruction, or None for any other line."""
    found = re.match(r"(?:ROOT )?%[\w.-]+ = (.+?) ([a-z][\w-]*)\(", line)
    return found and (found[1], found[2])


def _bound(condition: list[str]) -> int | None:
    """The constant below which a loop's counter stays, where that is the whole condition; else None."""
    root = next(line for line in condition if line.startswith("ROOT "))
    operands = re.search(r" (?:compare|fusion)\(([^)]*)\)", root)
    if operands is None:
        return None
    if "compare(" in root and "direction=LT" not in root:
        return None
    constants = {
        found[1]: int(found[2])
        for line in condition
        if (found := re.match(r"(%[\w.-]+) = s32\[\]\S* constant\((\d+)\)", line))
    }
    given = [part.strip().split()[-1] for part in operands[1].split(",")]
    known = [constants[operand] for operand in given if operand in constants]
    return known[0] if len(given) == 2 and len(known) == 1 else None


def size(result: str, every: bool = False) -> int:
    """Bytes of an HLO type; for a tuple, of its largest member, or with `every` of all members."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    sizes = [
        WIDTHS.get(kind, 4) * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays
    ]
    return sum(sizes) if every else max(sizes, default=0)


def _group(line: str) -> int | None:
    """Number of chips that take part in a collective; None: all of them."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    return None


def _part(pattern: str, line: str) -> str:
    """The first group of a pattern that the line must contain."""
    found = re.search(pattern, line)
    assert found is not None, (pattern, line)
    return found[1]
