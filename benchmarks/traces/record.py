"""Make the length traces that benchmarks/sampler.py replays: lognormal.json is drawn, quickstart.json is taken from a run.

python benchmarks/traces/record.py [--quickstart runs/quickstart]

A trace holds the tokens of each prompt, `prompts`, and of its K responses, `responses`, in the order in which they
were asked. The files are committed, and new ones would make old results incomparable.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SEED, COUNT, K = 5, 1000, 5
# Logarithms of lengths in tokens: mean and spread; least and most. About 350 and 180 tokens on average.
RESPONSE, PROMPT = (5.545, 0.8, 4, 2048), (5.02, 0.6, 8, 512)
CORRELATION = 0.5  # of the logarithms of two responses to one prompt


def lognormal() -> dict[str, Any]:
    """Draw the lengths of prompts, and of K correlated responses to each."""
    rng = np.random.default_rng(SEED)
    prompts = _lengths(rng.standard_normal(COUNT), PROMPT)
    shared, own = rng.standard_normal((COUNT, 1)), rng.standard_normal((COUNT, K))
    responses = _lengths(CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own, RESPONSE)
    source = (
        f"lognormal: responses {RESPONSE}, correlation {CORRELATION}, prompts {PROMPT}; numpy seed {SEED}"
    )
    return {"source": source, "prompts": prompts, "responses": responses}


def _lengths(normal: np.ndarray, shape: tuple[float, float, int, int]) -> Any:
    mean, spread, least, most = shape
    return np.clip(np.rint(np.exp(mean + spread * normal)), least, most).astype(int).tolist()


def quickstart(run: Path) -> dict[str, Any]:
    """The first iteration's prompts and responses, in the order of its shards."""
    from sppo_jax import records

    shards = sorted((run / "iter_1" / "responses").glob("*.parquet"))
    rows = [row for shard in shards for row in records.read(shard, records.Responses)]
    return {
        "source": "configs/quickstart.yaml, seed 0, iteration 1",
        "prompts": [len(row.prompt_ids) for row in rows],
        "responses": [[len(ids) for ids in row.response_ids] for row in rows],
    }


def write(path: Path, trace: dict[str, Any]) -> None:
    """Write the trace as JSON, with one line per array of K responses, and one for all prompts."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in trace["responses"])
    prompts = json.dumps(trace["prompts"], separators=(",", ":"))
    path.write_text(
        f'{{"source": {json.dumps(trace["source"])},\n"prompts": {prompts},\n"responses": [\n{rows}\n]}}\n'
    )
    lengths = np.array(trace["responses"])
    print(f"{path.name}: {len(lengths)} prompts of {np.mean(trace['prompts']):.1f} tokens, {lengths.size} responses of "
          f"{lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max()}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, help="a run of configs/quickstart.yaml")
    args = parser.parse_args()
    write(HERE / "lognormal.json", lognormal())
    if args.quickstart:
        write(HERE / "quickstart.json", quickstart(args.quickstart))


if __name__ == "__main__":
    main()
