"""What a compiled TPU program's text says: the compiler's cycles and what collectives move, loops counted by their turns.

`Compiled.cost_analysis` counts the body of a loop once, however often it turns.
"""

import math
import re
from dataclasses import dataclass, field

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


def sent(kind: str, result: float, group: int) -> float:
    """Bytes that leave a chip in a collective over `group` chips whose result has `result` bytes on each."""
    share = (group - 1) / group
    return (
        result
        * {
            "all-reduce": 2 * share,
            "all-gather": share,
            "all-to-all": share,
            "reduce-scatter": group - 1,
            "collective-permute": 1,
        }[kind]
    )


@dataclass
class Cost:
    """Of one chip."""

    cycles: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)  # bytes of results by kind of collective
    sent: float = 0.0  # bytes that leave the chip in collectives,
    waited: float = 0.0  # and in those of them that nothing is computed beside
    collectives: float = 0.0  # how many are waited for
    copies: dict[str, float] = field(default_factory=dict)  # MiB of copies in loops, from 1 on

    def add(self, other: "Cost", times: float = 1) -> None:
        self.cycles += times * other.cycles
        self.sent += times * other.sent
        self.waited += times * other.waited
        self.collectives += times * other.collectives
        for kind, size in other.moved.items():
            self.moved[kind] = self.moved.get(kind, 0.0) + times * size
        self.copies |= other.copies


class Module:
    """A program's text, as `compiled.as_text()` gives it."""

    def __init__(self, text: str, turns: dict[str, float] | None = None):
        """`turns`: of the loops whose length is not known before, by what their names match, the first that does."""
        self.turns = turns or {}
        self.computations: dict[str, list[str]] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = "ENTRY" if head[1] else head[2]
                self.computations[name] = []
            elif line.startswith("  "):
                self.computations[name].append(line.strip().removeprefix("ROOT "))

    def cost(self, name: str = "ENTRY") -> Cost:
        total = Cost()
        for line in self.computations[name]:
            found = re.match(r"%[\w.-]+ = (.+?) ([a-z][\w-]*)\(", line)
            if found is None:
                continue
            result, operation = found.groups()  # a copy-start moves between memories and is not looked at
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                total.cycles += int(cycles[1])
            if (kind := operation.removesuffix("-start")) in KINDS:
                total.add(self._collective(kind, result, line, beside=operation.endswith("-start")))
            if operation == "copy" and name != "ENTRY" and size(result) >= 2**20:
                total.copies[result.split("{")[0]] = size(result) / 2**20
            if operation == "while":
                total.add(self.cost(_part(r"body=%([\w.-]+)", line)), self._turns(line))
            if operation == "call":
                total.add(self.cost(_part(r"to_apply=%([\w.-]+)", line)))
            if operation == "conditional":  # one of its branches: the longest
                branches = re.findall(r"%([\w.-]+)", line.partition("computation")[2])
                costs = [self.cost(name) for name in branches if name in self.computations]
                total.add(max(costs, key=lambda cost: cost.cycles))
        return total

    def _collective(self, kind: str, result: str, line: str, beside: bool) -> Cost:
        # Several in one have a tuple as their result; one that is begun has its operand in there, too.
        moved = size(result) if beside else size(result, every=True)
        out = sent(kind, moved, _group(line))
        return Cost(
            moved={kind: moved},
            sent=out,
            waited=0.0 if beside else out,
            collectives=0 if beside else 1,
        )

    def _turns(self, line: str) -> float:
        name = _part(r'op_name="([^"]*)"', line) if "op_name=" in line else ""
        known = [turns for pattern, turns in self.turns.items() if re.search(pattern, name)]
        condition = " ".join(self.computations[_part(r"condition=%([\w.-]+)", line)])
        return known[0] if known else int(_part(r"constant\((\d+)\)", condition))


def size(result: str, every: bool = False) -> int:
    """Bytes of an HLO type; of a tuple's largest member, or of all."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    sizes = [
        WIDTHS.get(kind, 4) * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays
    ]
    return sum(sizes) if every else max(sizes, default=0)


def _group(line: str) -> int:
    """Chips that take part in a collective."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    return 2  # collective-permute: from one to one other


def _part(pattern: str, line: str) -> str:
    found = re.search(pattern, line)
    assert found is not None, (pattern, line)
    return found[1]
