"""Moments at which a run is killed, before and after a file or directory gets its final name, and what is on disk then."""

import contextlib
import errno
import fnmatch
import os
import shutil
import signal
import sys
from pathlib import Path

from tests.faults import refusing

# The same however a run was interrupted; the rest has times in it.
COMPARED = [
    "iter_*/responses/*", "iter_*/preferences/*", "iter_*/heldout/*", "iter_*/pairs.parquet", "iter_*/eval.json",
    "iter_*/export/*.safetensors",
]  # fmt: skip

FAULTS = contextlib.ExitStack()  # of this process, to its end


def watch(root, at):
    """Call `at(path below root, "before" or "after")` around each rename to a final name there. Returns a function that ends it."""
    plain = {name: getattr(os, name) for name in ("replace", "rename")}

    def watched(name):
        def rename(source, target, **options):
            path = Path(os.fspath(target))
            final = path.is_relative_to(root) and not path.name.startswith(".")
            if final:
                at(path.relative_to(root).as_posix(), "before")
            plain[name](source, target, **options)
            if final:
                at(path.relative_to(root).as_posix(), "after")

        return rename

    for name in plain:
        setattr(os, name, watched(name))
    return lambda: [setattr(os, name, function) for name, function in plain.items()]


def kill_at(root, pattern, when, number=signal.SIGKILL):
    """Send this process a signal before or after the first path below `root` that matches `pattern` gets its name."""

    def at(path, moment):
        if fnmatch.fnmatch(path, pattern) and moment == when:
            os.kill(os.getpid(), number)

    watch(root, at)


def no_room(root, pattern):
    """The disk is full for what this process writes below `root` with a path that matches `pattern`."""
    FAULTS.enter_context(refusing(f"{root}/{pattern}", errno.ENOSPC))


def contents(out):
    """Return {path: bytes} of what is compared."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for pattern in COMPARED
        for path in sorted(out.glob(pattern))
    }


def copy(source, target):
    """Copy a directory that is being written to.

    In the order of the names: what was made of other files is copied before these are.
    """
    target.mkdir(parents=True)
    for name in sorted(os.listdir(source)):
        try:
            if (source / name).is_dir():
                copy(source / name, target / name)
            else:
                shutil.copyfile(source / name, target / name)
        except FileNotFoundError:  # removed meanwhile
            continue


def judged_by(program, plan):
    """The judge's process of this process is `program` (tests/faulty_sidecar.py) with this plan of faults."""
    from sppo_jax.pairrm import launch

    launch.sidecar_command = lambda *_: [sys.executable, program, plan, "stand-in"]
