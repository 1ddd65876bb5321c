"""How the scoring process is started: its command, its environment, and the number of its CPU threads."""

import contextlib
import os
import sys
from pathlib import Path

from sppo_jax.pairrm import files
from sppo_jax.pairrm.format import Limits

_CGROUP = Path("/sys/fs/cgroup")


def sidecar_command(checkpoint: files.Checkpoint, threads: int, limits: Limits, dtype: str) -> list[str]:
    """Return the command that starts the sidecar for a checkpoint."""
    command = [sys.executable, "-P", "-m", "sppo_jax.pairrm.sidecar"]
    command += ["--path", str(checkpoint.directory.resolve()), "--threads", str(threads), "--dtype", dtype]
    command += ["--source", str(limits.source), "--candidate", str(limits.candidate)]
    command += ["--total", str(limits.total)]
    if checkpoint.backbone is not None:
        command += ["--backbone", str(checkpoint.backbone.resolve())]
    return command


def environment(threads: int) -> dict[str, str]:
    """Return our environment without the variables that configure accelerators; CUDA_VISIBLE_DEVICES stays.

    PYTHONPATH begins with the folder of this package, so that a source checkout works too.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "XLA_", "LIBTPU_", "JAX_"))}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    env["JAX_PLATFORMS"] = "cpu"
    env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    env["TOKENIZERS_PARALLELISM"] = "false"
    # Waiting threads should give up their core soon: where another process needs it, long spinning is ten times slower.
    env.setdefault("GOMP_SPINCOUNT", "1000")
    return env


def available_cpus() -> int:
    """Return the number of CPUs that this process may use: its affinity, or a container's quota if that is less."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for parts in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            quota, period = map(int, " ".join((_CGROUP / file).read_text() for file in parts).split())
            if quota > 0:
                ours = min(ours, -(-quota // period))
    return ours
