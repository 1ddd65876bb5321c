"""FastChat's own loader on our MT-Bench file: its questions, its check of the answers, and its sorting, which changes no byte.

python benchmarks/fastchat_reader.py [--cache DIR] [--json]

The first run makes FastChat's environment from requirements-fastchat.txt under --cache. The 80 questions are made here,
with MT-Bench's ids and categories; the answers are made up by a function in the policy's place, which notes what it is asked.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-fastchat.txt"
MODEL = "own-policy"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def make(folder: Path) -> dict[str, Any]:
    """Write questions and answers in FastChat's directories; return what the exporter said and asked."""
    from sppo_jax.evaluation import formats, questions
    from sppo_jax.text.messages import messages_of

    path = folder / "question.jsonl"
    rows = [
        {"question_id": 81 + n, "category": CATEGORIES[n // 10], "turns": [f"Question {n}?", f"And {n}?"]}
        for n in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    lines: list[str] = []
    asked = questions.read(f"jsonl:{path}", split="test", column="prompt", limit=None, tell=lines.append)
    calls: list[tuple[float, int]] = []

    def respond(prompts: Sequence[str], temperature: float) -> list[str]:
        calls.append((temperature, len(prompts)))
        return [f" é {temperature}: {messages_of(prompt)[-1]['content']}\n" for prompt in prompts]

    outputs = formats.turns("mt_bench", asked, respond)
    assert outputs is not None
    answers = folder / "model_answer" / f"{MODEL}.jsonl"
    lines += formats.write("mt_bench", answers, asked, outputs, model=MODEL, tstamp=1.5)
    return {"exporter_said": lines, "calls": calls}


def work(folder: Path) -> None:
    """Load, check and sort our file with FastChat; print the findings as the last line."""
    from importlib.metadata import version

    from fastchat.llm_judge.common import check_data, load_model_answers, load_questions
    from fastchat.llm_judge.gen_model_answer import reorg_answer_file

    questions = load_questions(str(folder / "question.jsonl"), None, None)
    answers = load_model_answers(str(folder / "model_answer"))
    check_data(questions, answers, {}, list(answers), {})
    file = folder / "model_answer" / f"{MODEL}.jsonl"
    before = file.read_bytes()
    reorg_answer_file(str(file))
    first = answers[MODEL][81]
    found = {
        "models": list(answers),
        "answers": len(answers[MODEL]),
        "ids": [min(answers[MODEL]), max(answers[MODEL])],
        "turns": sorted({len(answer["choices"][0]["turns"]) for answer in answers[MODEL].values()}),
        "unchanged_by_sorting": before == file.read_bytes(),
        "first": first,
        "versions": {name: version(name) for name in ("fschat", "transformers")},
    }
    print("\n" + json.dumps(found))


def main() -> None:
    """Run the benchmark and print its findings, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environment.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    python = environment.interpreter("fastchat", REQUIREMENTS, args.cache, whole=True)
    with tempfile.TemporaryDirectory(prefix="fastchat-") as name:
        folder = Path(name)
        made = make(folder)
        command = [python, __file__, "--worker", folder]
        variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found = made | json.loads(done.stdout.splitlines()[-1])
    found |= {"machine": f"{os.cpu_count()} x {platform.machine()}"}
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))
    if found["answers"] != 80 or not found["unchanged_by_sorting"]:
        sys.exit("FastChat does not read our file as it should")


if __name__ == "__main__":
    main()
