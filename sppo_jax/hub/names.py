"""What users name: `embedded:NAME`, a directory, or `owner/repo@revision` on the hub."""

from collections.abc import Callable
from pathlib import Path

from sppo_jax import command
from sppo_jax.config import EMBEDDED
from sppo_jax.errors import BadInput
from sppo_jax.hub import repositories

_DATA = Path(__file__).resolve().parents[1] / "tiny" / "data"


def path(name: str) -> Path:
    """The path of an embedded entry: "policy", "pairrm", "prompts" or a file below, "prompts/train_1.jsonl".

    Raises BadInput, naming the entries, when there is none of this name.
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
    return path(source.removeprefix(EMBEDDED)) if source.startswith(EMBEDDED) else Path(source)


def fetch(
    name: str, revision: str | None = None, *, tell: Callable[[str], None] = command.say
) -> repositories.Snapshot:
    """A snapshot of the checkpoint that a user names: `embedded:NAME`, a directory, or a name on the hub."""
    if name.startswith(EMBEDDED):
        return repositories.Snapshot(resolve(name), name, None)
    return repositories.fetch(name, revision, tell=tell)
