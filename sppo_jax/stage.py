"""One stage of a plan: what a unit of its work needs of each chip, and how long it takes."""

from dataclasses import dataclass, field

GIB = 2**30


@dataclass
class Stage:
    """One unit of a stage's work, on every chip of the slice at once. Bytes, operations and seconds are one chip's."""

    unit: str
    count: float  # units of an iteration, one after the other
    peak: float
    limit: float
    flops: float  # that the result needs, padding and what is computed again left out
    bytes: float  # that must move between memory and cores
    sent: float = 0.0  # out of the chip in collectives
    moved: dict[str, float] = field(default_factory=dict)  # bytes of results by kind of collective
    compiler: float | None = None  # seconds by the compiler's cycles
    collectives: float | None = None  # seconds of those that are waited for
    roofline: float = 0.0
    compile_seconds: float = 0.0
    note: str = ""

    @property
    def seconds(self) -> float:
        """The best estimate that there is."""
        return self.roofline if self.compiler is None else self.compiler + (self.collectives or 0)

    @property
    def hours(self) -> float:
        return self.count * self.seconds / 3600
