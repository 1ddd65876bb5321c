"""The text of one value, from a file or the command line, becomes what its knob holds; and the names of knobs.

Texts are read here and nowhere else: whole numbers are decimal, and a value means what a person reads or is refused.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from sppo_jax.config import Config, is_list, is_mapping, kinds, knobs
from sppo_jax.errors import BadInput
from sppo_jax.settings import mapping

# Digits in groups of three, such as 1_000, are the one other way to write a number.
GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:_[0-9]{3})+(?![0-9_])")
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(
    r"[+-]?\.?(?:inf|infinity|nan)", re.IGNORECASE
)  # read, so that their range refuses them
NULL = ("", "~", "null", "Null", "NULL")  # nothing at all, where a YAML file has them without quotes
MOST_DIGITS = 300
SHOWN = 60  # characters of a refused value


# Names that TRL and transformers have for our knobs, and what differs.
OTHERS = {
    "beta": ("fit.eta", ", which is 1 / beta: for beta 0.1 set it to 10"),
    "num_generations": ("sampling.responses", ""),
    "max_completion_length": ("sampling.max_new_tokens", ""),
    "max_prompt_length": ("prompts.max_length", ""),
    "per_device_train_batch_size": (
        "fit.global_batch",
        ", the prompts of an update on all devices together; their memory decides how many are computed at once",
    ),
    "gradient_accumulation_steps": (
        "fit.global_batch",
        ", the prompts of an update; how many are computed at once follows from the memory",
    ),
    "num_train_epochs": ("fit.epochs", ", of each iteration; set fit.schedule_epochs as well"),
    "warmup_ratio": ("fit.warmup", ""),
    "lr": ("fit.learning_rate", ", of RMSProp, whose first steps are ten times the rate"),
    "loss_type": ("fit.loss", ""),
    "gradient_checkpointing": ("fit.remat", ""),
    "model_name_or_path": ("model.path", ""),
    "lora_r": ("model.lora_rank", ""),
    "bf16": ("model.compute_dtype", ""),
    "fp16": ("model.compute_dtype", ""),
    "dtype": ("model.compute_dtype", ""),
    "torch_dtype": ("model.compute_dtype", ""),
    "dataset_name": ("prompts.source", ", with its kind before it, as hf:NAME or jsonl:PATH"),
    "reward_model_path": ("judge.path", ", or judge.backend for a judge of your own"),
    "output_dir": ("out", ""),
    "save_steps": ("fit.checkpoint_every", ", in updates"),
    "logging_steps": ("log.every", ", in updates"),
    "report_to": ("log.to", ""),
}


class Text(NamedTuple):
    """The text of a value."""

    text: str
    where: str  # the file and line, or the flag
    # Of YAML and without quotes, where null and an empty place mean nothing at all.
    plain: bool = False

    def of(self, key: str) -> str:
        """Return the beginning of a line about this value of the knob `key`."""
        return self.where if self.where == f"--{key}" else f"{self.where}: {key}"


def value(key: str, given: Text) -> Any:
    """Return what the knob `key` holds. Raises BadInput where the text is not of its type or cannot be a text at all."""
    kind, text = kinds()[key], given.text
    if kind is str:
        if given.plain and text in NULL:
            raise BadInput(f"{given.of(key)} needs a text, found nothing; the empty text is ''")
        _check_characters(key, given)
        return text
    if is_mapping(kind):
        _check_characters(key, given)
        return mapping.read(text, given.of(key))
    if is_list(kind):
        return _names(key, given)
    text = text.strip()
    options = get_args(kind) if get_origin(kind) is not Literal else (kind,)
    choices = tuple(str(c) for option in options for c in get_args(option))
    if text in choices:
        return text
    if float in (kind, *options):
        if (number := _number(text)) is not None:
            return number
    elif kind is int and WHOLE.fullmatch(digits := _ungrouped(text)):
        if len(digits) <= MOST_DIGITS:
            return int(digits)
        raise BadInput(f"{given.of(key)} needs a whole number, found one of {len(digits)} digits")
    advice = _advice(kind, text, choices) or default(key)
    raise BadInput(f"{given.of(key)} needs {needed(kind)}, found {_shown(text)}{advice}")


def _names(key: str, given: Text) -> list[str]:
    """Return the names of a list, with or without brackets: `[a, b]` or `a, b`. Raises BadInput for a name that is no choice."""
    (kind,) = get_args(kinds()[key])
    text = given.text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    names = [] if text in NULL else [name.strip().strip("'\"") for name in text.split(",")]
    for i, name in enumerate(names):
        if name not in get_args(kind):
            near = nearest(name, get_args(kind))
            raise BadInput(
                f"{given.of(key)} needs {needed(kind)}, or several as [a, b], found {_shown(name)}{near}"
            )
        if name in names[:i]:
            raise BadInput(f"{given.of(key)} has {name} a second time; keep one of them")
    return names


def needed(kind: Any) -> str:
    """Return what a knob of this type accepts, in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_args(kind):
        return " or ".join(
            needed(option).removeprefix("one of ") if get_origin(option) is Literal else needed(option)
            for option in get_args(kind)
        )
    return {int: "a whole number", float: "a number", str: "a text"}[kind]


