"""The tiny world's training prompts as files, for games that need more of them than the quickstart's 180 an iteration.

python benchmarks/tiny_prompts.py --to DIR [--iterations 10]

Writes DIR/train_1.jsonl and so on: all 540 training prompts, in an order of its own for each iteration. Then
`--prompts.source 'jsonl:DIR/train_{iteration}.jsonl' --prompts.heldout embedded:prompts/heldout.jsonl --judge.path embedded:pairrm`.
"""

import argparse
import json
import random
from pathlib import Path

from sppo_jax.tiny import world


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    parts, _ = world.split()
    prompts = [prompt for part in parts for prompt in part]
    args.to.mkdir(parents=True, exist_ok=True)
    for iteration in range(1, args.iterations + 1):
        order = random.Random(iteration).sample(prompts, len(prompts))
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in order)
        (args.to / f"train_{iteration}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
