"""A whole game from Python or a notebook: `sppo_jax.play`."""

from pathlib import Path

from sppo_jax import config_file, main
from sppo_jax.config import Config
from sppo_jax.errors import Terminated
from sppo_jax.run.directory import RunDir
from sppo_jax.settings import mapping


def play(config: Config | str | Path = "", /, **overrides: object) -> RunDir:
    """Play a whole game, as `python -m sppo_jax.main` does, and return the paths of what it wrote.

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
        knobs = {key.replace("__", "."): value for key, value in overrides.items()}
        texts = {key: mapping.written(x) if isinstance(x, dict) else str(x) for key, x in knobs.items()}
        flags = [f"--{key}={text}" for key, text in texts.items()]
        found = config_file.load([config] if config else [], flags)
    try:
        main.play(found)
    except Terminated:
        raise KeyboardInterrupt("stopped with all work on disk; the same call again resumes") from None
    return RunDir(found.out)
