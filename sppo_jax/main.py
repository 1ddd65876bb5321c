"""The command line: `python -m sppo_jax.main --config FILE [--section.key value ...]` plays the whole game."""

import importlib.util
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_jax import command, config_file
from sppo_jax.config import Config, Distributed, Knob, knobs
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.run import early, finished
from sppo_jax.settings import mapping
from sppo_jax.settings import words as command_line

if TYPE_CHECKING:
    from sppo_jax.run.directory import RunDir

FLAGS = {"--config": True, "--quiet": False}  # the command's own, and whether each takes a value
USAGE = """python -m sppo_jax.main --config FILE [--config FILE ...] [--section.key value ...]

Plays SPPO with this configuration; the same command again resumes, or prints the table of a finished run.

  python -m sppo_jax.main --config quickstart --out runs/quickstart
  python -m sppo_jax.main --config quickstart --iterations 1 --fit.eta 5 --out runs/short

  --config FILE          a configuration; later files override earlier ones, and flags override all files
  --section.key value    any knob below; of a flag given twice the last counts. A value that begins with -- is
                         written --section.key=--value
  --quiet                print nothing but warnings, errors, the final table and the report's path
  --version              print the version
  --help                 print this text"""
# What the knobs of each section are about; "" stands for those without a section.
HEADINGS = {
    "": "The run",
    "model": "The policy",
    "mesh": "The devices of the mesh",
    "distributed": "Several processes",
    "prompts": "Prompts to train on, and held-out ones",
    "sampling": "Sampling of responses",
    "judge": "The judge that compares them",
    "pairs": "Pairs to train on",
    "responses": "Responses made elsewhere",
    "fit": "Training",
    "eval": "Evaluation on held-out prompts",
    "log": "What is written down",
}
# Sections that describe a game: where the command line has one of their knobs, no file is asked for.
GAME = ("model.", "prompts.", "sampling.", "judge.", "pairs.", "responses.", "fit.", "eval.")
COLUMNS = 100  # of the text of a knob
# Variables in which a launcher gives a process its number: SLURM, Open MPI, indexed jobs of Kubernetes, TPUs on GKE.
NUMBERS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")


def main(words: Sequence[str]) -> None:
    """Play the game that the command line describes. Raises BadInput for a command line that cannot be used."""
    if "--help" in words or "-h" in words:
        print(usage())
        return
    if "--version" in words:
        print(command.version())
        return
    config, quiet = read(words)
    game(config, quiet=quiet)


def game(config: Config, *, quiet: bool = False) -> None:
    """Play the game of this configuration: its inputs are opened, and all its iterations are played or found on disk.

    `quiet`: print nothing but warnings, errors, the final table and the report's path.
    """
    if _is_alone(config.distributed):  # else the other processes would wait for this one
        early.check(config)
        if finished.unchanged(config):
            _show(config)
            return
    if not quiet and _is_first(config.distributed):
        print(
            f"loading {config.model.path}: iterations {config.iterations}, out {config.out} ...", flush=True
        )
    # Only now, since these import jax: a mistake is told at once. Most are imported after the processes have found each
    # other: a signal meanwhile reaches all of them.
    from sppo_jax.run import bucket, cluster, pod

    with cluster.joined(config.distributed):
        from sppo_jax import compilation, selfplay, session

        compilation.keep_programs()
        with (
            bucket.opened(config.out, pod.index(), pod.count()),
            session.opened(config, quiet=quiet) as opened,
        ):
            selfplay.play(opened)
        pod.end()


def _show(config: Config) -> None:
    """Print the table of a finished run, and where its report is."""
    from sppo_jax.report import tables
    from sppo_jax.run import evaluations
    from sppo_jax.run.directory import RunDir

    run = RunDir(config.out)
    print(tables.as_text(evaluations.read_all(run, lambda _: None)))
    print(f"report: {run.report}", flush=True)


def play(config: Config | str | Path = "", /, **overrides: object) -> "RunDir":
    """Play a whole game, as the command does, and return the paths of what it wrote.

    `config`: a YAML file, the name of a shipped configuration such as "quickstart", or a Config; empty: the defaults.
    `overrides`: knobs, with two underscores for the dot (`fit__eta=10`). The same call again resumes an interrupted game, or
    prints the table of a finished one. Raises BadInput for what cannot be used, and KeyboardInterrupt where the game was
    interrupted, with all work on disk.
    """
    if isinstance(config, Config):
        if overrides:
            raise TypeError("overrides belong to a file or a name; change a Config with dataclasses.replace")
        found = config_file.checked(config)
    else:
        texts = {key: mapping.written(x) if isinstance(x, dict) else str(x) for key, x in overrides.items()}
        flags = [f"--{key.replace('__', '.')}={text}" for key, text in texts.items()]
        found = config_file.load([config] if config else [], flags)
    try:
        game(found)
    except Terminated:
        raise KeyboardInterrupt("stopped with all work on disk; the same call again resumes") from None
    from sppo_jax.run.directory import RunDir  # it imports jax

    return RunDir(found.out)


def read(words: Sequence[str]) -> tuple[Config, bool]:
    """The configuration of a command line, and whether it asks for --quiet. Raises BadInput for one that cannot be used."""
    own, overrides = command_line.split(words, FLAGS)
    named = [file for flag, file in own if flag == "--config"]
    if not named and not any(word.removeprefix("--").startswith(GAME) for word in overrides):
        shipped = sorted(path.stem for path in config_file.SHIPPED.glob("*.yaml"))
        raise BadInput(
            "no configuration, and the defaults alone are those of a 7B model: give --config FILE, or the name of a shipped "
            f"one: {', '.join(shipped)}; the first to try is --config quickstart"
        )
    config = config_file.load(named, overrides)
    return config, any(flag == "--quiet" for flag, _ in own)


def usage() -> str:
    """The text of --help: every knob with its type, range, default and meaning, by section."""
    lines, section = [USAGE], None
    for knob in knobs():
        if (found := knob.key.rpartition(".")[0]) != section:
            section = found
            lines += ["", " - ".join(filter(None, [section, HEADINGS.get(section)])), ""]
        lines += _described(knob)
    return command.as_called("\n".join(lines))


def _described(knob: Knob) -> list[str]:
    """The lines of --help about one knob."""
    limits = f", {knob.range}" if knob.range else ""
    text = textwrap.wrap(f"{knob.help} (default: {knob.default!r})", COLUMNS - 6, break_long_words=False)
    return [f"  --{knob.key} {knob.kind}{limits}", *(f"      {line}" for line in text)]


def _is_alone(settings: Distributed) -> bool:
    """Whether nothing suggests that there are other processes, before jax looks for them; on TPUs there may be."""
    launched = any(name in os.environ for name in (*NUMBERS, "JAX_COORDINATOR_ADDRESS"))
    return not (settings.coordinator or launched or importlib.util.find_spec("libtpu"))


def _is_first(settings: Distributed) -> bool:
    """Whether this is process 0, or not known to be another one, before the processes have found each other."""
    if settings.process_id >= 0:
        return settings.process_id == 0
    return all(os.environ.get(name, "0") == "0" for name in NUMBERS)


if __name__ == "__main__":
    command.call(main)
