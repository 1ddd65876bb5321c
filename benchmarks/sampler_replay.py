"""Recorded lengths replayed by one contender of benchmarks/sampler.py, in a process of its own.

python benchmarks/sampler_replay.py NAME TASK

NAME is a function of WORKERS, TASK its argument as JSON; the last line printed is its result.
"""

import dataclasses
import gc
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRACES = Path(__file__).parent / "traces"
SEED, K = 0, 5
HF_CACHES = ("dynamic", "static")
# jax's event; a program found on disk counts too.
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Trace:
    """Numbers of tokens of each prompt and of each of its K responses."""

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
        """Number of tokens of all responses."""
        return sum(map(sum, self.responses))

    def batches(self, prompts: int, share: Sequence[int] = (0, 1)) -> Iterator[slice]:
        """Batches of so many prompts in their order; of `share` (i, n) every nth from the ith on."""
        starts = range(0, len(self.prompts), prompts)[share[0] :: share[1]]
        return (slice(i, i + prompts) for i in starts)

    def longest(self, cut: slice) -> int:
        """Tokens of the longest response of a batch: its decode steps."""
        return max(map(max, self.responses[cut]))

    def ids(self, vocab: int) -> list[list[int]]:
        """Random ids for each prompt."""
        rng = np.random.default_rng(SEED)
        return [rng.integers(5, vocab, n).tolist() for n in self.prompts]


def say(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


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
            idle = ticks[3] + ticks[4]  # waiting for disks included
            busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
        except OSError:
            busy = own  # not Linux: unknown
        return time.perf_counter(), busy, own


def peak_bytes() -> int:
    """The most resident memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class NoText:
    """Stands in for the tokenizer: only lengths matter."""

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


def engine(folder: str, slots: int, most: int, cache_tokens: int = 0) -> Any:
    """A sampler of the model in `folder`, or of the embedded policy, whose responses end by length alone."""
    from sppo_jax import models
    from sppo_jax.config import Sampling
    from sppo_jax.hub import names
    from sppo_jax.sampler import Sampler

    model = models.load(names.path("policy") if folder == "embedded" else Path(folder))
    sampling = Sampling(responses=K, max_new_tokens=most, slots=slots, cache_tokens=cache_tokens)
    sampler = Sampler(model, NoText(), sampling, eos=())
    del model
    gc.collect()  # the masters: nnx modules refer to themselves, and nothing is trained here
    return sampler


def prompts_of(trace: Trace, vocab: int) -> list[Any]:
    """The trace's prompts, with random ids."""
    from sppo_jax.records import Prompt

    return [Prompt(f"prompt {i}", ids) for i, ids in enumerate(trace.ids(vocab))]


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """The engine over a trace; with `drain`, one batch of slots // K prompts after another, each to its end."""
    trace, compiled = Trace.of(*task["trace"]), compilations()
    with Watch() as warm:
        sampler = engine(task["folder"], task["slots"], task["most"], task["cache_tokens"])
        prompts = prompts_of(trace, sampler.architecture.vocab)
        sampler.warm_up(trace.prompts)
        for _ in sampler.stream(prompts[:1], seed=SEED, limits=[[2] * K]):
            pass
    programs, before = len(compiled), dataclasses.replace(sampler.stats)
    with Watch() as watch:
        for cut in trace.batches(task["slots"] // K if task["drain"] else len(prompts), task["share"]):
            limits = trace.responses[cut]
            for i, found in sampler.stream(prompts[cut], seed=SEED, limits=limits):
                assert [len(ids) for ids in found.response_ids] == limits[i]
    steps = sampler.stats.steps - before.steps
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "warm_seconds": warm.seconds,
        "programs": programs,
        "new_compilations": len(compiled) - programs,
        "steps": steps,
        "slot_steps": sampler.stats.slot_steps - before.slot_steps,
        "tokens": sampler.stats.tokens - before.tokens,
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

    def record(_: int, tokens: int, __: int) -> None:
        if tokens:
            chunks.append((time.perf_counter(), sampler.stats.steps))

    for _ in sampler.stream(prompts, seed=SEED, limits=limits, on_progress=record):
        pass
    return (chunks[-1][1] - chunks[0][1]) / (chunks[-1][0] - chunks[0][0])


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
    """Time `generate` over the batches of a trace."""
    trace, rows, cache = Trace.of(*task["trace"]), task["rows"], task["cache"]
    with Watch() as warm:
        model = HuggingFace(task["folder"], task["threads"])
        prompts, cuts = trace.ids(model.model.config.vocab_size), [*trace.batches(rows // K, task["share"])]
        model.generate(prompts[:1], 4, K, cache)
    with Watch() as watch:
        for cut in cuts:
            batch = prompts[cut]
            model.generate(batch, trace.longest(cut), K * len(batch), cache)
    return {
        "seconds": watch.seconds,
        "others": watch.others,
        "warm_seconds": warm.seconds,
        "steps": sum(trace.longest(cut) for cut in cuts),
        "slot_steps": sum(trace.longest(cut) * K * len(prompts[cut]) for cut in cuts),
        "tokens": sum(map(sum, (row for cut in cuts for row in trace.responses[cut]))),
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
            prompt, new = max(trace.prompts[cut]), trace.longest(cut)
            read = prompt + new / 2 if cache == "dynamic" else prompt + new
            seconds += _line(task["contexts"], prefills, prompt) + new * _line(columns, steps, read)
        estimates.append({"cache": cache, "rows": rows, "estimated_seconds": seconds, "step_seconds": steps})
        say(
            f"  {cache} cache, {rows} rows: about {seconds:.0f} s; steps of {1e3 * steps[0]:.0f} and {1e3 * steps[1]:.0f} ms"
        )
    return {"estimates": sorted(estimates, key=lambda one: one["estimated_seconds"])}


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The line through two points at `x`, at least the first point's value."""
    return max(ys[0], ys[0] + (ys[1] - ys[0]) * (x - xs[0]) / (xs[1] - xs[0]))


def peaks(task: dict[str, Any]) -> dict[str, Any]:
    """The machine's peaks: FLOP/s of a large float32 matrix product, bytes/s of a copy, read and written."""
    import jax
    import jax.numpy as jnp

    side, length = task["side"], task["length"]
    square, vector = jnp.ones((side, side)), jnp.ones(length)
    product = best_seconds(jax.jit(lambda x: x @ x), square)
    # In place and many times: memory that is new to a process costs more than writing to it.
    turns = 20
    copies = best_seconds(jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, x: x + 1, x)), vector, 3)
    return {"flops_per_s": 2 * side**3 / product, "bytes_per_s": 2 * turns * vector.nbytes / copies}


def best_seconds(function: Any, x: Any, times: int = 7) -> float:
    """The least seconds of `times` calls of `function` on `x`, compilation left out."""
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


def main() -> None:
    name, task = sys.argv[1], json.loads(sys.argv[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    print("\n" + json.dumps(WORKERS[name](task)))


if __name__ == "__main__":
    main()
