"""Processes of a pod that share a run directory: which process makes which shard, and how they agree."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def mine(i: int) -> bool:
    """Whether this process makes shard i: shards go to the processes in turn."""
    return i % jax.process_count() == jax.process_index()


def wait_for_all(name: str) -> None:
    """Block until every process of the pod has called this with the same `name`; their shards are on disk then."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def anywhere(true: bool) -> bool:
    """Whether `true` holds in any process of the pod. All processes call this together."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.asarray(true)).any())


def as_first_says(chosen: Sequence[int], among: int) -> list[int]:
    """Process 0's choice of numbers below `among`, returned in every process. All processes call this together."""
    mask = np.isin(np.arange(among), chosen)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(mask)).tolist()
