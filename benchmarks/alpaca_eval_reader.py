"""alpaca_eval's own reader on our file: 805 rows, a finite length-controlled rate, and what it does with faulty files.

python benchmarks/alpaca_eval_reader.py [--cache DIR] [--json]

The first run makes alpaca_eval's environment from requirements-alpaca-eval.txt under --cache. Its code is unchanged: its
annotator's prompt, its swapping of the outputs, its parser of log-probabilities and its regression run; a
stub takes the place of the model behind the annotator. The hub is not asked: the reference outputs are a file, and
df_gamed.csv, the rows of two gamed baselines with each instruction's difficulty, lies in a cache of the hub's
layout. Instructions, outputs and that table are made here: they have the shapes of the published ones, and other numbers.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-alpaca-eval.txt"
SEED, MODEL, REFERENCE = 0, "own-policy", "own-reference"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
WORDS = [
    "the",
    "game",
    "of",
    "two",
    "players",
    "has",
    "a",
    "value",
    "which",
    "each",
    "of",
    "them",
    "can",
    "reach",
    "alone",
    "against",
    "any",
    "other",
    "play",
]
ENTRY = ("configs.yaml", "prompt.txt")


# --- our side: the set's shape, the outputs and our exporter ------------------------------------------------------------


def make(folder: Path) -> dict[str, Any]:
    """Write the reference outputs, our file with its entry, and the faulty files; return what the exporter said."""
    from sppo_jax.evaluation import alpaca_eval, formats, questions

    rng = random.Random(SEED)
    rows = []
    for dataset, size in alpaca_eval.SIZES.items():
        for n in range(size):
            end = ("", " ", "\n")[0 if n % 20 else 1 + n // 20 % 2]  # a twentieth ends in white space
            rows.append({"instruction": f"{dataset} {n}: {text(rng, 12)}?{end}", "dataset": dataset})
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = [row | {"output": text(rng, 60), "generator": REFERENCE} for row in rows]
    (folder / "reference.json").write_text(json.dumps(reference))

    lines: list[str] = []
    asked = questions.read(
        f"jsonl:{folder / 'set.jsonl'}", split="test", column="prompt", limit=None, tell=lines.append
    )
    outputs = [text(rng, 80) for _ in asked]
    outputs[3], outputs[4], outputs[5] = "", "7", " 1e3 "
    path = folder / "ours" / "model_outputs.json"
    lines += formats.write("alpaca_eval", path, asked, outputs, model=MODEL, preset="paper-mistral")
    entry = path.parent / "models_configs" / MODEL
    return {
        "exporter_said": [line.replace(str(folder), "DIR") for line in lines],
        "entry": [name for name in ENTRY if (entry / name).is_file()],
        "refused": refusals(folder, path, asked),
    }


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(max(1, int(words * rng.lognormvariate(0, 0.5)))))


def refusals(folder: Path, path: Path, asked: list[Any]) -> dict[str, str]:
    """Write the faulty files that the reader is given, and return what our exporter says of the same content."""
    from sppo_jax.errors import BadInput
    from sppo_jax.evaluation import formats

    good = json.loads(path.read_text())
    faults: dict[str, Callable[[list[dict[str, str]]], list[dict[str, str]]]] = {
        "no generator": lambda rows: [{k: v for k, v in row.items() if k != "generator"} for row in rows],
        "instructions without their white space": lambda rows: [
            row | {"instruction": row["instruction"].strip()} for row in rows
        ],
        "five instructions twice": lambda rows: rows + [row | {"output": "again"} for row in rows[:5]],
        "outputs that are numbers": lambda rows: [row | {"output": str(n)} for n, row in enumerate(rows)],
        "empty outputs": lambda rows: [row | {"output": ""} for row in rows],
    }
    (folder / "faults").mkdir()
    for number, (name, change) in enumerate(faults.items()):
        found = {"name": name, "rows": change(good)}
        (folder / "faults" / f"{number}.json").write_text(json.dumps(found))

    def said(questions: list[Any], outputs: list[str]) -> str:
        try:
            lines = formats.write("alpaca_eval", folder / "x" / "x.json", questions, outputs, model=MODEL)
        except BadInput as error:
            return f"refused: {str(error).replace(str(folder), 'DIR')}"
        return "told: " + lines[0].partition(": ")[2] if lines else ""

    some = ["words"] * len(asked)
    return {
        "five instructions twice": said(asked + asked[:5], some + some[:5]),
        "outputs that are numbers": said(asked, [str(n) for n in range(len(asked))]),
        "empty outputs": said(asked, [""] * len(asked)),
    }


# --- the reader's side, in alpaca_eval's interpreter --------------------------------------------------------------------


def work(folder: Path) -> None:
    """Read our file and the faulty ones with alpaca_eval; print the results as the last line."""
    import alpaca_eval
    import pandas
    import sklearn
    import yaml

    gamed(folder / "home")
    package = Path(alpaca_eval.__file__).parent / "evaluators_configs"
    settings = yaml.safe_load((package / ANNOTATOR / "configs.yaml").read_text())
    del settings[ANNOTATOR]["fn_completions"]  # the stub's place
    settings[ANNOTATOR]["prompt_template"] = str(package / settings[ANNOTATOR]["prompt_template"])
    config = folder / ANNOTATOR / "configs.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(settings))

    def read(path: Path) -> Any:
        table, notes = alpaca_eval.evaluate(
            model_outputs=str(path),
            reference_outputs=str(folder / "reference.json"),
            annotators_config=str(config),
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            metric_kwargs={"save_weights_dir": None},
            caching_path=None,
            fn_completions=annotate,
        )
        return table.iloc[0].to_dict() | {"name": table.index[0], "annotations": len(notes)}

    found = read(folder / "ours" / "model_outputs.json")
    faults = {}
    for path in sorted((folder / "faults").iterdir()):
        given = json.loads(path.read_text())
        path.write_text(json.dumps(given["rows"]))
        try:
            one = read(path)
            faults[given["name"]] = f"n_total {one['n_total']}, win_rate {one['win_rate']:.2f}"
        except Exception as error:  # whatever the reader raises is the finding
            traceback.print_exc()
            faults[given["name"]] = f"{type(error).__name__}: {error}"
    versions = {"alpaca_eval": "0.6.6", "pandas": pandas.__version__, "scikit-learn": sklearn.__version__}
    print("\n" + json.dumps({"ours": found, "faults": faults, "versions": versions}))


def annotate(prompts: list[str], **_: Any) -> dict[str, list[Any]]:
    """The stub: OpenAI's answer with log-probabilities, by a fixed taste for outputs, and for long ones."""
    answers = []
    for prompt in prompts:
        _, first, second = prompt.split('"output": """')
        first, second = first.split('"""\n    },')[0], second.split('"""\n    }\n}')[0]
        p = 1 / (1 + math.exp(-(taste(first) - taste(second))))
        tokens = [{"token": token, "logprob": math.log(share)} for token, share in (("m", p), ("M", 1 - p))]
        answers.append({"logprobs": {"content": [{"top_logprobs": tokens}]}})
    zeros = [0.0] * len(prompts)
    return {
        "completions": ["m"] * len(prompts),
        "completions_all": answers,
        "price_per_example": zeros,
        "time_per_example": zeros,
    }


