"""Cost of one unit of a stage: what it needs of each chip, and how long it takes."""

from dataclasses import dataclass, field

from sppo_jax.plan.chips import Chip
from sppo_jax.plan.hlo import Cost

GIB = 2**30
# Without a compiler: shares of the peak FLOP/s and of the memory bandwidth that programs are assumed to reach.
FLOPS_REACHED, BYTES_REACHED = 0.55, 0.7


@dataclass
class UnitCost:
    """Cost of one unit of a stage's work, which all chips of the slice do together.

    Bytes, FLOPs and seconds are those of one chip. `flops` and `bytes` are the least that the result needs.
    """

    unit: str
    # Units in an iteration, one after the other.
    count: float
    chip: Chip
    # Without padding and recomputation.
    flops: float
    # Traffic between memory and cores.
    bytes: float
    # Bytes in use at the peak, by kind.
    memory: dict[str, float] = field(default_factory=dict)
    # Bytes that collectives send out of the chip.
    sent: float = 0.0
    # Bytes of collectives' results, by kind of collective.
    moved: dict[str, float] = field(default_factory=dict)
    # Seconds by the compiler's cycle counts alone.
    compiler: float | None = None
    # Seconds that the compiler's estimate misses: attention kernels, and weight reads longer than the matmuls that hide them.
    uncounted: float = 0.0
    # Seconds of collectives that no computation overlaps.
    collectives: float | None = None
    # Seconds by formula, where nothing was compiled.
    formula: float | None = None
    compile_seconds: float = 0.0
    note: str = ""

    @property
    def peak(self) -> float:
        """Bytes in use at the peak."""
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        """Bytes that one program may use."""
        return self.chip.gib * GIB

    @property
    def roofline(self) -> float:
        """Lower bound in seconds: the slowest of compute, memory and links (overlapped collectives still need their links)."""
        chip = self.chip
        return max(self.flops / chip.flops, self.bytes / chip.memory, self.sent / chip.links)

    @property
    def seconds(self) -> float:
        """Best estimate of a unit's seconds, at least the roofline where programs were compiled."""
        if self.compiler is None:
            return self.formula or self.roofline
        return max(self.compiler + self.uncounted + (self.collectives or 0), self.roofline)

    @property
    def hours(self) -> float:
        """Hours of all units of an iteration."""
        return self.count * self.seconds / 3600

    @property
    def mfu_compiler(self) -> float | None:
        """Model FLOPs utilisation by the compiler's cycles alone, as if attention kernels and links took no time."""
        return self.flops / self.chip.flops / self.compiler if self.compiler else None

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation by `seconds`, which include attention kernels and collectives that are not overlapped."""
        return self.flops / self.chip.flops / self.seconds

    def add(self, cost: Cost, times: float, compile_seconds: float, computed: float = 1.0) -> None:
        """Add the cost of a program that runs `times` times in a unit.

        Of its tokens, `computed` is the share that it has there on average: cycles are in proportion, collectives are not.
        """
        self.compiler = (self.compiler or 0) + times * computed * cost.cycles / self.chip.cycles
        waited = cost.waited / self.chip.links + cost.collectives * self.chip.latency
        self.collectives = (self.collectives or 0) + times * waited
        self.compile_seconds += compile_seconds
        self.sent += times * cost.sent
        for kind, size in cost.moved.items():
            self.moved[kind] = self.moved.get(kind, 0) + times * size

    def estimate(self, computed: float, sent: float, width: int) -> None:
        """Set the seconds by formula, without a compiler.

        `computed`: FLOPs with padding and recomputation, on numbers of `width` bytes; `sent`: bytes that leave the chip
        in collectives, none of which is overlapped. The peak FLOP/s are those of 2-byte numbers.
        """
        self.sent = sent
        products = computed / self.chip.flops / FLOPS_REACHED * (width / 2)
        reached = max(products, self.bytes / self.chip.memory / BYTES_REACHED)
        self.formula = reached + sent / self.chip.links
