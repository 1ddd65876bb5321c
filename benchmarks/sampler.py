"""Responses per second of the sampler, Hugging Face `generate` and a static batch, on recorded lengths of responses.

python benchmarks/sampler.py [--prompts 24] [--slots 40] [--repetitions 3] [--threads 2] [--quick] [--json]

One run: the same random Mistral of 25M parameters in float32, the same prompts and lengths (benchmarks/traces), the same
threads, each contender in a process of its own, taking turns. K = 5 responses a prompt. A response ends where the trace
says, so the content of what is sampled does not matter. `generate` batches the prompts in their order and stops with the
longest response of a batch, which it is told beforehand; its batch size and cache are the best of those tried.
Compilation and loading are timed apart. Slot efficiency is counted over the whole trace at 128 slots, with the real engine
and a model small enough. An accelerator has its own benchmark, sampler_device.py.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRACES = Path(__file__).parent / "traces"
SEED, K = 0, 5
MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 5, "intermediate_size": 1792,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = MODEL | {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
MOST_NEW = 2048  # max_new_tokens of the engine, which does not know the lengths
HF_ROWS, HF_CACHES = (5, 10, 20, 40, 80, 160), ("dynamic", "static")
CONTEXTS = (64, 384)  # tokens before the steps that are timed to choose among them
EQUAL = 128  # tokens of each prompt and each response where all are equal
COMPILED = (
    "/jax/core/compile/backend_compile_duration"  # jax's event; one that finds its program on disk counts too
)


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """Tokens of each prompt, and of each of its K responses."""

    prompts: list[int]
    responses: list[list[int]]

    @staticmethod
    def of(name: str, count: int, shrink: int) -> "Trace":
        """The first `count` prompts of a file, all lengths divided by `shrink`."""
        found = json.loads((TRACES / f"{name}.json").read_text())
        responses = [[max(2, n // shrink) for n in row] for row in found["responses"][:count]]
        return Trace([max(2, n // shrink) for n in found["prompts"][:count]], responses)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.responses))

    def batches(self, prompts: int) -> Iterator[slice]:
        return (slice(i, i + prompts) for i in range(0, len(self.prompts), prompts))

    def static_steps(self, prompts: int) -> int:
        """Decode steps of batches that end with their longest response."""
        return sum(max(map(max, self.responses[cut])) for cut in self.batches(prompts))

    def ids(self, vocab: int) -> list[list[int]]:
        rng = np.random.default_rng(SEED)
        return [rng.integers(5, vocab, n).tolist() for n in self.prompts]


def make(folder: Path, sizes: dict[str, int]) -> None:
    """A random Mistral in Hugging Face's format, which all contenders load."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).save_pretrained(folder)


def useful(sizes: dict[str, int], trace: Trace, steps: int) -> tuple[float, float]:
    """(FLOPs, bytes) that a float32 model cannot do without: each prompt once, then each token of its responses, and in
    each decode step all matrices and the keys and values of what is live."""
    d, h, n, c = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    layers = sizes["num_hidden_layers"]
    body = layers * (2 * d * c * (h + n) + 3 * d * sizes["intermediate_size"])
    head = d * sizes["vocab_size"]
    prompt = np.repeat(trace.prompts, K).astype(float)
    said = np.concatenate(trace.responses).astype(float)
    columns = (said * prompt + said * (said + 1) / 2).sum()  # of the cache, over all tokens drawn
    once = np.array(trace.prompts, float)
    flops = 2 * body * once.sum() + 2 * layers * h * c * (once**2).sum()
    flops += 2 * (body + head) * said.sum() + 4 * layers * h * c * columns
    return flops, 4 * steps * (body + head) + 4 * layers * 2 * n * c * columns


# --- contenders, each in a process of its own -------------------------------------------------------------------------


