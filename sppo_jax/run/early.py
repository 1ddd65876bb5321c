"""What a configuration names and this machine lacks, found before jax and the libraries are imported, which takes seconds.

The rest is found where it is read.
"""

import importlib.util
from pathlib import Path

from sppo_jax import files
from sppo_jax.config import Config
from sppo_jax.errors import BadInput, about
from sppo_jax.hub import names

FILES = ("jsonl:", "parquet:")  # schemes of sources that are on a disk
DISTANT = "://"  # in the name of a file elsewhere
EACH = "{iteration}"  # a source with it names a file for each iteration


def check(config: Config) -> None:
    """Raise BadInput for a model, a judge or prompts of a configuration that are not where it says."""
    checkpoints, modules = {"model.path": config.model.path}, {"eval.oracle": config.eval.oracle}
    if ":" in config.judge.backend:
        modules["judge.backend"] = config.judge.backend
    else:
        checkpoints["judge.path"] = config.judge.path
    for key, name in checkpoints.items():
        with about(f"{key}="):
            names.check(name)
    for key, name in modules.items():
        _check_module(key, name)
    for key, source in (
        ("pairs.source", config.pairs.source),
        ("responses.source", config.responses.source),
        ("prompts.source", "" if config.pairs.source else config.prompts.source),
        ("prompts.heldout", config.prompts.heldout),
    ):
        _check_file(key, source)


def _check_module(key: str, name: str) -> None:
    """Raise BadInput where no such module:attribute can be: its code runs later."""
    module, colon, attribute = name.partition(":")
    top = module.partition(".")[0]
    if not name:
        return
    form = "a judge is module:attribute, a function without arguments in a module that Python finds from here"
    if not (colon and attribute and top):
        raise BadInput(f"{key}={name}: {form}, as rules:judge of rules.py")
    if top.isidentifier() and importlib.util.find_spec(top) is None:
        raise BadInput(f"{key}={name}: there is no module {top!r} (no {top}.py); {form}")


def _check_file(key: str, source: str) -> None:
    """Raise BadInput where the first file of a source is not there."""
    scheme, _, path = source.partition(":")
    if f"{scheme}:" not in FILES or not path or DISTANT in path or "*" in path:
        return
    if not files.exists(names.resolve(path.replace(EACH, "1"))):
        raise BadInput(f"{key}={source}: no such file {Path(path.replace(EACH, '1'))}")
