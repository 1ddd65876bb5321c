"""Stage 1: prompts of one iteration → K responses each, in order of completion → the judge, and shards on disk."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from sppo_jax import records
from sppo_jax.records import Prompt, Responses
from sppo_jax.run.pod import anywhere, as_first_says, mine, wait_for_all
from sppo_jax.run.shards import Shards
from sppo_jax.run.stage import Stage
from sppo_jax.sampler import Sampler, Stats


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

    `sampler` is called only when a response is missing. On a pod each process makes its own shards, unless a replica of
    the sampler spans processes.
    """
    shards = Shards(stage, "responses", Responses, len(prompts))
    pod = jax.process_count() > 1
    # On a pod all processes make their samplers together: the weights come from all of them.
    engine = sampler() if pod and anywhere(bool(shards.missing)) else None
    together = engine is not None and not engine.alone
    # Where all processes sample the same prompts, process 0 decides which, and writes alone.
    writer = _Writer(prompts, shards, follower, (lambda _: jax.process_index() == 0) if together else mine)
    todo, total = writer.begin()
    if together:
        todo, total = as_first_says(todo, len(prompts)), len(prompts)
    speed: dict[str, float] = {}
    if todo:
        engine = engine or sampler()
        before, start = dataclasses.replace(engine.stats), time.monotonic()
        with stage.progress("respond", total, "prompts", done=total - len(todo)) as advance:
            rows = engine.stream(
                [prompts[n] for n in todo],
                seed=stage.seed,
                iteration=stage.iteration,
                on_progress=stage.metrics.chunks(advance, follower.progress),
            )
            for place, row in rows:
                writer.add(todo[place], row)
        speed = _speed(engine.stats, before, time.monotonic() - start)
    wait_for_all(stage.label("respond"))
    found = [row for i in range(len(shards.ranges)) for row in writer.read(i)]
    reasons = [reason for row in found for reason in row.finish_reason]
    lengths = [len(ids) for row in found for ids in row.response_ids]
    facts = {
        "responses": len(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "truncated_share": reasons.count("length") / len(reasons),
    }
    stage.scalars("respond", facts | speed)
    return found


def _speed(stats: Stats, before: Stats, seconds: float) -> dict[str, float]:
    """Seconds, tokens per second and slot efficiency of the sampling since `before`."""
    new = {name: getattr(stats, name) - getattr(before, name) for name in ("steps", "tokens")}
    return {
        "seconds": seconds,
        "tokens_per_second": new["tokens"] / max(seconds, 1e-9),
        "slot_efficiency": dataclasses.replace(stats, **new).slot_efficiency,
    }


class _Writer:
    """Puts responses on disk as they come, and passes them on to the follower."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        shards: Shards[Responses],
        follower: Follower,
        own: Callable[[int], bool],
    ):
        """`own(i)` returns whether this process writes shard i."""
        self._prompts, self._shards, self._follower, self._own = prompts, shards, follower, own
        self._waiting: dict[int, Responses] = {}  # responses of incomplete shards

    def begin(self) -> tuple[list[int], int]:
        """Pass on the responses on disk. Returns our shards' prompts without responses, and the number of all their prompts."""
        todo: list[int] = []
        own = [i for i in range(len(self._shards.ranges)) if self._own(i)]
        for i in own:
            members, whole = self._shards.ranges[i], i not in self._shards.missing
            kept = {} if whole else self._shards.kept(i)
            rows = self.read(i) if whole else [kept.get(self._key(n), (None,))[0] for n in members]
            for n, row in zip(members, rows, strict=True):
                if row is None:
                    todo.append(n)
                elif whole:
                    self._follower.take(n, row)
                else:
                    self._finished(n, row)
        return todo, sum(len(self._shards.ranges[i]) for i in own)

    def add(self, n: int, row: Responses) -> None:
        """Keep the responses to prompt n, which the sampler has finished."""
        i = self._shards.holding(n)
        if self._own(i):
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
