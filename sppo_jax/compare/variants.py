"""The variants of a comparison, as the command line names them: files, knobs over them, and grids of values."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sppo_jax.config import kinds
from sppo_jax.errors import BadInput

LONGEST = 200  # bytes of a variant's name, which is a directory's
OTHERS = re.compile(r"[^\w@.+,=-]+")  # characters of a name that its directory does not have
OURS = {
    "seed": "give --seeds 0 1 2",
    "out": "give --out DIR once, for all runs",
}  # knobs that the command sets


@dataclass(frozen=True)
class Variant:
    """One configuration of a comparison: `files` over the common ones, then `knobs`, as (key, text), over all of them."""

    name: str
    files: tuple[str, ...] = ()
    knobs: tuple[tuple[str, str], ...] = ()

    @property
    def directory(self) -> str:
        """The name of its directory."""
        return OTHERS.sub("_", self.name).replace(".", "_", self.name.startswith("."))

    @property
    def overrides(self) -> list[str]:
        """Its knobs as words of a command line."""
        return [f"--{key}={text}" for key, text in self.knobs]


def read(words: Sequence[str], grid: Sequence[str], common: Sequence[str]) -> list[Variant]:
    """The variants of --configs, or without any the `common` configuration, each with each combination of --grid's values.

    Raises BadInput for words that name none, for equal names, and for a knob that is given twice.
    """
    named = [_variant(word) for word in words] or [Variant(_joined(common) or "defaults")]
    axes = [_axis(word) for word in grid]
    found = []
    for variant in named:
        for point in itertools.product(*axes):
            name = [variant.name] if words or not point else []
            knobs = _distinct((*variant.knobs, *point), variant.name)
            found.append(Variant(",".join([*name, *map("=".join, point)]), variant.files, knobs))
    for i, variant in enumerate(found):
        _check_name(variant, found[:i])
    return found


def _variant(word: str) -> Variant:
    """The variant of a word [NAME=][FILE[+FILE ...]][,section.key=value ...]; before a knob that comes first the comma may be missing."""
    head, *rest = word.split(",")
    label, equals, names = head.partition("=")
    if not equals:
        label, names = "", head
    elif _is_knob(label):
        label, names, rest = "", "", [head, *rest]
    elif _is_knob(names.partition("=")[0]) and "=" in names:  # NAME=section.key=value
        names, rest = "", [names, *rest]
    files = names.split("+") if names else []
    if "" in files or not (label or files or rest):
        raise BadInput(f"--configs {word!r}: an empty name of a file; write FILE+FILE, or NAME=FILE")
    return Variant(
        label or ",".join([*filter(None, [_joined(files)]), *rest]),
        tuple(files),
        tuple(_knob("--configs", text) for text in rest),
    )


def _is_knob(text: str) -> bool:
    """Whether a text before = is a knob, or is meant as one, and not the name of a variant."""
    sections = {key.partition(".")[0] for key in kinds()}
    return text in kinds() or ("." in text and text.partition(".")[0] in sections)


def _joined(files: Sequence[str]) -> str:
    """What a variant of these files is called."""
    return "+".join(
        Path(file).stem if file.endswith((".yaml", ".yml")) else Path(file).name for file in files
    )


def _knob(flag: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(f"{flag}: {text!r} is not section.key=value")
    if key in OURS:
        raise BadInput(f"{flag}: {text}: {OURS[key]}")
    return key, value


def _axis(word: str) -> list[tuple[str, str]]:
    """The (key, text) of each value of a word section.key=V1,V2 of --grid."""
    key, values = _knob("--grid", word)
    texts = values.split(",")
    if "" in texts:
        raise BadInput(f"--grid {word}: an empty value; write {key}=V1,V2")
    return [(key, text) for text in texts]


def _distinct(knobs: Sequence[tuple[str, str]], name: str) -> tuple[tuple[str, str], ...]:
    """The knobs, unless one of them is there twice."""
    keys = [key for key, _ in knobs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise BadInput(f"variant {name}: {twice[0]} is given twice; keep one of the two")
    return tuple(knobs)


def _check_name(variant: Variant, before: Sequence[Variant]) -> None:
    name = variant.directory
    if not name.strip("._") or len(name.encode("utf-8", "replace")) > LONGEST:
        raise BadInput(
            f"variant {variant.name[:80]}: not a possible name of a directory; give it one, as NAME=FILE,section.key=value"
        )
    if any(name == other.directory for other in before):
        raise BadInput(f"variant {variant.name} is there twice; give one of them another name, as NAME=FILE")
