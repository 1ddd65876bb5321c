"""Before stages 0 and 3: rows from where the user keeps them, be it a file, a Hugging Face dataset or a tfds one.

No code that comes with a dataset is run, and only the splits and columns asked for are given out.
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
NO_SPLIT = ("train", "test")  # the knobs' defaults, which mean nothing to a file
ROWS = 1000  # read at a time
SHOWN = 300  # characters of a library's message

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What the user named, and by which knob, so that messages can say so."""

    knob: str
    name: str
    split: str

    def __str__(self) -> str:
        return f"{self.knob}={self.name}"

    @property
    def by_iteration(self) -> bool:
        return PLACEHOLDER in self.name + self.split

    def at(self, iteration: int) -> "Source":
        name, split = (text.replace(PLACEHOLDER, str(iteration)) for text in (self.name, self.split))
        return dataclasses.replace(self, name=name, split=split)


def rows(source: Source, columns: Sequence[str]) -> Iterator[Row | None]:
    """Rows in the source's order, None for a line that is not JSON. Values are plain Python; text is str.

    A row of a jsonl file may lack columns. Raises BadInput, in one line, when the source or its split cannot be
    read, or no row has one of the columns.
    """
    scheme, colon, name = source.name.partition(":")
    if not colon or scheme not in _READERS or not name:
        kinds = "tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH"
        raise BadInput(f"{source}: give {kinds}, NAME being a dataset's name or local directory")
    yield from _READERS[scheme](source, name, columns)


def messages(value: Any) -> list[tuple[str, str]] | None:
    """(role, content) of each message of a conversation, be it a list of structs or a struct of lists; else None."""
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
    """JSON can spell lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _embedded(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row | None]:
    return _jsonl(source, str(resolve(f"embedded:{name}")), columns)


def _jsonl(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row | None]:
    """Blank lines are no rows; JSON that is no object is a row without columns."""
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
    with _told(source, "is it a whole parquet file?"), pq.ParquetFile(path) as file:
        _check_columns(source, columns, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS, columns=list(columns)):
            yield from _plain(batch.to_pylist())


def _hf(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """hf:NAME[:CONFIG][@REVISION]. What the hub gives goes through the library's cache."""
    import datasets

    config = revision = ""
    if Path(name).is_dir():
        name = os.path.abspath(name)  # "json" and the like are kinds of files to the library
    else:
        name, _, revision = name.partition("@")
        name, _, config = name.partition(":")
        if name.count("/") != 1:  # without its owner, "json" would be all files below here
            raise BadInput(f"{source}: no such directory; a dataset of the hub is named OWNER/NAME")
    with _told(source, _advice):
        builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        _check_revision(source, revision, builder)
        builder.download_and_prepare()
    splits = ", ".join(builder.info.splits or ())
    with _told(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_dataset(split=source.split)
    with _told(source, "is the dataset whole?"):
        _check_columns(source, columns, found.column_names)
        for table in found.select_columns(list(columns)).with_format("arrow").iter(ROWS):
            yield from _plain(table.to_pylist())


def _tfds(source: Source, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """A prepared directory, or a name that the library knows or finds prepared under TFDS_DATA_DIR."""
    import tensorflow_datasets as tfds

    advice = "give a directory that was prepared with file_format=array_record, or a name of its catalogue"
    with _told(source, advice):
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    if builder.info.file_format not in tfds.core.FileFormat.with_random_access():
        raise BadInput(f"{source}: its files are {builder.info.file_format.value}; {advice}")
    splits = ", ".join(builder.info.splits)
    with _told(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_data_source(split=source.split)
    _check_columns(source, columns, list(builder.info.features or ()))
    with _told(source, "is the dataset whole?"):
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
    path = Path(name)
    if not os.path.isfile(name):  # False, where Path's raises, for names that no file can have
        raise BadInput(f"{source}: no such file")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{source}: cannot be read")
    if source.split not in NO_SPLIT:
        raise BadInput(f"{source}: a file has no splits; leave out the split {source.split!r}")
    return path


def _check_columns(source: Source, columns: Sequence[str], names: Collection[str]) -> None:
    for column in columns:
        if column not in names:
            raise BadInput(f"{source}: no column {column!r}; there are {', '.join(names)}")


def _check_revision(source: Source, revision: str, builder: Any) -> None:
    """A cached dataset is given whatever revision was asked for: refuse another one than that."""
    if not revision or not type(builder).__module__.endswith(".cache.cache") or builder.hash == revision:
        return
    raise BadInput(
        f"{source}: the hub cannot be reached and the cache holds revision {builder.hash}; "
        f"to use that one, put it after the @"
    )


@contextlib.contextmanager
def _told(source: Source, advice: str | Callable[[Exception], str], *, reason: bool = True) -> Iterator[None]:
    """What a library raises (they raise many kinds) as one line with the advice."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        wrapped = type(error).__name__ == "DatasetGenerationError" and error.__cause__
        first, *_ = str(wrapped or error).strip().splitlines() or [type(error).__name__]
        said = f"{first[:SHOWN].rstrip('.')}; " if reason else ""
        raise BadInput(f"{source}: {said}{advice if isinstance(advice, str) else advice(error)}") from None


def _advice(error: Exception) -> str:
    """What to do when the `datasets` library has no dataset for us."""
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
    """Bytes as text (what is not UTF-8 becomes lone surrogates, see is_unicode) and arrays as lists, however deep."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
