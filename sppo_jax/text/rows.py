"""Rows for stages 0 and 3 from a file, a directory of files, a Hugging Face dataset or a tfds dataset."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.hub.names import resolve
from sppo_jax.text import libraries, text_files
from sppo_jax.text.conversations import prompt
from sppo_jax.text.source import (
    COLUMNS,
    NO_SPLIT,
    ROWS,
    Columns,
    NoColumn,
    Row,
    Source,
    as_bad_input,
    check_columns,
    named,
    plain,
    shown_name,
)

# Endings of the files of a directory that are read: the first group of which there are any.
ENDINGS = {"jsonl": ((".jsonl", ".ndjson"), (".json",)), "parquet": ((".parquet", ".parq"),)}
SPLITS = (
    ("train", re.compile(r"(?<![a-z])train(ing)?(?![a-z])")),
    ("validation", re.compile(r"(?<![a-z])(validation|valid|val|dev)(?![a-z])")),
    ("test", re.compile(r"(?<![a-z])(test|testing|eval|evaluation|held[-_]?out)(?![a-z])")),
)  # how the names of files say their split, as the datasets library reads them
PAIRS = (
    "the columns chosen and rejected (lists of messages), chosen_probs, chosen_probs_win and chosen_probs_lose "
    "(probabilities from 0 to 1: docs/prompts.md describes them); scores are none"
)
WITH_RESPONSES = ("responses.source", "--in")  # what names sources whose rows hold prompts and responses
SHOWN = 10  # names of files in a note
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
    try:
        yield from _READERS[scheme](source, name, columns)
    except NoColumn as error:
        raise BadInput(f"{error}{_instead(source, error.near)}") from None


def note(source: Source) -> str:
    """Return a sentence about which files of a directory are read; "" for a source that is not one of several files."""
    scheme, _, name = source.name.partition(":")
    if scheme not in ENDINGS or not files.is_dir(Path(name)):
        return ""
    names = [path.name for path, _ in _files(source, name, ENDINGS[scheme])]
    shown = ", ".join(map(shown_name, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
    return f"{source}: {len(names)} files of the directory are read: {shown}" if len(names) > 1 else ""


def _instead(source: Source, near: str) -> str:
    """Return the end of the line about a column that a source does not have: what to do."""
    if source.knob == "pairs.source":
        return f"; given pairs need {PAIRS}"
    meant = f"; did you mean {near!r}?" if near else ""
    if source.knob in WITH_RESPONSES:
        return f"; name the columns of prompts and of lists of responses in prompts.column and responses.column{meant}"
    names = [shown_name(name) for name in columns_of_text(source)]
    if not names:
        return (
            '; none of them holds text or a conversation: write one object per row, such as {"prompt": "..."}, and name '
            "its column in prompts.column"
        )
    both = ", which names the column of both sources" if source.knob == "prompts.heldout" else ""
    return f"; set prompts.column to one that holds text ({', '.join(names[:COLUMNS])}){both}{meant}"


def _meant(name: str) -> str:
    """Return the end of the line about a source without a kind, or with an unknown one, where it is a path."""
    with contextlib.suppress(BadInput):
        for path in filter(None, (name, name.partition(":")[2])):
            if files.is_file(Path(path)):
                return f"; did you mean {text_files.notation(Path(path), path)}:{shown_name(path)}?"
            if files.is_dir(Path(path)):
                return f"; did you mean hf:{shown_name(path)}?"
    return ""


def columns_of_text(source: Source) -> list[str]:
    """Return the names of the columns in which the source's first rows hold a text or a conversation."""
    names: dict[str, None] = {}
    with contextlib.suppress(BadInput):
        for row in itertools.islice(rows(source, None), FIRST):
            if isinstance(row, dict):
                names |= {name: None for name, value in row.items() if isinstance(prompt(value), tuple)}
    return list(names)


def _embedded(source: Source, name: str, columns: Columns) -> Iterator[Row | str]:
    return _jsonl(source, str(resolve(f"embedded:{name}")), columns)


