"""Where a PairRM lies on disk: its files, its options, and the hash that names what they hold."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput

FILES = ("config.json", "tokenizer.json", "model.safetensors")
_HOW_TO_GET = "the PairRM-hf layout is expected, as in the repository llm-blender/PairRM-hf"


@dataclass(frozen=True)
class Checkpoint:
    """A PairRM on this machine's disk, known to be complete."""

    directory: Path
    config: dict[str, Any]  # options of transformers' DebertaV2Config, and those of the pair head
    weights: Path  # safetensors with pretrained_model.* and head_layer.{1,4}.*
    tokenizer: Path
    backbone: Path | None = None  # the directory that completes a ranker's; None: it is complete
    sources: dict[str, str] = field(default_factory=dict)  # repository → commit of what came from the hub

    @property
    def identity(self) -> str:
        """`sha256:` and the hash of the files and their names: equal exactly when the judge is."""
        whole = hashlib.sha256()
        for name in FILES:
            with (self.directory / name).open("rb") as file:
                whole.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{whole.hexdigest()}"


def read(path: str | Path, backbone: str | Path | None = None) -> Checkpoint:
    """The PairRM in the directory `path`. Raises BadInput naming what is missing or is not a PairRM's."""
    directory = Path(path)
    if not directory.is_dir():
        raise BadInput(f"PairRM: there is no directory {str(path)!r}; {_HOW_TO_GET}")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise BadInput(f"PairRM: {str(path)!r} lacks {', '.join(missing)}; {_HOW_TO_GET}")
    return Checkpoint(
        directory, _config(directory), directory / "model.safetensors", directory / "tokenizer.json"
    )


def _config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises BadInput when it is not a DeBERTa-v2 with the pair head."""
    file = directory / "config.json"
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
