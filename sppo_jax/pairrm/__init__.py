"""PairRM, the preference model of stage 2: (prompt, two responses) → the logit that the first is better.

`load` is all that the judge stage needs. Importing this package costs nothing: PyTorch lives in the sidecar process.
"""

from pathlib import Path

from sppo_jax.errors import BadInput
from sppo_jax.pairrm.client import SidecarJudge

BACKENDS = ("torch",)

__all__ = ["BACKENDS", "SidecarJudge", "load"]


def load(path: str | Path, backend: str = "torch", *, threads: int | None = None) -> SidecarJudge:
    """Start a PairRM from `path`, a directory in the PairRM-hf layout, and return at once; it loads meanwhile.

    `threads` is the number of CPU threads it may use (default: all that this process may). Close the returned judge
    or use it as a context manager. Raises BadInput for an unknown backend or when a file of the layout is missing.
    """
    if backend not in BACKENDS:
        raise BadInput(f"PairRM backend {backend!r} is unknown; choose one of: {', '.join(BACKENDS)}")
    return SidecarJudge(path, threads=threads)
