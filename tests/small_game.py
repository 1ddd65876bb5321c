"""A game small enough to be played many times, for the tests of whole runs."""

import hashlib

import pyarrow.parquet as pq
from safetensors.numpy import load_file

ORACLE = "sppo_jax.tiny.world:oracle"
SMALL = {
    "iterations": 1,
    "seed": 0,
    "mesh.fsdp": 1,
    # Named, because they are the defaults beside the embedded policy only.
    "judge.path": "embedded:pairrm",
    "prompts.source": "embedded:prompts/train_{iteration}.jsonl",
    "prompts.heldout": "embedded:prompts/heldout.jsonl",
    "prompts.per_iteration": 7,
    "prompts.max_length": 64,
    "sampling.max_new_tokens": 12,
    "sampling.slots": 15,
    "sampling.shard_prompts": 3,
    "sampling.responses": 3,
    "judge.backend": ORACLE,
    "fit.eta": 10,
    "fit.learning_rate": 1e-4,
    "fit.global_batch": 4,
    "fit.checkpoint_every": 1,
    "eval.prompts": 6,
    "eval.probe_prompts": 4,
}


def words(out, **options):
    """Return the command line of the small game with these options changed; section__key stands for section.key."""
    knobs = SMALL | {key.replace("__", "."): value for key, value in options.items()} | {"out": out}
    return [word for key, value in knobs.items() for word in (f"--{key}", str(value))]


def digest(out, t=1):
    """Return the pairs of iteration t and a digest of the parameters that it ended with."""
    weights = load_file(out / f"iter_{t}/export/model.safetensors")
    values = b"".join(name.encode() + x.tobytes() for name, x in sorted(weights.items()))
    return pq.read_table(out / f"iter_{t}/pairs.parquet").to_pylist(), hashlib.sha256(values).hexdigest()
