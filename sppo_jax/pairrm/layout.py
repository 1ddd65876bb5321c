"""Where a PairRM lies on disk: the three files of the PairRM-hf layout, and the hash that names what they hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput

FILES = ("config.json", "tokenizer.json", "model.safetensors")
_HOW_TO_GET = "the PairRM-hf layout is expected, as in the repository llm-blender/PairRM-hf"


def find(path: str | Path) -> Path:
    """The directory `path`, once it is known to hold every file of the layout. Raises BadInput naming what is not there."""
    directory = Path(path)
    if not directory.is_dir():
        raise BadInput(f"PairRM: there is no directory {str(path)!r}; {_HOW_TO_GET}")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise BadInput(f"PairRM: {str(path)!r} lacks {', '.join(missing)}; {_HOW_TO_GET}")
    return directory


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a PairRM as a dict. Raises BadInput when it is not a DeBERTa-v2 with the pair head."""
    file = find(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"PairRM: {str(file)!r} is not JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "deberta-v2":
        raise BadInput(f"PairRM: {str(file)!r} has model_type {kind!r}, not 'deberta-v2'; {_HOW_TO_GET}")
    if config.get("n_tasks", 1) != 1:
        raise BadInput(f"PairRM: {str(file)!r} has n_tasks {config['n_tasks']}; only 1 is a preference")
    return config


def identity(path: str | Path) -> str:
    """`sha256:` and the hash of the three files and their names: equal exactly when the judge is."""
    directory = find(path)
    whole = hashlib.sha256()
    for name in FILES:
        with (directory / name).open("rb") as file:
            whole.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{whole.hexdigest()}"
