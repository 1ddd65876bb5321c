"""What accelerators can do: the figures that plans divide by, and stand-ins for devices that are not here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator."""

    flops: float  # bfloat16 operations per second
    memory: float  # bytes per second
    gib: float  # of memory that one program may use
    links: float  # bytes per second that leave it for its neighbours
    cycles: float = 0.0  # per second of a TPU: what its compiler's estimates are in
    capability: str = ""  # of a GPU: CUDA's compute capability
    host: int = 4  # chips of a host, which one process drives
    reached: float = 0.7  # share of `memory` that a kernel of ours is taken to reach
    latency: float = 5e-6  # seconds to begin a collective

    @property
    def platform(self) -> str:
        return "tpu" if self.cycles else "gpu"


@dataclass(frozen=True)
class Device:
    """As much of a device as meshes and the choice of kernels ask for; nothing is compiled for it."""

    id: int
    process_index: int
    platform: str
    compute_capability: str
    device_kind: str = "stand-in"


def stand_ins(chip: Chip, count: int) -> list[Device]:
    return [Device(i, i // chip.host, chip.platform, chip.capability) for i in range(count)]


# TPU: gib is what the compiler gives a program (v5e, v6e), nominal less 1.5 % elsewhere. A slice below 16 x 16 has no
# wrap-around, so a corner chip sends over two links. Cycles per second are those at which the compiler's
# estimate of a large matrix product comes to 88 to 93 % of the peak; no TPU has been timed.
TPUS = {
    "v4": Chip(275e12, 1228e9, 31.5, 90e9, 1.05e9),
    "v5e": Chip(197e12, 819e9, 15.75, 90e9, 1.5e9),
    "v5p": Chip(459e12, 2765e9, 93.5, 180e9, 1.75e9),
    "v6e": Chip(918e12, 1638e9, 31.25, 180e9, 2.2e9),
}
# GPU: what jax takes of a card unless told otherwise is 75 %; with XLA_CLIENT_MEM_FRACTION=.92, 92 %, which is counted.
GPUS = {
    "a100": Chip(312e12, 2039e9, 73.6, 300e9, capability="8.0", host=8),
    "h100": Chip(989e12, 3350e9, 73.6, 450e9, capability="9.0", host=8),
    "h200": Chip(989e12, 4800e9, 129.7, 450e9, capability="9.0", host=8),
}
