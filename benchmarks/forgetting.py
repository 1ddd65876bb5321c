"""What a policy has lost: lm-evaluation-harness's scores of its exports on tasks that training has nothing to do with.

python benchmarks/forgetting.py --base DIR --policies NAME=DIR [NAME=DIR …] [--json]

Three local tasks, the same questions for the base and each policy (Hugging Face directories):

capitals   which of four cities is a country's capital; the other three are capitals of other countries
agreement  "The pilot behind the doctors sings" or "… sing": a verb agrees with its subject, not with the nearest noun
reference  paragraphs of Python's language reference, as it comes with the interpreter: bits per byte, lower is better
"""

import argparse
import contextlib
import json
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from harness import TASK
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

CAPITALS = Path(__file__).with_name("capitals.json")
CHOICES = 4
SENTENCES = 240
PARAGRAPHS = 120
PARAGRAPH = range(300, 1500)  # characters: shorter ones are headings and rows of tables

PEOPLE = [
    "author", "teacher", "pilot", "farmer", "doctor", "painter", "driver", "lawyer", "singer", "nurse", "baker", "student",
    "guard", "sailor", "tailor",
]  # fmt: skip
PLACES = ["near", "behind", "beside", "opposite"]
VERBS = [
    "sings/sing", "is/are", "was/were", "has/have", "knows/know", "wants/want", "laughs/laugh", "sleeps/sleep",
]  # fmt: skip
ENDS = {"is": "late", "was": "late", "has": "left", "knows": "the way", "wants": "to leave"}


def capitals() -> list[dict[str, Any]]:
    """Return a question for each country."""
    cities, rng = json.loads(CAPITALS.read_text()), random.Random(0)
    rows = []
    for country, capital in cities.items():
        answers = rng.sample([city for city in cities.values() if city != capital], CHOICES - 1)
        gold = rng.randrange(CHOICES)
        answers.insert(gold, capital)
        rows.append({"prompt": f"The capital of {country} is", "answers": answers, "gold": gold})
    return rows


def agreement() -> list[dict[str, Any]]:
    """Return pairs of sentences that differ in the verb's number; the noun before the verb has the wrong number."""
    rng = random.Random(0)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < SENTENCES:
        (subject, other), place, verb = rng.sample(PEOPLE, 2), rng.choice(PLACES), rng.choice(VERBS)
        plural = rng.randrange(2)
        forms = verb.split("/")
        start = f"The {subject}{'s' * plural} {place} the {other}{'s' * (1 - plural)}"
        end = f" {ENDS[forms[0]]}." if forms[0] in ENDS else "."
        rows[start + verb] = {
            "prompt": "",
            "answers": [f"{start} {form}{end}" for form in forms],
            "gold": plural,
        }
    return list(rows.values())


def reference() -> list[dict[str, Any]]:
    """Return paragraphs of prose, without programs and grammars."""
    found = {
        " ".join(part.split()) for text in topics.values() for part in text.split("\n\n") if _is_prose(part)
    }
    return [{"prompt": text} for text in random.Random(0).sample(sorted(found), PARAGRAPHS)]


def _is_prose(part: str) -> bool:
    return len(part) in PARAGRAPH and not any(mark in part for mark in ("::=", ">>>", "   "))


TASKS = {
    "capitals": (capitals, TASK | {"task": "capitals"}),
    "agreement": (agreement, TASK | {"task": "agreement"}),
    "reference": (reference, {
        "task": "reference",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }),
}  # fmt: skip


def scores(policy: Path, folder: Path, limit: int | None) -> dict[str, np.ndarray]:
    """Return each task's scores, one for each question: 1 or 0 for a choice, bits per byte for a paragraph."""
    tasks = []
    for name, (rows, task) in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows()))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(folder)}
        tasks.append(task | {"dataset_path": "json", "test_split": "test", "dataset_kwargs": data})
    results = simple_evaluate(
        model="hf", model_args={"pretrained": str(policy), "dtype": "float32", "device": "cpu"}, limit=limit,
        tasks=tasks, task_manager=TaskManager(include_defaults=False), log_samples=True, bootstrap_iters=0, batch_size=8,
    )  # fmt: skip
    found = {}
    for name in TASKS:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = np.array([_score(sample) for sample in samples])
    return found


def _score(sample: dict[str, Any]) -> float:
    if "acc" in sample:
        return float(sample["acc"])
    nats, size = sample["bits_per_byte"]
    return float(-nats / size / np.log(2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face directory of the base")
    parser.add_argument(
        "--policies", nargs="+", required=True, metavar="NAME=DIR", help="exports of policies"
    )
    parser.add_argument("--limit", type=int, help="questions of each task (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 2:
        parser.error("--limit must be at least 2: one question has no interval")
    policies: dict[str, Path] = {}
    for word in (f"base={args.base}", *args.policies):
        name, mark, path = word.partition("=")
        if not (mark and (Path(path) / "config.json").is_file()) or name in policies:
            parser.error(f"{word}: not NAME=DIR with a new name and the directory of a model")
        policies[name] = Path(path)
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for name, policy in policies.items():
            found[name] = scores(policy, Path(folder), args.limit)
    table: dict[str, dict[str, Any]] = {name: {} for name in policies}
    for task in TASKS:
        for name, row in table.items():
            score, change = found[name][task], found[name][task] - found["base"][task]
            spread = 1.96 * change.std(ddof=1) / len(change) ** 0.5
            row[task] = {
                "questions": len(score),
                "mean": float(score.mean()),
                "change": float(change.mean()),
                "interval": float(spread),
            }
            print(f"{task:9}  {name:12}  {score.mean():.3f}  change {change.mean():+.4f} ± {spread:.4f}")
    if args.json:
        versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")} | {
            "python": platform.python_version()
        }
        print(json.dumps({"table": table, "versions": versions}))


if __name__ == "__main__":
    main()
