"""Make the length traces that benchmarks/sampler.py and fit.py replay: lognormal.json is drawn, quickstart.json is taken
from a run, and smollm2.json is sampled from SmolLM2-135M-Instruct.

python benchmarks/traces/record.py [--quickstart runs/quickstart] [--smollm2 DIR]

DIR is what `benchmarks/smollm2.py --to DIR` makes; its prompts are the first of examples/ifollow.py.

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


def smollm2(folder: Path, count: int = 128, new: int = 128) -> dict[str, Any]:
    """Two responses to each of the first prompts of examples/ifollow.py, at temperature 1, to their end or `new` tokens."""
    import sys

    sys.path.append(str(HERE.parent.parent / "examples"))
    import ifollow

    from sppo_jax import models
    from sppo_jax.config import Sampling
    from sppo_jax.sampler import Sampler
    from sppo_jax.text import chat_template

    tokenizer, model = chat_template.load_tokenizer(folder), models.load(folder)
    texts = ifollow.prompts(SEED, ifollow.TOPICS, ifollow.combinations()[0], count)
    prompts = [chat_template.chat_prompt(tokenizer, text) for text in texts]
    eos = chat_template.eos_ids(folder, tokenizer, model.architecture.vocab)
    sampling = Sampling(responses=2, max_new_tokens=new, slots=64)
    found = Sampler(model, tokenizer, sampling, eos=eos).generate(prompts, seed=SEED)
    return {
        "source": f"SmolLM2-135M-Instruct, examples/ifollow.py, at most {new} new tokens, seed {SEED}",
        "prompts": [len(prompt.ids) for prompt in prompts],
        "responses": [[len(ids) for ids in row.response_ids] for row in found],
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
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="the model's directory")
    args = parser.parse_args()
    write(HERE / "lognormal.json", lognormal())
    if args.quickstart:
        write(HERE / "quickstart.json", quickstart(args.quickstart))
    if args.smollm2:
        write(HERE / "smollm2.json", smollm2(args.smollm2))


if __name__ == "__main__":
    main()
