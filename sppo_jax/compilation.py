"""Keeps compiled programs on disk, so that the second run of a command starts at once, and frees the compiler's memory."""

import ctypes
import os
import sys
from pathlib import Path

import jax

LARGEST = 4 * 2**30  # bytes on disk; the programs used longest ago are deleted first


def keep_programs() -> None:
    """Use JAX's persistent cache, in ~/.cache/sppo_jax/programs unless JAX_COMPILATION_CACHE_DIR names another folder.

    Call it before anything is compiled. A cache that cannot be written costs a warning and nothing else.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", str(caches / "sppo_jax" / "programs"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def return_memory() -> None:
    """Return to the system the memory that the C library keeps free after compiling on a CPU, some 0.1 GB per program.

    Only glibc keeps it, and has a call for this; with another C library nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
