"""A PEFT adapter where a model is needed: it is recognised, and merged by the command in the error's line."""

import shlex
from pathlib import Path

from sppo_jax.errors import BadInput
from sppo_jax.files import exists, read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
MERGE = (
    "import sys; from peft import AutoPeftModelForCausalLM as Model; from transformers import AutoTokenizer; "
    "adapter, tokenizer, to = sys.argv[1:]; Model.from_pretrained(adapter).merge_and_unload().save_pretrained(to); "
    "AutoTokenizer.from_pretrained(tokenizer).save_pretrained(to)"
)


def refuse(directory: Path, name: str | None = None) -> None:
    """Raise BadInput for a directory with a PEFT adapter and no weights of a model, with the command that merges it.

    `name` is what the user called the directory, if it is on the hub.
    """
    if not exists(directory / CONFIG) or any(exists(directory / weights) for weights in WEIGHTS):
        return
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    merged = directory.absolute().parent / "export"
    if exists(merged / "config.json"):  # of a run of ours
        raise BadInput(f"{directory}: an adapter, not a model; {merged} is the model with it")
    source = name or str(directory)
    tokenizer = source if exists(directory / "tokenizer_config.json") or not base else str(base)
    to = f"{source.rstrip('/').rpartition('/')[2] or 'adapter'}-merged"
    command = shlex.join(["python", "-c", MERGE, source, tokenizer, to])
    raise BadInput(
        f"{source}: an adapter (PEFT) of {base or 'an unnamed model'}, not a model; merge it into its model once "
        f"(pip install peft), and give {to}: {command}"
    )
