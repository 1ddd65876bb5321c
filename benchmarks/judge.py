"""Pairs per second of PairRM: llm-blender's `rank`, one pair at a time, against the sidecar and the jax backend.

python benchmarks/judge.py [--prompts 4] [--threads 2] [--backends original sidecar jax] [--cache DIR] [--json]

One run, the same random weights of the real size (24 layers, 1024 wide; the golden tokenizer's 773 tokens stand for the
128 thousand, which only a row per token is read of) in both layouts, the same texts, one process after another, each with
the same CPU threads or the GPU that is there. Results must be equal. The first run makes llm-blender's environment from
requirements-llm-blender.txt (over a gigabyte) under --cache. Loading and compilation are timed apart.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import environment

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "pairrm"
REQUIREMENTS = ROOT / "requirements-llm-blender.txt"
SEED, K = 0, 5
# Log-normal lengths in tokens: median, spread and limits.
PROMPT, RESPONSE = (125, 0.6, 15, 800), (320, 0.45, 20, 850)
REPEATED = 0.1  # share of responses that equal an earlier one to the same prompt, as at a low temperature
WARM_UP = ("hello", ["one answer", "and another"])
BACKENDS = ("original", "sidecar", "jax")
# Largest difference of a logit. On a GPU the original uses float16, and the sidecar bfloat16.
TOLERANCE = {"cpu": 2e-3, "cuda": 0.5}
CONFIG: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 4096,
    "layer_norm_eps": 1e-7, "max_position_embeddings": 512, "max_relative_positions": -1, "model_type": "deberta-v2", "norm_rel_ebd": "layer_norm",
    "num_attention_heads": 16, "pad_token_id": 0, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "position_buckets": 256,
    "relative_attention": True, "share_att_key": True, "type_vocab_size": 0,
}  # fmt: skip
TIMES = ("load_seconds", "warm_seconds", "seconds")


# --- the texts and the models ----------------------------------------------------------------------------------------


def make(folder: Path, layers: int) -> None:
    """Write a PairRM in both layouts: folder/hf, and folder/ranker with folder/backbone."""
    import torch
    from safetensors.torch import save_file

    from sppo_jax.pairrm.torch_model import PairRM

    for name in ("hf", "ranker", "backbone"):
        (folder / name).mkdir()
    golden = json.loads((GOLDEN / "pairrm_hf" / "config.json").read_text())
    same = ("vocab_size", "n_tasks", "drop_out", "sep_token_id")
    ids = {key: value for key, value in golden.items() if key in same or key.endswith("_prefix_id")}
    config = CONFIG | {"num_hidden_layers": layers, "architectures": ["DebertaV2PairRM"]} | ids
    torch.manual_seed(SEED)
    with torch.device("meta"):
        weights = PairRM(config).state_dict()
    for name, value in weights.items():
        random_value = torch.randn(value.shape) * _spread(name, value.ndim)
        weights[name] = random_value + (1.0 if name.endswith("LayerNorm.weight") else 0.0)
    save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "pairrm_hf" / "tokenizer.json", folder / "hf")

    os.link(folder / "hf" / "model.safetensors", folder / "ranker" / "model.safetensors")
    ranker = json.loads((GOLDEN / "pairrm" / "config.json").read_text())
    ranker["model_name"] = str(folder / "backbone")
    (folder / "ranker" / "config.json").write_text(json.dumps(ranker))
    for name in ("spm.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "backbone" / name, folder / "backbone")
    (folder / "backbone" / "config.json").write_text(
        json.dumps(config | {"architectures": ["DebertaV2Model"]})
    )
    # llm-blender loads a backbone and then PairRM's weights over it; a backbone of one tensor is enough.
    embedding = weights["pretrained_model.embeddings.word_embeddings.weight"]
    save_file(
        {"embeddings.word_embeddings.weight": embedding},
        folder / "backbone" / "model.safetensors",
        metadata={"format": "pt"},
    )


def _spread(name: str, dimensions: int) -> float:
    """Return a parameter's standard deviation, chosen so that logits differ between texts.

    With much sharper attention (0.1) 24 random layers are chaotic: float32's rounding, a millionth, grows to the size of
    the logits.
    """
    of = {"query_proj": 0.08, "key_proj": 0.08, "attention.output": 0.04, "dense": 0.01, "head_layer.4": 1.0}
    return 0.1 if dimensions == 1 else next((size for part, size in of.items() if part in name), 0.04)


def texts(folder: Path, count: int) -> None:
    """Write folder/texts.json: prompts, responses, and the lengths of the pairs."""
    from sppo_jax.pairrm import comparisons, files
    from sppo_jax.pairrm.format import Formatter

    formatter = Formatter.of(files.read(folder / "hf"))
    golden = json.loads((GOLDEN / "golden.json").read_text())
    every = [*golden["sources"], *(text for row in golden["candidates"] for text in row)]
    words = sorted({word for text in every for word in text.split() if word.isascii() and word.isalpha()})
    rng = random.Random(SEED)

    def text(median: float, spread: float, least: int, most: int) -> str:
        wanted = min(max(int(median * rng.lognormvariate(0, spread)), least), most)
        said = ""
        while len(formatter.body(said)) < wanted:
            said += (" " if said else "") + rng.choice(words)
        return said

    prompts = [text(*PROMPT) for _ in range(count)]
    responses = [[text(*RESPONSE) for _ in range(K)] for _ in prompts]
    for n in range(math.ceil(REPEATED * K * count)):  # over the prompts in turn
        responses[n % count][K - 1 - n // count] = responses[n % count][0]
    todo = comparisons.distinct(comparisons.tokenise(formatter, prompts, responses))
    found = {
        "prompts": prompts,
        "responses": responses,
        "tokens": [len(comparison.pair) for comparison in todo for _ in comparison.cells],
        "distinct": len(todo),
    }
    (folder / "texts.json").write_text(json.dumps(found))


# --- the three, each in a process of its own --------------------------------------------------------------------------


def read_texts(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Return the prompts and responses of folder/texts.json."""
    found = json.loads((folder / "texts.json").read_text())
    return found["prompts"], found["responses"]


