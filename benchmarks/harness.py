"""Compares lm-evaluation-harness's scores of an exported policy through its own `hf` backend with those through our model.

python benchmarks/harness.py [--policy DIR] [--questions 60] [--json]

The task is local: questions of the embedded world, each with four answers drawn by it, the best of which is gold.
"""

import argparse
import json
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from sppo_jax import export, models
from sppo_jax.hub import names
from sppo_jax.tiny import world

TASK = {
    "task": "embedded_world",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "answers",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
# Requests are padded to multiples of this width, so that a few programs serve all.
WIDTH = 32


class Ours(TemplateLM):
    """Our decoder behind the harness's interface."""

    def __init__(self, policy: Path):
        super().__init__()
        self.model, self.tokenizer = models.load(policy), AutoTokenizer.from_pretrained(policy)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, as the harness asks for them."""
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            ids = [*context, *continuation]
            tokens = np.zeros((1, -(-len(ids) // WIDTH) * WIDTH), np.int32)
            tokens[0, : len(ids)] = ids
            scores = np.asarray(_log_softmax(self.model, jnp.asarray(tokens)))[0]
            predicted = scores[len(context) - 1 : len(ids) - 1]  # position t predicts token t + 1
            picked = predicted[np.arange(len(continuation)), continuation]
            found.append((float(picked.sum()), bool((predicted.argmax(-1) == continuation).all())))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not supported: the task does not need it."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not supported: the task does not need it."""
        raise NotImplementedError


@jax.jit
def _log_softmax(model: Any, tokens: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(tokens))


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of the task: a prompt, four answers and the index of the best one."""
    rng = random.Random(0)
    rows = []
    for line in (names.path("prompts/heldout.jsonl")).read_text().splitlines()[:count]:
        prompt = json.loads(line)["prompt"]
        answers = [world.sample_response(prompt, rng) for _ in range(4)]
        gold = int(np.argmax([world.quality(prompt, answer) for answer in answers]))
        rows.append({"prompt": prompt, "answers": answers, "gold": gold})
    return rows


def evaluate(policy: Path, count: int, folder: Path) -> dict[str, Any]:
    """Export the policy into `folder`. Return for each backend every request's score, whether it is greedy, and the accuracy."""
    exported = folder / "exported"
    export.export(models.load(policy), policy, exported)
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in questions(count)))
    task = TASK | {
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}, "cache_dir": str(folder)}
    }
    theirs = {"model": "hf", "model_args": {"pretrained": str(exported), "dtype": "float32", "device": "cpu"}}
    found: dict[str, Any] = {}
    for name, backend in (("hf", theirs), ("ours", {"model": Ours(exported)})):
        results = simple_evaluate(
            **backend, tasks=[task], task_manager=TaskManager(include_defaults=False),
            log_samples=True, bootstrap_iters=0, batch_size=8,
        )  # fmt: skip
        samples = sorted(results["samples"]["embedded_world"], key=lambda sample: sample["doc_id"])
        found[name] = {
            "scores": [[float(score) for ((score, _),) in sample["resps"]] for sample in samples],
            "greedy": [[bool(greedy) for ((_, greedy),) in sample["resps"]] for sample in samples],
            "accuracy": results["results"]["embedded_world"]["acc,none"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=names.path("policy"), help="Hugging Face directory")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(args.policy, args.questions, Path(folder))
    hf, ours = (np.asarray(found[name]["scores"]) for name in ("hf", "ours"))
    summary = {
        "requests": hf.size,
        "largest_difference_nats": float(np.abs(hf - ours).max()),
        "mean_log_likelihood": float(hf.mean()),
        "accuracy_hf": found["hf"]["accuracy"],
        "accuracy_ours": found["ours"]["accuracy"],
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch", "jax")},
    }
    print(
        f"{hf.size} log-likelihoods, mean {hf.mean():.2f} nats: largest difference "
        f"{summary['largest_difference_nats']:.1e} nats; accuracy {summary['accuracy_hf']:.3f} (hf), "
        f"{summary['accuracy_ours']:.3f} (ours)"
    )
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
