"""PairRM, the preference model of stage 2: (prompt, two responses) → the logit that the first is better.

`load` is all that the judge stage needs. Importing this package costs little: PyTorch lives in the sidecar process, and
the network in JAX is imported when it is asked for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_jax import command
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.pairrm import files
from sppo_jax.pairrm.format import Limits
from sppo_jax.pairrm.process_judge import Patience, SidecarJudge

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sppo_jax.pairrm.mesh_judge import JaxJudge

BACKENDS = ("torch", "jax", "llm_blender")

__all__ = ["BACKENDS", "Limits", "SidecarJudge", "load"]


def load(
    path: str | Path,
    backend: str = "torch",
    *,
    python: str = "",
    threads: int | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    dtype: str = "auto",
    mesh: "Mesh | None" = None,
    pinned: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = command.say,
) -> "SidecarJudge | JaxJudge":
    """A PairRM that compares: `load(...).compare(prompts, responses)` → logits, float32 [n, K, K].

    `path` is a directory in either published layout or a name on the hub, whose commit `pinned` may give. torch starts
    a process and returns at once; jax looks at the files alone, and takes devices (`mesh`, default all) when first
    asked; llm_blender runs the original package with the interpreter `python`. `threads`: CPU threads of a process
    (default: all that this one may use). `dtype`: auto, float32 or bfloat16, of the matrix products. Close the judge,
    or use it as a context manager. Raises BadInput for an unknown backend or files that are not a PairRM's.
    """
    if backend not in BACKENDS:
        raise BadInput(f"PairRM backend {backend!r} is unknown; choose one of: {', '.join(BACKENDS)}")
    checkpoint = files.fetch(str(names.resolve(str(path))), pinned=pinned or {}, tell=tell)
    if backend == "jax":
        from sppo_jax.pairrm.mesh_judge import JaxJudge

        return JaxJudge(checkpoint, mesh=mesh, limits=limits, dtype=dtype)
    if backend == "llm_blender":
        from sppo_jax.pairrm import llm_blender

        command = llm_blender.command(python, checkpoint, threads, limits)
        patience = Patience(stall=7200)  # one pair at a time, in float32 where there is no GPU
        return SidecarJudge(
            checkpoint, threads=threads, command=command, name="llm-blender", patience=patience, tell=tell
        )
    return SidecarJudge(checkpoint, threads=threads, limits=limits, dtype=dtype, tell=tell)