def peak(who: int) -> int:
    """Return the peak of resident memory in bytes."""
    return 1024 * resource.getrusage(who).ru_maxrss


def original(folder: Path, threads: int) -> dict[str, Any]:
    """Measure `Blender.rank` with batch size 1, as uclaml/SPPO calls it, in an interpreter without sppo_jax."""
    import torch
    import transformers
    from llm_blender import Blender

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    blender = Blender()
    blender.loadranker(str(folder / "ranker"), device=device)
    loaded = time.perf_counter()
    matrices: list[Any] = []
    predict = blender.ranker._full_predict

    def recorded(**batch: Any) -> Any:  # rank itself returns only the scores
        outputs = predict(**batch)
        matrices.extend(outputs["logits"].tolist())
        return outputs

    blender.ranker._full_predict = recorded
    blender.rank([WARM_UP[0]], [WARM_UP[1]], return_scores=True, batch_size=1)
    matrices.clear()
    warm = time.perf_counter()
    blender.rank(*read_texts(folder), return_scores=True, batch_size=1, disable_tqdm=True)
    seconds = time.perf_counter() - warm
    return {
        "logits": matrices,
        **dict(zip(TIMES, (loaded - started, warm - loaded, seconds), strict=True)),
        "peak_bytes": peak(resource.RUSAGE_SELF),
        "device": device,
        "versions": {"llm-blender's transformers": transformers.__version__, "llm-blender's torch": torch.__version__},
    }  # fmt: skip


def sidecar(folder: Path, threads: int) -> dict[str, Any]:
    """Measure the sidecar."""
    from sppo_jax import pairrm

    return ours(
        pairrm.load(folder / "hf", "torch", threads=threads), folder, [WARM_UP], resource.RUSAGE_CHILDREN
    )


def on_mesh(folder: Path, threads: int) -> dict[str, Any]:
    """Measure the jax backend. Its warm-up scores two pairs of each length that it compiles for."""
    import jax

    from sppo_jax import pairrm
    from sppo_jax.pairrm import comparisons, files, mesh_judge
    from sppo_jax.pairrm.format import Formatter

    prompts, responses = read_texts(folder)
    formatter = Formatter.of(files.read(folder / "hf"))
    lengths = {}
    for comparison in comparisons.distinct(comparisons.tokenise(formatter, prompts, responses)):
        n, i, j = comparison.cells[0]
        lengths[mesh_judge.bucket(len(comparison.pair), jax.default_backend())] = (prompts[n], [responses[n][i], responses[n][j]])  # fmt: skip
    found = ours(pairrm.load(folder / "hf", "jax"), folder, [*lengths.values()], resource.RUSAGE_SELF)
    return found | {"programs": len(lengths)}


