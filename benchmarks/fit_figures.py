"""The figures that benchmarks/fit.py draws from its measurements: necessary work, errors, medians, ratios."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from fit_replay import Data


def useful(sizes: dict[str, int], data: Data) -> float:
    """FLOPs that reference and training need at least: a forward pass, then a forward and backward pass, of each prompt
    once and of its responses, with the head at the responses alone."""
    d, h, n = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    layers, c = sizes["num_hidden_layers"], sizes.get("head_dim") or d // h
    body = layers * (2 * d * c * (h + n) + 3 * d * sizes["intermediate_size"])
    every = np.array([data.lengths(i) for i in range(len(data.prompts))], float)
    prompts = np.array([len(ids) for ids in data.prompts], float)
    said = sum(len(ids) for row in data.responses for ids in row)
    forward = 2 * body * (prompts.sum() + said) + 2 * d * sizes["vocab_size"] * said
    forward += 2 * layers * h * c * ((every**2).sum() - (prompts**2).sum())
    return 4 * forward


def errors(ours: Path, theirs: Path) -> dict[str, Any]:
    """Each parameter's error is the largest |ours - TRL's / 2| over the largest |TRL's / 2|. Return the largest error, its
    parameter, and the error of all parameters together in norms."""
    from safetensors.numpy import load_file

    mine, other = load_file(ours), load_file(theirs)
    assert mine.keys() == other.keys(), sorted(mine.keys() ^ other.keys())
    found, square, whole = {}, 0.0, 0.0
    for name, x in mine.items():
        half = other[name].astype(np.float64) / 2
        difference = np.abs(x - half)
        found[name] = float(difference.max() / np.abs(half).max())
        square, whole = square + float((difference**2).sum()), whole + float((half**2).sum())
    worst = max(found, key=lambda name: found[name])
    return {
        "max_grad_error": found[worst],
        "of": worst,
        "norm_error": (square / whole) ** 0.5,
        "norm": whole**0.5,
        "parameters": len(found),
    }


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge repetitions into one result: medians, but maxima of the figures that must stay small."""
    middle = (
        "seconds",
        "reference_seconds",
        "import_seconds",
        "load_seconds",
        "warm_seconds",
        "cpu_seconds",
        "peak_bytes",
    )
    one = runs[-1] | {key: statistics.median(run[key] for run in runs) for key in middle}
    one |= {
        f"every_{key}": [run[key] for run in runs] for key in ("seconds", "reference_seconds", "peak_bytes")
    }
    # The first process compiles; later ones find its programs.
    one["warm_seconds"] = max(run["warm_seconds"] for run in runs)
    one["others"] = max(run["others"] for run in runs)
    seconds = one["seconds"] + one["reference_seconds"]
    return one | {
        "pairs_per_s": one["pairs"] / seconds,
        "pairs_per_s_without_reference": one["pairs"] / one["seconds"],
        "tokens_per_s": one["tokens"] / seconds,
        "real_token_share": one["real_tokens"] / one["computed_tokens"],
    }


def ratios(
    mine: dict[str, Any], theirs: dict[str, Any], alone: dict[str, Any], default: dict[str, Any]
) -> dict[str, float]:
    """Ours over TRL's. `alone` and `default` are ours and TRL's default over the pairs of the search."""
    return {
        "vs_trl_pairs_per_s": mine["pairs_per_s"] / theirs["pairs_per_s"],
        "vs_trl_peak_memory": mine["peak_bytes"] / theirs["peak_bytes"],
        "vs_trl_pairs_per_s_without_reference": mine["pairs_per_s_without_reference"]
        / theirs["pairs_per_s_without_reference"],
        # The first process compiles; later ones find its programs on disk.
        "vs_trl_peak_memory_compiled_before": min(mine["every_peak_bytes"]) / theirs["peak_bytes"],
        "vs_trl_default_pairs_per_s": alone["pairs_per_s"] / default["pairs_per_s"],
        "vs_trl_default_peak_memory": alone["peak_bytes"] / default["peak_bytes"],
    }
