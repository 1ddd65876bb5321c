"""The run directory: the path of each file, and the claim of one process and one configuration on it.

A file exists under its final name only when it is complete (`sppo_jax.files.replacing`).
"""

import contextlib
import dataclasses
import errno
import fcntl
import io
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sppo_jax import command, config_file, files
from sppo_jax import config as configuration
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.run import bucket, pod
from sppo_jax.settings import mapping, resuming

LOCK = ".lock"
FOREIGN = ("lost+found",)  # what a file system itself puts into its top directory
# Errors of a lock that another process holds. Others mean that the file system has no locks.
IN_USE = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
MARK_SECONDS = 5  # in which a file of another process must be seen
BASE = 0  # iteration number of the untouched base policy


class RunDir:
    """Paths below OUT; of a bucket, below its local copy."""

    def __init__(self, root: str | Path):
        self.root, self._checkpoints = bucket.local(root), bucket.checkpoints(root)
        self.config = self.root / "config.yaml"
        self.manifest = self.root / "manifest.json"
        self.metrics = self.root / "metrics.jsonl"
        self.report = self.root / "report.html"
        self.tensorboard = self.root / "tensorboard"
        self.tracked = self.root / "tracked.json"
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

    def checkpoints(self, t: int) -> Path | epath.Path:
        """The directory of orbax checkpoints of iteration t's training. In a bucket it may have no local copy."""
        return self._checkpoints / f"iter_{t}" / "checkpoints"

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
        found = (name.removeprefix("iter_") for name in files.entries(self.root) if name.startswith("iter_"))
        return sorted(
            int(name) for name in found if name.isascii() and name.isdigit() and str(int(name)) == name
        )


@contextlib.contextmanager
def opened(config: Config) -> Iterator[RunDir]:
    """Claim OUT for this process, and all others of the run, and this configuration.

    Raises BadInput if another run holds it, if it was made with a configuration whose results differ, if it cannot be
    written, or if the processes see different directories under its name. A run that does not begin leaves nothing of its
    own, and everything else.
    """
    pod.same("configuration", _shared_knobs(config), "{key} =")
    with _claimed(config) if pod.first() else contextlib.nullcontext(RunDir(config.out)) as run:
        _check_seen(run, config)
        yield run


@contextlib.contextmanager
def _claimed(config: Config) -> Iterator[RunDir]:
    """Claim OUT for this process, which writes there for all."""
    run = RunDir(config.out)
    made: list[Path] = []  # by us, in this order
    try:
        _make(run.root, config.out, made)
        _check(run, config)
        path = run.root / LOCK
        new = not files.exists(path)
        with files.writing(path):
            lock = path.open("a+b", buffering=0)
        with held(lock):
            made += [path] if new else []
            yield run
    except BaseException:
        # The error goes on, whatever becomes of this. A run that has begun has files of its own in OUT, and stays.
        with contextlib.suppress(OSError, BadInput):
            if not set(files.entries(run.root)) - {LOCK, *FOREIGN}:
                for path in reversed(made):
                    path.unlink() if path.name == LOCK else path.rmdir()
        raise


def _shared_knobs(config: Config) -> dict[str, object]:
    """The knobs that all processes of a run have in common."""
    return {k: v for k, v in configuration.flat(config).items() if not k.startswith("distributed.")}


def _check_seen(run: RunDir, config: Config) -> None:
    """Raise BadInput, in every process, unless all of them see the same directory: each leaves a mark, process 0 looks."""
    if pod.count() == 1:
        return
    if bucket.is_url(config.out):  # the same name is the same place
        pod.meet("seen")  # after which all have what process 0 has sent
        return
    token = pod.agreed("token", lambda: secrets.token_hex(8))
    marks = [run.root / f".{token}-{i}" for i in range(pod.count())]
    with contextlib.suppress(OSError):
        marks[pod.index()].touch()
    hosts = pod.gathered("hosts", socket.gethostname())
    unseen = pod.agreed("seen", lambda: _unseen(marks))
    with contextlib.suppress(OSError):
        marks[pod.index()].unlink()
    pod.meet("seen")
    if unseen:
        i = unseen[0]
        raise BadInput(
            f"--out {config.out}: process {i} on {hosts[i]} sees another directory there than process 0 on {hosts[0]}; choose "
            "one on a file system that all hosts share"
        )


