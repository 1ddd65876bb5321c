"""Stage 1: prompts of one iteration → K responses each, in order of completion → the judge, and shards on disk."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from sppo_jax.errors import BadInput
from sppo_jax.records import Prompt, Responses
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.shards import Shards, anywhere, as_first_says, mine, wait_for_all
from sppo_jax.sampler.engine import Sampler, Stats


class Follower(Protocol):
    """Who is given each prompt's responses as soon as they are on disk."""

    def take(self, n: int, row: Responses) -> None:
        """Those of prompt n, in any order."""
        ...

    def progress(self) -> dict[str, Any]:
        """What to show beside the sampler's progress. Asked after each chunk of sampling; what it raises ends that."""
        ...


def respond(
    prompts: Sequence[Prompt],
    sampler: Callable[[], Sampler],
    follower: Follower,
    *,
    run: RunDir,
    iteration: int,
    seed: int,
    shard_prompts: int,
    made_from: dict[str, str],
    metrics: Metrics,
) -> list[Responses]:
    """Responses to every prompt, in order. What is on disk, in whole shards or begun ones, is read, the rest made.

    `sampler` is called only when a response is missing. On a pod each process makes the shards that are its own, unless
    the sampler needs all of them for each prompt.
    """
    shards = Shards(run, iteration, "responses", Responses, len(prompts), shard_prompts, made_from)
    pod = jax.process_count() > 1
    # On a pod all make their samplers together: the weights come from all.
    engine = sampler() if pod and anywhere(bool(shards.missing)) else None
    together = engine is not None and not engine.alone
    # Where all sample the same, the first one's word counts, and it alone writes.
    answers = _Answers(prompts, shards, follower, (lambda _: jax.process_index() == 0) if together else mine)
    todo, total = answers.begin()
    if together:
        todo, total = as_first_says(todo, len(prompts)), len(prompts)
    speed: dict[str, float] = {}
    if todo:
        engine = engine or sampler()
        before, start = dataclasses.replace(engine.stats), time.monotonic()
        label = f"iteration {iteration} respond"
        with metrics.progress(label, total, "prompts", done=total - len(todo)) as advance:
            asked, on_progress = [prompts[n] for n in todo], metrics.chunks(advance, follower.progress)
            for place, row in engine.stream(asked, seed=seed, iteration=iteration, on_progress=on_progress):
                answers.add(todo[place], row)
        speed = _speed(engine.stats, before, time.monotonic() - start)
    wait_for_all(f"iteration {iteration} respond")
    found = [row for i in range(len(shards.ranges)) for row in answers.read(i)]
    reasons = [reason for row in found for reason in row.finish_reason]
    lengths = [len(ids) for row in found for ids in row.response_ids]
    metrics.scalars(
        iteration,
        "respond",
        0,
        responses=len(lengths),
        mean_tokens=sum(lengths) / len(lengths),
        truncated_share=reasons.count("length") / len(reasons),
        **speed,
    )
    return found


def _speed(stats: Stats, before: Stats, seconds: float) -> dict[str, float]:
    """Of what has been sampled since."""
    new = {name: getattr(stats, name) - getattr(before, name) for name in ("steps", "tokens")}
    return {
        "seconds": seconds,
        "tokens_per_second": new["tokens"] / max(seconds, 1e-9),
        "slot_efficiency": dataclasses.replace(stats, **new).slot_efficiency,
    }


class _Answers:
    """Responses on their way to disk and to the follower."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        shards: Shards[Responses],
        follower: Follower,
        own: Callable[[int], bool],
    ):
        """`own`: whether this process is the one that writes a shard."""
        self._prompts, self._shards, self._follower, self._own = prompts, shards, follower, own
        self._waiting: dict[int, Responses] = {}  # for the rest of their shard

    def begin(self) -> tuple[list[int], int]:
        """Pass on what is on disk. Returns which prompts of our shards have no responses yet, and how many are in them."""
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
        """The sampler has finished prompt n."""
        i = self._shards.holding(n)
        if self._own(i):
            self._shards.keep(i, self._key(n), row)
            self._finished(n, row)
        else:
            self._follower.take(n, row)

    def read(self, i: int) -> list[Responses]:
        """Shard i. Raises BadInput unless it answers our prompts."""
        rows = self._shards.read(i)
        if [row.prompt_id for row in rows] != [self._prompts[n].prompt_id for n in self._shards.ranges[i]]:
            where = self._shards.paths[i].parent
            raise BadInput(f"{where}: answers other prompts than asked; delete it and run again")
        return rows

    def _finished(self, n: int, row: Responses) -> None:
        self._waiting[n] = row
        i = self._shards.holding(n)
        if all(m in self._waiting for m in self._shards.ranges[i]):
            self._shards.write(i, [self._waiting.pop(m) for m in self._shards.ranges[i]])
        self._follower.take(n, row)  # last: whoever has heard of a whole shard finds it on disk

    def _key(self, n: int) -> str:
        return str(self._prompts[n].prompt_id)
