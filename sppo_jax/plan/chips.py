"""Speed and memory of accelerators, from which plans compute times, and stand-ins for devices that are not here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Figures of one accelerator."""

    # bfloat16 FLOP/s.
    flops: float
    # Memory bandwidth, bytes per second.
    memory: float
    # GiB of memory that one program may use.
    gib: float
    # Bytes per second that the chip can send to its neighbours.
    links: float
    # Cycles per second of a TPU, by which its compiler's estimates become seconds; 0 for a GPU.
    cycles: float = 0.0
    # CUDA's compute capability of a GPU.
    capability: str = ""
    # Chips of a host, which one process drives.
    host: int = 4
    # Share of `memory` that a kernel of ours is assumed to reach.
    reached: float = 0.7
    # Seconds to start a collective.
    latency: float = 5e-6

    @property
    def platform(self) -> str:
        """jax's name of the platform."""
        return "tpu" if self.cycles else "gpu"


@dataclass(frozen=True)
class Device:
    """The attributes of a jax device that meshes and the choice of kernels read; nothing is compiled for it."""

    id: int
    process_index: int
    platform: str
    compute_capability: str
    device_kind: str = "stand-in"


def stand_ins(chip: Chip, count: int) -> list[Device]:
    """`count` devices of a kind, in order, on as many processes as they need."""
    return [Device(i, i // chip.host, chip.platform, chip.capability) for i in range(count)]


# TPU: gib is the compiler's limit for a program (v5e, v6e), nominal less 1.5 % elsewhere. A slice below 16 x 16 has no
# wrap-around, so a corner chip sends over two links. Cycles per second are those at which the compiler's
# estimate of a large matrix product comes to 88 to 93 % of the peak; no TPU has been timed.
TPUS = {
    "v4": Chip(275e12, 1228e9, 31.5, 90e9, 1.05e9),
    "v5e": Chip(197e12, 819e9, 15.75, 90e9, 1.5e9),
    "v5p": Chip(459e12, 2765e9, 93.5, 180e9, 1.75e9),
    "v6e": Chip(918e12, 1638e9, 31.25, 180e9, 2.2e9),
}


def _gpu(tflops: float, bandwidth: float, gib: float, links: float, capability: str, host: int = 8) -> Chip:
    """Return a GPU of `gib` GiB, from TFLOP/s and GB/s.

    jax takes 75 % of a card by default. Counted here are 92 %, as with XLA_CLIENT_MEM_FRACTION=.92.
    """
    return Chip(1e12 * tflops, 1e9 * bandwidth, 0.92 * gib, 1e9 * links, capability=capability, host=host)


# From NVIDIA's data sheets and architecture papers: dense bfloat16 products that are summed in float32, which on GeForce
# cards is half of the rate that sums in float16; links are what a card sends, half of what NVLink is sold as. GiB are those
# that nvidia-smi shows. Copies between cards on PCIe pass the host's bridge or memory: half of a slot's 32 GB/s (PCIe 4.0)
# or 64 (5.0) is assumed. AMD's MI300X is missing: neither the installation nor any kernel of ours has been tried with ROCm.
GPUS = {
    "rtx3090": _gpu(71, 936, 24, 16, "8.6", host=4),
    "rtx4090": _gpu(165.2, 1008, 24, 16, "8.9", host=4),
    "rtx5090": _gpu(209.5, 1792, 32, 32, "12.0", host=4),
    "a10g": _gpu(70, 600, 22.5, 16, "8.6"),
    "l4": _gpu(121, 300, 22.5, 16, "8.9"),
    "l40s": _gpu(362, 864, 45, 16, "8.9"),
    "a100-40": _gpu(312, 1555, 40, 300, "8.0"),
    "a100": _gpu(312, 2039, 80, 300, "8.0"),
    "h100": _gpu(989, 3350, 80, 450, "9.0"),
    "h200": _gpu(989, 4800, 141, 450, "9.0"),
    "b200": _gpu(2250, 8000, 179, 900, "10.0"),
}