def _unseen(marks: list[Path]) -> list[int]:
    """The numbers of the marks that do not appear within a few seconds."""
    deadline = time.monotonic() + MARK_SECONDS
    while True:
        names = files.entries(marks[0].parent)
        missing = [i for i, mark in enumerate(marks) if mark.name not in names]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def shard_ranges(total: int, size: int) -> list[range]:
    """Cut [0, total) into consecutive ranges of `size`, the last one possibly shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def partial(shard: Path) -> Path:
    """The hidden file with the rows of a shard that is not whole yet."""
    return shard.with_name(f".{shard.stem}.partial.jsonl")


def claim(run: RunDir, config: Config) -> None:
    """Write the resolved configuration, which claims OUT for it. To be called once every input has been checked."""
    # Not which process this is.
    shared = dataclasses.replace(config, distributed=configuration.Distributed())
    with replacing(run.config) as part:
        part.write_text(config_file.dump(shared), encoding="utf-8")


def _make(root: Path, out: str, made: list[Path]) -> None:
    """Make a directory and those above it that are missing; the ones made are added to `made`. Raises BadInput."""
    try:
        out.encode()  # it goes into config.yaml
        try:
            missing = [path for path in (root, *root.parents) if not files.exists(path)]
        except BadInput as error:
            raise BadInput(f"--out {error}; choose another directory") from None
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
    except FileExistsError:
        if not files.is_dir(root):
            raise BadInput(
                f"--out {out}: a link to nothing is in the way; choose another directory"
            ) from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if not os.path.isabs(out) and files.working_directory_gone():
            reason = "the working directory was deleted; go to another one"
        raise BadInput(f"--out {out}: cannot be made: {reason}") from None
    except UnicodeEncodeError:
        raise BadInput(f"--out {out!r}: not a possible name; choose one that is text") from None
    if not files.is_dir(root):
        raise BadInput(f"--out {out}: a file is in the way; choose another directory")


def _check(run: RunDir, config: Config) -> None:
    if files.exists(run.config):
        before = config_file.load([run.config])
        if changed := resuming.changed_keys(before, config):
            old, new = configuration.flat(before), configuration.flat(config)
            shown = ", ".join(f"{k} ({_shown(old[k])} there, {_shown(new[k])} now)" for k in changed)
            raise BadInput(
                f"--out {config.out} belongs to another configuration: {shown}; choose another --out"
            )
    elif others := set(files.entries(run.root)) - {LOCK, files.part_of(run.config).name, *FOREIGN}:
        raise BadInput(
            f"--out {config.out} holds {min(others)} and is not a run directory; choose another --out"
        )


def _shown(value: object) -> str:
    """Return a value as a line shows it: an empty text in quotes."""
    return mapping.written(value) if isinstance(value, dict) else str(value) or "''"


@contextlib.contextmanager
def held(file: io.FileIO) -> Iterator[None]:
    """Hold the lock on `file` until the process ends, however it ends. The text inside is for people."""
    path = Path(str(file.name))
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in IN_USE:
                with contextlib.suppress(OSError):
                    file.seek(0)
                    holder = file.read(200).decode(errors="replace").strip()
                    raise BadInput(f"{path.parent} is in use by {holder or 'another process'}") from None
                raise BadInput(f"{path.parent} is in use by another process") from None
            command.say(
                f"warning: {path} cannot be locked ({error.strerror}), as on some network file systems: nothing stops a "
                "second run from writing into the same --out"
            )
        with contextlib.suppress(OSError):  # on a full disk a finished run can still be printed
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
