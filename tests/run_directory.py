"""A run directory that nothing has played: what the tests of exports and of model cards share."""

from pathlib import Path

from sppo_jax import config_file, files
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
