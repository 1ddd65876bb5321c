"""Rows for stages 0 and 3 from a file, a Hugging Face dataset or a tfds dataset.

No code of a dataset is run, and only the requested splits and columns are returned.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.hub.names import resolve

PLACEHOLDER = "{iteration}"
NO_SPLIT = ("train", "test")  # the knobs' defaults, which a file ignores
ROWS = 1000  # rows read at a time
SHOWN = 300  # characters of a library's message

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A source of rows as the user named it, and the knob that named it, for messages."""

    knob: str
    name: str
    split: str

    def __str__(self) -> str:
        return f"{self.knob}={self.name}"

    @property
    def by_iteration(self) -> bool:
        """Whether the name or split depends on the iteration."""
        return PLACEHOLDER in self.name + self.split

    def at(self, iteration: int) -> "Source":
        """Return the source with the number of the iteration filled in."""
        name, split = (text.replace(PLACEHOLDER, str(iteration)) for text in (self.name, self.split))
        return dataclasses.replace(self, name=name, split=split)


def rows(source: Source, columns: Sequence[str]) -> Iterator[Row | None]:
    """Yield rows in the source's order, None for a line that is not JSON. Values are plain Python; text is str.

    A row of a jsonl file may lack columns. Raises BadInput, in one line, when the source or its split cannot be read, or
    when a column is in no row.
    """
    scheme, colon, name = source.name.partition(":")
    if not colon or scheme not in _READERS or not name:
        kinds = "tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH"
        raise BadInput(f"{source}: give {kinds}, NAME being a dataset's name or local directory")
    yield from _READERS[scheme](source, name, columns)


def messages(value: Any) -> list[tuple[str, str]] | None:
    """Return (role, content) of each message of a conversation (a list of structs, or a struct of lists), else None."""
    if isinstance(value, dict):
        roles, contents = value.get("role"), value.get("content")
        if not isinstance(roles, list) or not isinstance(contents, list) or len(roles) != len(contents):
            return None
        value = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        return None
    found = [(m.get("role"), m.get("content")) for m in value]
    return found if all(isinstance(part, str) for m in found for part in m) else None


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which JSON can spell and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _embedded(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row | None]:
    return _jsonl(source, str(resolve(f"embedded:{name}")), columns)


def _jsonl(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row | None]:
    """Yield the rows of a jsonl file. Blank lines are skipped; JSON other than an object is a row without columns."""
    names: set[str] = set()
    with _file(source, name).open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    yield None
                    continue
                row = row if isinstance(row, dict) else {}
                names.update(row)
                yield row
    if names:
        _check_columns(source, columns, sorted(names))


def _parquet(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    path = _file(source, name)
    with _as_bad_input(source, "is it a whole parquet file?"), pq.ParquetFile(path) as file:
        _check_columns(source, columns, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS, columns=list(columns)):
            yield from _plain(batch.to_pylist())


def _hf(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of hf:NAME[:CONFIG][@REVISION]. Downloads go through the library's cache."""
    import datasets

    config = revision = ""
    if Path(name).is_dir():
        name = os.path.abspath(name)  # the library takes "json" and the like as kinds of files
    else:
        name, _, revision = name.partition("@")
        name, _, config = name.partition(":")
        if name.count("/") != 1:  # without an owner, "json" would mean all files below here
            raise BadInput(f"{source}: no such directory; a dataset of the hub is named OWNER/NAME")
    with _as_bad_input(source, _advice):
        builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        _check_revision(source, revision, builder)
        builder.download_and_prepare()
    splits = ", ".join(builder.info.splits or ())
    with _as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_dataset(split=source.split)
    with _as_bad_input(source, "is the dataset whole?"):
        _check_columns(source, columns, found.column_names)
        for table in found.select_columns(list(columns)).with_format("arrow").iter(ROWS):
            yield from _plain(table.to_pylist())


def _tfds(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a prepared directory, or of a name in the catalogue or prepared under TFDS_DATA_DIR."""
    import tensorflow_datasets as tfds

    advice = "give a directory that was prepared with file_format=array_record, or a name of its catalogue"
    with _as_bad_input(source, advice):
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    if builder.info.file_format not in tfds.core.FileFormat.with_random_access():
        raise BadInput(f"{source}: its files are {builder.info.file_format.value}; {advice}")
    splits = ", ".join(builder.info.splits)
    with _as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_data_source(split=source.split)
    _check_columns(source, columns, list(builder.info.features or ()))
    with _as_bad_input(source, "is the dataset whole?"):
        for index in range(len(found)):
            row = found[index]
            yield _plain({column: row[column] for column in columns})


_READERS: dict[str, Callable[[Source, str, Sequence[str]], Iterator[Any]]] = {
    "embedded": _embedded,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "hf": _hf,
    "tfds": _tfds,
}


def _file(source: Source, name: str) -> Path:
    """Return the path of a source that is a file. Raises BadInput unless it can be read and no split is named."""
    path = Path(name)
    if not os.path.isfile(name):  # returns False for impossible names, for which Path.is_file raises
        raise BadInput(f"{source}: no such file")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{source}: cannot be read")
    if source.split not in NO_SPLIT:
        raise BadInput(f"{source}: a file has no splits; leave out the split {source.split!r}")
    return path


def _check_columns(source: Source, columns: Sequence[str], names: Collection[str]) -> None:
    """Raise BadInput for a column that is not among `names`."""
    for column in columns:
        if column not in names:
            raise BadInput(f"{source}: no column {column!r}; there are {', '.join(names)}")


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
    source: Source, advice: str | Callable[[Exception], str], *, reason: bool = True
) -> Iterator[None]:
    """Turn any exception of a library into BadInput with one line: its first line (if `reason`) and the advice."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        wrapped = type(error).__name__ == "DatasetGenerationError" and error.__cause__
        first, *_ = str(wrapped or error).strip().splitlines() or [type(error).__name__]
        cause = f"{first[:SHOWN].rstrip('.')}; " if reason else ""
        raise BadInput(f"{source}: {cause}{advice if isinstance(advice, str) else advice(error)}") from None


def _advice(error: Exception) -> str:
    """Return advice for an error of the `datasets` library."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
        if HF_HUB_OFFLINE:
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
