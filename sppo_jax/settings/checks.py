"""The checks of a whole configuration: ranges, and values that contradict each other."""

from collections.abc import Sequence
from typing import Any

from sppo_jax.config import LARGEST, Config, Judge, Range, flat, knobs
from sppo_jax.errors import BadInput
from sppo_jax.losses import LOSSES
from sppo_jax.settings.values import default, nearest

BACKENDS = ("torch", "jax", "llm_blender")  # of PairRM; a judge of the user's own is module:attribute
SMALLEST = 2.0**-126  # of float32; devices take what is smaller, and not 0, as 0


def validate(config: Config) -> None:
    """Raise BadInput where a value is out of its range, or values contradict each other."""
    values, fit = flat(config), config.fit
    for key, _, _, _, accepted in knobs():
        _check_number(key, values[key], accepted)
    if fit.schedule_epochs < fit.epochs:
        raise BadInput(
            f"fit.schedule_epochs={fit.schedule_epochs} is shorter than fit.epochs={fit.epochs}: "
            f"the rate would be 0 before the end; set fit.schedule_epochs to {fit.epochs}"
        )
    _check_judge(config.judge)
    _check_loss(config)
    if config.pairs.source:
        _check_given_pairs(config)
    if config.responses.source:
        _check_given_responses(config)
    if isinstance(fit.baseline, float) and not 0 <= fit.baseline <= 1:
        raise BadInput(
            f"fit.baseline={fit.baseline} is a win rate: it must lie in [0, 1], or be log_partition"
        )


def _check_number(key: str, value: Any, accepted: Range | None) -> None:
    """Raise BadInput for a number out of its range, and for one that is 0 or infinite in float32 but not here."""
    if accepted is not None and value not in accepted:
        raise BadInput(f"{key}={value} must be {bounds(accepted, value)}{default(key)}")
    smallest = "0, or at least 1.2e-38" if accepted is None or 0.0 in accepted else "at least 1.2e-38"
    if isinstance(value, float) and 0 < abs(value) < SMALLEST and not (accepted and accepted.clamped):
        raise BadInput(f"{key}={value} is 0 in float32, in which it is used: give {smallest}")


def bounds(accepted: Range, value: float) -> str:
    """Return the bounds of a range in words; the upper one that every number has only where `value` is beyond it."""
    return str(accepted) if value < LARGEST else accepted.whole()


def _check_loss(config: Config) -> None:
    """Raise BadInput where a loss of pairs is given all K responses or scores, and for a baseline that nothing reads."""
    fit, score = config.fit, config.judge.target == "score"
    others = " or ".join(name for name, loss in LOSSES.items() if not loss.pairs)
    if LOSSES[fit.loss].pairs and config.pairs.select == "all":
        raise BadInput(
            f"pairs.select=all needs fit.loss={others}: {fit.loss} is a loss of pairs; use best_worst"
        )
    if LOSSES[fit.loss].pairs and score:
        raise BadInput(
            f"judge.target=score needs fit.loss={others}: {fit.loss} reads no scores; use judge.target=probability"
        )
    if fit.baseline != 0.5 and not LOSSES[fit.loss].baseline:
        readers = " or ".join(name for name, loss in LOSSES.items() if loss.baseline)
        raise BadInput(f"fit.baseline={fit.baseline} is read by fit.loss={readers} only; leave it at 0.5")
    if fit.baseline != 0.5 and score:
        raise BadInput(
            f"fit.baseline={fit.baseline} is a win rate, and with judge.target=score the baseline is a score of 0: leave it at 0.5"
        )


def _check_judge(judge: Judge) -> None:
    """Raise BadInput for a backend that there is not, limits that are too small, and knobs that the backend does not read."""
    if judge.backend not in BACKENDS and ":" not in judge.backend:
        raise BadInput(
            f"judge.backend={judge.backend} is not known; choose {', '.join(BACKENDS)}, or module:attribute for a judge of "
            f"your own{nearest(judge.backend, BACKENDS)}"
        )
    for key in ("source_tokens", "candidate_tokens", "total_tokens"):
        value = getattr(judge, key)
        if value and not 4 <= value < LARGEST:
            raise BadInput(
                f"judge.{key}={value} must be 0 (the checkpoint's number), or at least 4 and below {LARGEST}"
            )
    if judge.backend == "llm_blender":
        if not judge.python:
            raise BadInput(
                "judge.backend=llm_blender needs judge.python, an interpreter with requirements-llm-blender.txt installed"
            )
        if judge.compute_dtype != "auto":
            raise BadInput(
                "judge.compute_dtype is ignored by llm_blender, which chooses its own: leave it at auto"
            )
    elif judge.python:
        raise BadInput(
            f"judge.python={judge.python} is read by judge.backend=llm_blender only: leave it empty"
        )
    if ":" in judge.backend:
        for key in ("compute_dtype", "source_tokens", "candidate_tokens", "total_tokens"):
            if getattr(judge, key) != getattr(Judge(), key):
                raise BadInput(
                    f"judge.{key}={getattr(judge, key)} is PairRM's and is ignored by judge.backend={judge.backend}: leave it at its default"
                )


def _check_given_pairs(config: Config) -> None:
    """Raise BadInput for knobs that need K responses or a new set: read pairs hold two responses and their win rates."""
    source = f"pairs.source={config.pairs.source}"
    if config.pairs.select == "all":
        raise BadInput(
            f"{source} holds two responses per prompt; pairs.select=all needs all K: use best_worst"
        )
    if config.judge.target == "score":
        raise BadInput(
            f"{source} holds win rates; judge.target=score needs the judge's logits: use probability"
        )
    if config.fit.baseline == "log_partition":
        raise BadInput(
            f"{source} holds two win rates per prompt; fit.baseline=log_partition needs all K: use 0.5"
        )
    if config.iterations > 1 and "{iteration}" not in config.pairs.source + config.pairs.split:
        raise BadInput(
            f"{source} names the same pairs for {config.iterations} iterations; put {{iteration}} in it, or set "
            "iterations to 1"
        )


def _check_given_responses(config: Config) -> None:
    """Raise BadInput for a second source to train on: the prompts are those of the responses."""
    for key, other in (("pairs.source", config.pairs.source), ("prompts.source", config.prompts.source)):
        if other:
            raise BadInput(
                f"responses.source={config.responses.source} holds prompts with their responses, and {key}={other} is a second "
                "source to train on: leave one of them empty"
            )


def shorter(lengths: Sequence[int], new: int, room: int) -> str:
    """Return what to lower, with values, where the longest of these prompts and `new` tokens exceed a model's `room`.

    `lengths`: tokens of each prompt.
    """
    longest, middle = (
        max(lengths),
        sorted(lengths)[(len(lengths) - 1) // 2],
    )  # a limit that keeps half of them works
    ways = []
    if longest < room:
        ways.append(f"sampling.max_new_tokens to {room - longest}")
    if room - new >= middle:
        ways.append(f"prompts.max_length to {room - new}")
    if not ways and middle < room:
        kept = max(middle, room // 2)
        ways.append(f"prompts.max_length to {kept} and sampling.max_new_tokens to {room - kept}")
    return f"lower {' or '.join(ways)}" if ways else "take a model with more, or shorter prompts"