def ours(judge: Any, folder: Path, warm_up: list[tuple[str, list[str]]], who: int) -> dict[str, Any]:
    started = time.perf_counter()
    judge.compare([warm_up[0][0]], [warm_up[0][1]])
    loaded = time.perf_counter()
    for prompt, responses in warm_up:
        judge.compare([prompt], [responses])
    warm = time.perf_counter()
    logits = judge.compare(*read_texts(folder))
    seconds = time.perf_counter() - warm
    judge.close()
    return {
        "logits": logits.tolist(),
        **dict(zip(TIMES, (loaded - started, warm - loaded, seconds), strict=True)),
        "peak_bytes": peak(who),
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(python: str | Path, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Return the result of this file's function `name`, run in a new process with `threads` cores."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    command = [python, __file__, "--worker", name, str(folder), "--threads", str(threads)]
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, folder: Path, threads: int) -> None:
    """Run one contender with `threads` cores and print its result."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    found = {"original": original, "sidecar": sidecar, "jax": on_mesh}[name](folder, threads)
    print("\n" + json.dumps(found))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=4, help=f"of {K * (K - 1)} pairs each")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    environment.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its table, or one JSON object."""
    args = arguments()
    if args.worker:
        work(args.worker[0], Path(args.worker[1]), args.threads)
        return
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="judge-") as name:
        folder = Path(name)
        make(folder, args.layers)
        texts(folder, args.prompts)
        told = json.loads((folder / "texts.json").read_text())
        found: dict[str, dict[str, Any]] = {}
        for backend in args.backends:
            own = backend == "original"
            python = (
                environment.interpreter("llm-blender", REQUIREMENTS, args.cache) if own else sys.executable
            )
            print(f"{backend} ...", file=sys.stderr, flush=True)
            found[backend] = measure(python, backend, folder, args.threads)
            rate = len(told["tokens"]) / found[backend]["seconds"]
            print(f"{backend}: {rate:.3f} pairs/s", file=sys.stderr, flush=True)
    pairs = len(told["tokens"])
    logits = {backend: np.array(one.pop("logits")) for backend, one in found.items()}
    first = logits[args.backends[0]]
    device = next(iter(found.values())).get("device", "cpu")
    for backend, one in found.items():
        one["pairs_per_second"] = pairs / one["seconds"]
        one["largest_difference"] = float(np.abs(logits[backend] - first).max())
    summary = report(args, told, found, device, float(first[first != 0].std()))
    if args.json:
        print(json.dumps(summary))
    if any(one["largest_difference"] > TOLERANCE[device] for one in found.values()):
        sys.exit(f"results differ by more than {TOLERANCE[device]}")


def report(
    args: argparse.Namespace, told: dict[str, Any], found: dict[str, Any], device: str, spread: float
) -> dict[str, Any]:
    """Print the table; return the object that --json prints."""
    from importlib.metadata import version

    pairs, tokens = len(told["tokens"]), told["tokens"]
    versions = {name: version(name) for name in ("jax", "torch", "transformers", "tokenizers")}
    versions |= found.get("original", {}).pop("versions", {})
    rate = {backend: one["pairs_per_second"] for backend, one in found.items()}
    summary: dict[str, Any] = {
        f"{backend}_vs_original": rate[backend] / rate["original"]
        for backend in rate
        if backend != "original" and "original" in rate
    }
    # Without the gain from scoring repeated responses once.
    scored = told["distinct"] / pairs
    summary |= {f"{name}_but_for_repetition": ratio * scored for name, ratio in summary.items()}
    summary |= {
        "backends": found,
        "pairs": pairs,
        "distinct_pairs": told["distinct"],
        "tokens_per_pair": {"mean": statistics.mean(tokens), "median": statistics.median(tokens), "most": max(tokens)},
        "logit_spread": spread,
        "layers": args.layers,
        "threads": args.threads,
        "seed": SEED,
        "device": device,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": versions,
    }  # fmt: skip
    print(
        f"{pairs} pairs ({told['distinct']} distinct) of {statistics.mean(tokens):.0f} tokens on average (at most "
        f"{max(tokens)}), {args.layers} layers, {device}, {args.threads} threads; logits spread by {spread:.2f}\n"
    )
    print("| | pairs/s | against the original | load s | warm-up s | peak GiB | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for backend, one in found.items():
        ratio = f"{rate[backend] / rate['original']:.2f}" if "original" in rate else "-"
        print(
            f"| {backend} | {rate[backend]:.3f} | {ratio} | {one['load_seconds']:.1f} | {one['warm_seconds']:.1f} | "
            f"{one['peak_bytes'] / 2**30:.2f} | {one['largest_difference']:.1e} |"
        )
    print(f"\nWithout the gain from repeated responses, the ratios are {scored:.2f} times as large.")
    return summary


if __name__ == "__main__":
    main()
