"""Rows for stages 0 and 3 from a file, a directory of files, a Hugging Face dataset or a tfds dataset."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.hub.names import resolve
from sppo_jax.text import libraries, text_files
from sppo_jax.text.conversations import instruction
from sppo_jax.text.source import (
    NO_SPLIT,
    ROWS,
    Columns,
    Row,
    Source,
    as_bad_input,
    check_columns,
    named,
    plain,
    shown_name,
)

FIRST = 100  # rows whose columns are looked at for advice


def rows(source: Source, columns: Columns) -> Iterator[Row | str]:
    """Yield rows in the source's order; for a line that is not an object, the reason: "not_json" or "not_object".

    Values are plain Python; text is str. A row of a jsonl file may lack columns, and may have others. `columns` None: all
    columns. Raises BadInput, in one line, when the source or its split cannot be read, or when a column is in no row.
    """
    scheme, colon, name = source.name.partition(":")
    if not colon or scheme not in _READERS or not name:
        kinds = "tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH"
        raise BadInput(
            f"{source}: give {kinds}, NAME being a dataset's name or local directory{_meant(source.name)}"
        )
    yield from _READERS[scheme](source, name, columns)


def _meant(name: str) -> str:
    """Return the end of the line about a source without a kind, where it is a path."""
    with contextlib.suppress(BadInput):
        if files.is_file(Path(name)):
            return f"; did you mean {text_files.notation(Path(name), name)}:{shown_name(name)}?"
        if files.is_dir(Path(name)):
            return f"; did you mean hf:{shown_name(name)}?"
    return ""


def columns_of_text(source: Source) -> list[str]:
    """Return the names of the columns in which the source's first rows hold a text or a conversation."""
    names: dict[str, None] = {}
    with contextlib.suppress(BadInput):
        for row in itertools.islice(rows(source, None), FIRST):
            if isinstance(row, dict):
                names |= {name: None for name, value in row.items() if isinstance(instruction(value), tuple)}
    return list(names)


def _embedded(source: Source, name: str, columns: Columns) -> Iterator[Row | str]:
    return _jsonl(source, str(resolve(f"embedded:{name}")), columns)


def _jsonl(source: Source, name: str, columns: Columns) -> Iterator[Row | str]:
    """Yield the rows of a file of JSON, or of all files of a directory."""
    names: set[str] = set()
    number, last = 0, {}
    for path, label in _files(source, name, (".jsonl", ".ndjson"), (".json",)):
        for row in text_files.rows(path, label):
            number += 1
            if isinstance(row, dict):
                names.update(row)
                last = row
            yield row
    if number == 1 and last:
        _check_object(source, columns, last)
    if names:
        check_columns(source, columns, sorted(names))


def _check_object(source: Source, columns: Columns, row: Row) -> None:
    """Raise BadInput if the only row of a file is an object that holds all rows in a list, or whole columns."""
    for column in columns or ():
        value = row.get(column)
        holding = [name for name, other in row.items() if _holds_rows(other, column)]
        if column not in row and holding:
            raise BadInput(
                f"{source}: one JSON object, whose list {holding[0]!r} holds the rows; give that list alone as a JSON array"
            )
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value and (texts or (isinstance(value, dict) and all(map(str.isdigit, value)))):
            raise BadInput(
                f"{source}: one JSON object that holds whole columns; write one object per row (pandas: "
                "to_json(orient='records', lines=True))"
            )


def _holds_rows(value: Any, column: str) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and column in item for item in value)


def _parquet(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a parquet file, or of all files of a directory, of which only the columns are read."""
    import pyarrow.parquet as pq

    for path, label in _files(source, name, (".parquet", ".parq")):
        start = text_files.head(path, label)
        if start[:4] != b"PAR1" and (found := text_files.kind(start) or _json(start)):
            raise BadInput(f"{label}: {found}")
        with as_bad_input(label, "is it a whole parquet file?"), pq.ParquetFile(path) as file:
            check_columns(label, columns, file.schema_arrow.names)
            wanted = None if columns is None else list(columns)
            for batch in file.iter_batches(ROWS, columns=wanted):
                yield from plain(batch.to_pylist())


_READERS: dict[str, Callable[[Source, str, Columns], Iterator[Any]]] = {
    "embedded": _embedded,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": libraries.hf,
    "tfds": libraries.tfds,
}


def _files(source: Source, name: str, *endings: Sequence[str]) -> list[tuple[Path, str]]:
    """Return a source's file, or those of a directory by name, each with what messages call it.

    Of a directory these are the files whose names have the first of `endings` that any has, compressed or not.
    Raises BadInput unless they can be read and no split is named.
    """
    path = Path(name)
    with named(source):
        directory = files.is_dir(path)
        if not directory and not files.is_file(path):
            raise BadInput(_not_a_file(path))
    if source.split not in NO_SPLIT:
        raise BadInput(f"{source}: a file has no splits; leave out the split {source.split!r}")
    return _parts(source, path, endings) if directory else [(path, str(source))]


def _parts(source: Source, path: Path, endings: Sequence[Sequence[str]]) -> list[tuple[Path, str]]:
    try:
        # Hidden files are the system's; Spark's marks begin with an underscore.
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
    except OSError as error:
        raise BadInput(f"{source}: {error.strerror}") from None
    with named(source):
        if libraries.is_saved(path):
            raise BadInput("a dataset that was saved to disk, give hf:DIR")
        if files.is_file(path / "features.json"):
            raise BadInput("a dataset of tensorflow-datasets, give tfds:DIR")
        for some in endings:
            packed = tuple(ending + end for ending in some for end in text_files.ENDINGS)
            if found := [p for p in inside if p.name.lower().endswith(packed) and files.is_file(p)]:
                return [(part, f"{source}: {shown_name(part.name)}") for part in found]
    held = ", ".join(shown_name(p.name) for p in inside[:3]) or "nothing"
    kinds = " or ".join("*" + ending for ending in itertools.chain(*endings))
    raise BadInput(
        f"{source}: no file {kinds} in this directory, which holds {held}; hf:DIR reads datasets in other layouts"
    )


def _not_a_file(path: Path) -> str:
    """Return why a name that is neither a file nor a directory cannot be read."""
    if files.exists(path):
        return "not a regular file, which is needed because it is read more than once"
    return "no such file" + ("; patterns are not read, give the directory" if "*" in str(path) else "")


def _json(start: bytes) -> str:
    """Return the kind of a file that begins with `start` if it seems to be JSON."""
    return "JSON, not parquet: give jsonl:PATH" if start.lstrip()[:1] in (b"{", b"[") else ""
