"""AlpacaEval 2: one response to each instruction, as the JSON array and the entry `configs.yaml` that alpaca_eval 0.6.6 reads."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.evaluation.presets import Preset
from sppo_jax.evaluation.questions import Question
from sppo_jax.text.messages import messages_of

# Instructions of the set by dataset.
SIZES = {"helpful_base": 129, "koala": 156, "oasst": 188, "selfinstruct": 252, "vicuna": 80}
BATCH = 900  # prompts that vLLM is given at a time, as in the published entries


def check(path: Path, questions: Sequence[Question]) -> None:
    """Raise BadInput for what alpaca_eval's reader would stop at, or read as something else."""
    if path.suffix != ".json":
        raise BadInput(f"{path}: alpaca_eval reads files that end in .json; name it so")
    if any(len(messages_of(question.prompt)) > 1 for question in questions):
        raise BadInput(
            "alpaca_eval's instructions are single messages; a conversation cannot be written for it"
        )
    most, number = Counter(map(_instruction, questions)).most_common(1)[0]
    if number > 1:
        raise BadInput(f"the instruction {most[:60]!r} is there {number} times, at which alpaca_eval stops")


def write(path: Path, questions: Sequence[Question], outputs: Sequence[str], model: str) -> list[str]:
    """Write the outputs, stripped; returns sentences about what the reader does not say. Raises BadInput as `check` does,
    and where each output reads as a number.
    """
    check(path, questions)
    stripped = [output.strip() for output in outputs]
    if all(map(_is_number, stripped)):  # pandas, which reads the file, then makes them numbers
        raise BadInput(
            f"{path}: all outputs are numbers, such as {stripped[0]}, at which alpaca_eval's reader stops; not written"
        )
    rows = [
        {"dataset": q.category, "instruction": _instruction(q), "output": output, "generator": model}
        for q, output in zip(questions, stripped, strict=True)
    ]
    with files.replacing(path) as part:
        part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = []
    if empty := stripped.count(""):
        lines.append(
            f"{path}: {empty} of {len(rows)} outputs are empty, which alpaca_eval judges without a word"
        )
    found, all_ = Counter(q.category for q in questions), sum(SIZES.values())
    if found.keys() <= SIZES.keys() and found != SIZES:
        lines.append(
            f"{path}: {len(rows)} of the {all_} instructions of AlpacaEval: the rate is over these alone"
        )
    return lines


def entry(model: str, weights: str, preset: Preset) -> dict[str, Any]:
    """The content of models_configs/MODEL/configs.yaml, by which alpaca_eval samples the outputs itself, with vLLM.

    `weights` is the directory, or the name on the hub, of what vLLM loads.
    """
    settings: dict[str, Any] = {
        "model_name": weights,
        "model_kwargs": {"dtype": "bfloat16", "tokenizer_mode": "auto", "trust_remote_code": False},
        "max_new_tokens": preset.max_new_tokens,
        "temperature": preset.temperature,
        "top_p": preset.top_p,
        "batch_size": BATCH,
        "is_chatml_prompt": False,
    }
    if preset.stop_ids:
        settings["stop_token_ids"] = list(preset.stop_ids)
    return {
        model: {
            "prompt_template": f"{model}/prompt.txt",
            "fn_completions": "vllm_local_completions",
            "completions_kwargs": settings,
            "pretty_name": model,
            "link": f"https://huggingface.co/{weights}" if weights.count("/") == 1 else "",
        }
    }


def write_entry(path: Path, model: str, weights: str, preset: Preset) -> list[str]:
    """Write models_configs/MODEL/configs.yaml and prompt.txt beside the file of outputs; returns where they are."""
    folder = path.parent / "models_configs" / model
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(entry(model, weights, preset), sort_keys=False, allow_unicode=True)
    for name, content in (("configs.yaml", text), ("prompt.txt", preset.prompt)):
        with files.replacing(folder / name) as part:
            part.write_text(content, encoding="utf-8")
    return [f"{folder}: configs.yaml and prompt.txt; vLLM loads the policy from {weights}"]


def _instruction(question: Question) -> str:
    """The instruction, equal to the set's byte for byte: the reader joins on it."""
    return messages_of(question.prompt)[0]["content"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
