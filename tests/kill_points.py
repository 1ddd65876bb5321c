"""Moments at which a run is killed: before and after a file or directory gets its final name."""

import errno
import os
import signal
from pathlib import Path

from tests.faults import refusing


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


def kill_at(root, name, when):
    """Kill this process before or after the path `name` below `root` gets its name."""

    def at(path, moment):
        if (path, moment) == (name, when):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(root, at)


def no_room(root, pattern):
    """The disk is full for what this process writes below `root` with a path that matches `pattern`."""
    refusing(f"{root}/{pattern}", errno.ENOSPC).__enter__()
