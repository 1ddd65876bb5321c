"""A run's configuration and that of its resumption: which knobs may differ."""

from typing import Any

from sppo_jax.config import Config, flat

# Knobs that may differ between a run and its resumption: they move work about and leave results as they are.
# What prompts.turns changes is compared itself, the prompts, and so is what judge.strip comes to with a template.
FREE_TO_CHANGE = (
    "out",
    "iterations",
    "mesh.",
    "distributed.",
    "log.",
    "fit.checkpoint_every",
    "fit.remat",
    "model.attention",
    "prompts.turns",
    "sampling.slots",
    "sampling.cache_tokens",
    "judge.python",
    "judge.strip",
)
# Knobs that runs were begun without, and the values with which such runs go on: these are in no digest.
LATER: dict[str, Any] = {
    "judge.strip": "none",
    "model.template": {},
    "responses.source": "",
    "responses.split": "train",
    "responses.column": "responses",
    "judge.target": "probability",
    "fit.anchor": 0.0,
}


def changed_keys(old: Config, new: Config) -> list[str]:
    """Keys that differ and change results: with any, a run directory of `old` is refused."""
    before, after = flat(old), flat(new)
    return [k for k in after if before[k] != after[k] and not k.startswith(FREE_TO_CHANGE)]
