"""The shards of a stage on disk, whole or absent, and the rows of a shard that is still being made.

Rows come one by one and in any order. Each is appended at once as a line of JSON to a hidden file beside its shard, so
that a killed process loses none. With the last row the shard is written and the hidden file deleted. Several processes
share the directory, and each shard is dealt to one of them, anew at each start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Generic

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Record
from sppo_jax.run import pod
from sppo_jax.run.directory import partial, shard_ranges
from sppo_jax.run.stage import Stage, visible

# A row, and figures about its making, such as seconds.
KeptRow = tuple[Record, dict[str, float]]


class Shards(Generic[Record]):
    """The shards of one stage in one iteration: `ranges` of prompt numbers, and the indices of shards `missing` on disk.

    `own`: those of the missing ones that this process makes. All processes of the run make this object together.
    """

    def __init__(self, stage: Stage, name: str, kind: type[Record], prompts: int, source: str = ""):
        """`name`: the folder of the shards; `prompts`: their number over all shards.

        `source`: the folder of the shards from which these are made. A process that makes one there makes the same one here.
        """
        self.ranges = shard_ranges(prompts, stage.shard_prompts)

        def paths(folder: str) -> list[Path]:
            count = len(self.ranges)
            return [stage.run.shard(stage.iteration, folder, i, count) for i in range(count)]

        def absent(folder: str) -> list[int]:
            return [i for i, path in enumerate(paths(folder)) if not files.exists(path)]

        self.paths = paths(name)
        self.missing = pod.agreed(f"missing {name}", lambda: absent(name))
        first = pod.agreed(f"missing {source}", lambda: absent(source)) if source else []
        order = sorted(self.missing, key=lambda i: (i not in first, i))
        self.own = set(pod.dealt(order))
        self._kind: type[Record] = kind
        self._size, self._made_from = stage.shard_prompts, stage.made_from
        for i in set(range(len(self.ranges))) - set(self.missing) if pod.first() else ():
            # A crash after the shard was written and before its rows' file was deleted leaves both.
            self._forget(i)

    def holding(self, n: int) -> int:
        """Index of the shard that holds prompt n."""
        return n // self._size

    def read(self, i: int, also_from: Mapping[str, str] = {}) -> list[Record]:
        """Rows of shard i, in order. Raises BadInput if it is damaged, or was made from something else."""
        visible(self.paths[i])
        return records.read(self.paths[i], self._kind, {**self._made_from, **also_from})

    def write(self, i: int, rows: Sequence[Record], also_from: Mapping[str, str] = {}) -> None:
        """Write shard i, whole, and delete the lines of its single rows."""
        records.replace(self.paths[i], self._kind, rows, {**self._made_from, **also_from})
        self._forget(i)

    def keep(self, i: int, key: str, row: Record, facts: Mapping[str, float] = {}) -> None:
        """Append a row of shard i to its hidden file, from which `kept` reads it back, floats to the last bit."""
        path = self._lines(i)
        line = {"key": key, "made_from": self._made_from, "facts": dict(facts), "row": asdict(row)}
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # On a line of its own: a crash may have cut the line before.
        files.append(path, f"\n{json.dumps(line)}\n".encode())

    def kept(self, i: int) -> dict[str, KeptRow[Record]]:
        """{key: row and facts} of a shard that is not complete; lines cut by a crash are left out.

        Raises BadInput if they were made from something else.
        """
        path, found = self._lines(i), dict[str, KeptRow[Record]]()
        try:
            text = path.read_text(errors="replace") if files.exists(path) else ""
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}; delete it and run again") from None
        for line in text.split("\n"):
            try:
                match json.loads(line):
                    case {
                        "key": str(key),
                        "made_from": dict(made_from),
                        "row": dict(row),
                        "facts": dict(facts),
                    }:
                        kept = self._kind(**row), facts
                    case _:
                        continue
            except (ValueError, TypeError, RecursionError):  # not JSON, or a row with other columns
                continue
            records.check_made_from(path, self._kind, made_from, self._made_from)
            found[key] = kept
        return found

    def _forget(self, i: int) -> None:
        """Delete the lines of a shard that is complete."""
        path = self._lines(i)
        with files.writing(path):
            path.unlink(missing_ok=True)

    def _lines(self, i: int) -> Path:
        return partial(self.paths[i])
