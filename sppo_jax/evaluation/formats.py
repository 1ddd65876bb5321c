"""Files of the public benchmarks, and of responses alone: what each asks of the questions, and how it is written."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import alpaca_eval, arena_hard, mt_bench, presets
from sppo_jax.evaluation.mt_bench import Respond
from sppo_jax.evaluation.questions import Question
from sppo_jax.records import prompt_id
from sppo_jax.text.messages import messages_of

FORMATS = ("alpaca_eval", "mt_bench", "arena_hard", "jsonl")
# The formats whose outputs are not one response to each question's prompt, and what draws them.
TURNS = {"mt_bench": mt_bench.answers}
OTHERS = re.compile(r"[^A-Za-z0-9._-]+")  # characters that a name in a file does not have


def check(name: str, path: Path, questions: Sequence[Question], *, arena_format: str = "current") -> None:
    """Raise BadInput, before anything is sampled, for questions or a file that a format does not take."""
    if name not in FORMATS:
        raise BadInput(f"--write {name}: must be one of {', '.join(FORMATS)}")
    if files.is_dir(path) or not files.is_dir(path.absolute().parent):
        raise BadInput(f"--write {name} {path}: name a file in a directory that is there")
    if not questions:
        raise BadInput(f"--write {name}: there are no questions")
    if name in ("mt_bench", "arena_hard") and (path.suffix != ".jsonl" or not path.stem.strip(".")):
        raise BadInput(f"{path}: the benchmark takes the model's name from the file's; name it MODEL.jsonl")
    if name == "alpaca_eval":
        alpaca_eval.check(path, questions)
    elif name == "mt_bench":
        mt_bench.check(questions)
    elif name == "arena_hard":
        arena_hard.check(questions, arena_format)


def turns(name: str, questions: Sequence[Question], respond: Respond) -> list[list[str]] | None:
    """The outputs of a format that draws its own, turn by turn (`mt_bench.answers`); None for the others."""
    return TURNS[name](questions, respond) if name in TURNS else None


def write(
    name: str,
    path: Path,
    questions: Sequence[Question],
    outputs: Sequence[Any],
    *,
    model: str,
    preset: str = "",
    arena_format: str = "current",
    tstamp: float = 0.0,
    weights: str = "",
) -> list[str]:
    """Write a file whole or not at all, and return sentences about it for the user.

    `outputs` are one response to each question, or for mt_bench what `turns` returns. `model` is the policy as the user
    named it, `weights` the directory or name on the hub of what it loads (default: `model`). `tstamp` is the time that the
    benchmarks' lines carry: the same arguments give the same bytes. With a preset, alpaca_eval's file has its
    entry of models_configs/ beside it. Raises BadInput as `check` does, and where the system refuses the file.
    """
    check(name, path, questions, arena_format=arena_format)
    if name == "alpaca_eval":
        own = model_name(model)
        said = alpaca_eval.write(path, questions, outputs, own)
        if not preset:
            return [*said, f"{path}: without --preset there is no entry of alpaca_eval's models_configs"]
        return said + alpaca_eval.write_entry(path, own, weights or model, presets.named(preset))
    if name == "mt_bench":
        _write_lines(path, mt_bench.lines(questions, outputs, path.stem, tstamp))
        return mt_bench.notes(path, questions, outputs)
    if name == "arena_hard":
        lines, notes = arena_hard.lines(questions, outputs, path.stem, tstamp, arena_format)
        _write_lines(path, lines)
        return [f"{path}: {note}" for note in notes]
    pairs = zip(questions, outputs, strict=True)
    _write_lines(path, [json.dumps(row(question, output, model)) for question, output in pairs])
    return []


def row(question: Question, response: str, policy: str) -> dict[str, Any]:
    """A line of jsonl: `prompt`, or `messages` for a conversation, and the response as it is."""
    messages = messages_of(question.prompt)
    asked = {"prompt": messages[0]["content"]} if len(messages) == 1 else {"messages": messages}
    return asked | {
        "response": response,
        "category": question.category,
        "prompt_id": prompt_id(question.prompt),
        "policy": policy,
    }


def model_name(policy: str) -> str:
    """The name in a benchmark's file of a policy: the end of its path, an iteration as in `quickstart-iter3`."""
    run, at, iteration = policy.rstrip("/").rpartition("@")
    end = f"{run}-iter{iteration}" if at and iteration.isdigit() else policy.rstrip("/")
    return OTHERS.sub("-", end.rpartition("/")[2].rpartition(":")[2]).strip("-.") or "policy"


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with files.replacing(path) as part:
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
