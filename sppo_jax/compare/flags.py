"""What `python -m sppo_jax.compare` is asked for: variants and seeds, as configurations of runs."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sppo_jax import command, config_file, files
from sppo_jax.compare import variants
from sppo_jax.compare.variants import OURS, Variant
from sppo_jax.config import Config, flat
from sppo_jax.errors import BadInput, about
from sppo_jax.run import early
from sppo_jax.settings import words as command_line

LISTS = ("--configs", "--grid", "--seeds")  # flags with several values, up to the next flag
FLAGS = dict.fromkeys((*LISTS, "--config", "--out", "--iteration"), True) | {"--quiet": False}
OUT, SEEDS = "runs/compare", (0, 1, 2)
LARGEST = 2**32  # above every seed and every number of an iteration


@dataclass(frozen=True)
class Game:
    """One run of a comparison."""

    variant: Variant
    seed: int
    config: Config

    @property
    def title(self) -> str:
        """What lines for people call it."""
        return f"{command.printable(self.variant.name)}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A command line of `compare`, checked as far as no model is needed."""

    out: Path
    variants: list[Variant]
    seeds: list[int]
    games: list[Game]  # every variant with the first seed, then with the next one
    iteration: int | None  # of the table; None: the last one of each variant
    quiet: bool
    command: str  # that gives the same comparison again

    def of(self, variant: Variant) -> list[Game]:
        """The games of one variant, in the order of the seeds."""
        return [game for game in self.games if game.variant == variant]


def read(words: Sequence[str]) -> Comparison:
    """Parse a command line, and load every configuration. Raises BadInput for one that cannot be used."""
    own, overrides = command_line.split(_repeated(words), FLAGS)

    def given(flag: str) -> list[str]:
        return [value for name, value in own if name == flag]

    for flag in ("--out", "--iteration"):
        if len(given(flag)) > 1:
            raise BadInput(f"{flag} is given twice")
    common = given("--config")
    found = variants.read(given("--configs"), given("--grid"), common)
    seeds = [_number("--seeds", text) for text in given("--seeds")] or list(SEEDS)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise BadInput(f"--seeds names {twice[0]} twice")
    out = _out(*given("--out"))
    configs = {variant.name: _config(variant, common, overrides) for variant in found}
    _check_different(configs)
    iteration = _iteration(configs, *given("--iteration"))
    games = [
        Game(variant, seed, dataclasses.replace(configs[variant.name], seed=seed, out=str(out / place)))
        for seed in seeds
        for variant in found
        for place in [Path(variant.directory) / f"seed-{seed}"]
    ]
    line = f"python -m sppo_jax.compare {shlex.join(words)}"
    return Comparison(out, found, seeds, games, iteration, any(flag == "--quiet" for flag, _ in own), line)


def _repeated(words: Sequence[str]) -> list[str]:
    """The words with --seeds 0 1 as --seeds=0 --seeds=1, and so with the other flags that have several values."""
    found: list[str] = []
    flag, values = "", 0
    for word in [*words, "--"]:
        if word.startswith("--"):
            if flag and not values:
                raise BadInput(f"{flag} needs one value or more")
            flag, values = word if word in LISTS else "", 0
        if word == "--" or flag == word:
            continue
        found.append(f"{flag}={word}" if flag else word)
        values += 1
    return found


def _config(variant: Variant, common: Sequence[str], overrides: Sequence[str]) -> Config:
    """A variant's configuration. Raises BadInput, with the variant's name, for one that no run could begin with."""
    for word in overrides:
        if (key := word.partition("=")[0].removeprefix("--")) in OURS:
            raise BadInput(f"--{key}: {OURS[key]}")
    with about(f"variant {variant.name}: "):
        config = config_file.load([*common, *variant.files], [*overrides, *variant.overrides])
        early.check(config)
    return config


def _check_different(configs: dict[str, Config]) -> None:
    """Raise BadInput for two variants that are one configuration."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        knobs = repr({key: value for key, value in flat(config).items() if key not in OURS})
        if knobs in seen:
            raise BadInput(
                f"variants {seen[knobs]} and {name} are the same configuration; leave one of them out"
            )
        seen[knobs] = name


def _out(name: str = OUT) -> Path:
    if "://" in name:
        raise BadInput(f"--out {name}: a comparison lies in a directory of this machine; name one")
    return Path(files.expand(name))


def _iteration(configs: dict[str, Config], text: str = "") -> int | None:
    """The iteration of the table. Raises BadInput where a variant has none of that number."""
    if not text:
        return None
    found = _number("--iteration", text)
    for name, config in configs.items():
        if found > config.iterations:
            raise BadInput(f"--iteration {found}: variant {name} has {config.iterations} iterations")
    return found


def _number(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) < LARGEST):
        raise BadInput(
            f"{flag} {command.printable(text)[:80]}: must be a whole number from 0 to {LARGEST - 1}"
        )
    return int(text)
