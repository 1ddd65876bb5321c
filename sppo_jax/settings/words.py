"""The words of a command line: a command's own flags, and overrides of the configuration."""

from collections.abc import Iterable, Mapping, Sequence

from sppo_jax.config import is_mapping, kinds
from sppo_jax.errors import BadInput
from sppo_jax.settings.values import default, unknown


def split(words: Sequence[str], flags: Mapping[str, bool]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the (flag, value) of a command's own flags, and the overrides as words `--section.key=value`, in order.

    `flags`: whether each of the command's own flags, such as "--config", takes a value; one without has "". Raises
    BadInput for a word that is neither, and for a flag without its value: a word that begins with -- is the next flag,
    and a value that does so is written --section.key=--value.
    """
    own: list[tuple[str, str]] = []
    overrides: list[str] = []
    todo = list(words)
    while todo:
        word = todo.pop(0)
        flag, equals, value = word.partition("=")
        takes_value = flags.get(flag, True)
        if flag not in flags:
            _check_override(flag, word, flags)
        if equals and not takes_value:
            raise BadInput(f"{flag} takes no value, found {value!r}")
        if takes_value and not equals:
            value = _next(flag, todo)
        if flag in flags and takes_value and not value:
            raise BadInput(f"{flag} needs a value, found an empty one")
        if flag in flags:
            own.append((flag, value))
        else:
            overrides.append(f"{flag}={value}")
    return own, overrides


def _next(flag: str, todo: list[str]) -> str:
    """Take the value of `flag` from the words that follow it."""
    if not todo:
        key = flag.removeprefix("--")
        raise BadInput(f"{flag} needs a value{default(key) if key in kinds() else ''}")
    if todo[0].startswith("--"):
        raise BadInput(
            f"{flag} needs a value, and the next word is the flag {todo[0]}; if that is the value, write {flag}={todo[0]}"
        )
    return todo.pop(0)


def _check_override(flag: str, word: str, flags: Iterable[str]) -> None:
    """Raise BadInput unless `flag` names a knob."""
    knobs, own = kinds(), [name.removeprefix("--") for name in flags]
    if not flag.startswith("--"):
        raise BadInput(f"unexpected argument {word!r}: {_meant(word, own)}")
    key = flag.removeprefix("--")
    if key in knobs:
        return
    above, _, name = key.rpartition(".")
    if above in knobs and is_mapping(knobs[above]):
        raise BadInput(
            f"{flag} is a name in a mapping: write --{above} '{{{name}: VALUE}}', with all its names"
        )
    if keys := [k for k in knobs if k.startswith(f"{key}.")]:
        names = ", ".join(k.split(".")[1] for k in keys)
        raise BadInput(f"{flag} is a section: write --{keys[0]} VALUE; its keys are {names}")
    raise BadInput(f"unknown flag {flag}{unknown(key, [*own, 'help'], '--')}; see --help")


def _meant(word: str, own: Sequence[str]) -> str:
    """Return what to write instead of a word that is not a flag."""
    if word.endswith((".yaml", ".yml")) and "config" in own:
        return f"a file is given as --config {word}"
    key = word.partition("=")[0].lstrip("-\N{EN DASH}\N{EM DASH}")
    if key in kinds() or key in own:
        return f"did you mean --{word.lstrip('-' + chr(0x2013) + chr(0x2014))}?"
    return "flags are --section.key value" + "".join(f", --{name}" for name in own) + "; see --help"