def default(key: str) -> str:
    """Return "; the default is X" for a knob that holds a number or a choice; empty for another one."""
    value = next(knob.default for knob in knobs() if knob.key == key)
    return f"; the default is {value}" if kinds()[key] is not str and value != {} else ""


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean 'X'?" with the name among `names` that is most like `name`; empty where none is like it.

    `prefix` is put before X.
    """
    known = {other.lower(): other for other in names}
    match = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return f"; did you mean '{prefix}{known[match[0]]}'?" if match else ""


def unknown(key: str, flags: Iterable[str] = (), prefix: str = "") -> str:
    """Return the end of a line about an unknown key: the nearest knob or flag, else the keys or sections that exist.

    `flags`: names of the command's own flags, without dashes. `prefix` is put before a name.
    """
    section, dot, _ = key.rpartition(".")
    knobs, top = kinds(), tuple(Config.__dataclass_fields__)
    # The right name in the wrong section, or without its section.
    leaf = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    if leaf in OTHERS:
        ours, why = OTHERS[leaf]
        return f"; here it is {prefix}{ours}{why}"
    same = [k for k in knobs if k.rsplit(".", 1)[-1] == leaf]
    if same and not nearest(key, flags):
        return f"; did you mean '{prefix}{same[0]}'?"
    if match := nearest(key, [*knobs, *flags, *(() if dot else top)], prefix):
        return match
    if siblings := [k for k in knobs if dot and k.startswith(f"{section}.")]:
        return f"; its section has {', '.join(k.split('.')[1] for k in siblings)}"
    return f"; keys and sections are {', '.join(top)}"


def _number(text: str) -> float | None:
    plain = _ungrouped(text)
    if NUMBER.fullmatch(plain):
        return float(plain)
    return float(plain.replace(".", "")) if NOT_FINITE.fullmatch(plain) else None


def _ungrouped(text: str) -> str:
    """Return the text without the underscores of digits in groups of three."""
    return GROUPED.sub(lambda found: found[0].replace("_", ""), text, count=1)


def _advice(kind: Any, text: str, choices: tuple[str, ...]) -> str:
    """Return the end of the line about a value: the nearest choice, or the whole number that was meant."""
    if choices:
        return nearest(text, choices)
    number = _number(text)
    if kind is int and number is not None and number == number // 1 and abs(number) < 1e15:
        return f"; write {int(number)}"
    return "; write it in decimal digits" if number is None and text[:1].isdigit() else ""


def _check_characters(key: str, given: Text) -> None:
    """Raise BadInput for NUL, which no path has, and for halves of characters, which no file can be written with."""
    if "\0" in given.text:
        raise BadInput(f"{given.of(key)} has a NUL character in it: {_shown(given.text)}")
    try:
        given.text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(f"{given.of(key)} is not UTF-8 text: {_shown(given.text)}") from None


def _shown(text: str) -> str:
    if not text:
        return "nothing"
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}... ({len(text)} characters)"
