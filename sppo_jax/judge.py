"""Stage 2: responses → every ordered pair compared → K x K probabilities and win rates, shard by shard on disk.

A prompt is compared as soon as its responses are there, by a thread beside the sampler's.
"""

import importlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from sppo_jax import config as configuration
from sppo_jax import pairrm, preferences, records
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.records import Preferences, Responses
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.shards import Kept, Shards, mine, wait_for_all

POLL_SECONDS = 0.2  # between looks at those who stop us, while only the judge is at work


class Judge(Protocol):
    """Anything that compares: an object with these two is a backend (docs/judges.md has examples)."""

    @property
    def identity(self) -> str:
        """What the scores depend on, as a hash or a name."""
        ...

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Logits [n, K, K]: response i, shown first, beats j. `on_progress(done, total)` counts ordered pairs."""
        ...


class Checked:
    """A judge whose answers are looked at before anyone learns from them."""

    def __init__(self, judge: Judge, key: str):
        self._judge, self._key = judge, key

    @property
    def identity(self) -> str:
        return self._judge.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """As the judge's own; raises BadInput unless it is finite and [n, K, K]."""
        logits = np.asarray(self._judge.compare(prompts, responses, on_progress))
        n, k = len(prompts), len(responses[0]) if responses else 0
        if logits.shape != (n, k, k):
            raise BadInput(f"{self._key}: compare gave an array {logits.shape}, needed {(n, k, k)}")
        if bad := np.flatnonzero(~np.isfinite(logits).all(axis=(1, 2))).tolist():
            raise BadInput(f"{self._key}: a score of prompt {prompts[bad[0]][:80]!r} is not a finite number")
        return logits

    # What a judge may have besides.

    @property
    def on_mesh(self) -> bool:
        """Whether it runs on the devices that sample, and so has to wait for them."""
        return bool(getattr(self._judge, "on_mesh", False))

    @property
    def sources(self) -> dict[str, str]:
        """{repository: commit} of what came from the hub."""
        return dict(getattr(self._judge, "sources", {}))

    @property
    def cut(self) -> Counter[str]:
        """Prompts and responses so far of which the judge read only a part."""
        return Counter(getattr(self._judge, "cut", {}))

    def tell(self, say: Callable[[str], None]) -> None:
        """Where the judge's own news goes from now on: the run's log is opened after it."""
        if hasattr(self._judge, "tell"):
            self._judge.tell = say

    def release(self) -> None:
        """Free the devices' memory until the next comparison."""
        if hasattr(self._judge, "release"):
            self._judge.release()

    def close(self) -> None:
        if hasattr(self._judge, "close"):
            self._judge.close()


def open_judge(judge: configuration.Judge, pinned: Mapping[str, str] | None = None) -> Checked:
    """The judge that the configuration names; `pinned`: {repository: commit} of the hub that a run was begun with.

    A PairRM of its own process is started, and loads meanwhile; one on the mesh has only looked at its files.
    """
    if ":" in judge.backend:
        return from_attribute("judge.backend", judge.backend)
    if judge.backend not in pairrm.BACKENDS:
        known = ", ".join(pairrm.BACKENDS)
        raise BadInput(f"judge.backend={judge.backend} is not known; choose {known} or module:attribute")
    opened = pairrm.load(
        judge.path,
        judge.backend,
        python=judge.python,
        limits=pairrm.Limits(judge.source_tokens, judge.candidate_tokens, judge.total_tokens),
        dtype=judge.compute_dtype,
        pinned=pinned or {},
    )
    return Checked(opened, "judge.backend")


