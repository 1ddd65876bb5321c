"""Tokens per second of the sampler and of Hugging Face `generate` on SmolLM2-135M-Instruct, a published model, on a CPU.

python benchmarks/smollm2_speed.py --model DIR [--prompts 32] [--repetitions 2] [--threads 2] [--quick] [--json]

DIR is what `benchmarks/smollm2.py --to DIR` makes. One run, float32, the same prompts and threads, each contender in a
process of its own: K = 5 responses a prompt at temperature 1 from all tokens, at most 128 new tokens; a response ends at its
end-of-sequence token, and only tokens up to there count. `generate` gets the fastest of 20, 40 and 80 rows with the dynamic
and the static cache, found over half of the prompts. Ours has the default number of slots; its first process compiles, the
later ones must find every program on disk. A decode step of 40 full slots is held against its matrix products alone, the
fastest of XLA's, torch's and NumPy's.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sampler_replay import HF_CACHES, SEED, K, NoText, Watch, peak_bytes, say, steady_steps
from smollm2 import PROMPTS

BEGAN = time.perf_counter()
NEW, ROWS, SLOTS = 128, (20, 40, 80), 40
SUBJECTS = (
    "tides", "bread", "chess", "volcanoes", "bees", "glaciers", "the violin", "rainbows", "compilers", "sleep", "bicycles",
    "coffee", "the moon", "earthquakes", "vaccines", "maps", "glass", "whales", "photography", "concrete", "tea", "clouds",
)  # fmt: skip
QUESTIONS = (*PROMPTS, *(f"Tell me something surprising about {subject}." for subject in SUBJECTS))
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


def prompts_of(folder: Path, count: int) -> tuple[Any, list[Any]]:
    """The tokenizer, and the first `count` prompts in its chat template."""
    from sppo_jax.text import chat_template

    tokenizer = chat_template.load_tokenizer(folder)
    return tokenizer, [chat_template.chat_prompt(tokenizer, text) for text in QUESTIONS[:count]]


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """The sampler over all prompts, programs and weights included in `first_token_seconds` but not in `seconds`."""
    import jax

    from sppo_jax import compilation, models
    from sppo_jax.config import Sampling
    from sppo_jax.sampler import Sampler
    from sppo_jax.text import chat_template

    compilation.keep_programs()
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    folder = Path(task["folder"])
    tokenizer, prompts = prompts_of(folder, task["prompts"])
    model = models.load(folder)
    eos = chat_template.eos_ids(folder, tokenizer, model.architecture.vocab)
    sampler = Sampler(model, tokenizer, Sampling(responses=K, max_new_tokens=task["new"]), eos=eos)
    del model
    sampler.warm_up([len(prompt.ids) for prompt in prompts], K * len(prompts))
    first: list[float] = []
    with Watch() as watch:
        sampler.generate(prompts, seed=SEED, on_progress=lambda *_: first.append(time.perf_counter() - BEGAN))
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "first_token_seconds": first[0],
        "programs": events.count(HIT) + events.count(MISS),
        "compiled": events.count(MISS),
        "tokens": sampler.stats.tokens,
        "steps": sampler.stats.steps,
        "slot_steps": sampler.stats.slot_steps,
        "peak_bytes": peak_bytes(),
    }


def step(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a decode step with 40 slots that are full to the end."""
    from sppo_jax import compilation, models
    from sppo_jax.config import Sampling
    from sppo_jax.sampler import Sampler

    compilation.keep_programs()
    folder = Path(task["folder"])
    _, prompts = prompts_of(folder, SLOTS // K)
    sampling = Sampling(responses=K, max_new_tokens=task["new"], slots=SLOTS)
    sampler = Sampler(models.load(folder), NoText(), sampling, eos=())
    limits = [[task["new"]] * K] * (SLOTS // K)
    rates = [steady_steps(sampler, prompts, limits) for _ in range(task["repetitions"])]
    return {"seconds": 1 / max(rates)}


def products(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the matrix products of one step of 40 rows, the fastest of several times, by XLA, torch and NumPy."""
    import jax
    import numpy as np
    import torch

    torch.set_num_threads(task["threads"])
    shapes = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)) * 30
    rng = np.random.default_rng(SEED)
    matrices = [rng.standard_normal(shape, np.float32) for shape in (*shapes, (576, 49152))]
    inputs = {width: rng.standard_normal((SLOTS, width), np.float32) for width in (576, 1536)}
    pairs = [(inputs[len(w)], w) for w in matrices]
    tensors = [tuple(map(torch.from_numpy, pair)) for pair in pairs]
    arrays = jax.device_put(pairs)
    run = jax.jit(lambda pairs: [x @ w for x, w in pairs]).lower(arrays).compile()
    contenders = {
        "xla": lambda: jax.block_until_ready(run(arrays)),
        "torch": lambda: [x @ w for x, w in tensors],
        "numpy": lambda: [x @ w for x, w in pairs],
    }
    found = {}
    for name, call in contenders.items():
        call()
        times = []
        for _ in range(5 * task["repetitions"]):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        found[name] = min(times)
    return {"seconds": min(found.values()), "by": found}


def hf(task: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face `generate` over the prompts, a batch of `rows` after another."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(task["threads"])
    torch.manual_seed(SEED)
    folder = Path(task["folder"])
    _, prompts = prompts_of(folder, task["prompts"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id

    def run(batch: list[Any], new: int) -> torch.Tensor:
        longest = max(len(prompt.ids) for prompt in batch)
        rows = [
            ([0] * (longest - len(p.ids)) + p.ids, [0] * (longest - len(p.ids)) + [1] * len(p.ids))
            for p in batch
        ]
        ids, mask = (torch.tensor(part) for part in zip(*rows, strict=True))
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, num_return_sequences=K, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, pad_token_id=eos,
                cache_implementation=None if task["cache"] == "dynamic" else task["cache"],
            )  # fmt: skip
        return found[:, longest:]

    each = task["rows"] // K
    run(prompts[:each], 2)
    tokens = steps = slot_steps = 0
    with Watch() as watch:
        for start in range(0, len(prompts), each):
            found = run(prompts[start : start + each], task["new"])
            ended = (found == eos).int().cumsum(1)
            tokens += int((ended - (found == eos).int() == 0).sum())  # up to the first end, itself included
            steps += found.shape[1]
            slot_steps += found.numel()
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "tokens": tokens,
        "steps": steps,
        "slot_steps": slot_steps,
        "peak_bytes": peak_bytes(),
    }


WORKERS = {"ours": ours, "step": step, "products": products, "hf": hf}


def measure(name: str, programs: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The result of a worker in a fresh process."""
    threads = str(task["threads"])
    variables = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(programs), "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
    }  # fmt: skip
    command = [sys.executable, __file__, "--worker", name, json.dumps(task)]
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if "tokens" in found:
        found |= {"tokens_per_s": found["tokens"] / found["seconds"]}
        say(f"  {name}: {found['tokens_per_s']:.0f} tokens/s, {found['tokens']} in {found['seconds']:.1f} s, "
            f"{found['tokens'] / found['slot_steps']:.0%} of the rows computed, {found['peak_bytes'] / 2**30:.2f} GiB; others had "
            f"{found['others']:.0%} of the cores")  # fmt: skip
    return found


def compare(args: argparse.Namespace, programs: Path) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    count, new, rows = (2, 8, (10,)) if args.quick else (args.prompts, NEW, ROWS)
    task = {"folder": str(args.model), "threads": args.threads, "prompts": count, "new": new}
    task["repetitions"] = args.repetitions
    load = os.getloadavg()
    runs = [measure("ours", programs, task) for _ in range(1 + args.repetitions)]
    settings = []
    for setting in ({"rows": n, "cache": cache} for n in rows for cache in HF_CACHES):
        say(f"Hugging Face, {setting}")
        settings.append(setting | measure("hf", programs, task | setting | {"prompts": -(-count // 2)}))
    best = max(settings, key=lambda one: one["tokens_per_s"])
    theirs = [
        measure("hf", programs, task | {k: best[k] for k in ("rows", "cache")})
        for _ in range(args.repetitions)
    ]
    floor, one = measure("products", programs, task), measure("step", programs, task)
    mine, other = (statistics.median(run["tokens_per_s"] for run in found) for found in (runs[1:], theirs))
    return {
        "tokens_per_s": mine,
        "vs_hf_generate": mine / other,
        "products_share": floor["seconds"] / one["seconds"],
        "peak_memory_ratio": max(run["peak_bytes"] for run in runs[1:]) / max(run["peak_bytes"] for run in theirs),
        "compiled_in_later_runs": sum(run["compiled"] for run in runs[1:]),
        "first_token_seconds": runs[-1]["first_token_seconds"],
        "best": {key: best[key] for key in ("rows", "cache")},
        "ours": runs, "hf": theirs, "hf_settings": settings, "products": floor, "step": one,
        "seed": SEED, "prompts": count, "responses": K * count, "max_new_tokens": new, "threads": args.threads,
        "load_at_start": load, "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "numpy")},
    }  # fmt: skip


def report(s: dict[str, Any]) -> None:
    """Print what matters."""
    print(
        f"{s['responses']} responses: {s['tokens_per_s']:.0f} tokens/s, {s['vs_hf_generate']:.2f} x Hugging Face's "
        f"({s['best']['rows']} rows, {s['best']['cache']} cache); peak memory {s['peak_memory_ratio']:.2f} x\n"
        f"a step of {SLOTS} slots: {1e3 * s['step']['seconds']:.0f} ms, its products alone "
        f"{1e3 * s['products']['seconds']:.0f} ms ({s['products_share']:.0%})\n"
        f"first token of a later run after {s['first_token_seconds']:.1f} s; {s['compiled_in_later_runs']} programs compiled again"
    )
    noisy = max(run["others"] for run in (*s["ours"], *s["hf"], *s["hf_settings"]))
    if noisy > 0.05:
        print(f"other processes had up to {noisy:.0%} of the cores: figures are not to be kept")


def main() -> None:
    """Run the benchmark, or one of its workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="the model's directory")
    parser.add_argument(
        "--prompts", type=int, default=32, help=f"at most {len(QUESTIONS)}, {K} responses each"
    )
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--quick", action="store_true", help="everything once and short: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, task = args.worker[0], json.loads(args.worker[1])
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
        print("\n" + json.dumps(WORKERS[name](task)))
        return
    if args.model is None:
        parser.error("name the model's directory: --model DIR (benchmarks/smollm2.py --to DIR makes it)")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        summary = compare(args, Path(folder) / "programs")
    report(summary)
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
