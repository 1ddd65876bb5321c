"""The sampler with Mistral-7B's shapes on the accelerator at hand: how near decoding and prefill come to its limits.

python benchmarks/sampler_device.py [--slots 64 128 256] [--quantize int8] [--quick] [--json]

Random weights in bfloat16. Decoding is timed with all slots full, about 600 tokens live in each: a step must read all matrices
and the live keys and values once, which takes bytes / bandwidth. Prefill is timed over whole responses of one
token, their single decode steps included, and held against the FLOPs of its matrix products and its attention. Limits are
the data sheet's, and the speeds of a large product and of a copy in the same run. --quick: small shapes, to see it run.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sampler_replay import SEED, NoText, best_seconds, compilations, say, steady_steps

from sppo_jax import sharding
from sppo_jax.config import Sampling
from sppo_jax.models import Architecture, Transformer, attention, hf
from sppo_jax.models.architecture import Rope
from sppo_jax.records import Prompt
from sppo_jax.sampler import Sampler

MISTRAL = Architecture(
    vocab=32_000, model=4096, mlp=14_336, layers=32, heads=32, kv_heads=8, head_dim=128, norm_eps=1e-5,
    rope=Rope(1e6), max_positions=32_768, window=None, tied=False,
)  # fmt: skip
SMALL = Architecture(
    vocab=512, model=64, mlp=128, layers=2, heads=4, kv_heads=2, head_dim=16, norm_eps=1e-5,
    rope=Rope(1e6), max_positions=1024, window=None, tied=False,
)  # fmt: skip
# Dense bfloat16 FLOP/s and bytes/s of main memory, by what the name of the device begins with.
CHIPS = {
    "NVIDIA H100": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12), "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5": (459e12, 2.765e12), "TPU v6 lite": (918e12, 1.638e12),
}  # fmt: skip
K, PROMPT, NEW, FIRST_CHUNK = 4, 448, 320, 32
PREFILLED = 512  # tokens of a prompt where prefill is timed; all but the last are prefilled


def random_model(a: Architecture) -> Transformer:
    """A random model with a run's attention kernel, in bfloat16 from the start: float32 masters would not fit everywhere."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    like = hf.abstract(a, mesh, jnp.bfloat16)

    def weights(key: jax.Array) -> dict[str, jax.Array]:
        keys = dict(zip(like, jax.random.split(key, len(like)), strict=True))
        return {
            path: jnp.ones(x.shape, x.dtype) if path.endswith("norm")
            else (0.02 * jax.random.normal(keys[path], x.shape, x.dtype))
            for path, x in like.items()
        }  # fmt: skip

    kernel = attention.choose("auto", mesh, a, jnp.bfloat16)
    return Transformer(a, jax.jit(weights)(jax.random.key(SEED)), jnp.bfloat16, kernel)


def sampler_of(model: Transformer, slots: int, responses: int, new: int, quantize: Any) -> Sampler:
    """A sampler whose responses end by length alone."""
    sampling = Sampling(responses=responses, max_new_tokens=new, slots=slots, quantize=quantize)
    return Sampler(model, NoText(), sampling, eos=())


def prompts(a: Architecture, count: int, tokens: int) -> list[Prompt]:
    """`count` prompts of `tokens` random ids each."""
    rng = np.random.default_rng(SEED)
    return [Prompt(f"prompt {i}", rng.integers(5, a.vocab, tokens).tolist()) for i in range(count)]


def matrices(a: Architecture) -> tuple[int, int]:
    """Parameters in the layers' matrices, and in the head."""
    layer = 2 * a.model * a.head_dim * (a.heads + a.kv_heads) + 3 * a.model * a.mlp
    return a.layers * layer, a.model * a.vocab