def taste(output: str) -> float:
    return hashlib.sha256(output.encode()).digest()[0] / 128 + len(output) / 1000


def gamed(home: Path) -> None:
    """Lay df_gamed.csv into a cache of the hub: two baselines' rows for each of 805 instructions."""
    import pandas

    rng = random.Random(SEED)
    difficulty = [rng.gauss(0, 1) for _ in range(805)]
    rows = [
        {
            "model": model,
            "index": index,
            "preference": min(1.0, max(0.0, rng.gauss(0.5, 0.2))),
            "std_delta_len": rng.gauss(mean, 1),
            "instruction_difficulty": difficulty[index],
            "not_gamed_baseline": False,
        }
        for model, mean in (("gamed_concise", 1), ("gamed_verbose", -1))
        for index in range(805)
    ]
    commit = "0" * 40
    repository = home / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    pandas.DataFrame(rows).to_csv(repository / "snapshots" / commit / "df_gamed.csv", index=False)


# --- the run ------------------------------------------------------------------------------------------------------------


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
    python = environment.interpreter("alpaca-eval", REQUIREMENTS, args.cache, whole=True)
    with tempfile.TemporaryDirectory(prefix="alpaca-eval-") as name:
        folder = Path(name)
        made = make(folder)
        variables = os.environ | {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "IS_ALPACA_EVAL_2": "True",
            "PYTHONWARNINGS": "ignore",
        }
        command = [python, __file__, "--worker", folder]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found = made | json.loads(done.stdout.splitlines()[-1])
    found |= {"seed": SEED, "machine": f"{os.cpu_count()} x {platform.machine()}"}
    print(json.dumps(found) if args.json else json.dumps(found, indent=1))
    ours = found["ours"]
    if ours["n_total"] != 805 or not math.isfinite(ours["length_controlled_winrate"]):
        sys.exit("alpaca_eval does not read our file as it should")


if __name__ == "__main__":
    main()
