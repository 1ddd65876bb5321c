"""Rows for stages 0 and 3 from a file, a Hugging Face dataset or a tfds dataset.

No code of a dataset is run, and only the requested splits and columns are returned.
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.hub import environment
from sppo_jax.hub.names import resolve
from sppo_jax.text import connection, text_files
from sppo_jax.text.conversations import instruction

PLACEHOLDER = "{iteration}"
NO_SPLIT = ("train", "test")  # the knobs' defaults, which a file ignores
ROWS = 1000  # rows read at a time
SHOWN = 300  # characters of a library's message
FIRST = 100  # rows whose columns are looked at for advice
# What to do about a column that is not there, by the knob that named the source.
COLUMN_ADVICE = {
    "prompts.source": "; set prompts.column to one of them",
    "prompts.heldout": "; set prompts.column to one of them, which names the column of both sources",
}
COLUMNS = 20  # names of columns in a message
SAVED = ("state.json", "dataset_dict.json")  # files of what `datasets` saves to disk

Row = dict[str, Any]
Columns = Sequence[str] | None


@dataclass(frozen=True)
class Source:
    """A source of rows as the user named it, and the knob that named it, for messages."""

    knob: str
    name: str
    split: str

    def __str__(self) -> str:
        return f"{self.knob}={shown_name(self.name)}"

    @property
    def by_iteration(self) -> bool:
        """Whether the name or split depends on the iteration."""
        return PLACEHOLDER in self.name + self.split

    def at(self, iteration: int) -> "Source":
        """Return the source with the number of the iteration filled in."""
        name, split = (text.replace(PLACEHOLDER, str(iteration)) for text in (self.name, self.split))
        return dataclasses.replace(self, name=name, split=split)


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
            return f"; did you mean {_kind(Path(name), name)}:{shown_name(name)}?"
        if files.is_dir(Path(name)):
            return f"; did you mean hf:{shown_name(name)}?"
    return ""


def _kind(path: Path, label: str) -> str:
    """Return the notation of a file: "parquet" or "jsonl"."""
    return "parquet" if text_files.head(path, label)[:4] == b"PAR1" else "jsonl"


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
        _check_columns(source, columns, sorted(names))


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
        with _as_bad_input(label, "is it a whole parquet file?"), pq.ParquetFile(path) as file:
            _check_columns(label, columns, file.schema_arrow.names)
            wanted = None if columns is None else list(columns)
            for batch in file.iter_batches(ROWS, columns=wanted):
                yield from _plain(batch.to_pylist())


def _hf(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of hf:NAME[:CONFIG][@REVISION]. Downloads go through the library's cache."""
    with _named(source):
        local, file = files.is_dir(Path(name)), files.is_file(Path(name))
    if file:
        raise BadInput(f"{source}: a file, not a dataset: give {_kind(Path(name), str(source))}:PATH")
    with _named(source):
        saved = local and _is_saved(Path(name))
    found = _saved_to_disk(source, name) if saved else _loaded(source, name, local)
    with _as_bad_input(source, "is the dataset whole?"):
        _check_columns(source, columns, found.column_names)
        wanted = found.column_names if columns is None else list(columns)
        for table in found.select_columns(wanted).with_format("arrow").iter(ROWS):
            yield from _plain(table.to_pylist())


def _loaded(source: Source, name: str, local: bool) -> Any:
    """Return the split of a dataset of the hub, or of a directory of data files."""
    import datasets

    config = revision = ""
    if local:
        name = os.path.abspath(name)  # the library takes "json" and the like as kinds of files
    else:
        name, _, revision = name.partition("@")
        name, _, config = name.partition(":")
        if name.count("/") != 1:  # without an owner, "json" would mean all files below here
            raise BadInput(f"{source}: no such directory; a dataset of the hub is named OWNER/NAME")
    with contextlib.ExitStack() as stack:
        unreachable = "" if local else stack.enter_context(connection.asked_once())
        with _as_bad_input(source, functools.partial(_advice, unreachable), reason=not unreachable):
            builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
            _check_revision(source, revision, builder)
            builder.download_and_prepare()
    splits = ", ".join(builder.info.splits or ())
    with _as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        return builder.as_dataset(split=source.split)


def _saved_to_disk(source: Source, name: str) -> Any:
    """Return the split of a directory that `save_to_disk` wrote. One that holds no splits is read whole, as a file is."""
    import datasets

    with _as_bad_input(source, "is the dataset whole?"):
        found = datasets.load_from_disk(os.path.abspath(name))
    if isinstance(found, datasets.Dataset):
        if source.split not in (*NO_SPLIT, str(found.split)):
            raise BadInput(f"{source}: it has no splits; leave out the split {source.split!r}")
        return found
    with _as_bad_input(
        source, f"split {source.split!r} cannot be read; there are {', '.join(found)}", reason=False
    ):
        lengths = {split: len(rows) for split, rows in found.items()}
        pieces = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
        return datasets.concatenate_datasets(
            [
                found[p.splitname].select(range(p.from_ or 0, lengths[p.splitname] if p.to is None else p.to))
                for p in pieces
            ]
        )


