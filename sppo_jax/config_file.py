"""Configuration files: read with overrides, and written. A key that is unknown or a value of the wrong type is refused."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from sppo_jax.config import Config, knobs, type_name, validate
from sppo_jax.errors import BadInput, one_line


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Return the configuration: the defaults, then each YAML file in turn, then `--section.key value` overrides.

    Raises BadInput that names the file, the key and the nearest valid key.
    """
    raw: dict[str, Any] = {}
    for file in files:
        _merge(raw, _read_yaml(Path(file)))
    for key, value in _parse_overrides(overrides):
        *sections, leaf = key.split(".")
        nested: dict[str, Any] = {leaf: value}
        for section in reversed(sections):
            nested = {section: nested}
        _check_keys(nested, f"--{key}")
        _merge(raw, nested)
    try:
        config = draccus.decode(Config, raw)
    except Exception as error:
        # draccus raises several kinds of exceptions; the first line of each names key, value and type.
        first, *details = str(error).splitlines()
        tried = f" {' or '.join(d.strip() for d in details)}" if first.endswith(":") else ""
        raise BadInput(f"configuration: {first}{tried}") from None
    validate(config)
    return config


def dump(config: Config) -> str:
    """The resolved configuration as YAML, from which `load` returns the same configuration."""
    return yaml.safe_dump(draccus.encode(config), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: not YAML: {one_line(error)}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise BadInput(f"--config {path}: expected sections and keys, found a {type(raw).__name__}")
    _check_keys(raw, str(path))
    return raw


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise BadInput(f"unexpected argument {word!r}: overrides read --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise BadInput(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            verbatim = {k for k, kind, *_ in knobs() if kind == "str"}
            pairs.append((key, text if key in verbatim else yaml.safe_load(text)))
        except yaml.YAMLError:
            pairs.append((key, text))
    return pairs


def _check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Raise BadInput for unknown sections and keys, and for values that draccus would convert silently."""
    sections = {f.name: f for f in dataclasses.fields(Config)}
    for name, value in raw.items():
        if name not in sections:
            raise BadInput(f"{where}: unknown key {name!r}{_nearest(str(name), ())}")
        kind = sections[name].type
        if not dataclasses.is_dataclass(kind):
            _check_value(where, str(name), value, kind)
            continue
        if not isinstance(value, dict):
            raise BadInput(f"{where}: {name} is a section of keys, found {value!r}")
        keys = {f.name: f.type for f in dataclasses.fields(kind)}
        for key, leaf in value.items():
            if key not in keys:
                raise BadInput(f"{where}: unknown key '{name}.{key}'{_nearest(f'{name}.{key}', tuple(keys))}")
            _check_value(where, f"{name}.{key}", leaf, keys[key])


def _check_value(where: str, key: str, value: Any, kind: Any) -> None:
    if value is None or isinstance(value, (dict, list)):
        raise BadInput(f"{where}: {key} needs a {type_name(kind)}, found {value!r}")
    if isinstance(value, bool) and kind is not bool:
        raise BadInput(f"{where}: {key} needs a {type_name(kind)}, found {str(value).lower()}")


def _nearest(key: str, siblings: tuple[str, ...]) -> str:
    """The end of an error line about an unknown key: the nearest key, else the keys or sections that exist."""
    names = [k for k, *_ in knobs()]
    match = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    leaf = key.rsplit(".", 1)[-1]
    if not match:
        # The right name in the wrong section, or without its section.
        match = [k for k in names if k.rsplit(".", 1)[-1] == leaf]
    if not match and siblings:
        return f"; its section has {', '.join(siblings)}"
    sections = ", ".join(f.name for f in dataclasses.fields(Config))
    return f"; did you mean '{match[0]}'?" if match else f"; sections are {sections}"


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
