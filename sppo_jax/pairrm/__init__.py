"""PairRM, the preference model of stage 2: (prompt, two responses) → the logit that the first response is better.

The judge stage needs `load` alone. Importing this package is cheap: PyTorch is imported in the sidecar process only, and
the network in JAX only for the backend "jax".
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_jax.command import say
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
    tell: Callable[[str], None] = say,
) -> "SidecarJudge | JaxJudge":
    """Open a PairRM; `load(...).compare(prompts, responses)` returns logits, float32 [n, K, K].

    `path` is `embedded:NAME`, a directory in either published layout, or `owner/repo[@revision]` on the hub; `pinned`
    maps repositories to the commits to use. Backends: "torch" starts a process and returns at once; "jax" reads only the
    files' headers now, and uses the devices of `mesh` (default: all) from the first comparison on; "llm_blender" runs the
    original package with the interpreter `python`. `threads` is the number of CPU threads of the process (default: all
    available), `dtype` that of the matrix products: auto, float32 or bfloat16. `tell` receives lines for people.
    Close the judge, or use it as a context manager. Raises BadInput for an unknown backend, and as `files.fetch` does.
    """
    if backend not in BACKENDS:
        raise BadInput(f"PairRM backend {backend!r} is unknown; choose one of: {', '.join(BACKENDS)}")
    checkpoint = files.fetch(str(names.resolve(str(path))), pinned=pinned or {}, tell=tell)
    if backend == "jax":
        from sppo_jax.pairrm.mesh_judge import JaxJudge

        return JaxJudge(checkpoint, mesh=mesh, limits=limits, dtype=dtype)
    if backend == "llm_blender":
        from sppo_jax.pairrm import llm_blender

        return SidecarJudge(
            checkpoint,
            threads=threads,
            command=llm_blender.command(python, checkpoint, threads, limits),
            name="llm-blender",
            # It scores one pair at a time, in float32 where there is no GPU.
            patience=Patience(stall=7200),
            tell=tell,
        )
    return SidecarJudge(checkpoint, threads=threads, limits=limits, dtype=dtype, tell=tell)
