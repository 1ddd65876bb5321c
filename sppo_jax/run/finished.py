"""Whether a run is finished and nothing that it was made from has changed since: its table is then printed without jax.

Everything else is left to the session, which opens and checks each input: that takes the imports of jax, transformers and
the judge, and a report is drawn.
"""

import os
from pathlib import Path

from sppo_jax import config_file, files
from sppo_jax.config import EMBEDDED, Config
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.run import bucket, early
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.settings import resuming

FILES = (
    "jsonl:",
    "parquet:",
    EMBEDDED,
)  # beginnings of sources on this machine: others' rows may change unseen


def unchanged(config: Config) -> bool:
    """Whether OUT holds all iterations of this configuration, its report, and only inputs that are older than its manifest.

    A file's age is that of its contents, name and place: one that was put there later by a copy is younger than the run.
    """
    try:
        run = RunDir(config.out)
        if bucket.is_url(config.out) or not files.exists(run.config):
            return False
        if resuming.changed_keys(config_file.load([run.config]), config):
            return False
        made = [run.evaluation(t) for t in (BASE, *_numbers(config))]
        made += [run.export(t) / "README.md" for t in run.iterations() if files.exists(run.export(t))]
        if max(run.iterations(), default=0) != config.iterations or _youngest(made) > _youngest([run.report]):
            return False
        since = run.manifest.stat().st_mtime_ns
        inputs = [path for name in _inputs(config) for path in _files(name)]
        return bool(inputs) and _youngest(inputs) < since
    except (BadInput, OSError, ValueError, ImportError, LookupError):  # said by the session, which comes next
        return False


def _inputs(config: Config) -> list[Path]:
    """The files that a run is made from, but those of the hub, which its manifest pins to a commit.

    Raises LookupError where others are elsewhere, or cannot be found.
    """
    found = [_checkpoint(config.model.path)]
    modules = [config.eval.oracle, config.judge.backend]
    if ":" not in config.judge.backend:
        found.append(_checkpoint(config.judge.path))
    found += [[early.source(name.partition(":")[0])] for name in modules if ":" in name]
    for source in (
        config.pairs.source,
        config.responses.source,
        config.prompts.source,
        config.prompts.heldout,
    ):
        scheme, _, path = source.partition(":")
        if source and (f"{scheme}:" not in FILES or "://" in path or "*" in path):
            raise LookupError(source)
        name = source if source.startswith(EMBEDDED) else path
        found += [_files(names.resolve(name.replace(early.EACH, str(t)))) for t in _numbers(config) if source]
    return [path for part in found for path in part]


def _numbers(config: Config) -> range:
    return range(1, config.iterations + 1)


def _checkpoint(name: str) -> list[Path]:
    """The files of a checkpoint in a directory; none of one on the hub."""
    place = names.resolve(name if name.startswith(EMBEDDED) else files.expand(name))
    return _files(place) if files.is_dir(place) else []


def _files(path: Path) -> list[Path]:
    """A file, or the files of a folder. Raises LookupError where there is neither."""
    if files.is_dir(path):
        return [entry for name in files.entries(path) if files.is_file(entry := path / name)]
    if not files.is_file(path):
        raise LookupError(str(path))
    return [path]


def _youngest(paths: list[Path]) -> int:
    """When the last of these files was made or changed, ns."""
    return max(max(found.st_mtime_ns, found.st_ctime_ns) for found in map(os.stat, paths))
