"""The names of slices: "v5e:4x4" is a kind of TPU and its shape, "h100:8" a kind of GPU and a number of cards."""

import math
import re

from sppo_jax.errors import BadInput
from sppo_jax.plan.chips import GPUS, TPUS, Chip
from sppo_jax.settings.values import nearest

# Shapes of a flat slice. Slices of the other kinds have three sides, of 1, 2, or multiples of 4.
FLAT = dict.fromkeys(("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"))
MOST = 16384  # chips


def parse(name: str) -> tuple[Chip, int]:
    """Return a slice's kind of chip and number of chips. Raises BadInput for a name that stands for none."""
    kind, _, size = name.partition(":")
    if kind in GPUS:
        if not re.fullmatch("[0-9]{1,6}", size) or not 1 <= int(size) <= MOST:
            raise BadInput(f"--device {kind} --count {size}: needs a whole number from 1 to {MOST}")
        return GPUS[kind], int(size)
    if kind == "cpu":
        raise BadInput(
            "--device cpu: a CPU's speed is measured, not planned: play one iteration of a few prompts, with --iterations 1 "
            "--prompts.per_iteration 8, and multiply (docs/your-data.md has a measured example)"
        )
    if kind not in TPUS:
        raise BadInput(
            f"{name}: unknown; TPUs are {', '.join(TPUS)}, as --topology v5e:4x4, and GPUs {', '.join(GPUS)}, as "
            f"--device h100{nearest(kind, [*TPUS, *GPUS])}"
        )
    flat = FLAT.get(kind)
    if not size:
        raise BadInput(f"--topology {name}: a shape is needed, as {kind}:{'4x4' if flat else '2x2x4'}")
    if flat and size not in flat:
        raise BadInput(f"--topology {name}: there is no such slice; shapes are {', '.join(flat)}")
    sides = [int(side) for side in size.split("x")] if re.fullmatch("[0-9]{1,2}(x[0-9]{1,2})+", size) else []
    if not flat and (len(sides) != 3 or not all(n in (1, 2) or (n and n % 4 == 0) for n in sides)):
        raise BadInput(
            f"--topology {name}: there is no such slice; shapes have three sides, of 1, 2 or multiples of 4, as "
            f"{kind}:2x2x4"
        )
    if math.prod(sides) > MOST:
        raise BadInput(f"--topology {name}: more than {MOST} chips")
    return TPUS[kind], math.prod(sides)
