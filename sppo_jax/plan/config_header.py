"""Writes a plan's figures into the first comment of a configuration's file, with a digest of the configuration."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from sppo_jax import config as configuration
from sppo_jax.config import Config
from sppo_jax.files import read_text, replacing
from sppo_jax.settings import resuming

BEGIN, END = "# Planned", "# (end of the plan)"
# Prefixes of knobs that no plan depends on.
NOT_PLANNED = (
    "out",
    "seed",
    "log.",
    "distributed.",
    "prompts.source",
    "prompts.heldout",
    "prompts.split",
    "prompts.column",
    "prompts.turns",
    "model.template",
    "judge.strip",
    "responses.split",
    "responses.column",
)


def digest(config: Config) -> str:
    """Digest of all knobs that a plan may depend on, 12 hexadecimal digits."""
    knobs = configuration.flat(config)
    kept = {
        key: value
        for key, value in knobs.items()
        if not key.startswith(NOT_PLANNED) and (key, value) not in resuming.LATER.items()
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def write(path: Path, config: Config, lines: Sequence[str]) -> None:
    """Write the figures, one line each, into the file, in place of any that it has."""
    text = read_text(path)
    block = "\n".join(
        [f"{BEGIN} by `make plan` (configuration {digest(config)}):", *(f"#   {x}" for x in lines), END]
    )
    old = re.search(rf"^{BEGIN}.*?^{re.escape(END)}$", text, re.DOTALL | re.MULTILINE)
    if old:
        text = text.replace(old[0], block)
    else:  # after the first comment
        rows = text.splitlines()
        first = next((i for i, row in enumerate(rows) if not row.startswith("#")), len(rows))
        text = "\n".join([*rows[:first], block, *rows[first:]]) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def planned(path: Path) -> str | None:
    """The digest of the configuration for which the file's figures were made; None: the file has no figures."""
    found = re.search(rf"^{BEGIN} .*\(configuration ([0-9a-f]+)\)", read_text(path), re.MULTILINE)
    return found and found[1]
