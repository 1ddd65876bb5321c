"""The names that users give: `embedded:NAME`, a directory, or `owner/repo@revision` on the hub."""

from collections.abc import Callable
from pathlib import Path

from sppo_jax.command import say
from sppo_jax.config import EMBEDDED
from sppo_jax.errors import BadInput
from sppo_jax.hub import repositories

_DATA = Path(__file__).resolve().parents[1] / "tiny" / "data"


def path(name: str) -> Path:
    """Return the path of an embedded entry: "policy", "pairrm", "prompts", or a file below ("prompts/train_1.jsonl").

    Raises BadInput, with the names of all entries, where there is no such entry.
    """
    found = (_DATA / name).resolve()
    if not name or not found.is_relative_to(_DATA) or not found.exists():
        entries = sorted(entry.name for entry in _DATA.glob("*") if entry.is_dir())
        raise BadInput(
            f"nothing named {name!r} is embedded; there are: {', '.join(entries) or 'none (make tiny)'}"
        )
    return found


def resolve(source: str) -> Path:
    """Return the path that a user's name means: inside the package for `embedded:NAME`, else the name itself."""
    return path(source.removeprefix(EMBEDDED)) if source.startswith(EMBEDDED) else Path(source)


def fetch(
    name: str, revision: str | None = None, *, tell: Callable[[str], None] = say
) -> repositories.Snapshot:
    """Return a snapshot of the checkpoint `name`: `embedded:NAME`, a directory, or `owner/repo[@revision]` on the hub.

    `revision` overrides the one in `name`; `tell` receives progress lines. Raises BadInput as `repositories.fetch` does.
    """
    if name.startswith(EMBEDDED):
        return repositories.Snapshot(resolve(name), name, None)
    return repositories.fetch(name, revision, tell=tell)
