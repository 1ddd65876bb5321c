"""The run directory: where each file lives, what "complete" means, and whose directory it is.

A file exists under its final name only when it is whole: it is written beside it, synced and renamed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sppo_jax import config as configuration
from sppo_jax.config import Config
from sppo_jax.errors import BadInput

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
        return self.root / f"iter_{t}"

    def shard(self, t: int, stage: str, index: int, count: int) -> Path:
        return self.iteration(t) / stage / f"shard-{index:05d}-of-{count:05d}.parquet"

    def pairs(self, t: int) -> Path:
        return self.iteration(t) / "pairs.parquet"

    def heldout(self, t: int, kind: str) -> Path:
        """Of the policy after iteration t: `responses`, and for the probe `probe` and `probe_preferences`."""
        return self.iteration(t) / "heldout" / f"{kind}.parquet"

    def checkpoints(self, t: int) -> Path:
        return self.iteration(t) / "checkpoints"

    def export(self, t: int) -> Path:
        return self.iteration(t) / "export"

    def adapter(self, t: int) -> Path:
        """PEFT's directory of the adapters after iteration t, beside the frozen base."""
        return self.iteration(t) / "adapter"

    def evaluation(self, t: int) -> Path:
        return self.iteration(t) / "eval.json"

    def iterations(self) -> list[int]:
        """Iterations that have begun, in order."""
        found = (p.name.removeprefix("iter_") for p in self.root.glob("iter_*"))
        return sorted(int(name) for name in found if name.isdigit())


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
            if [p.name for p in run.root.iterdir()] == [LOCK]:  # nothing was begun: leave nothing
                _remove(run.root)
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on success what was written there (file or directory) becomes `path`.

    A directory takes the place of one that is there; a file never takes a directory's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _part(path)
    _remove(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _sync(file)
        if path.is_dir() and temporary.is_dir():
            _remove(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def shard_ranges(total: int, size: int) -> list[range]:
    """[0, total) cut into consecutive ranges of `size`, the last one shorter: each index exactly once."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def sha256(paths: list[Path]) -> str:
    """One digest over the names and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def claim(run: RunDir, config: Config) -> None:
    """Write the resolved configuration; from here on OUT is this configuration's. For when all inputs are known good."""
    with replacing(run.config) as part:
        part.write_text(configuration.dump(config), encoding="utf-8")


def _check(run: RunDir, config: Config) -> None:
    if run.config.exists():
        before = configuration.load([run.config])
        if changed := configuration.changed_keys(before, config):
            old, new = configuration.flat(before), configuration.flat(config)
            shown = ", ".join(f"{k} ({old[k]} there, {new[k]} now)" for k in changed)
            raise BadInput(
                f"--out {config.out} belongs to another configuration: {shown}; choose another --out"
            )
    elif others := [p.name for p in run.root.iterdir() if p.name not in (LOCK, _part(run.config).name)]:
        raise BadInput(
            f"--out {config.out} holds {min(others)} and is no run directory; choose another --out"
        )


@contextlib.contextmanager
def _held(file: TextIO) -> Iterator[None]:
    """Locked while the process lives, whatever ends it; the text inside is for people."""
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


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
