"""Between a stage and the disk: its shards, whole or absent, and the rows of one that is still being made.

Rows come one by one and in any order. Each stands at once as a line of JSON in a hidden file beside its shard, so that
a process that is killed loses none; the shard is written, and the lines deleted, when the last one is there. On a pod the
directory is shared, and shard i belongs to process i modulo their number.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic

import jax
import numpy as np
from jax.experimental import multihost_utils

from sppo_jax import records
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.records import Record
from sppo_jax.run.directory import RunDir, shard_ranges

Kept = tuple[Record, dict[str, float]]  # a row, and figures that belong to the making of it


class Shards(Generic[Record]):
    """The shards of one stage in one iteration: `ranges` of the prompts' numbers, and those that are `missing`."""

    def __init__(
        self,
        run: RunDir,
        iteration: int,
        stage: str,
        kind: type[Record],
        prompts: int,
        shard_prompts: int,
        made_from: dict[str, str],
    ):
        self.ranges = shard_ranges(prompts, shard_prompts)
        self.paths = [run.shard(iteration, stage, i, len(self.ranges)) for i in range(len(self.ranges))]
        self.missing = [i for i, path in enumerate(self.paths) if not path.exists()]
        self._kind: type[Record] = kind
        self._size, self._made_from = shard_prompts, made_from
        for i in set(range(len(self.ranges))) - set(self.missing):  # a crash came between shard and lines
            self._lines(i).unlink(missing_ok=True)

    def holding(self, n: int) -> int:
        """The shard of prompt n."""
        return n // self._size

    def read(self, i: int, also_from: Mapping[str, str] = {}) -> list[Record]:
        """Rows of shard i, in order. Raises BadInput if it is damaged, or made from something else."""
        return records.read(self.paths[i], self._kind, {**self._made_from, **also_from})

    def write(self, i: int, rows: Sequence[Record], also_from: Mapping[str, str] = {}) -> None:
        """Shard i, whole."""
        with replacing(self.paths[i]) as part:
            records.write(part, self._kind, rows, {**self._made_from, **also_from})
        self._lines(i).unlink(missing_ok=True)

    def keep(self, i: int, key: str, row: Record, facts: Mapping[str, float] = {}) -> None:
        """Row of shard i, for `kept` of whoever comes after us. Floats survive to the last bit."""
        path = self._lines(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": key, "made_from": self._made_from, "facts": dict(facts), "row": asdict(row)}
        text = json.dumps(line)  # ASCII
        with path.open("a") as file:
            file.write(f"\n{text}\n")  # begun anew: the last line may have been cut by a crash

    def kept(self, i: int) -> dict[str, Kept[Record]]:
        """By key, the rows of a shard that is not whole; lines cut by a crash are left out.

        Raises BadInput if they are made from something else.
        """
        path, found = self._lines(i), dict[str, Kept[Record]]()
        for text in path.read_text(errors="replace").split("\n") if path.exists() else []:
            if (line := _parsed(text)) is None:
                continue
            if other := sorted(k for k, v in self._made_from.items() if line["made_from"].get(k) != v):
                raise BadInput(
                    f"{path}: was made from another {' and '.join(other)}; choose another --out, or delete it"
                )
            found[line["key"]] = self._kind(**line["row"]), line["facts"]
        return found

    def _lines(self, i: int) -> Path:
        return self.paths[i].with_name(f".{self.paths[i].stem}.partial.jsonl")


def mine(i: int) -> bool:
    """Whether shard i is this process's to make."""
    return i % jax.process_count() == jax.process_index()


def wait_for_all(name: str) -> None:
    """Until every process of the pod is here and its shards are on disk."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def anywhere(true: bool) -> bool:
    """Whether it is true in any process of the pod; all ask together."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.asarray(true)).any())


def as_first_says(chosen: Sequence[int], among: int) -> list[int]:
    """Process 0's choice of the numbers below `among`, in every process; all ask together."""
    mask = np.isin(np.arange(among), chosen)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(mask)).tolist()


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
