"""One stage of a plan: what a unit of its work needs of each chip, and how long it takes."""

from dataclasses import dataclass, field

from sppo_jax.plan.chips import Chip
from sppo_jax.plan.hlo import Cost

GIB = 2**30
# Where there is no compiler: shares of the peaks that programs are taken to reach.
FLOPS_REACHED, BYTES_REACHED = 0.55, 0.7


@dataclass
class Stage:
    """One unit of a stage's work, on every chip of the slice at once. Bytes, operations and seconds are one chip's."""

    unit: str
    count: float  # units of an iteration, one after the other
    chip: Chip
    flops: float  # that the result needs, padding and what is computed again left out
    bytes: float  # that must move between memory and cores
    memory: dict[str, float] = field(default_factory=dict)  # bytes at the peak, by kind
    sent: float = 0.0  # out of the chip in collectives
    moved: dict[str, float] = field(default_factory=dict)  # bytes of results by kind of collective
    compiler: float | None = None  # seconds by the compiler's cycles, and by these alone
    left_out: float = (
        0.0  # seconds of what has no cycles: attention kernels, and fetching that outlasts the products
    )
    collectives: float | None = None  # seconds of those that are waited for
    formula: float | None = None  # seconds where nothing was compiled
    compile_seconds: float = 0.0
    note: str = ""

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        return self.chip.gib * GIB

    @property
    def roofline(self) -> float:
        """Seconds that nothing can be faster than: collectives that run beside products are bound by their links, too."""
        chip = self.chip
        return max(self.flops / chip.flops, self.bytes / chip.memory, self.sent / chip.links)

    @property
    def seconds(self) -> float:
        """The best estimate that there is."""
        if self.compiler is None:
            return self.formula or self.roofline
        return max(self.compiler + self.left_out + (self.collectives or 0), self.roofline)

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600

    @property
    def mfu_compiler(self) -> float | None:
        """Model FLOPs utilisation by the compiler's cycles alone, as if attention kernels and links took no time."""
        return self.flops / self.chip.flops / self.compiler if self.compiler else None

    @property
    def mfu(self) -> float:
        """By `seconds`: attention kernels and the collectives that are waited for included."""
        return self.flops / self.chip.flops / self.seconds

    def add(self, cost: Cost, times: float, compile_seconds: float) -> None:
        """A program's cost, run so many times in a unit."""
        self.compiler = (self.compiler or 0) + times * cost.cycles / self.chip.cycles
        waited = cost.waited / self.chip.links + cost.collectives * self.chip.latency
        self.collectives = (self.collectives or 0) + times * waited
        self.compile_seconds += compile_seconds
        self.sent += times * cost.sent
        for kind, size in cost.moved.items():
            self.moved[kind] = self.moved.get(kind, 0) + times * size

    def by_formula(self, computed: float, sent: float, width: int) -> None:
        """Without a compiler, from the operations that are `computed`, in numbers of `width` bytes, and the bytes that leave.

        Collectives are taken to be waited for.
        """
        self.sent = sent
        products = computed / self.chip.flops / FLOPS_REACHED * (width / 2)
        reached = max(products, self.bytes / self.chip.memory / BYTES_REACHED)
        self.formula = reached + sent / self.chip.links
