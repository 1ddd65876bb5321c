"""The table of starting points in docs/your-data.md: python -m sppo_jax.plan.starting_points prints it, by formula.

Each row is the plan that `python -m sppo_jax.plan` has for configs/own.yaml with the flags of `Start.flags`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sppo_jax import config_file
from sppo_jax.command import call
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.plan import search
from sppo_jax.plan.lengths import Lengths
from sppo_jax.plan.table import Plan, duration, few

# 1,000 prompts of 100 tokens an iteration, five responses of 250 tokens each, judged by PairRM on the same devices.
LENGTHS = Lengths(prompt=100, response=250)
# What configs/own.yaml says, which is not beside an installed package.
OWN = "--prompts.source jsonl:prompts.jsonl --prompts.max_length 256"
COMMON = (
    "--prompts.per_iteration 1000 --sampling.max_new_tokens 512 --sampling.slots 320 --fit.global_batch 64 --fit.epochs 1 "
    "--fit.schedule_epochs 1 --judge.backend jax --judge.path llm-blender/PairRM-hf"
)
RATE, ADAPTERS_RATE = 5e-7, 5e-6


@dataclass(frozen=True)
class Start:
    """A model, what is trained of it, and where."""

    model: str
    # A kind of GPU and the number of cards, or a TPU slice.
    slice: str
    eta: float
    # Rank of the adapters; 0: all weights are trained.
    rank: int = 0

    @property
    def flags(self) -> list[str]:
        """The flags that make the row's configuration."""
        rate = ADAPTERS_RATE if self.rank else RATE
        own = f"--model.path {self.model} --model.lora_rank {self.rank} --fit.eta {self.eta:g} --fit.learning_rate {rate:g}"
        return f"{OWN} {COMMON} {own}".split()

    def plan(self) -> tuple[Config, Plan]:
        """Return the row's configuration and its plan. Raises DoesNotFit."""
        config = config_file.load([], self.flags)
        return config, search.by_formula(config, self.slice, LENGTHS)

    def row(self) -> str:
        """Return the row in markdown."""
        config, plan = self.plan()
        kind, _, size = self.slice.partition(":")
        peak = max(stage.peak for stage in plan.stages.values()) / 2**30
        cells = [
            self.model.partition("/")[2],
            f"adapters of rank {self.rank}" if self.rank else "all weights",
            f"`{kind}`" if size == "1" else f"`{kind}` × {size}",
            f"{config.fit.eta:g}",
            f"{config.fit.learning_rate:.0e}".replace("e-0", "e-"),
            f"{config.fit.global_batch}",
            f"{config.sampling.responses}",
            f"{config.sampling.max_new_tokens}",
            f"{peak:.0f} of {plan.stages['fit'].chip.gib:.0f}",
            few(plan.disk_gb),
            duration(plan.iteration_hours),
        ]
        return f"| {' | '.join(cells)} |"


STARTS = (
    Start("HuggingFaceTB/SmolLM2-135M-Instruct", "rtx3090:1", 10),
    Start("HuggingFaceTB/SmolLM2-360M-Instruct", "rtx3090:1", 10),
    Start("meta-llama/Llama-3.2-1B-Instruct", "rtx4090:1", 10),
    Start("meta-llama/Llama-3.2-1B-Instruct", "rtx3090:1", 10, rank=16),
    Start("meta-llama/Llama-3.2-3B-Instruct", "a100:1", 10),
    Start("meta-llama/Llama-3.2-3B-Instruct", "rtx4090:1", 10, rank=16),
    Start("mistralai/Mistral-7B-Instruct-v0.2", "l40s:1", 1000, rank=16),
    Start("mistralai/Mistral-7B-Instruct-v0.2", "h100:1", 1000, rank=16),
    Start("mistralai/Mistral-7B-Instruct-v0.2", "h200:1", 1000),
    Start("mistralai/Mistral-7B-Instruct-v0.2", "h100:8", 1000),
    Start("mistralai/Mistral-7B-Instruct-v0.2", "v5e:4x4", 1000),
    Start("google/gemma-2-9b-it", "h100:1", 1000, rank=16),
    Start("google/gemma-2-9b-it", "h100:8", 1000),
    Start("google/gemma-2-9b-it", "v5e:4x4", 1000),
)
HEAD = (
    "| model | trained | on | eta | rate | batch | K | new tokens | memory, GiB | disk, GB | an iteration |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def main(words: Sequence[str]) -> None:
    """Print the table. Raises BadInput for any flag."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    if words:
        raise BadInput(f"{words[0]}: this command has no flags")
    print("\n".join([*HEAD, *(start.row() for start in STARTS)]))


if __name__ == "__main__":
    call(main, resumes=False)
