"""The errors of the judge in bfloat16 against float32, on the embedded judge and on random weights of the real size.

python benchmarks/judge_precision.py [--pairs 400] [--layers 24] [--json]

Three computations in bfloat16, which cost a TPU the same: as the jax backend does it (weights and products rounded; sums over
the depth, norms and softmax in float32), with the sum over the depth rounded after each layer, and with float32 products of
rounded weights (what is left is the weights' own rounding). torch's float16 and bfloat16 stand for the original on a GPU.
The embedded judge is trained, so its logits mean something: what counts is the change of P, and the verdicts that flip.
The random weights show what 24 layers do to a hidden state (root mean square of the error, relative to that of the state).
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import save_file

from sppo_jax import sharding
from sppo_jax.hub import names
from sppo_jax.pairrm import comparisons, files, jax_model, mesh_judge, torch_model
from sppo_jax.pairrm.format import Formatter, TextPair
from sppo_jax.tiny.build_pairrm import held_out_pairs

LARGE = {
    "hidden_size": 1024, "num_attention_heads": 16, "attention_head_size": 64, "intermediate_size": 4096,
    "position_buckets": 256, "max_position_embeddings": 512, "pooler_hidden_size": 1024,
}  # fmt: skip


class RoundedDepth(jax_model.PairRM):
    """The residual stream is rounded to bfloat16 after every norm, as in most implementations."""

    def _norm(self, x: jax.Array, weight_D: jax.Array, bias_D: jax.Array) -> jax.Array:
        return super()._norm(x, weight_D, bias_D).astype(jnp.bfloat16).astype(jnp.float32)


def networks(checkpoint: files.Checkpoint) -> dict[str, jax_model.PairRM]:
    """Return the network in float32, and three computations in bfloat16, by name."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    wide = jax_model.load(checkpoint, mesh, jnp.float32)
    half = jax_model.load(checkpoint, mesh, jnp.bfloat16)

    def of(kind: type[jax_model.PairRM], weights: dict[str, jax.Array], dtype: Any) -> jax_model.PairRM:
        return kind(wide.deberta, weights, dtype, wide.form)

    rounded = {path.replace("/", "."): x[...] for path, x in half.weights.items()}
    return {
        "float32": wide,
        "bfloat16": half,
        "bfloat16, sum over the depth too": of(RoundedDepth, rounded, jnp.bfloat16),
        "bfloat16 weights, float32 products": of(
            jax_model.PairRM, {path: x.astype(jnp.float32) for path, x in rounded.items()}, jnp.float32
        ),
    }


def batch(pairs: list[TextPair], size: int) -> tuple[jax.Array, ...]:
    """Return the arguments of the network for pairs padded to `size` tokens."""
    todo = [comparisons.Comparison(pair, []) for pair in pairs]
    return tuple(jnp.asarray(x) for x in mesh_judge.padded(todo, size, len(pairs)))


def embedded(number: int) -> list[dict[str, Any]]:
    """Return the logits of both orders of `number` pairs of held-out responses."""
    checkpoint = files.read(names.path("pairrm"))
    formatter = Formatter.of(checkpoint)
    segments = [formatter.prompt(p, [y, z]) for p, y, z in held_out_pairs("wide", number, 7)]
    pairs = [s.pair(i, 1 - i) for i in (0, 1) for s in segments]
    size = -(-max(map(len, pairs)) // 64) * 64
    inputs = batch(pairs, size)

    logits = {name: np.asarray(jax.jit(net)(*inputs)) for name, net in networks(checkpoint).items()}
    for dtype in (torch.float16, torch.bfloat16):
        model = torch_model.load(checkpoint, "cpu", dtype)
        logits[f"torch {str(dtype).removeprefix('torch.')}"] = model.logits(pairs)

    def probability(c: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(c[:number] - c[number:]) / 2))

    exact = logits.pop("float32")
    rows = []
    for name, found in logits.items():
        error, p, q = found - exact, probability(found), probability(exact)
        rows.append(
            {
                "computed": name,
                "logit_error_rms": float(np.sqrt((error**2).mean())),
                "logit_error_max": float(np.abs(error).max()),
                "logit_rms": float(np.sqrt((exact**2).mean())),
                "probability_change_mean": float(np.abs(p - q).mean()),
                "probability_change_max": float(np.abs(p - q).max()),
                "flipped": float(((p > 0.5) != (q > 0.5)).mean()),
                "pairs": number,
            }
        )
    return rows


def large(directory: Path, layers: int) -> files.Checkpoint:
    """Write a checkpoint of random weights of the real width with the embedded judge's vocabulary."""
    small = files.read(names.path("pairrm"))
    config = small.config | LARGE | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_bytes(small.tokenizer.read_bytes())
    rng = np.random.default_rng(0)
    weights = {}
    for tensor in jax_model.table(
        jax_model.Deberta.of(files.Checkpoint(directory, config, directory, directory))
    ):
        for name in tensor.names(layers):
            x = rng.standard_normal(tensor.shape, np.float32)
            if tensor.path.endswith("norm_weight"):
                x = 1 + 0.1 * x
            elif x.ndim == 1:
                x *= 0.1
            elif tensor.path != "embedding":
                x /= np.sqrt(x.shape[1], dtype=np.float32)
            weights[name] = x
    save_file(weights, directory / "model.safetensors")
    return files.read(directory)


@functools.partial(jax.jit, static_argnums=0)
def last_hidden(graph: nnx.GraphDef, weights: Any, ids: jax.Array, length: jax.Array) -> jax.Array:
    """Return the jitted network with weights as arguments: as constants the compiler would copy them."""
    return nnx.merge(graph, weights).hidden(ids, length)[0]


def real_size(layers: int) -> list[dict[str, Any]]:
    """Return the errors of the last hidden state of one pair of about 250 tokens."""
    rows = []
    with tempfile.TemporaryDirectory() as made:
        checkpoint = large(Path(made), layers)
        formatter = Formatter.of(checkpoint)
        texts = held_out_pairs("wide", 8, 3)
        pair = formatter.pair(texts[0][0], *(" ".join(row[side] for row in texts) for side in (1, 2)))
        pair = TextPair(pair.source, pair.first[:130], pair.second[:130])
        ids, length, _ = batch([pair], -(-len(pair) // 64) * 64)
        exact: np.ndarray | None = None
        for name, network in networks(checkpoint).items():
            found = np.asarray(last_hidden(*nnx.split(network), ids, length))[0, : len(pair)]
            if exact is None:
                exact = found
                continue
            rows.append({"computed": name, "tokens": len(pair), "layers": layers, **_errors(found, exact)})
        model = torch_model.load(checkpoint, "cpu", torch.bfloat16)
        with torch.inference_mode():
            found = model.hidden([pair])[0].float().numpy()
        rows.append(
            {"computed": "torch bfloat16", "tokens": len(pair), "layers": layers, **_errors(found, exact)}
        )
    return rows


def _errors(found: np.ndarray, exact: np.ndarray | None) -> dict[str, float]:
    assert exact is not None
    size = float(np.sqrt((exact**2).mean()))
    return {
        "hidden_error_rms": float(np.sqrt(((found - exact) ** 2).mean())) / size,
        "hidden_error_max": float(np.abs(found - exact).max()) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    started = time.perf_counter()
    report = {
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "embedded_judge": embedded(options.pairs),
        "random_weights": real_size(options.layers),
    }
    for row in (*report["embedded_judge"], *report["random_weights"]):
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
            )
        )
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