def from_attribute(key: str, name: str) -> Checked:
    """Call the factory `module:attribute` without arguments; what it returns is a judge."""
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # the user's own code
        raise BadInput(f"{key}={name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not callable(getattr(made, "compare", None)) or not isinstance(getattr(made, "identity", None), str):
        raise BadInput(f"{key}={name}: what it makes has no method compare and no text identity")
    return Checked(made, key)


def prefer(
    responses: Sequence[Responses],
    judge: Judge,
    settings: configuration.Judge,
    as_shown: Callable[[str], str],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Preferences]:
    """Judge all ordered pairs of every prompt's K responses. `as_shown` maps an instruction to what the judge reads."""
    logits = judge.compare(
        [as_shown(r.prompt) for r in responses], [r.responses for r in responses], on_progress
    )
    p = preferences.probability_matrix(logits, settings.estimator, sharpness=settings.sharpness)
    rates = preferences.win_rates(p, leave_one_out=settings.estimator == "pairwise_loo")
    return [
        Preferences(r.prompt_id, logits[i].tolist(), p[i].tolist(), rates[i].tolist(), settings.estimator)
        for i, r in enumerate(responses)
    ]


@dataclass
class _Shard:
    """A shard being judged: the rows that are there, and what making them took."""

    rows: dict[int, tuple[Responses, Preferences]] = field(default_factory=dict)
    facts: dict[str, float] = field(
        default_factory=lambda: {"seconds": 0.0, "cut_prompts": 0.0, "cut_responses": 0.0}
    )


class Judging:
    """The judgements of one iteration, begun while its responses are sampled; a context, which no thread outlives.

    What is compared in one call depends on nothing but the judge, so that timing and interruptions change no bit: one
    prompt, or, by a judge on the mesh, whose turn comes when sampling is over, all prompts of a shard.
    """

    def __init__(
        self,
        judge: Checked,
        settings: configuration.Judge,
        as_shown: Callable[[str], str],
        *,
        prompts: int,
        run: RunDir,
        iteration: int,
        shard_prompts: int,
        made_from: dict[str, str],
        metrics: Metrics,
    ):
        """Of so many `prompts`; `as_shown` maps an instruction to what the judge reads. Shards on disk are kept."""
        self._judge, self._settings, self._as_shown = judge, settings, as_shown
        self._iteration, self._metrics = iteration, metrics
        self._shards = Shards(run, iteration, "preferences", Preferences, prompts, shard_prompts, made_from)
        self._own = {i for i in self._shards.missing if mine(i)}
        self._kept = {key: row for i in self._shards.missing for key, row in self._shards.kept(i).items()}
        self._taken: set[int] = set()
        self._pairs_kept = 0
        self._thread = futures.ThreadPoolExecutor(1, "judge")
        self._waiting: deque[futures.Future[None]] = deque()
        self._stop = threading.Event()
        # Written by the thread only.
        self._open = {i: _Shard() for i in self._shards.missing}
        self._prompts_judged = self._pairs_judged = 0
        self._cut: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, n: int, row: Responses) -> None:
        """Prompt n has its responses, and they are on disk: the thread may compare them."""
        if not self._judge.on_mesh:
            self._submit({n: row})

    def progress(self) -> dict[str, int]:
        """For people: how many prompts have been judged so far. Raises what the judge has raised."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        return {} if self._judge.on_mesh else {"judged": self._prompts_judged}

    def finish(self, responses: Sequence[Responses]) -> list[Preferences]:
        """Preferences for every prompt, in order, once all are on disk."""
        for i in self._shards.missing:
            shard = {n: responses[n] for n in self._shards.ranges[i]}
            for unit in [shard] if self._judge.on_mesh else [{n: row} for n, row in shard.items()]:
                self._submit(unit)
        self._wait(_pairs(responses[:1]))
        wait_for_all(f"iteration {self._iteration} judge")
        if self._shards.missing:
            self._judge.release()
        found: list[Preferences] = []
        for i, members in enumerate(self._shards.ranges):
            found += self._shards.read(i, _of([responses[n] for n in members]))
        if [row.prompt_id for row in found] != [row.prompt_id for row in responses]:
            where = self._shards.paths[0].parent
            raise BadInput(f"{where}: judged other prompts than were answered; delete it and run again")
        self._tell(responses, found)
        return found

    def _submit(self, members: dict[int, Responses]) -> None:
        """Of one shard; what is on disk, another process's or taken already is left alone."""
        members = {n: row for n, row in members.items() if n not in self._taken}
        i = self._shards.holding(min(members, default=0))
        # On the mesh a pod judges together.
        if members and i in self._shards.missing and (i in self._own or self._judge.on_mesh):
            self._taken |= members.keys()
            key = records.digest(list(members.values()))
            kept = self._kept.get(key)
            self._pairs_kept += 0 if kept is None else _pairs(list(members.values()))
            self._waiting.append(self._thread.submit(self._judged, i, members, key, kept))

    def _wait(self, pairs: int) -> None:
        """For the thread, until it has judged all that it was given, so many pairs a prompt."""
        if not self._waiting:
            return
        label, shown = f"iteration {self._iteration} judge", self._pairs_judged
        total, done = len(self._taken) * pairs, self._pairs_kept + shown
        with self._metrics.progress(label, total, "pairs", done=done) as advance:
            while self._waiting:
                futures.wait([self._waiting[0]], POLL_SECONDS)
                self.progress()
                self._metrics.poll()
                now = self._pairs_judged
                advance(now - shown)
                shown = now

    def _tell(self, responses: Sequence[Responses], found: Sequence[Preferences]) -> None:
        label = f"iteration {self._iteration} judge"
        if self._cut:
            self._metrics.say(
                f"{label}: reads only the beginning of {self._cut['prompts']} prompts and "
                f"{self._cut['responses']} responses (judge.source_tokens, judge.total_tokens)"
            )
        facts = _diagnostics(responses, found)
        self._metrics.scalars(self._iteration, "judge", 0, **facts)
        self._metrics.say(
            f"{label}: prompts with a cycle {facts['cycle_share']:.1%}, ties {facts['tie_share']:.1%}, "
            f"position bias {facts['position_bias']:+.2f}, "
            f"win rate and length correlate {facts['length_correlation']:+.2f}, entropy {facts['entropy']:.2f}"
        )

    # In the thread.

    def _judged(
        self, i: int, members: dict[int, Responses], key: str, kept: Kept[Preferences] | None
    ) -> None:
        """Compare prompts of shard i, unless what they got is kept; the last ones complete it."""
        if self._stop.is_set():
            return
        try:
            found, facts = ([kept[0]], kept[1]) if kept else self._compared(i, list(members.values()), key)
            shard = self._open[i]
            for (n, row), preferences in zip(members.items(), found, strict=True):
                shard.rows[n] = row, preferences
            shard.facts = {name: value + facts[name] for name, value in shard.facts.items()}
            self._prompts_judged += len(members)
            if len(shard.rows) == len(self._shards.ranges[i]):
                self._write(i, self._open.pop(i))
        except BaseException:
            self._stop.set()  # whatever waits would fail likewise
            raise

    def _compared(
        self, i: int, rows: list[Responses], key: str
    ) -> tuple[list[Preferences], dict[str, float]]:
        """Preferences of `rows`, and what making them took; those of a prompt by itself are kept at once."""
        before, cut, start = self._pairs_judged, self._judge.cut, time.monotonic()

        def on_progress(done: int, _total: int) -> None:
            if self._stop.is_set() or self._metrics.stop_requested:
                raise Terminated
            self._pairs_judged = before + done

        found = prefer(rows, self._judge, self._settings, self._as_shown, on_progress)
        self._pairs_judged = before + _pairs(rows)  # for judges that report nothing
        facts = {"seconds": time.monotonic() - start} | _cut(self._judge.cut - cut)
        if not self._judge.on_mesh:
            self._shards.keep(i, key, found[0], facts)
        return found, facts

    def _write(self, i: int, shard: _Shard) -> None:
        responses, rows = zip(*(shard.rows[n] for n in self._shards.ranges[i]), strict=True)
        facts = shard.facts
        self._cut += Counter({name: int(facts[f"cut_{name}"]) for name in ("prompts", "responses")})
        if i not in self._own:
            return
        rate = _pairs(responses) / max(facts.pop("seconds"), 1e-9)
        # Before the shard itself: what a crash comes between is said again, and the last line counts.
        self._metrics.scalars(
            self._iteration, "judge_shard", i,
            **_diagnostics(responses, rows), **facts, pairs_per_second=rate,
        )  # fmt: skip
        self._shards.write(i, rows, _of(responses))


def _pairs(rows: Sequence[Responses]) -> int:
    """Ordered ones."""
    return sum(len(row.responses) * (len(row.responses) - 1) for row in rows)


def _of(responses: Sequence[Responses]) -> dict[str, str]:
    """What preferences are made from besides."""
    return {"responses": records.digest(responses)}


def _cut(cut: Mapping[str, int]) -> dict[str, float]:
    return {f"cut_{name}": float(cut.get(name, 0)) for name in ("prompts", "responses")}


def _diagnostics(responses: Sequence[Responses], found: Sequence[Preferences]) -> dict[str, float]:
    lengths = [[len(ids) for ids in row.response_ids] for row in responses]
    logits = records.square([row.logits for row in found])
    return preferences.diagnostics(logits, records.square([row.probability for row in found]), lengths)
