"""From the runs' eval.json to the figures of a comparison, as plain numbers and lists for JSON (docs/compare.md)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from sppo_jax.compare.flags import Comparison, Game
from sppo_jax.compare.variants import Variant
from sppo_jax.config import flat
from sppo_jax.files import exists
from sppo_jax.run import evaluations, manifest
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.evaluations import Evaluation

Figures = dict[str, Any]
LEVEL = 0.95  # of the intervals
# Knobs in which runs differ without being different: where they lie, and what the comparison sets.
PLACE = ("out", "seed", "distributed.", "log.")


def _win_rate(judge: str) -> Callable[[Evaluation], float | None]:
    def mean(found: Evaluation) -> float | None:
        rate = found.against(judge, "base")
        return rate.mean if rate else None

    return mean


# What is compared: the name in the JSON, and the figure of one eval.json; None where it was not measured.
MEASURES: dict[str, Callable[[Evaluation], float | None]] = {
    "win_rate_judge": _win_rate("judge"),
    "win_rate_oracle": _win_rate("oracle"),
    "winners": lambda e: e.winners,
    "losers": lambda e: e.losers,
    "kl_per_token": lambda e: e.kl_per_token,
    "tokens": lambda e: e.tokens,
    "words": lambda e: e.words,
}


def collected(asked: Comparison, failed: Mapping[str, str] = {}) -> Figures:
    """The figures of all games as far as they are played; empty where no iteration was measured.

    `failed`: the line about each game that could not go on, by its title. The same runs give the same figures. Raises
    BadInput where a run's eval.json or manifest is damaged.
    """
    found = [_variant(variant, asked.of(variant), asked.iteration) for variant in asked.variants]
    measured = [game for game in asked.games if exists(RunDir(game.config.out).evaluation(1))]
    if not measured:
        return {}
    for variant in found:
        variant["against_first"] = differences(variant, found[0])
    manifests = {game.title: manifest.read(RunDir(game.config.out)) for game in measured}
    return {
        "command": asked.command,
        "seeds": asked.seeds,
        "level": LEVEL,
        "variants": found,
        "failed": dict(failed),
        "missing": _missing(asked, failed),
        "differ": _differ(asked),
        "notes": _notes(manifests),
        "versions": next(iter(manifests.values()))["versions"],
        "platform": next(iter(manifests.values()))["devices"].get("platform"),
    }


def across(values: Sequence[float]) -> Figures:
    """Mean and least of one value a seed, and half the width of the mean's interval: None of fewer than two.

    The interval is Student's: t sd / sqrt(n), t the .975 quantile with n - 1 degrees of freedom.
    """
    n = len(values)
    half = None
    if n > 1:
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))
    return {"n": n, "mean": float(np.mean(values)), "least": float(min(values)), "half_width": half}


def shown(variant: Figures) -> Figures:
    """The figures over seeds of the iteration that tables show; empty where no run has reached it."""
    return next((of for of in variant["over_seeds"] if of["iteration"] == variant["iteration"]), {})


def measure(found: Figures, name: str) -> Figures:
    """One measure over seeds, with None for everything where no run has it."""
    return found.get(name) or {"n": 0, "mean": None, "least": None, "half_width": None}


def main_measure(found: Figures) -> str:
    """The win rate that decides: by the oracle where there is one, else by the judge."""
    by_oracle = any("win_rate_oracle" in shown(variant) for variant in found["variants"])
    return "win_rate_oracle" if by_oracle else "win_rate_judge"


def _variant(variant: Variant, games: Sequence[Game], iteration: int | None) -> Figures:
    iterations = games[0].config.iterations
    runs = [_run(game, variant) for game in games]
    return {
        "name": variant.name,
        "files": list(variant.files),
        "knobs": dict(variant.knobs),
        "iteration": iterations if iteration is None else iteration,
        "runs": runs,
        "over_seeds": [
            {"iteration": t} | over for t in range(BASE, iterations + 1) if (over := _over_seeds(runs, t))
        ],
    }


def _run(game: Game, variant: Variant) -> Figures:
    run = RunDir(game.config.out)
    measured = [e for t in range(game.config.iterations + 1) if (e := evaluations.read(run, t)) is not None]
    return {
        "seed": game.seed,
        "directory": f"{variant.directory}/seed-{game.seed}",
        "iterations": [
            {"iteration": e.iteration}
            | {name: value for name, of in MEASURES.items() if (value := of(e)) is not None}
            for e in measured
        ],
    }


def at(run: Figures, t: int) -> Figures:
    """The figures of one run after iteration t; empty where it has none."""
    return next((of for of in run["iterations"] if of["iteration"] == t), {})


def _over_seeds(runs: Sequence[Figures], t: int) -> Figures:
    values = {name: [at(run, t)[name] for run in runs if name in at(run, t)] for name in MEASURES}
    return {name: across(found) for name, found in values.items() if found}


def differences(variant: Figures, first: Figures) -> Figures:
    """The variant's figures minus the first variant's, seed by seed, at the iterations that tables show."""
    theirs = {run["seed"]: at(run, first["iteration"]) for run in first["runs"]}
    mine = {run["seed"]: at(run, variant["iteration"]) for run in variant["runs"]}
    found = {
        name: [mine[s][name] - theirs[s][name] for s in mine if name in mine[s] and name in theirs[s]]
        for name in MEASURES
    }
    return {name: across(values) for name, values in found.items() if values and variant is not first}


def _missing(asked: Comparison, failed: Mapping[str, str]) -> list[str]:
    """Titles of the games that are not played to their end, failed ones left out."""
    return [
        game.title
        for game in asked.games
        if not exists(RunDir(game.config.out).evaluation(game.config.iterations)) and game.title not in failed
    ]


def _differ(asked: Comparison) -> Figures:
    """{knob: its value in each variant}, of the knobs in which variants differ."""
    knobs = [flat(asked.of(variant)[0].config) for variant in asked.variants]
    return {
        key: [of[key] for of in knobs]
        for key in knobs[0]
        if not key.startswith(PLACE) and any(of[key] != knobs[0][key] for of in knobs)
    }


def _notes(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes runs less comparable: other judges, bases, held-out prompts, versions or devices than the first one's."""
    first, *rest = manifests
    found = []
    for what, section, key in (
        ("another judge", "sha256", "judge"),
        ("another base", "sha256", "base_weights"),
        ("other held-out prompts", "sha256", "prompts_heldout"),
        ("other versions of packages", "versions", ""),
        ("other devices", "devices", "platform"),
    ):

        def part(title: str, section: str = section, key: str = key) -> Any:
            return manifests[title][section].get(key) if key else manifests[title][section]

        if other := [title for title in rest if part(title) != part(first)]:
            found.append(f"{what} than {first}: {'; '.join(other)}")
    return found
