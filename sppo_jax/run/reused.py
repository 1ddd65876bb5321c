"""What an earlier start has left of an iteration: the one line that a resumed run prints about what it does not do again."""

from pathlib import Path

from sppo_jax import files
from sppo_jax.run import directory
from sppo_jax.run.directory import RunDir, shard_ranges


def line(run: RunDir, t: int, prompts: int, shard_prompts: int) -> str:
    """The line about iteration t of `prompts` prompts in shards of `shard_prompts`; empty where nothing of it is on disk."""
    ranges = shard_ranges(prompts, shard_prompts)
    found = []
    for stage in ("responses", "preferences"):
        paths = [run.shard(t, stage, i, len(ranges)) for i in range(len(ranges))]
        done = sum(_rows(path, len(members)) for path, members in zip(paths, ranges, strict=True))
        if done:
            found.append(stage if done == prompts else f"{stage} of {done} of {prompts} prompts")
    if files.exists(run.pairs(t)):
        found.append("pairs")
    if files.exists(run.export(t)):
        found.append("the trained policy")
    elif update := _update(run, t):
        found.append(f"a checkpoint after {update} update{'s' * (update > 1)}")
    if files.exists(run.heldout(t, "responses")):
        found.append("held-out responses")
    if not found:
        return ""
    shown = " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
    return f"iteration {t} goes on: on disk already, and not made again: {shown}"


def _rows(shard: Path, members: int) -> int:
    """The prompts of a shard that are on disk: all of a whole one, and the lines of one that was begun."""
    if files.exists(shard):
        return members
    try:
        lines = directory.partial(shard).read_bytes().split(b"\n")
    except OSError:  # not there, or not readable, which the stage itself says
        return 0
    return min(members, sum(text.startswith(b"{") and text.endswith(b"}") for text in lines))


def _update(run: RunDir, t: int) -> int:
    """The last update of which there is a checkpoint; 0 without one, and in a bucket, where training itself says so."""
    place = run.checkpoints(t)
    if not isinstance(place, Path) or not files.is_dir(place):
        return 0
    return max((int(name) for name in files.entries(place) if name.isascii() and name.isdigit()), default=0)
