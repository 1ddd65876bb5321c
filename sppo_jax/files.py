"""Files that are whole or absent, JSON objects, and digests."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success the file or directory written there is synced and renamed to `path`.

    A directory replaces an existing directory; a file never replaces a directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(path)
    remove(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _sync(file)
        if path.is_dir() and temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BadInput if the file cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    """The sha256 of a text's UTF-8, in hexadecimal; lone surrogates are allowed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def part_of(path: Path) -> Path:
    """The hidden temporary name beside `path` under which it is written."""
    return path.with_name(f".{path.name}.part")


def remove(path: Path) -> None:
    """Delete a file or a whole directory; nothing happens where there is none."""
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
