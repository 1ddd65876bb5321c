"""The run directory: the path of each file, and the claim of one process and one configuration on it.

A file exists under its final name only when it is complete (`sppo_jax.files.replacing`).
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sppo_jax import config as configuration
from sppo_jax import config_file
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.files import part_of, remove, replacing

LOCK = ".lock"
BASE = 0  # iteration number of the untouched base policy


class RunDir:
    """Paths below OUT."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.manifest = self.root / "manifest.json"
        self.metrics = self.root / "metrics.jsonl"
        self.report = self.root / "report.html"
        self.tensorboard = self.root / "tensorboard"
        self.profile = self.root / "profile"

    def iteration(self, t: int) -> Path:
        """The directory of iteration t."""
        return self.root / f"iter_{t}"

    def shard(self, t: int, stage: str, index: int, count: int) -> Path:
        """The file of shard `index` of `count`, in the folder `stage`."""
        return self.iteration(t) / stage / f"shard-{index:05d}-of-{count:05d}.parquet"

    def pairs(self, t: int) -> Path:
        """The pairs that iteration t trains on."""
        return self.iteration(t) / "pairs.parquet"

    def heldout(self, t: int, kind: str) -> Path:
        """A held-out file of iteration t: `responses` of its new policy, or the `probe` of its reference."""
        return self.iteration(t) / "heldout" / f"{kind}.parquet"

    def checkpoints(self, t: int) -> Path:
        """The directory of orbax checkpoints of iteration t's training."""
        return self.iteration(t) / "checkpoints"

    def export(self, t: int) -> Path:
        """The Hugging Face directory of the policy after iteration t."""
        return self.iteration(t) / "export"

    def adapter(self, t: int) -> Path:
        """The PEFT directory with the adapters after iteration t."""
        return self.iteration(t) / "adapter"

    def evaluation(self, t: int) -> Path:
        """The measurements of the policy after iteration t."""
        return self.iteration(t) / "eval.json"

    def iterations(self) -> list[int]:
        """Iterations that have begun, in order."""
        found = (p.name.removeprefix("iter_") for p in self.root.glob("iter_*"))
        return sorted(
            int(name) for name in found if name.isascii() and name.isdigit() and str(int(name)) == name
        )


@contextlib.contextmanager
def opened(config: Config) -> Iterator[RunDir]:
    """Claim OUT for this process and this configuration.

    Raises BadInput if another process holds it, if it was made with a configuration whose results differ, or
    if it cannot be written.
    """
    run = RunDir(config.out)
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        _check(run, config)
        lock = (run.root / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {config.out}: {error.strerror}: {error.filename}") from None
    with _held(lock):
        try:
            yield run
        except BaseException:
            if [p.name for p in run.root.iterdir()] == [LOCK]:  # the run did not begin: leave no directory
                remove(run.root)
            raise


def shard_ranges(total: int, size: int) -> list[range]:
    """Cut [0, total) into consecutive ranges of `size`, the last one possibly shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def claim(run: RunDir, config: Config) -> None:
    """Write the resolved configuration, which claims OUT for it. To be called once every input has been checked."""
    with replacing(run.config) as part:
        part.write_text(config_file.dump(config), encoding="utf-8")


def _check(run: RunDir, config: Config) -> None:
    if run.config.exists():
        before = config_file.load([run.config])
        if changed := configuration.changed_keys(before, config):
            old, new = configuration.flat(before), configuration.flat(config)
            shown = ", ".join(f"{k} ({old[k]} there, {new[k]} now)" for k in changed)
            raise BadInput(
                f"--out {config.out} belongs to another configuration: {shown}; choose another --out"
            )
    elif others := [p.name for p in run.root.iterdir() if p.name not in (LOCK, part_of(run.config).name)]:
        raise BadInput(
            f"--out {config.out} holds {min(others)} and is not a run directory; choose another --out"
        )


@contextlib.contextmanager
def _held(file: TextIO) -> Iterator[None]:
    """Hold the lock on `file` until the process ends, however it ends. The text inside is for people."""
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BadInput(f"{Path(file.name).parent} is in use by {holder}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
