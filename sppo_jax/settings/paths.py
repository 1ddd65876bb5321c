"""The knobs that hold paths, and `~` in them."""

from sppo_jax import files
from sppo_jax.errors import BadInput

PATHS = ("out", "model.path", "judge.path", "judge.python")
NEEDED = {"out": "the run directory", "model.path": "a directory, a name on the hub, or embedded:policy"}
# Their path follows a scheme, as jsonl:PATH.
SOURCES = ("prompts.source", "prompts.heldout", "pairs.source", "responses.source")


def expand(key: str, text: str) -> str:
    """Return a knob's text with the home directory in place of `~`, if the knob holds a path.

    Raises BadInput where no home is known, and where a path that is needed is empty.
    """
    if key in NEEDED and not text.strip():
        raise BadInput(f"{key} is empty: name {NEEDED[key]}")
    scheme, path = "", text
    if key in SOURCES and ":" in text:
        before, colon, path = text.partition(":")
        scheme = before + colon
    if key not in (*PATHS, *SOURCES) or not path.startswith("~"):
        return text
    try:
        return scheme + files.expand(path)
    except BadInput as error:
        raise BadInput(f"{key}={error}") from None
