"""Rows of a text file: one JSON object per line, or a JSON array; compressed or not; decoded once, by its mark.

What is not such a file is refused with its kind, where its first bytes show it.
"""

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sppo_jax import files
from sppo_jax.errors import BadInput, one_line
from sppo_jax.hub.repositories import POINTER

HEAD = 4096  # bytes that show the kind of a file
SPACE = " \t\n\r\v\f"
BETWEEN = re.compile(r"\s*,?\s*")  # values that span lines
SHOWN = 60  # characters of a line in a message
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as they are decoded
ENDINGS = ("", ".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")  # of compressed parts
CONVERT = "convert it to JSON lines or parquet"
# What a file is that begins, at an offset, with these bytes, and what to do.
KINDS = (
    (0, b"PAR1", "a parquet file: give parquet:PATH"),
    (0, b"ARROW1", "an arrow file: give hf: and the directory that it is in"),
    (0, b"\xff\xff\xff\xff", "an arrow file: give hf: and the directory that it is in"),
    (0, b"ORC", f"an ORC file; {CONVERT}"),
    (0, b"Obj\x01", f"an avro file; {CONVERT}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (0, b"Rar!", "a rar archive: unpack it"),
    (0, b"\x1f\x9d", "compressed by compress: unpack it"),
    (257, b"ustar", "a tar archive: unpack it, and give the file or the directory"),
    (0, b"SQLite format 3\0", f"an SQLite database; {CONVERT}"),
    (0, b"\x89HDF", f"an HDF5 file; {CONVERT}"),
    (0, b"\x93NUMPY", f"a numpy file; {CONVERT}"),
    (0, b"%PDF", f"a PDF document; {CONVERT}"),
    (0, b"\x89PNG", "an image"),
    (0, b"\xff\xd8\xff", "an image"),
    (0, b"\x7fELF", "a program"),
    (0, b"\x80\x02", f"a pickle or torch file; {CONVERT}"),
    (0, b"\x80\x03", f"a pickle or torch file; {CONVERT}"),
    (0, b"\x80\x04", f"a pickle or torch file; {CONVERT}"),
    (0, b"\x80\x05", f"a pickle or torch file; {CONVERT}"),
    (0, POINTER, "a git-lfs pointer, not the data: fetch it with git lfs pull"),
)
IN_ZIP = (
    (b"data.pkl", f"a torch file (a zip archive); {CONVERT}"),
    (b".npy", f"a numpy file (a zip archive); {CONVERT}"),
    (b"[Content_Types].xml", f"an Office document (a zip archive); {CONVERT}"),
    (b"", "a zip archive: unpack it, and give the file or the directory"),
)


def rows(path: Path, label: str) -> Iterator[dict[str, Any] | str]:
    """Yield the objects of a file; for a line that is not one, the reason: "not_json" or "not_object".

    The file has one object per line (blank lines are skipped; a line ends in LF, CR or both; a comma after the object
    means nothing), or is a JSON array of objects, or objects on several lines. Raises BadInput, which begins with `label`, for what cannot be read, is not
    text, or holds no JSON at all.
    """
    lines = _lines(path, label)
    first = next(lines, "")
    if _is_begun(first):
        found = _document("\n".join([first, *lines]), label)
        yield from map(_row, found) if found is not None else _of_lines(_lines(path, label), label)
        return
    second = next(lines, "")
    value = None if second else _parsed(first)
    found = value if isinstance(value, list) else None  # an array on one line
    if value is None and not second and first.startswith("{"):
        found = _document(first, label)  # objects on one line
    if found is not None:
        yield from map(_row, found)
    else:
        yield from _of_lines(itertools.chain(filter(None, (first, second)), lines), label)


def kind(head: bytes) -> str:
    """Return what a file is that begins with `head`, and what to do; "" where it may be text or nothing is known."""
    for at, magic, name in KINDS:
        if head[at : at + len(magic)] == magic:
            return name
    if head.startswith(b"PK\x03\x04"):
        return next(name for inside, name in IN_ZIP if inside in head[:HEAD])
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the data: download the file itself"
    if files.encoding(head[:4]) == "utf-8" and b"\0" in head:
        return _without_mark(head)
    return ""


def head(path: Path, label: str) -> bytes:
    """Return the first bytes of a file, as it is on disk. Raises BadInput, which begins with `label`."""
    with _reported(label), path.open("rb") as file:
        return file.read(HEAD)


def notation(path: Path, label: str) -> str:
    """Return the notation for a file: "parquet" or "jsonl". Raises BadInput, which begins with `label`."""
    return "parquet" if head(path, label)[:4] == b"PAR1" else "jsonl"


def _of_lines(lines: Iterable[str], label: str) -> Iterator[dict[str, Any] | str]:
    """Yield a row, or the reason why it is not one, for each line. Raises BadInput if no line is JSON."""
    any_json, first = False, ""
    for line in lines:
        first = first or line
        row = _of_line(line)
        any_json = any_json or row != "not_json"
        yield row
    if first and not any_json:
        hint = ""
        if re.match(r"[^{\[]*[,;\t]", first):
            hint = " A csv file? hf:DIR reads a directory of them."
        raise BadInput(
            f"{label}: no line is JSON; the first is {first[:SHOWN]!r}. Write one object per line, such as "
            f'{{"prompt": "..."}}.{hint}'
        )


def _lines(path: Path, label: str) -> Iterator[str]:
    """Yield the lines of a file that are not blank, decoded. Raises BadInput where the file is not text."""
    with _reported(label), _unpacked(path, label) as file:
        start = file.read(HEAD)
    if any(start.startswith(magic) for magic, _ in PACKED):
        raise BadInput(
            f"{label}: compressed more than once: unpack it until it is compressed once, or not at all"
        )
    if found := kind(start):
        raise BadInput(f"{label}: {found}")
    name = files.encoding(start)
    # Bytes that are not UTF-8 are let through as single surrogates, so that their line can be named.
    errors = "surrogateescape" if name.startswith("utf-8") else "strict"
    with (
        _reported(label, name),
        _unpacked(path, label) as file,
        io.TextIOWrapper(file, encoding=name, errors=errors) as text,
    ):
        for number, line in enumerate(text, 1):
            if not line.isascii() and (bad := ESCAPED.search(line)):
                raise BadInput(
                    f"{label}: not UTF-8 (byte 0x{ord(bad[0]) - 0xDC00:02X} in line {number}): its encoding is not known, or "
                    "it is not text; save it as UTF-8 (iconv -f ENCODING -t UTF-8)"
                )
            if "\0" in line:
                raise BadInput(
                    f"{label}: line {number} holds NUL: part of the file is in another encoding, or was not written; "
                    "save all of it as UTF-8"
                )
            # A mark stands at the start of a line where files were joined.
            if line := line.strip(SPACE).lstrip("\ufeff"):
                yield line


def _is_begun(line: str) -> bool:
    """Return whether a line is the beginning of a JSON value that ends on a later line."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line[:1] in ("[", "{") and error.pos >= len(line)
    except (ValueError, RecursionError):
        pass
    return False


def _document(text: str, label: str) -> list[Any] | None:
    """Return the values of a text in which they span lines: an array's items, or objects; None if it is not JSON.

    Raises BadInput for an array that is not whole: by its lines, most of its rows would be lost.
    """
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            if between := BETWEEN.match(text, at):
                at = between.end()
    except (ValueError, RecursionError) as error:
        if text.startswith("["):
            raise BadInput(
                f"{label}: begins a JSON array and is not one: {one_line(error)}; is the file whole?"
            ) from None
        return None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _of_line(line: str) -> dict[str, Any] | str:
    """Return the row on a line, or why it is none. Objects that were joined by commas are rows, too."""
    value = _parsed(line)
    if value is None and line.endswith(","):
        value = _parsed(line[:-1])
        return value if isinstance(value, dict) else "not_json"
    return _row(value) if value is not None or line == "null" else "not_json"


def _row(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "not_object"


def _without_mark(head: bytes) -> str:
    """Return the kind of a file that holds NUL and has no mark."""
    if head[8:10] == b'{"':
        return f"a safetensors file; {CONVERT}"
    first = re.match(rb"(\0*)[\[{\" \t\r\n](\0*)", head)
    zeros = len(first[1] or first[2]) if first else 0
    if first is None or zeros not in (1, 3):
        # Text in which NUL comes later is refused where its line is read.
        return "" if head[:1] in (b"{", b"[") else f"a binary file; {CONVERT}"
    name = f"UTF-{8 * (zeros + 1)}"
    return f"{name} without a mark; save it as UTF-8 (iconv -f {name}{'BE' if first[1] else 'LE'} -t UTF-8)"


def _by_arrow(codec: str, path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=codec))  # type: ignore[arg-type]


PACKED: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x28\xb5\x2f\xfd", functools.partial(_by_arrow, "zstd")),
    (b"\x04\x22\x4d\x18", functools.partial(_by_arrow, "lz4")),
)


@contextlib.contextmanager
def _unpacked(path: Path, label: str) -> Iterator[BinaryIO]:
    """Open a file for reading its bytes, which are decompressed where its first ones say that they are compressed."""
    start = head(path, label)
    opened = next((by for magic, by in PACKED if start.startswith(magic)), lambda path: path.open("rb"))
    with opened(path) as file:
        yield file


@contextlib.contextmanager
def _reported(label: str, encoding: str = "") -> Iterator[None]:
    """Turn an error of reading, unpacking or decoding into BadInput with one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{label}: not {encoding.upper()}, although it begins with that mark: {error.reason}; save it as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or f"{one_line(error)}; is it whole?"
        raise BadInput(f"{label}: cannot be read: {reason}") from None
