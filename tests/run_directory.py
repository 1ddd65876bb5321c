"""A run directory that nothing has played: what the tests of reports, exports and model cards share."""

import json
from pathlib import Path

from sppo_jax import config_file, files, records
from sppo_jax.records import Responses
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