def decode(sampler: Sampler, bytes_per_s: float, quick: bool, width: int) -> dict[str, float]:
    """Tokens per second, and the share of a step's time that its memory traffic needs. `width`: bytes of one number."""
    a, slots, shrink = sampler.architecture, sampler.stats.slots, 4 if quick else 1
    prompt, new = PROMPT // shrink, NEW // shrink
    asked, limits = prompts(a, slots // K, prompt), [[new] * K] * (slots // K)
    for _ in sampler.stream(asked[:1], seed=SEED, limits=limits[:1]):
        pass
    compiled = compilations()
    rate = steady_steps(sampler, asked, limits)
    live = prompt + (FIRST_CHUNK + new) / 2
    bytes_ = width * (sum(matrices(a)) + slots * live * a.layers * 2 * a.kv_heads * a.head_dim)
    return {
        "tokens_per_s": rate * slots,
        "step_ms": 1e3 / rate,
        "live_tokens": live,
        "bytes_per_step": bytes_,
        "roofline_share": bytes_ / bytes_per_s * rate,
        "new_compilations": len(compiled),
    }


def prefill(sampler: Sampler, flops_per_s: float, quick: bool) -> dict[str, float]:
    """Prompt tokens per second, and the share of the time that the matrix products and attention need at `flops_per_s`."""
    a, tokens = sampler.architecture, PREFILLED // (4 if quick else 1)
    asked = prompts(a, 4 * sampler.stats.slots, tokens)
    for _ in sampler.stream(asked[:1], seed=SEED, responses=1, limits=[[1]]):
        pass
    began = time.perf_counter()
    for _ in sampler.stream(asked, seed=SEED, responses=1, limits=[[1]] * len(asked)):
        pass
    seconds = time.perf_counter() - began
    each = 2 * matrices(a)[0] * (tokens - 1) + 2 * a.layers * a.heads * a.head_dim * (tokens - 1) ** 2
    return {
        "tokens_per_s": len(asked) * (tokens - 1) / seconds,
        "matmul_share": len(asked) * each / seconds / flops_per_s,
    }


def reached(quick: bool) -> tuple[float, float]:
    """FLOP/s of a bfloat16 product of random matrices, and bytes/s of a copy, read and written."""
    side, length = (512, 2**20) if quick else (8192, 2**31)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    flops = 2 * side**3 / best_seconds(jax.jit(lambda x: x @ x), square)
    vector = jnp.ones(length, jnp.bfloat16)
    return flops, 2 * vector.nbytes / best_seconds(jax.jit(lambda x: x + 1), vector)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    device, a = jax.devices()[0].device_kind, SMALL if args.quick else MISTRAL
    flops, moved = reached(args.quick)
    # The longest name that fits, as "TPU v5 lite" begins with "TPU v5".
    named = max((name for name in CHIPS if device.startswith(name)), key=len, default=None)
    sheet = CHIPS[named] if named else (flops, moved)
    model, found = random_model(a), {}
    width = 1 if args.quantize == "int8" else 2
    for slots in args.slots:
        say(f"{slots} slots")
        sampler = sampler_of(model, slots, K, NEW, args.quantize)
        found[str(slots)] = decode(sampler, sheet[1], args.quick, width)
        say(f"  {found[str(slots)]}")
        last = prefill(sampler, sheet[0], args.quick)
        sampler.release()
        del sampler
    summary = {
        "device": device,
        "sheet": {"flops_per_s": sheet[0], "bytes_per_s": sheet[1]},
        "reached": {"flops_per_s": flops, "bytes_per_s": moved},
        "decode": found,
        "prefill": last,
        "quantize": args.quantize,
        "memory": {k: v for k, v in (jax.devices()[0].memory_stats() or {}).items() if k.startswith("peak")},
        "jax": jax.__version__,
    }
    print(f"{device}: {flops / 1e12:.0f} TFLOP/s and {moved / 1e9:.0f} GB/s reached, {sheet[0] / 1e12:.0f} and "
          f"{sheet[1] / 1e9:.0f} by its data sheet\n\n| slots | tokens/s | ms per step | of the data sheet's bandwidth | of the "
          "one reached |\n|---|---|---|---|---|")  # fmt: skip
    for slots, one in found.items():
        share = one["roofline_share"]
        print(
            f"| {slots} | {one['tokens_per_s']:.0f} | {one['step_ms']:.2f} | {share:.0%} | {share * sheet[1] / moved:.0%} |"
        )
    print(
        f"\nprefill: {last['tokens_per_s']:.0f} tokens/s, {last['matmul_share']:.0%} of the data sheet's FLOP/s, "
        f"{last['matmul_share'] * sheet[0] / flops:.0%} of those reached"
    )
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