def _jsonl(source: Source, name: str, columns: Columns) -> Iterator[Row | str]:
    """Yield the rows of a file of JSON, or of all files of a directory."""
    names: set[str] = set()
    number, last = 0, {}
    for path, label in _files(source, name, ENDINGS["jsonl"]):
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
    """Raise BadInput if the only row of a file is an object that holds all rows, or whole columns."""
    columns_apart = isinstance(row.get("columns"), list) and isinstance(row.get("data"), list)
    for column in columns or ():
        value = row.get(column)
        if column not in row and _are_rows(list(row.values()), column):
            raise BadInput(
                f"{source}: one JSON object whose values are the rows, by their keys; write one object per row, such as "
                f'{{"{column}": "..."}}'
            )
        holding = [name for name, other in row.items() if _holds_rows(other, column)]
        if column not in row and holding:
            raise BadInput(
                f"{source}: one JSON object, whose list {holding[0]!r} holds the rows; give that list alone as a JSON array"
            )
        # The first column is the prompt's; another may hold a list of responses.
        texts = (
            column == (columns or ())[0]
            and isinstance(value, list)
            and all(isinstance(item, str) for item in value)
        )
        by_index = isinstance(value, dict) and all(map(str.isdigit, value))
        if (value and (texts or by_index)) or (column not in row and columns_apart):
            raise BadInput(
                f"{source}: one JSON object that holds whole columns; write one object per row (pandas: "
                "to_json(orient='records', lines=True))"
            )


def _are_rows(values: Sequence[Any], column: str) -> bool:
    """Return whether the values of an object are rows: all have the column, or several have the same columns."""
    kinds = {tuple(sorted(value)) if isinstance(value, dict) else () for value in values}
    return all(column in kind for kind in kinds) or (len(kinds) == 1 < len(values) and kinds != {()})


def _holds_rows(value: Any, column: str) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and column in item for item in value)


def _parquet(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a parquet file, or of all files of a directory, of which only the columns are read."""
    import pyarrow.parquet as pq

    for path, label in _files(source, name, ENDINGS["parquet"]):
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


def _files(source: Source, name: str, endings: Sequence[Sequence[str]]) -> list[tuple[Path, str]]:
    """Return a source's file, or those of a directory by name, each with what messages call it.

    Of a directory these are the files whose names have the first of `endings` that any has, compressed or not.
    Raises BadInput unless they can be read, are of one split by their names, and no split is named.
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
                _check_splits([part.name for part in found])
                return [(part, f"{source}: {shown_name(part.name)}") for part in found]
    held = ", ".join(shown_name(p.name) for p in inside[:3]) or "nothing"
    kinds = " or ".join("*" + ending for ending in itertools.chain(*endings))
    raise BadInput(
        f"{source}: no file {kinds} in this directory, which holds {held}; hf:DIR reads datasets in other layouts"
    )


def _check_splits(names: Sequence[str]) -> None:
    """Raise BadInput for files of which some are for training and some for tests, by their names."""
    found: dict[str, str] = {}
    for name in names:
        split = next((split for split, words in SPLITS if words.search(name.lower())), "")
        found.setdefault(split, shown_name(name))
    if len(found) > 1 and found.keys() & {"validation", "test"}:
        raise BadInput(
            f"files of several splits in one directory ({', '.join(found.values())}), give one file, or hf:DIR with a split"
        )


def _not_a_file(path: Path) -> str:
    """Return why a name that is neither a file nor a directory cannot be read."""
    if files.exists(path):
        return "not a regular file, which is needed because it is read more than once"
    return "no such file" + ("; patterns are not read, give the directory" if "*" in str(path) else "")


def _json(start: bytes) -> str:
    """Return the kind of a file that begins with `start` if it seems to be JSON."""
    return "JSON, not parquet: give jsonl:PATH" if start.lstrip()[:1] in (b"{", b"[") else ""
