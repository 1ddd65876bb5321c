"""The embedded default: a small world, a policy and a preference model for it, so that everything runs anywhere.

The files under data/ were made by build.py; see data/README.md.
"""

from collections.abc import Callable
from pathlib import Path

from sppo_jax import hub
from sppo_jax.config import EMBEDDED
from sppo_jax.errors import BadInput

_DATA = Path(__file__).resolve().parent / "data"


def path(name: str) -> Path:
    """Where an embedded entry lies: "policy", "pairrm", "prompts" or a file below, "prompts/train_1.jsonl".

    Raises BadInput, naming the entries, when there is no such.
    """
    found = (_DATA / name).resolve()
    if not name or not found.is_relative_to(_DATA) or not found.exists():
        entries = sorted(entry.name for entry in _DATA.glob("*") if entry.is_dir())
        raise BadInput(
            f"nothing named {name!r} is embedded; there are: {', '.join(entries) or 'none (make tiny)'}"
        )
    return found


def resolve(source: str) -> Path:
    """`embedded:NAME` as a path inside the package, anything else as the path it is."""
    scheme, colon, name = source.partition(":")
    return path(name) if colon and scheme == "embedded" else Path(source)


def fetch(name: str, revision: str | None = None, *, tell: Callable[[str], None] = hub.say) -> hub.Snapshot:
    """The checkpoint that a user names: embedded:NAME, a directory, or a name on the hub (`hub.fetch`)."""
    if name.startswith(EMBEDDED):
        return hub.Snapshot(resolve(name), name, None)
    return hub.fetch(name, revision, tell=tell)
