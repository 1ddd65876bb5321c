"""Stage 1: prompts of one iteration → K responses each, in order of completion → the judge, and shards on disk."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sppo_jax import records
from sppo_jax.records import Prompt, Responses
from sppo_jax.run import pod
from sppo_jax.run.shards import Shards
from sppo_jax.run.stage import Stage
from sppo_jax.sampler import Sampler, Stats

SPEED = ("seconds", "tokens_per_second", "slot_efficiency")  # figures of the sampling itself


class Follower(Protocol):
    """Receives each prompt's responses as soon as they are on disk: the judge."""

    def take(self, n: int, row: Responses) -> None:
        """Accept the responses to prompt n. Prompts come in any order."""
        ...

    def progress(self) -> dict[str, Any]:
        """Facts to show beside the sampler's progress. Called after each chunk; an exception ends the sampling."""
        ...


def respond(
    prompts: Sequence[Prompt], sampler: Callable[[], Sampler], follower: Follower, stage: Stage
) -> list[Responses]:
    """Responses to every prompt, in order. Those on disk, in whole shards or begun ones, are read, and the rest are drawn.

    `sampler` is called only when a response is missing. Each of several processes makes its own shards, unless a replica of
    the sampler spans them.
    """
    shards = Shards(stage, "responses", Responses, len(prompts))
    # Several processes make their samplers together, before they know what is left to each: the weights come from all.
    engine = sampler() if pod.count() > 1 and shards.missing else None
    together = engine is not None and not engine.alone
    # Where all processes sample the same prompts, process 0 decides which, and writes alone.
    own = set(shards.missing if pod.first() else ()) if together else shards.own
    writer = _Writer(prompts, shards, follower, own)
    todo, total = writer.begin()
    if together:
        todo, total = pod.agreed("prompts", lambda: (todo, total))
    speed: dict[str, float] = {}
    if todo:
        engine = engine or sampler()
        before, start = dataclasses.replace(engine.stats), time.monotonic()
        with stage.progress("respond", total, "prompts", done=total - len(todo)) as advance:
            rows = engine.stream(
                [prompts[n] for n in todo],
                seed=stage.seed,
                iteration=stage.iteration,
                on_progress=stage.metrics.chunks(
                    advance,
                    follower.progress,
                    most=len(todo) * engine.sampling.responses * engine.sampling.max_new_tokens,
                    together=together,
                ),
            )
            for place, row in rows:
                writer.add(todo[place], row)
        speed = _speed(engine.stats, before, time.monotonic() - start)
    pod.meet("responses")
    speed = _over_all(pod.gathered("speed", speed), together)
    found = [row for i in range(len(shards.ranges)) for row in writer.read(i)]
    # Where all was on disk already, its speed is the one of the start that has drawn it.
    earlier = {name: x for name, x in stage.earlier("respond").items() if name in SPEED}
    stage.scalars("respond", _figures(found) | (speed or earlier))
    return found


def given(rows: Sequence[Responses], follower: Follower, stage: Stage) -> list[Responses]:
    """Responses that were made elsewhere, as this stage's shards: each process writes its own, and all are judged.

    They are read back, in order, so that the stages after this one find what they find of sampled ones.
    """
    shards = Shards(stage, "responses", Responses, len(rows))
    prompts = [Prompt(row.prompt, row.prompt_ids) for row in rows]
    writer = _Writer(prompts, shards, follower, shards.own)
    todo, total = writer.begin()
    with stage.progress("given responses", total, "prompts", done=total - len(todo), minor=True) as advance:
        for i in sorted(shards.own):
            stage.metrics.poll()
            shards.write(i, [rows[n] for n in shards.ranges[i]])
            for n in shards.ranges[i]:
                follower.take(n, rows[n])
            advance(len(shards.ranges[i]), **follower.progress())
    pod.meet("responses")
    found = [row for i in range(len(shards.ranges)) for row in writer.read(i)]
    stage.scalars("respond", _figures(found))
    return found


def _figures(found: Sequence[Responses]) -> dict[str, float]:
    """Number, mean length and share of cut ones of all responses."""
    reasons = [reason for row in found for reason in row.finish_reason]
    lengths = [len(ids) for row in found for ids in row.response_ids]
    return {
        "responses": len(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "truncated_share": reasons.count("length") / len(reasons),
    }


def _speed(stats: Stats, before: Stats, seconds: float) -> dict[str, float]:
    """Seconds, tokens per second and slot efficiency of the sampling since `before`."""
    new = {name: getattr(stats, name) - getattr(before, name) for name in ("steps", "slot_steps", "tokens")}
    efficiency = dataclasses.replace(stats, **new).slot_efficiency
    return dict(zip(SPEED, (seconds, new["tokens"] / max(seconds, 1e-9), efficiency), strict=True))


def _over_all(speeds: Sequence[dict[str, float]], together: bool) -> dict[str, float]:
    """The speed of all processes, from each one's. A process that had nothing left to sample does not count."""
    found = [speed for speed in speeds if speed]
    if not found or together:
        return speeds[0]
    return {
        "seconds": max(speed["seconds"] for speed in found),
        "tokens_per_second": sum(speed["tokens_per_second"] for speed in found),
        "slot_efficiency": sum(speed["slot_efficiency"] for speed in found) / len(found),
    }


class _Writer:
    """Puts responses on disk as they come, and passes them on to the follower."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        shards: Shards[Responses],
        follower: Follower,
        own: set[int],
    ):
        """`own`: the missing shards that this process writes."""
        self._prompts, self._shards, self._follower, self._own = prompts, shards, follower, own
        self._waiting: dict[int, Responses] = {}  # responses of incomplete shards

    def begin(self) -> tuple[list[int], int]:
        """Pass on the responses on disk. Returns our shards' prompts without responses, and the number of all their prompts."""
        todo: list[int] = []
        whole = [i for i in range(len(self._shards.ranges)) if i not in self._shards.missing]
        for i in whole:
            for n, row in zip(self._shards.ranges[i], self.read(i), strict=True):
                self._follower.take(n, row)
        for i in sorted(self._own):
            kept = self._shards.kept(i)
            for n in self._shards.ranges[i]:
                if (found := kept.get(self._key(n))) is None:
                    todo.append(n)
                else:
                    self._finished(n, found[0])
        return todo, sum(len(self._shards.ranges[i]) for i in {*whole, *self._own})

    def add(self, n: int, row: Responses) -> None:
        """Keep the responses to prompt n, which the sampler has finished."""
        i = self._shards.holding(n)
        if i in self._own:
            self._shards.keep(i, self._key(n), row)
            self._finished(n, row)
        else:
            self._follower.take(n, row)

    def read(self, i: int) -> list[Responses]:
        """Rows of shard i. Raises BadInput unless they belong to our prompts."""
        rows = self._shards.read(i)
        records.check_prompts(
            self._shards.paths[i].parent, rows, [self._prompts[n] for n in self._shards.ranges[i]]
        )
        return rows

    def _finished(self, n: int, row: Responses) -> None:
        self._waiting[n] = row
        i = self._shards.holding(n)
        if all(m in self._waiting for m in self._shards.ranges[i]):
            self._shards.write(i, [self._waiting.pop(m) for m in self._shards.ranges[i]])
        # Last, so that a follower that received a shard's final row finds the shard on disk.
        self._follower.take(n, row)

    def _key(self, n: int) -> str:
        return str(self._prompts[n].prompt_id)
