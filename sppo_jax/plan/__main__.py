"""What a configuration needs and how long it takes on devices that are not here: memory, time and cost of each stage.

python -m sppo_jax.plan --config FILE --topology v5e:4x4 [--topology v6e:2x4 ...] [--section.key value ...]
python -m sppo_jax.plan --config FILE --device h100 --count 8

    --device NAME, --count N                 a GPU (rtx3090, rtx4090, rtx5090, a10g, l4, l40s, a100-40, a100, h100, h200, b200)
                                             and the number of them (default: 1)
    --prompt-tokens N, --response-tokens N   mean lengths, which are unknown before a run (default: 180 and 350)
    --price X                                of a chip for an hour
    --json                                   print one JSON object as the last line
    --write                                  put the figures into the header of FILE
    --version                                print the version

For a TPU topology the real programs are compiled, on this machine's CPU, by the TPU's own compiler. It must be importable:
pip install --no-deps --target TPU libtpu==0.0.42.1, then PYTHONPATH=TPU. Without it, and for GPUs, all is computed from
formulas, and the table says so. Nothing is run, and no TPU has been timed: cycles become seconds at the clock of chips.py.
Other meshes are weighed by formula; where the configuration's own does not fit, they are compiled, the most promising first.
"""

import os

if __name__ == "__main__":
    # Before jax is imported: the compiler must look neither for a TPU, nor for other processes that compile.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sppo_jax import config_file
from sppo_jax.command import as_called, call, say
from sppo_jax.errors import BadInput
from sppo_jax.plan import config_header, slices
from sppo_jax.plan.lengths import Lengths
from sppo_jax.settings import words as command_line

# The command's own flags, and whether each takes a value.
FLAGS = dict.fromkeys(
    (
        "--config",
        "--topology",
        "--device",
        "--count",
        "--price",
        "--prompt-tokens",
        "--response-tokens",
    ),
    True,
) | {"--json": False, "--write": False}


@dataclass
class PlanRequest:
    """The command's own flags."""

    # Slices such as v5e:4x4 or h100:8.
    slices: list[str] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)
    price: float | None = None
    json: bool = False
    write: bool = False


def main(words: Sequence[str]) -> None:
    """Print the plans that the command line asks for. Raises BadInput for wrong flags, and where nothing fits."""
    if "--help" in words or "-h" in words:
        print(as_called(__doc__ or ""))
        return
    files, request, overrides = parse(words)
    config = config_file.load(files, overrides)
    # Only now, since these import jax: a mistake is told at once.
    from sppo_jax.plan import search, table

    began = time.perf_counter()
    plans = [search.plan(config, name, request.lengths) for name in request.slices]
    for plan in plans:
        print("\n".join(table.table(plan, config, request.price)))
    say(f"planned in {time.perf_counter() - began:.0f} s")
    if request.write:
        if len(files) != 1 or overrides:
            raise BadInput(
                "--write needs one --config and no flags that change it: the header's figures are of the file as it is"
            )
        lines = [line for plan in plans for line in table.summary(plan, config, request.price)]
        config_header.write(config_file.find(files[0]), config, lines)
    if request.json:
        found = [table.as_json(plan, config, request.lengths, request.price) for plan in plans]
        print(json.dumps(found[0] if len(found) == 1 else {"plans": found}))


def parse(words: Sequence[str]) -> tuple[list[str], PlanRequest, list[str]]:
    """Return (--config files, the command's own flags, overrides of the configuration). Raises BadInput."""
    files: list[str] = []
    request, devices, counts = PlanRequest(), [], []
    lengths = {"--prompt-tokens": "prompt", "--response-tokens": "response"}
    own, rest = command_line.split(words, FLAGS)
    for flag, value in own:
        if flag in ("--json", "--write"):
            setattr(request, flag[2:], True)
        elif flag == "--config":
            files.append(value)
        elif flag == "--topology":
            request.slices.append(value)
        elif flag == "--device":
            devices.append(value)
        elif flag == "--count":
            counts.append(_count(flag, value))
        elif flag == "--price":
            request.price = _number(flag, value)
        else:
            request.lengths = dataclasses.replace(request.lengths, **{lengths[flag]: _count(flag, value)})
    if counts and len(counts) != len(devices):
        raise BadInput("--count: give one for each --device")
    request.slices += [f"{name}:{n}" for name, n in zip(devices, counts or [1] * len(devices), strict=True)]
    if not request.slices:
        raise BadInput("name a slice: --topology v5e:4x4, or --device h100 --count 8")
    for name in request.slices:
        slices.parse(name)
    return files, request, rest


def _count(flag: str, value: str) -> int:
    """A flag's value as a whole number above 0. Raises BadInput."""
    number = _number(flag, value)
    if number != int(number):
        raise BadInput(f"{flag} {value}: needs a whole number, as {max(1, int(number))}")
    return int(number)


def _number(flag: str, value: str) -> float:
    """A flag's value as a number above 0. Raises BadInput."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e9:
        raise BadInput(f"{flag} {value}: needs a number above 0 and below 1000000000")
    return number


if __name__ == "__main__":
    call(main, resumes=False)
