"""Options of a chat template, such as enable_thinking: written before its text, so that every rendering has them."""

import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from sppo_jax.errors import BadInput, one_line
from sppo_jax.settings.values import nearest

# What templates read that is not an option: transformers gives it, and the tokenizer its special tokens.
GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now",
}  # fmt: skip


def apply(tokenizer: Any, options: Mapping[str, Any], where: str) -> None:
    """Put options before the chat template that the tokenizer renders with, in memory alone.

    Raises BadInput, whose line begins with `where`, for one that the template never reads.
    """
    template = tokenizer.get_chat_template()
    names = _read_by(template, where) - GIVEN - set(tokenizer.special_tokens_map)
    for name in options:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise BadInput(
                f"{where}: the chat template reads no option {name!r}{nearest(name, names) or f'; it reads {known}'}"
            )
    # A tag removes its own line's end, as the template's first line had been the first.
    sets = "".join(f"{{% set {name} = {_literal(value, where)} %}}\n" for name, value in options.items())
    found = tokenizer.chat_template
    tokenizer.chat_template = (
        found | {"default": sets + template} if isinstance(found, dict) else sets + template
    )


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, by which templates mark what an assistant says."""

    tags = {"generation"}  # noqa: RUF012  (the name and the type are of jinja)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _read_by(template: str, where: str) -> set[str]:
    """Return the names that a template reads and does not define itself."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return set(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise BadInput(f"{where}: the chat template fails: {one_line(error)}") from None


def _literal(value: Any, where: str) -> str:
    """Return a value as Jinja reads it."""
    if not isinstance(value, bool | int | float | str):
        raise BadInput(f"{where}: options of a chat template are truths, numbers and texts, found {value!r}")
    return json.dumps(value, ensure_ascii=False)
