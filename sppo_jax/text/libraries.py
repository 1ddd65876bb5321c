"""Rows of datasets that a library reads: Hugging Face's `datasets`, from the hub or a directory, and tensorflow-datasets.

No code of a dataset is run, and only the requested splits and columns are returned.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.hub import environment
from sppo_jax.text import connection, text_files
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
)

SAVED = ("state.json", "dataset_dict.json")  # files of what `datasets` saves to disk


def hf(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of hf:NAME[:CONFIG][@REVISION]. Downloads go through the library's cache."""
    with named(source):
        local, file = files.is_dir(Path(name)), files.is_file(Path(name))
    if file:
        raise BadInput(
            f"{source}: a file, not a dataset: give {text_files.notation(Path(name), str(source))}:PATH"
        )
    with named(source):
        saved = local and is_saved(Path(name))
    found = _saved_to_disk(source, name) if saved else _loaded(source, name, local)
    with as_bad_input(source, "is the dataset whole?"):
        check_columns(source, columns, found.column_names)
        wanted = found.column_names if columns is None else list(columns)
        for table in found.select_columns(wanted).with_format("arrow").iter(ROWS):
            yield from plain(table.to_pylist())


def tfds(source: Source, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a prepared directory, or of a name in the catalogue or prepared under TFDS_DATA_DIR."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise BadInput(
            f"{source}: needs tensorflow-datasets: pip install 'sppo_jax[tfds]', in the repository '.[tfds]'"
        ) from None

    advice = "give a directory that was prepared with file_format=array_record, or a name of its catalogue"
    with as_bad_input(source, advice):
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
    with as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        found = builder.as_data_source(split=source.split)
    names = list(builder.info.features or ())
    check_columns(source, columns, names)
    with as_bad_input(source, "is the dataset whole?"):
        for index in range(len(found)):
            row = found[index]
            yield plain({column: row[column] for column in columns or names})


def is_saved(path: Path) -> bool:
    """Return whether `datasets` saved a directory to disk."""
    return any(files.is_file(path / name) for name in SAVED)


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
        with as_bad_input(source, functools.partial(_advice, unreachable), reason=not unreachable):
            builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
            _check_revision(source, revision, builder)
            builder.download_and_prepare()
    splits = ", ".join(builder.info.splits or ())
    with as_bad_input(source, f"split {source.split!r} cannot be read; there are {splits}", reason=False):
        return builder.as_dataset(split=source.split)


def _saved_to_disk(source: Source, name: str) -> Any:
    """Return the split of a directory that `save_to_disk` wrote. One that holds no splits is read whole, as a file is."""
    import datasets

    with as_bad_input(source, "is the dataset whole?"):
        found = datasets.load_from_disk(os.path.abspath(name))
    if isinstance(found, datasets.Dataset):
        if source.split not in (*NO_SPLIT, str(found.split)):
            raise BadInput(f"{source}: it has no splits; leave out the split {source.split!r}")
        return found
    with as_bad_input(
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


def _check_revision(source: Source, revision: str, builder: Any) -> None:
    """Raise BadInput if the library returned another revision, as it does for a cached dataset without a network."""
    if not revision or not type(builder).__module__.endswith(".cache.cache") or builder.hash == revision:
        return
    raise BadInput(
        f"{source}: the hub cannot be reached and the cache holds revision {builder.hash}; "
        f"to use that one, put it after the @"
    )


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