def _tfds(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a prepared directory, or of a name in the catalogue or prepared under TFDS_DATA_DIR."""
    import tensorflow_datasets as tfds

    advice = "give a directory that was prepared with file_format=array_record, or a name of its catalogue"
    with _as_bad_input(source, advice):
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
            with connection.few_attempts():
                builder.download_and_prepare()
    if builder.info.file_format not in tfds.core.FileFormat.with_random_access():
        raise BadInput(f"{source}: its files are {builder.info.file_format.value}; {advice}")
    splits = ", ".join(builder.info.splits)
    with _as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_data_source(split=source.split)
    names = list(builder.info.features or ())
    _check_columns(source, columns, names)
    with _as_bad_input(source, "is the dataset whole?"):
        for index in range(len(found)):
            row = found[index]
            yield _plain({column: row[column] for column in columns or names})


_READERS: dict[str, Callable[[Source, str, Columns], Iterator[Any]]] = {
    "embedded": _embedded,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hf,
    "tfds": _tfds,
}


def _files(source: Source, name: str, *endings: Sequence[str]) -> list[tuple[Path, str]]:
    """Return a source's file, or those of a directory by name, each with what messages call it.

    Of a directory these are the files whose names have the first of `endings` that any has, compressed or not.
    Raises BadInput unless they can be read and no split is named.
    """
    path = Path(name)
    with _named(source):
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
    with _named(source):
        if _is_saved(path):
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


def _is_saved(path: Path) -> bool:
    """Return whether `datasets` saved a directory to disk."""
    return any(files.is_file(path / name) for name in SAVED)


def shown_name(name: str) -> str:
    """Return a name as messages show it: escaped if it cannot be printed, and cut in the middle if it is long."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= SHOWN else f"{name[: SHOWN // 2]}…{name[-SHOWN // 2 :]}"


def _json(start: bytes) -> str:
    """Return the kind of a file that begins with `start` if it seems to be JSON."""
    return "JSON, not parquet: give jsonl:PATH" if start.lstrip()[:1] in (b"{", b"[") else ""


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Put the source in front of what BadInput says about its path."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {str(error).rpartition(': ')[2]}") from None


def _check_columns(source: Source | str, columns: Columns, names: Collection[str]) -> None:
    """Raise BadInput for a column that is not among `names`."""
    for column in columns or ():
        if column not in names:
            near = difflib.get_close_matches(column, names, 1)
            shown = ", ".join(map(shown_name, list(names)[:COLUMNS])) + (
                ", …" if len(names) > COLUMNS else ""
            )
            advice = next((text for knob, text in COLUMN_ADVICE.items() if str(source).startswith(knob)), "")
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"{source}: no column {column!r}; there are {shown}{advice}{meant}")


def _check_revision(source: Source, revision: str, builder: Any) -> None:
    """Raise BadInput if the library returned another revision, as it does for a cached dataset without a network."""
    if not revision or not type(builder).__module__.endswith(".cache.cache") or builder.hash == revision:
        return
    raise BadInput(
        f"{source}: the hub cannot be reached and the cache holds revision {builder.hash}; "
        f"to use that one, put it after the @"
    )


@contextlib.contextmanager
def _as_bad_input(
    source: Source | str, advice: str | Callable[[Exception], str], *, reason: bool = True
) -> Iterator[None]:
    """Turn any exception of a library into BadInput with one line: its first line (if `reason`) and the advice."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        wrapped = type(error).__name__ == "DatasetGenerationError" and error.__cause__
        first, *_ = str(wrapped or error).strip().splitlines() or [type(error).__name__]
        if isinstance(wrapped or error, UnicodeDecodeError):
            advice = "a text in it is not UTF-8: write it anew"
        first = "".join(c if c.isprintable() else "?" for c in first[:SHOWN])
        cause = f"{first.rstrip('.')}; " if reason else ""
        raise BadInput(f"{source}: {cause}{advice if isinstance(advice, str) else advice(error)}") from None


def _advice(unreachable: str, error: Exception) -> str:
    """Return advice for an error of the `datasets` library. `unreachable`: why there is no connection to the hub."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if unreachable:
        return f"{unreachable}, and the dataset is not in the cache; check the network, or give hf:DIR"
    if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
        if environment.offline():
            return "it is not in the cache: unset HF_HUB_OFFLINE to download it"
        return "check the network; a dataset in the cache loads with HF_HUB_OFFLINE=1"
    if isinstance(error, (FileNotFoundError, HfHubHTTPError)):
        return "check the name; a private or gated dataset needs its terms accepted and HF_TOKEN set"
    return "is the dataset whole, and of a kind that needs no code of its own?"


def _plain(value: Any) -> Any:
    """Return a value with bytes as text (invalid UTF-8 as lone surrogates, see is_unicode) and arrays as lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
