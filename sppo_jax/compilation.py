"""Keeps compiled programs on disk, so that the second run of a command starts at once, and frees memory that nobody uses."""

import contextlib
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sppo_jax import command, files
from sppo_jax.errors import one_line

LARGEST = 4 * 2**30  # bytes on disk; the programs used longest ago are deleted first
WITHOUT = "programs are compiled again in each run"


def keep_programs() -> None:
    """Use JAX's persistent cache, in ~/.cache/sppo_jax/programs unless JAX_COMPILATION_CACHE_DIR names another folder.

    Call it before anything is compiled. A cache that cannot be used, or that fails later, costs one line and nothing else.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        caches = files.caches()
        if caches is None:
            _switch_off("no home directory is known, and XDG_CACHE_HOME names no absolute path")
            return
        jax.config.update("jax_compilation_cache_dir", str(caches / "sppo_jax" / "programs"))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
    folder = str(jax.config.values["jax_compilation_cache_dir"])
    if "://" not in folder and (reason := _refusal(Path(folder))):
        _switch_off(f"{folder}: {reason}")
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _guard()


def collect() -> None:
    """Free the memory of arrays that are gone. jax on a CPU uses NumPy's memory without a copy, and lets go of it only here."""
    gc.collect()
    return_memory()


def return_memory() -> None:
    """Return to the system the memory that the C library keeps free after compiling on a CPU, some 0.1 GB per program.

    Only glibc keeps it, and has a call for this; with another C library nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _refusal(folder: Path) -> str:
    """The reason why nothing can be written into `folder`, which is made if need be; "" where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or one_line(error)
    return ""


def _switch_off(reason: str) -> None:
    """Compile without the cache from now on, and print why."""
    jax.config.update("jax_enable_compilation_cache", False)
    command.say(f"no cache of compiled programs ({reason}); {WITHOUT}")


def _guard() -> None:
    """Make the cache's first failure print one line and end its use. JAX warns once per program, and keeps torn entries."""
    try:
        from jax._src.lru_cache import LRUCache
    except ImportError:  # a later JAX, whose warnings are then seen
        return
    if not getattr(LRUCache.put, "guarded", False):
        failed: list[bool] = []
        for name in ("get", "put"):
            setattr(LRUCache, name, _guarded(getattr(LRUCache, name), failed))


def _guarded(use: Callable[..., Any], failed: list[bool]) -> Callable[..., Any]:
    """`use`, a method of JAX's cache, which returns None, as for a program that is not there, from the first failure on."""

    def guarded(cache: Any, key: str, *value: bytes) -> Any:
        if failed:
            return None
        try:
            return use(cache, key, *value)
        except Exception as error:  # of the file system, or of the lock beside the files
            failed.append(True)
            if value:  # what is left of an entry would be read by the next run
                for suffix in ("-cache", "-atime"):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(str(cache.path), key + suffix))
            reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
            command.say(f"no cache of compiled programs from now on ({cache.path}: {reason}); {WITHOUT}")
            return None

    guarded.guarded = True  # type: ignore[attr-defined]
    return guarded