class Watch:
    """Seconds of a `with` block, and the share of the machine's cores that other processes had meanwhile."""

    def __enter__(self) -> "Watch":
        self._before = self._clocks()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (b - a for a, b in zip(self._before, self._clocks(), strict=True))
        self.seconds, self.others = wall, max(0.0, busy - own) / wall / (os.cpu_count() or 1)

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        own = sum(os.times()[:2])
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf(
                "SC_CLK_TCK"
            )  # less idle and waiting for disks
        except OSError:
            busy = own  # not Linux: unknown
        return time.perf_counter(), busy, own


def peak_bytes() -> int:
    """Of this process's resident memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class NoText:
    """Stands for the tokenizer: lengths are all that counts."""

    def decode(self, ids: list[int], **_: object) -> str:
        return ""


def compilations() -> list[float]:
    """A list that grows by the seconds of each program that XLA compiles from now on."""
    import jax

    found: list[float] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def engine(folder: str, slots: int, most: int) -> Any:
    from sppo_jax import models, tiny
    from sppo_jax.config import Sampling
    from sppo_jax.sampler import Sampler

    model = models.load(tiny.path("policy") if folder == "embedded" else Path(folder))
    return Sampler(model, NoText(), Sampling(responses=K, max_new_tokens=most, slots=slots), eos=())


def prompts_of(trace: Trace, vocab: int) -> list[Any]:
    from sppo_jax.records import Prompt

    return [Prompt(f"prompt {i}", ids) for i, ids in enumerate(trace.ids(vocab))]


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """The engine over a trace; with `drain`, one batch of slots // K prompts after another, each to its end."""
    trace, compiled = Trace.of(*task["trace"]), compilations()
    with Watch() as warm:
        sampler = engine(task["folder"], task["slots"], task["most"])
        prompts = prompts_of(trace, sampler.architecture.vocab)
        sampler.warm_up(trace.prompts)
        for _ in sampler.stream(prompts[:1], seed=SEED, limits=[[2] * K]):
            pass
    programs, before = len(compiled), dataclasses.replace(sampler.stats)
    with Watch() as watch:
        for cut in trace.batches(task["slots"] // K if task["drain"] else len(prompts)):
            limits = trace.responses[cut]
            for i, found in sampler.stream(prompts[cut], seed=SEED, limits=limits):
                assert [len(ids) for ids in found.response_ids] == limits[i]
    steps = sampler.stats.steps - before.steps
    tokens = sampler.stats.tokens - before.tokens
    assert tokens == trace.tokens
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "warm_seconds": warm.seconds,
        "programs": programs,
        "new_compilations": len(compiled) - programs,
        "steps": steps,
        "slot_efficiency": tokens / (steps * sampler.stats.slots),
        "evicted_tokens": sampler.stats.evicted_tokens,
        "peak_bytes": peak_bytes(),
    }


