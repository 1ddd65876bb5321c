"""A run directory that nothing has played: what the tests of reports, exports and model cards share."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from sppo_jax import config_file, files, records
from sppo_jax.records import Pair, Preferences, Responses
from sppo_jax.run.directory import RunDir

MANIFEST = {
    "model": {"name": "embedded:policy", "revision": None},
    "versions": {"sppo_jax": "0.1.0", "jax": "0.10.2"},
    "devices": {"platform": "cpu", "names": ["a", "b"], "mesh": {"data": 1, "fsdp": 2, "tensor": 1}},
    "seed": 3,
    "sha256": {"base_weights": "c0ffee", "judge": "j"},
    "prompts": {"iteration 1": {"kept": 128, "no_text": 1}, "heldout": {"kept": 6}},
}
RATE = {"mean": 0.625, "stderr": 0.0123}
MOVED = {"winners": 1.5, "winners_stderr": 0.1, "losers": -2.5, "losers_stderr": 0.2, "kl_per_token": 0.0123}
JUDGED = {
    "cycle_share": 0.125,
    "tie_share": 0.25,
    "position_bias": -0.5,
    "length_correlation": 0.75,
    "entropy": 0.625,
}


def evaluated(t, **rates):
    return {
        "iteration": t,
        "prompts": 6,
        "win_rate": {"judge": rates},
        "length": {"tokens": 20.25, "words": 1.0},
    }


def begun(parent: Path, *flags: str, **manifest) -> RunDir:
    """A run directory below `parent` with a configuration and a manifest."""
    run = RunDir(parent / "out")
    run.root.mkdir()
    embedded = ["--judge.path=embedded:pairrm", "--prompts.source=embedded:prompts/train_{iteration}.jsonl"]
    config = config_file.load([], ["--out", str(run.root), *embedded, *flags])
    run.config.write_text(config_file.dump(config))
    files.write_json(run.manifest, MANIFEST | manifest)
    return run


def lines(run: RunDir, *found: dict) -> None:
    """Write metrics.jsonl."""
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in found))


def responses(word: str, prompts: int = 6) -> list[Responses]:
    """Held-out responses `word` to `prompts` prompts."""
    return [
        Responses(i, f"question {i}", [1, 2], [[3, 4]], [f"{word} {i}"], ["stop"], [-1.5])
        for i in range(prompts)
    ]


def measured(parent: Path, *flags: str, **manifest) -> RunDir:
    """A run directory with everything that the report of one complete iteration shows."""
    run = begun(parent, *flags, **manifest)
    for t, word in enumerate(("before", "after")):
        records.replace(run.heldout(t, "responses"), Responses, responses(word), {})
    files.write_json(run.evaluation(0), evaluated(0, base=RATE))
    files.write_json(run.evaluation(1), evaluated(1, base=RATE, previous=RATE) | {"log_ratio": MOVED})
    lines(
        run,
        {"iteration": 1, "stage": "judge", "step": 0, "time": 1.5} | JUDGED,
        {"iteration": 1, "stage": "judge_shard", "step": 0, "cut_prompts": 1.0, "cut_responses": 2.0},
        *({"iteration": 1, "stage": "fit", "step": step, "loss": 10.0 - step} for step in range(3)),
    )
    return run


TALK = "a" * 300  # a word that fits nowhere
ORDINARY = "Which word means the reverse of wide? " * 3


def played(parent: Path) -> RunDir:
    """A run directory of two iterations with everything that a report can show: oracle, features, probabilities, a ring."""
    run = begun(parent, "--prompts.column", TALK)
    rng = np.random.default_rng(0)
    for t, word in enumerate(("before", "between", TALK)):
        rows = [dataclasses.replace(row, prompt=ORDINARY + row.prompt) for row in responses(word, prompts=40)]
        records.replace(run.heldout(t, "responses"), Responses, rows, {})
        chances = rng.beta(2 + t, 2, 40).round(4).tolist()
        rate = {"mean": float(np.mean(chances)), "stderr": 0.02, "per_prompt": chances}
        found = evaluated(t, base=rate) | {
            "features": {"right": 0.4 + 0.1 * t, "with an insult": 0.1 / (t + 1)}
        }
        found["win_rate"]["oracle"] = {"base": rate}
        files.write_json(run.evaluation(t), found | ({"log_ratio": MOVED} if t else {}))
    for t in (1, 2):
        preferred(run, t, [RING, TIES], responses=3)
        trained(run, t, {0: [2, 1]})
    lines(
        run,
        *({"iteration": t, "stage": "judge", "step": 0} | JUDGED for t in (1, 2)),
        *({"iteration": t, "stage": "respond", "step": 0, "tokens_per_second": 900.0 * t, "truncated_share": 0.4} for t in (1, 2)),
        *({"iteration": t, "stage": "seconds", "step": 0, "sampling": 2.0, "training": 3.0 * t, "total": 9.0} for t in (1, 2)),
        *({"iteration": t, "stage": "fit", "step": n, "loss": 10.0 - n} for t in (1, 2) for n in range(9)),
    )  # fmt: skip
    return run


RING = [[0.5, 0.75, 0.125], [0.25, 0.5, 0.625], [0.875, 0.375, 0.5]]  # 0 beats 1, 1 beats 2, 2 beats 0
TIES = [[0.5] * 3] * 3


def preferred(run: RunDir, t: int, matrices: list[list[list[float]]], *, responses: int) -> None:
    """Write the responses and preferences of iteration t, one shard of a prompt for each matrix P. The last response is cut."""
    texts = [f"{'ABCDEFG'[k]} of iteration {t}" for k in range(responses)]
    ids = [[2, k] for k in range(responses)]
    reasons = ["stop"] * (responses - 1) + ["length"]
    for i, p in enumerate(matrices):
        row = Responses(i, f"prompt {i}", [1], ids, texts, reasons, [-1.0] * responses)
        whole = all(len(one) == len(p) and None not in one for one in p)
        rates = [float(np.mean(one)) for one in p] if whole else [0.5] * responses
        judged = Preferences(i, p, p, rates, "pairwise")
        records.replace(run.shard(t, "responses", i, len(matrices)), Responses, [row], {})
        records.replace(run.shard(t, "preferences", i, len(matrices)), Preferences, [judged], {})


def trained(run: RunDir, t: int, kept: dict[int, list[int]]) -> None:
    """Write the pairs of iteration t: {prompt: its responses that were trained on, the best first}."""
    talk = [{"role": "user", "content": "x"}]
    rows = [
        Pair(talk, talk, 0.75, 0.6, 0.4, i, [1], [[2, k] for k in ks], [0.6] * len(ks), 0.5, [1.0] * len(ks), [-1.0] * len(ks))
        for i, ks in kept.items()
    ]  # fmt: skip
    records.replace(run.pairs(t), Pair, rows, {})
