"""Places where nothing can be written: errors of the system for chosen paths, and real file systems that are full or read-only."""

import builtins
import contextlib
import errno
import fnmatch
import io
import os
import resource
import subprocess

import pytest

ERRORS = {
    "no space": errno.ENOSPC,
    "no quota": errno.EDQUOT,
    "no permission": errno.EACCES,
    "read-only": errno.EROFS,
    "I/O error": errno.EIO,
    "too large": errno.EFBIG,
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@contextlib.contextmanager
def refusing(pattern, number, after=None):
    """The system refuses to write every path that matches `pattern`. Yields the list of paths that were refused.

    With `after`, a file opens, takes so many bytes of the first write, and refuses the rest.
    """
    refused, half = [], {}
    plain = {name: getattr(os, name) for name in ("open", "write", "replace", "mkdir")}
    plain_open = io.open

    def check(path):
        if isinstance(path, str | os.PathLike) and fnmatch.fnmatch(os.fspath(path), pattern):
            refused.append(os.fspath(path))
            raise OSError(number, os.strerror(number), os.fspath(path))

    def os_open(path, flags, *args, **options):
        writes = flags & WRITES
        if writes and after is None:
            check(path)
        file = plain["open"](path, flags, *args, **options)
        if writes and fnmatch.fnmatch(os.fspath(path), pattern):
            half[file] = os.fspath(path)
        else:
            half.pop(file, None)
        return file

    def write(file, data):
        if file not in half or after is None:
            return plain["write"](file, data)
        if half[file] in refused:
            raise OSError(number, os.strerror(number))
        refused.append(half[file])
        return plain["write"](file, data[:after])

    def open_(path, mode="r", *args, **options):
        if set(mode) & set("wax+"):
            check(path)
        return plain_open(path, mode, *args, **options)

    def replace(source, target, **options):
        check(target)
        return plain["replace"](source, target, **options)

    def mkdir(path, *args, **options):
        check(path)
        return plain["mkdir"](path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in (("open", os_open), ("write", write), ("replace", replace), ("mkdir", mkdir)):
            patch.setattr(os, name, stand_in)
        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        yield refused


@contextlib.contextmanager
def files_no_larger_than(size):
    """No file of this process may grow beyond `size` bytes, as under `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(directory, options):
    """A file system in memory at `directory`. Skips the test where mounting is not allowed. Yields a function that remounts it."""
    directory.mkdir(exist_ok=True)

    def mount(words):
        return subprocess.run(["mount", *words, str(directory)], capture_output=True, text=True)

    try:
        done = mount(["-t", "tmpfs", "-o", options, "none"])
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield lambda other: mount(["-o", f"remount,{other}"])
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
