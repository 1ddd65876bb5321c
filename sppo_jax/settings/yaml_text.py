"""A configuration file as the texts of its values: YAML without its types, tags and merging.

PyYAML's own types would read 010 as 8, 12:30 as 750 and 2024-01-01 as a date, and the last of two equal keys would win.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sppo_jax import files
from sppo_jax.config import is_list, is_mapping, kinds
from sppo_jax.errors import BadInput, one_line
from sppo_jax.settings.mapping import Loader
from sppo_jax.settings.values import NULL, Text, unknown

MOST_BYTES = (
    1 << 18
)  # of a file; ours have two thousand, and a model's weights given by mistake are refused at once


def read(path: Path) -> dict[str, Text]:
    """Return {"section.key": text} of a file.

    Raises BadInput where it cannot be read, is not a mapping of known sections and keys, or has a key twice.
    """
    node = _compose(path)
    if node is None or _is_null(node):
        return {}
    found: dict[str, Text] = {}
    knobs = kinds()
    sections = {key.split(".")[0] for key in knobs if "." in key}
    for name, where, child in _entries(path, node, ""):
        if name in sections and _is_null(child) and not child.value:
            continue  # all its keys are commented out
        if name in sections:
            for key, place, leaf in _entries(path, child, name):
                found[key] = _text(key, place, leaf)
        else:
            found[name] = _text(name, where, child)
    return found


def _compose(path: Path) -> Any:
    """Return the root of a file's one document; None for an empty file."""
    text = files.decode(_bytes(path), path)
    try:
        return yaml.compose(text, Loader=Loader)
    except RecursionError:
        raise BadInput(f"--config {path}: not a configuration: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = error.problem or error.context or "it cannot be read"
        if "single document" in str(error.context):
            problem = "several documents (---); put each into a file of its own, and give --config for each"
        raise BadInput(
            f"--config {path}: not YAML: {f'line {mark.line + 1}: ' if mark else ''}{one_line(Exception(problem))}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise BadInput(
            f"--config {path}: not a configuration: it has the character U+{error.character:04X}"
        ) from None
    except Exception as error:  # what PyYAML lets through, such as OverflowError of an escape
        raise BadInput(f"--config {path}: not YAML: {one_line(error)}") from None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from None
    except ValueError:  # NUL, or half of a character
        raise BadInput(f"--config {str(path)!r}: not a possible name of a file") from None
    if len(data) > MOST_BYTES:
        raise BadInput(f"--config {path}: not a configuration: it has more than {MOST_BYTES} bytes")
    return data


def _entries(path: Path, node: Any, section: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (full key, file and line, value) of a mapping of known keys. Raises BadInput for others, and for a key twice."""
    prefix = f"{section}." if section else ""
    if not isinstance(node, yaml.MappingNode):
        what = f"{section} is a section of keys" if section else "expected sections and keys"
        raise BadInput(f"{_where(path, node)}: {what}, found {_found(node)}")
    seen: dict[str, str] = {}
    for key_node, child in node.value:
        where = _where(path, key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadInput(f"{where}: {_found(key_node)} cannot be a key")
        name = key_node.value
        if name == "<<":
            raise BadInput(f"{where}: merging (<<) is not read; write out the keys that it would bring")
        key = prefix + name
        if key in seen:
            raise BadInput(f"{where}: {key} is there a second time, after {seen[key]}; keep one of them")
        seen[key] = f"line {key_node.start_mark.line + 1}"
        if not _is_known(key, section):
            raise BadInput(f"{where}: unknown key {key!r}{_unknown(key, section)}")
        yield key, where, child


def _is_known(key: str, section: str) -> bool:
    return key in kinds() if section else any(k.split(".")[0] == key for k in kinds())


def _unknown(key: str, section: str) -> str:
    if not section and key in kinds():
        section, leaf = key.split(".", 1)
        return f"; in a file it is the key {leaf} of the section {section}: {section}: {{{leaf}: VALUE}}"
    return unknown(key)


def _text(key: str, where: str, node: Any) -> Text:
    if isinstance(node, yaml.MappingNode) and is_mapping(kinds()[key]):
        start, end = node.start_mark, node.end_mark  # its first line begins in the column of the others
        return Text(" " * start.column + str(start.buffer)[start.pointer : end.pointer], where)
    if isinstance(node, yaml.SequenceNode) and is_list(kinds()[key]):
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode) or _is_null(item):
                raise BadInput(f"{where}: {key} is a list of names, found {_found(item)} in it")
        return Text(f"[{', '.join(item.value for item in node.value)}]", where)
    if not isinstance(node, yaml.ScalarNode):
        raise BadInput(f"{where}: {key} needs one value, found {_found(node)}")
    block = node.style in ("|", ">")  # ends with a line break, which nobody means
    return Text(node.value.rstrip("\n") if block else node.value, where, plain=node.style is None)


def _is_null(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULL


def _found(node: Any) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if _is_null(node) else repr(node.value[:60])
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _where(path: Path, node: Any) -> str:
    return f"{path}, line {node.start_mark.line + 1}"
