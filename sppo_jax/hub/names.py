"""The names that users give: `embedded:NAME`, a directory, or `owner/repo@revision` on the hub."""

import os
from collections.abc import Callable
from pathlib import Path

from sppo_jax import files
from sppo_jax.command import say
from sppo_jax.config import EMBEDDED
from sppo_jax.errors import BadInput
from sppo_jax.hub import adapters, repositories

_DATA = Path(__file__).resolve().parents[1] / "tiny" / "data"


def path(name: str) -> Path:
    """Return the path of an embedded entry: "policy", "pairrm", "prompts", or a file below ("prompts/train_1.jsonl").

    Raises BadInput, with the names of all entries, where there is no such entry.
    """
    found = (_DATA / name).resolve()
    if not name or not found.is_relative_to(_DATA) or not found.exists():
        entries = sorted(entry.name for entry in _DATA.glob("*") if entry.is_dir())
        raise BadInput(
            f"{EMBEDDED}{name}: not embedded; there are: {', '.join(entries) or 'none (make tiny)'}"
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
    if revision is None:
        check_export(name)
    return repositories.fetch(name, revision, tell=tell)


def check(name: str) -> None:
    """Raise BadInput for a name that can be no checkpoint: neither embedded, nor a directory, nor a name on the hub."""
    if name.startswith(EMBEDDED):
        resolve(name)
    elif not files.is_dir(Path(files.expand(name))):
        repositories.parse(name)


def check_export(name: str) -> None:
    """Raise BadInput, with the path to give, where a run's directory, or an iteration's, is named in place of an export."""
    _check_iteration(name)
    root = Path(files.expand(name))
    # os.path.isdir is False also for names that no directory can have, about which `repositories` has lines of its own.
    if not os.path.isdir(root) or files.is_file(root / "config.json"):
        return
    if files.is_file(root / "export" / "config.json"):
        raise BadInput(f"{name}: one iteration of a run; its policy is {root / 'export'}")
    found = [p.parent for p in root.glob("iter_*/export/config.json")]
    if found:
        latest = max(found, key=lambda export: (len(export.parent.name), export.parent.name))
        others = f", the latest of {len(found)}" if found[1:] else ""
        raise BadInput(f"{name}: a run directory, not a model; give an export in it: {latest}{others}")
    if files.is_file(root / "config.yaml") and files.is_file(root / "manifest.json"):
        raise BadInput(
            f"{name}: a run directory without an export yet, not a model; let its first iteration end"
        )
    if not files.exists(root / adapters.CONFIG):  # `repositories` says more of an adapter
        raise BadInput(
            f"{name}: no config.json in it; a model is a Hugging Face directory, a name on the hub (owner/repo) or "
            f"{EMBEDDED}policy"
        )


def _check_iteration(name: str) -> None:
    """Raise BadInput, with the path to give, for OUT@T, which `evaluate` alone reads."""
    out, at, number = name.rpartition("@")
    if at and number.isdigit() and files.is_file(Path(files.expand(out)) / "config.yaml"):
        raise BadInput(
            f"{name}: an iteration of a run; give its policy: {Path(out) / f'iter_{number}' / 'export'}"
        )
