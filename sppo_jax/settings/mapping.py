"""The text of a knob that holds a mapping, in YAML's notation: {name: value}, of truths, numbers and texts."""

import re
from typing import Any

import yaml

from sppo_jax.errors import BadInput, one_line

TRUTHS = {"true": True, "false": False}
UNCLEAR = ("yes", "no", "on", "off", "y", "n")  # truths to some readers of YAML, and texts to others
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?")
NOTHING = ("", "~", "null")


class Loader(yaml.SafeLoader):
    """Composes nodes, and refuses tags, which would give a value another type than a person reads."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.MarkedYAMLError(
                problem=f"the tag {tag} is not read; write a plain value", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


def read(text: str, where: str) -> dict[str, Any]:
    """Return {name: value} of a text; empty for an empty one. `where` begins the line of the BadInput about another text."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise BadInput(f"{where} is not a mapping: {one_line(Exception(problem))}; {_example()}") from None
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in NOTHING):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{where} needs a mapping, found {text.strip()[:60]!r}; {_example()}")
    found: dict[str, Any] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise BadInput(
                f"{where}: its values are truths, numbers and texts, no lists or mappings; {_example()}"
            )
        if name.value in found:
            raise BadInput(f"{where}: {name.value} is there a second time; keep one of them")
        found[name.value] = _value(value, f"{where}: {name.value}")
    return found


def written(value: dict[str, Any]) -> str:
    """Return the text on one line from which `read` returns the mapping."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False).strip()


def _value(node: yaml.ScalarNode, where: str) -> bool | int | float | str:
    text = node.value
    if node.style is not None:
        return str(text)
    if text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    if text.lower() in UNCLEAR:
        raise BadInput(
            f"{where}: {text} is not clear; write true or false, or '{text}' in quotes for the text"
        )
    if text.lower() in NOTHING:
        raise BadInput(f"{where} needs a value; the empty text is ''")
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else str(text)


def _example() -> str:
    return "write '{name: value}', such as '{enable_thinking: false}'"
