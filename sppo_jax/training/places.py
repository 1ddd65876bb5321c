"""Directories of checkpoints, on a disk or in a bucket, where nothing is renamed at once and orbax marks what is whole."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from etils import epath

from sppo_jax import files
from sppo_jax.errors import BadInput, one_line

NUMBER = re.compile("0|[1-9][0-9]*")
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of what is being written, on a disk
WHOLE = "commit_success.txt"  # in a bucket: orbax writes it last
Place: TypeAlias = Path | epath.Path


def absolute(directory: Place) -> Place:
    """`directory` as orbax wants it."""
    return Path(os.path.abspath(directory)) if isinstance(directory, Path) else directory


def steps(directory: Place) -> list[int]:
    """The steps whose checkpoints are whole, in order. Raises BadInput where the directory cannot be read."""
    found = (name for name in _names(directory) if NUMBER.fullmatch(name))
    if isinstance(directory, Path):
        return sorted(map(int, found))
    with changing(directory):
        return sorted(int(name) for name in found if (directory / name / WHOLE).exists())


def tidy(directory: Place, end: str = UNFINISHED) -> None:
    """Delete what is named like a step with `end`: by default what a write that was cut off has left.

    Other names may be anyone's.
    """
    for name in _names(directory):
        step, found, _ = name.partition(end)
        if found and NUMBER.fullmatch(step):
            remove(directory / name)
    if not isinstance(directory, Path):
        whole = steps(directory)
        for name in _names(directory):
            if NUMBER.fullmatch(name) and int(name) not in whole:
                remove(directory / name)


def remove(path: Place) -> None:
    """Delete a checkpoint, or a link to one."""
    if not isinstance(path, Path):
        (path / WHOLE).unlink(missing_ok=True)  # first: what is left of it then does not count
        path.rmtree(missing_ok=True)
    elif path.is_symlink():
        path.unlink()
    else:
        files.remove(path)


@contextlib.contextmanager
def changing(directory: Place) -> Iterator[None]:
    """Turn the errors of reading or changing a directory into BadInput with one line."""
    if isinstance(directory, Path):
        with files.writing(directory):
            yield
        return
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # of the bucket, which are of many kinds
        raise BadInput(f"{directory}: {one_line(error)[:300] or type(error).__name__}") from None


def _names(directory: Place) -> list[str]:
    if isinstance(directory, Path):
        return files.entries(directory) if files.is_dir(directory) else []
    with changing(directory):
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []
