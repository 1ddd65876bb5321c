"""Stage 6: parameters → a directory that `transformers` loads: safetensors, config.json, tokenizer."""

import json
import shutil
from pathlib import Path

from sppo_jax.models import hf
from sppo_jax.models.transformer import Transformer
from sppo_jax.rundir import replacing
from sppo_jax.tokens import TOKENIZER_FILES


def export(model: Transformer, base: Path, to: Path) -> None:
    """Write float32 weights with the base's configuration and tokenizer files; whole or not at all."""
    with replacing(to) as part:
        part.mkdir()
        hf.save(model, part)
        config = hf.read_json(base / "config.json")
        config.pop("torch_dtype", None)
        config["dtype"] = "float32"
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (base / name).is_file():
                shutil.copyfile(base / name, part / name)