def equal_ours(task: dict[str, Any]) -> dict[str, Any]:
    """Decode steps per second with all slots full to the end."""
    found = {}
    for rows in task["rows"]:
        trace = Trace([task["equal"]] * (rows // K), [[task["equal"]] * K] * (rows // K))
        sampler = engine(task["folder"], rows, task["equal"])
        found[str(rows)] = steady_steps(
            sampler, prompts_of(trace, sampler.architecture.vocab), trace.responses
        )
    return {"steps_per_s": found}


def steady_steps(sampler: Any, prompts: list[Any], limits: list[list[int]]) -> float:
    """Decode steps per second, from the end of the first chunk to the end of the last; `limits` are equal and fill all slots."""
    chunks: list[tuple[float, int]] = []

    def heard(_: int, tokens: int, __: int) -> None:
        if tokens:
            chunks.append((time.perf_counter(), tokens))

    for _ in sampler.stream(prompts, seed=SEED, limits=limits, on_progress=heard):
        pass
    steps = sum(tokens for _, tokens in chunks[1:]) / sampler.stats.slots
    return steps / (chunks[-1][0] - chunks[0][0])


class HuggingFace:
    """transformers' own model and `generate`, sampling at temperature 1 from all tokens, without an end of sequence."""

    def __init__(self, folder: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: Sequence[list[int]], new: int, rows: int, cache: str) -> list[float]:
        """rows // len(prompts) responses of `new` tokens to each, padded on the left. Returns when each token came."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Clock(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **_: object) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

        times: list[float] = []
        longest = max(map(len, prompts))
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        self.model._previous_max_cache_length = -1  # else a static cache stays as long as the longest so far
        with torch.inference_mode():
            found = self.model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, num_return_sequences=rows // len(prompts),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                cache_implementation=None if cache == "dynamic" else cache,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )  # fmt: skip
        assert found.shape == (rows, longest + new)
        return times


def hf(task: dict[str, Any]) -> dict[str, Any]:
    trace, rows, cache = Trace.of(*task["trace"]), task["rows"], task["cache"]
    with Watch() as warm:
        model = HuggingFace(task["folder"], task["threads"])
        prompts = trace.ids(model.model.config.vocab_size)
        model.generate(prompts[:1], 4, K, cache)
    with Watch() as watch:
        for cut in trace.batches(rows // K):
            batch = prompts[cut]
            model.generate(batch, max(map(max, trace.responses[cut])), K * len(batch), cache)
    steps = trace.static_steps(rows // K)
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "warm_seconds": warm.seconds,
        "steps": steps,
        "slot_efficiency": trace.tokens / (steps * rows),
        "peak_bytes": peak_bytes(),
    }


def equal_hf(task: dict[str, Any]) -> dict[str, Any]:
    """Decode steps per second of the better cache for each batch size."""
    model, found = HuggingFace(task["folder"], task["threads"]), {}
    prompt = np.random.default_rng(SEED).integers(5, model.model.config.vocab_size, task["equal"]).tolist()
    for rows in task["rows"]:
        rates = []
        for cache in HF_CACHES:
            times = model.generate([prompt] * (rows // K), task["equal"], rows, cache)
            rates.append((len(times) - 1) / (times[-1] - times[0]))
        found[str(rows)] = max(rates)
    return {"steps_per_s": found}


def calibrate(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds that each batch size and cache would need for the trace, from prefills and steps at two lengths.

    The step's time is taken as linear in the columns of the cache: those so far if it is dynamic, all if it is static.
    """
    trace, model = Trace.of(*task["trace"]), HuggingFace(task["folder"], task["threads"])
    vocab, estimates = model.model.config.vocab_size, []
    model.generate([[5] * 8], 4, K, "dynamic")
    for cache, rows in itertools.product(HF_CACHES, task["rows"]):
        prefills, steps = [], []
        for context in task["contexts"]:
            ids = np.random.default_rng(SEED).integers(5, vocab, (rows // K, context)).tolist()
            began = time.perf_counter()
            times = model.generate(ids, 12, rows, cache)
            prefills.append(times[0] - began)
            steps.append(statistics.median(np.diff(times)))
        columns = [context + 12 * (cache == "static") for context in task["contexts"]]
        seconds = 0.0
        for cut in trace.batches(rows // K):
            prompt, new = max(trace.prompts[cut]), max(map(max, trace.responses[cut]))
            read = prompt + new / 2 if cache == "dynamic" else prompt + new
            seconds += _line(task["contexts"], prefills, prompt) + new * _line(columns, steps, read)
        estimates.append({"cache": cache, "rows": rows, "estimated_seconds": seconds, "step_seconds": steps})
        say(
            f"  {cache} cache, {rows} rows: about {seconds:.0f} s; steps of {1e3 * steps[0]:.0f} and {1e3 * steps[1]:.0f} ms"
        )
    return {"estimates": sorted(estimates, key=lambda one: one["estimated_seconds"])}


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Through two points, and never below the first's value."""
    return max(ys[0], ys[0] + (ys[1] - ys[0]) * (x - xs[0]) / (xs[1] - xs[0]))


def peaks(task: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do: FLOP/s of a large float32 matrix product, bytes/s of a copy, read and written."""
    import jax
    import jax.numpy as jnp

    side, length = task["side"], task["length"]
    square, vector = jnp.ones((side, side)), jnp.ones(length)
    product = best_seconds(jax.jit(lambda x: x @ x), square)
    copy = best_seconds(jax.jit(lambda x: x + 1), vector)
    return {"flops_per_s": 2 * side**3 / product, "bytes_per_s": 2 * vector.nbytes / copy}


def best_seconds(function: Any, x: Any, times: int = 7) -> float:
    import jax

    jax.block_until_ready(function(x))
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


WORKERS = {
    "ours": ours, "equal_ours": equal_ours, "hf": hf, "equal_hf": equal_hf, "calibrate": calibrate, "peaks": peaks,
}  # fmt: skip


def work(name: str, task: dict[str, Any]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    print("\n" + json.dumps(WORKERS[name](task)))


# --- the run ----------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """What one run of the benchmark does."""

    folder: Path  # of the models, and of the programs that XLA keeps
    threads: int
    repetitions: int
    prompts: int
    slots: int
    quick: bool

    def measure(self, name: str, **task: Any) -> dict[str, Any]:
        """What a worker of this file returns, in a fresh process that has `threads` cores."""
        variables = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        task = {"threads": self.threads, "folder": str(self.folder / "model")} | task
        command = [sys.executable, __file__, "--worker", name, json.dumps(task)]
        done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def trace(self, name: str, count: int | None = None) -> tuple[str, int, int]:
        """Arguments of Trace.of."""
        shrink = 16 if self.quick and name == "lognormal" else 1
        return name, 16 if self.quick else count or self.prompts, shrink

    @property
    def sizes(self) -> dict[str, int]:
        return MODEL | {"num_hidden_layers": 1} if self.quick else MODEL

    def slot_efficiency(self) -> dict[str, Any]:
        say("slot efficiency: the whole trace at 128 slots, a very small model")
        folder, slots = str(self.folder / "small"), 16 if self.quick else 128
        trace = ("lognormal", 100, 16) if self.quick else ("lognormal", 1000, 1)
        found = self.measure("ours", folder=folder, trace=trace, slots=slots, most=MOST_NEW, drain=False)
        say(f"  {found['slot_efficiency']:.3f} in {found['steps']} steps, {found['seconds']:.0f} s")
        return found

    def calibrated(self) -> list[dict[str, Any]]:
        """Hugging Face's batch sizes and caches, the one that promises most first."""
        say("Hugging Face generate: which batch size and cache")
        rows = (5, 10) if self.quick else HF_ROWS
        contexts = (16, 32) if self.quick else CONTEXTS
        return self.measure("calibrate", trace=self.trace("lognormal"), rows=rows, contexts=contexts)[
            "estimates"
        ]

    def lognormal(self, estimates: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], int]:
        """Measurements of ours, hf and static in turns; and hf's best batch size.

        Of its two best estimates both run once, and the faster goes on.
        """
        trace = self.trace("lognormal")
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "hf": [], "static": []}
        contestants = [{key: one[key] for key in ("cache", "rows")} for one in estimates[:2]]
        for _ in range(self.repetitions):
            found["ours"].append(self.replay("ours", trace, self.slots, MOST_NEW))
            tried = []
            for one in contestants:
                tried.append(one | self.measure("hf", trace=trace, **one))
                label = f"hf, {one['cache']} cache, {one['rows']} rows"
                say(f"  {label}: {tried[-1]['seconds']:.1f} s; others {tried[-1]['others']:.0%}")
            best = min(range(len(tried)), key=lambda i: tried[i]["seconds"])
            contestants = [contestants[best]]
            found["hf"].append(tried[best])
            found["static"].append(self.replay("static", trace, self.slots, MOST_NEW))
        return found, contestants[0]["rows"]

    def replay(self, name: str, trace: tuple[str, int, int], slots: int, most: int, folder: str = "") -> Any:
        other = {"folder": folder} if folder else {}
        found = self.measure("ours", trace=trace, slots=slots, most=most, drain=name == "static", **other)
        say(f"  {name}, {slots} slots: {found['seconds']:.1f} s; others {found['others']:.0%}")
        return found

    def equal(self, rows: set[int]) -> dict[str, dict[str, float]]:
        """Decode steps per second by rows: medians of ours, hf, and their ratio."""
        say(f"equal lengths: {sorted(rows)} rows")
        task: dict[str, Any] = {"rows": sorted(rows), "equal": 64 if self.quick else EQUAL}
        runs = [
            (self.measure("equal_ours", **task), self.measure("equal_hf", **task))
            for _ in range(self.repetitions)
        ]
        found = {}
        for n in map(str, sorted(rows)):
            mine, theirs = (statistics.median(run[i]["steps_per_s"][n] for run in runs) for i in (0, 1))
            found[n] = {"ours": mine, "hf": theirs, "ratio": mine / theirs}
            say(f"  {n} rows: {mine:.1f} steps/s, hf {theirs:.1f}")
        return found

    def quickstart(self) -> dict[str, list[dict[str, Any]]]:
        """The embedded policy at the quickstart's own lengths and slots."""
        from sppo_jax.config import Sampling

        say("the quickstart's lengths")
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "static": []}
        sampling, trace = Sampling(), self.trace("quickstart", 128)
        for _, name in itertools.product(range(self.repetitions), found):
            found[name].append(self.replay(name, trace, sampling.slots, sampling.max_new_tokens, "embedded"))
        return found


def merged(runs: list[dict[str, Any]], responses: int, tokens: int) -> dict[str, Any]:
    """Repetitions as one: medians of what is timed, the largest of what must stay small."""
    seconds = statistics.median(run["seconds"] for run in runs)
    largest = ("new_compilations", "peak_bytes", "others", "warm_seconds")
    return runs[-1] | {
        "seconds": seconds,
        "every_seconds": [run["seconds"] for run in runs],
        "responses_per_s": responses / seconds,
        "tokens_per_s": tokens / seconds,
        **{key: max(run[key] for run in runs) for key in largest if key in runs[0]},
    }


def compare(run: Run) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    from importlib.metadata import version

    make(run.folder / "model", run.sizes)
    make(run.folder / "small", SMALL)
    say("the machine's peaks")
    peak = run.measure("peaks", side=1024 if run.quick else 4096, length=2**22 if run.quick else 2**27)
    full = run.slot_efficiency()
    estimates = run.calibrated()
    say(f"{run.trace('lognormal')[1]} prompts of the trace, {run.repetitions} times")
    runs, hf_rows = run.lognormal(estimates)
    equal = run.equal({hf_rows, run.slots // K * K})
    quick = run.quickstart()

    trace = Trace.of(*run.trace("lognormal"))
    found = {name: merged(each, K * len(trace.prompts), trace.tokens) for name, each in runs.items()}
    for one in found.values():
        flops, moved = useful(run.sizes, trace, one["steps"])
        one["flops_share"] = flops / one["seconds"] / peak["flops_per_s"]
        one["bytes_share"] = moved / one["seconds"] / peak["bytes_per_s"]
        one["roofline_share"] = max(one["flops_share"], one["bytes_share"])
    short = Trace.of(*run.trace("quickstart", 128))
    small = {name: merged(each, K * len(short.prompts), short.tokens) for name, each in quick.items()}
    mine = found["ours"]
    everything = [full, *(one for kind in (runs, quick) for each in kind.values() for one in each)]
    return {
        "slot_efficiency": full["slot_efficiency"],
        "new_compilations": sum(one.get("new_compilations", 0) for one in everything),
        "responses_per_s": mine["responses_per_s"],
        "vs_hf_generate": mine["responses_per_s"] / found["hf"]["responses_per_s"],
        "vs_static": mine["responses_per_s"] / found["static"]["responses_per_s"],
        "peak_memory_ratio": mine["peak_bytes"] / found["hf"]["peak_bytes"],
        "equal_steps_ratio": {rows: one["ratio"] for rows, one in equal.items()},
        "quickstart_vs_static": small["ours"]["responses_per_s"] / small["static"]["responses_per_s"],
        "contenders": found,
        "quickstart": small,
        "equal_steps_per_s": equal,
        "slots": run.slots,
        "whole_trace": full,
        "hf_estimates": estimates,
        "peak": peak,
        "prompts": len(trace.prompts),
        "responses": K * len(trace.prompts),
        "tokens": trace.tokens,
        "repetitions": run.repetitions,
        "threads": run.threads,
        "model": run.sizes,
        "seed": SEED,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers")},
    }  # fmt: skip


def report(s: dict[str, Any]) -> None:
    """The tables."""
    full, best = s["whole_trace"], s["contenders"]["hf"]
    print(
        f"\nWhole trace at 128 slots: slot efficiency {s['slot_efficiency']:.3f} in {full['steps']} steps; "
        f"{full['programs']} programs, {s['new_compilations']} compiled after the warm-up\n\n"
        f"{s['responses']} responses of {s['tokens'] / s['responses']:.0f} tokens, {s['threads']} threads, medians of "
        f"{s['repetitions']}; this machine: {s['peak']['flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"{s['peak']['bytes_per_s'] / 1e9:.0f} GB/s\n"
    )
    names = {
        "ours": f"ours, {s['slots']} slots",
        "hf": f"Hugging Face, {best['rows']} rows, {best['cache']} cache",
        "static": f"our static batch, {s['slots']} rows",
    }
    columns = (
        "responses/s",
        "tokens/s",
        "steps",
        "slot efficiency",
        "peak GiB",
        "FLOP/s, of peak",
        "bytes/s, of peak",
    )
    print("| | " + " | ".join((*columns, "warm-up s", "others")) + " |\n|" + "---|" * 10)
    for name, one in s["contenders"].items():
        print(
            f"| {names[name]} | {one['responses_per_s']:.2f} | {one['tokens_per_s']:.0f} | {one['steps']} | "
            f"{one['slot_efficiency']:.3f} | {one['peak_bytes'] / 2**30:.2f} | {one['flops_share']:.2f} | "
            f"{one['bytes_share']:.2f} | {one['warm_seconds']:.1f} | {one['others']:.0%} |"
        )
    for name, one in s["quickstart"].items():
        print(
            f"| quickstart, {name} | {one['responses_per_s']:.1f} | {one['tokens_per_s']:.0f} | {one['steps']} | "
            f"{one['slot_efficiency']:.3f} | {one['peak_bytes'] / 2**30:.2f} | | | {one['warm_seconds']:.1f} | "
            f"{one['others']:.0%} |"
        )
    print(
        f"\n{s['vs_hf_generate']:.2f} x Hugging Face generate, {s['vs_static']:.2f} x our static batch, peak memory "
        f"{s['peak_memory_ratio']:.2f} x Hugging Face's; quickstart {s['quickstart_vs_static']:.2f} x static"
    )
    for rows, one in s["equal_steps_per_s"].items():
        print(
            f"equal lengths, {rows} rows: {one['ours']:.1f} steps/s, {one['hf']:.1f} by Hugging Face: {one['ratio']:.2f} x"
        )
    noisy = max(one["others"] for kind in ("contenders", "quickstart") for one in s[kind].values())
    if noisy > 0.05:
        print(f"other processes had up to {noisy:.0%} of the cores: figures are not to be kept")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24, help=f"of the trace, {K} responses each")
    parser.add_argument("--slots", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--quick", action="store_true", help="everything once and short: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        work(args.worker[0], json.loads(args.worker[1]))
        return
    with tempfile.TemporaryDirectory(prefix="sampler-") as folder:
        slots, repetitions = (10, 1) if args.quick else (args.slots, args.repetitions)
        summary = compare(Run(Path(folder), args.threads, repetitions, args.prompts, slots, args.quick))
    report(summary)
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
