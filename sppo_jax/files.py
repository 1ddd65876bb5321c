"""Files: looked up, read as text or JSON, written whole or not at all; and digests.

Paths come from users, so every look-up, read and write here ends in a result or in BadInput with one line.
"""

import codecs
import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput, one_line

# The encodings that begin with a mark of their own. UTF-32's little-endian mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What to do about a write that the system refuses, by the error's number; the others get the system's own words alone.
MEND = {
    errno.ENOSPC: "make room (df), or for more files (df -i)",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EIO: "check the disk",
    errno.EISDIR: "move the directory that is in the way",
    errno.EEXIST: "move the file that is in the way",
    errno.ENOTDIR: "move the file that is in the way",
    errno.ENOTEMPTY: "move the directory that is in the way",
}
NO_SYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
    errno.ENOSYS,
)  # of file systems that cannot sync a directory


def exists(path: Path) -> bool:
    """Whether something lies at `path`, links followed. Raises BadInput where that cannot be found out."""
    return _status(path) is not None


def is_file(path: Path) -> bool:
    """Whether `path` is a file, links followed. Raises BadInput where that cannot be found out."""
    found = _status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_dir(path: Path) -> bool:
    """Whether `path` is a directory, links followed. Raises BadInput where that cannot be found out."""
    found = _status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def expand(name: str) -> str:
    """Return a path with `~` replaced by the home directory. Raises BadInput where there is no such home."""
    expanded = os.path.expanduser(name)
    if name.startswith("~") and (expanded == name or os.environ.get("HOME") == ""):
        raise BadInput(f"{name}: no home directory is known; write the path without ~")
    return expanded


def caches() -> Path | None:
    """The folder of the user's caches; None where there is none. A relative path is no folder: it differs by run."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    home = os.path.expanduser("~")
    return Path(home) / ".cache" if os.path.isabs(home) else None


def working_directory_gone() -> bool:
    """Whether the directory that relative paths begin with was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def encoding(head: bytes) -> str:
    """Return the encoding of a text that begins with `head` (4 bytes are enough): by its mark, else UTF-8."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """Return the text of a file, decoded by its mark, or as UTF-8. Raises BadInput where that fails."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError:
        raise BadInput(f"{str(path)!r}: not a possible name of a file") from None
    return decode(data, path)


def decode(data: bytes, path: Path) -> str:
    """Return the text of the bytes of `path`, decoded by their mark, or as UTF-8. Raises BadInput where that fails."""
    name = encoding(data[:4])
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not {name.removesuffix('-sig').upper()} text (at byte {error.start}); save it as UTF-8"
        ) from None


def unwritten(path: Path, error: OSError) -> BadInput:
    """Return the one line about a write below `path` that failed."""
    reason, number = error.strerror or one_line(error), error.errno
    if number is None:  # a library's message without a number
        number = next((n for n in MEND if os.strerror(n) in reason), None)
    if number in MEND:
        reason = os.strerror(number)
    advice = MEND.get(number or 0)
    return BadInput(
        f"{path}: cannot be written: {reason}"
        + (f"; {advice}, and run the same command again" if advice else "")
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system while `path` is written into BadInput with one line."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success the file or directory written there is synced and renamed to `path`.

    A directory replaces an existing directory; a file never replaces a directory. Raises BadInput where the system
    refuses the write; nothing is left of it then.
    """
    temporary = part_of(path)
    if exists(path) and not is_file(path) and not is_dir(path):  # root could replace a device
        raise BadInput(f"{path}: neither a file nor a directory; choose another name")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            yield temporary
            for file in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                sync(file)
            if path.is_dir() and temporary.is_dir():
                remove(path)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that made us clean up is the one to report
            remove(temporary)
        raise


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file, and make it if need be. Raises BadInput where the system refuses; `data` is then absent.

    No buffer lies between, so nothing is left to be written later.
    """
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            before, written = os.fstat(file).st_size, 0
            try:
                while written < len(data):
                    written += os.write(file, data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    # Unless another process has appended meanwhile, whose bytes are not ours to cut.
                    if os.fstat(file).st_size == before + written:
                        os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def entries(directory: Path) -> list[str]:
    """Return the names in a directory, in order. Raises BadInput where it cannot be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise BadInput(f"{directory}: {error.strerror}") from None


def near(path: Path) -> str:
    """Return "; did you mean X?" with the name in the folder of a missing file that is most like its own; else nothing."""
    with contextlib.suppress(BadInput):
        names = entries(path.parent) if is_dir(path.parent) else []
        # By what is before the ending: two names are not alike because both end in .jsonl.
        stems = {Path(name).stem: name for name in names if Path(name).suffix == path.suffix}
        found = [stems[stem] for stem in difflib.get_close_matches(path.stem, stems, n=1)]
        if match := found or difflib.get_close_matches(path.name, names, n=1, cutoff=0.8):
            return f"; did you mean {path.with_name(match[0])}?"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises BadInput if the file cannot be read or holds anything else."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys and each list of numbers on one line, whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True)
    # A text in JSON has no line ends, so that only lists match.
    text = re.sub(r"\[\n[-+\d.e,\s]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    with replacing(path) as part:
        part.write_text(f"{text}\n", encoding="utf-8")


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


def sync(path: Path) -> None:
    """Make a file or directory outlast a loss of power, where its file system can promise that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # no permission, a name that is too long, links in a circle
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError:  # NUL, or half of a character
        raise BadInput(f"{str(path)!r}: not a possible name of a file") from None
