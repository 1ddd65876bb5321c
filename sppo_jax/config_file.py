"""Configurations: read from files with overrides, and written. A key that is unknown or a value of the wrong type is refused."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sppo_jax import files as file_system
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.settings import checks, embedded, paths, values, words, yaml_text
from sppo_jax.settings.values import Text

SHIPPED = (
    Path(__file__).parent / "configs"
)  # a link in the source tree, a folder where the package is installed


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Return the configuration: the defaults, then each YAML file in turn, then `--section.key value` overrides.

    A file is a path, or the name of a shipped configuration, such as "quickstart" (`find`). `~` is expanded in its paths, and the embedded judge and prompts are filled in beside the embedded policy. Raises
    BadInput that names the file, the key, and the nearest valid key or value.
    """
    texts: list[tuple[str, Text]] = []
    for file in files:
        texts += yaml_text.read(find(file)).items()
    for word in words.split(overrides, {})[1]:
        flag, _, text = word.partition("=")
        texts.append((flag.removeprefix("--"), Text(text, flag)))
    nested: dict[str, Any] = {}
    for key, given in texts:
        value = values.value(key, given)
        if isinstance(value, str):
            value = paths.expand(key, value)
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    return checked(_made(nested))


def checked(config: Config) -> Config:
    """Return a configuration that was made in Python as `load` returns it: embedded parts filled in. Raises BadInput."""
    config = embedded.resolve(config)
    checks.validate(config)
    return config


def find(file: str | Path) -> Path:
    """Return the path of a configuration file: the file of that path, else the shipped one of that name.

    Raises BadInput for a name that is neither, with the nearest names.
    """
    name = str(file)
    path = Path(file_system.expand(name))
    if file_system.exists(path) and not file_system.is_dir(path):
        return path
    if path.name != name or path.suffix not in ("", ".yaml"):
        if not file_system.exists(path) and (near := file_system.near(path)):
            raise BadInput(f"--config {name}: no such file{near}")
        return path
    shipped = sorted(known.stem for known in SHIPPED.glob("*.yaml"))
    if path.stem in shipped:
        return SHIPPED / f"{path.stem}.yaml"
    near = file_system.near(path)
    if not near and (match := difflib.get_close_matches(path.stem, shipped, n=1)):
        near = f"; did you mean {match[0]}?"
    raise BadInput(
        f"--config {name}: no such file, and no shipped configuration of that name"
        f"{near or '; there are ' + ', '.join(shipped)}"
    )


def dump(config: Config) -> str:
    """The resolved configuration as YAML, from which `load` returns the same configuration.

    Parts that were filled in beside the embedded policy are empty, as if they were not named: beside a model of the user's own
    the file then names no embedded part.
    """
    encoded = dataclasses.asdict(config)
    for key in embedded.unnamed(config):
        section, name = key.split(".")
        encoded[section][name] = ""
    return yaml.safe_dump(encoded, sort_keys=False)


def _made(nested: dict[str, Any]) -> Config:
    """The default configuration with these values, which have their knobs' types: {knob or section: value or {knob: value}}."""
    config = Config()
    sections = {
        name: dataclasses.replace(getattr(config, name), **given)
        for name, given in nested.items()
        if dataclasses.is_dataclass(getattr(config, name))
    }
    return dataclasses.replace(config, **(nested | sections))
