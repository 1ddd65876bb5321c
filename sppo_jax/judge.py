"""Stage 2: responses → every ordered pair compared → K x K probabilities and win rates, shard by shard on disk.

A prompt is compared as soon as its responses are on disk, in a thread beside the sampler.
`python -m sppo_jax.judge` ranks the rows of a file (evaluation/ranking.py).
"""

if __name__ == "__main__":
    # Before the stage's own imports, which take seconds: a mistake on the command line is refused at once.
    import sys

    from sppo_jax.command import call
    from sppo_jax.evaluation.ranking import main

    call(main)
    sys.exit()

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Self

from sppo_jax import config as configuration
from sppo_jax import preferences, records
from sppo_jax.errors import Terminated
from sppo_jax.judges import CheckedJudge, prefer
from sppo_jax.records import Preferences, Responses
from sppo_jax.run import pod
from sppo_jax.run.shards import KeptRow, Shards
from sppo_jax.run.stage import Stage
from sppo_jax.text.reading import Reading

POLL_SECONDS = 0.2  # between checks for SIGTERM while only the judge works


@dataclass
class _Shard:
    """A shard being judged: its rows so far, with the seconds and counts of their judging."""

    rows: dict[int, tuple[Responses, Preferences]] = field(default_factory=dict)
    facts: dict[str, float] = field(
        default_factory=lambda: {"seconds": 0.0, "cut_prompts": 0.0, "cut_responses": 0.0}
    )


class Judging:
    """The preferences of one iteration, begun while its responses are sampled; a context that ends its thread.

    One call of the judge compares one prompt's responses; a judge on the mesh, whose turn comes after sampling, compares a
    whole shard's. So the scores depend on nothing but the judge: timing and interruptions change no bit.
    """

    def __init__(
        self,
        stage: Stage,
        judge: CheckedJudge,
        settings: configuration.Judge,
        read: Reading,
        prompts: int,
    ):
        """`prompts` is their number in this iteration; `read`: how the judge reads prompts and responses."""
        self._stage, self._judge, self._settings, self._read = stage, judge, settings, read
        self._shards = Shards(stage, "preferences", Preferences, prompts, source="responses")
        self._own = self._shards.own
        self._kept = {key: row for i in self._shards.missing for key, row in self._shards.kept(i).items()}
        # A judge on the mesh is used by all processes together, and so they can stop together alone.
        self._together = judge.on_mesh and pod.count() > 1
        self._taken: set[int] = set()
        self._pairs_kept = 0
        self._thread = futures.ThreadPoolExecutor(1, "judge")
        self._waiting: deque[futures.Future[None]] = deque()
        self._stop = threading.Event()
        # Only the thread writes these.
        self._open = {i: _Shard() for i in self._shards.missing}
        self._prompts_judged = self._pairs_judged = 0
        self._cut: Counter[str] = Counter()
        self._facts: dict[int, dict[str, float]] = {}  # by shard of this process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, n: int, row: Responses) -> None:
        """Queue prompt n, whose responses are on disk, for the thread."""
        if not self._judge.on_mesh:
            self._submit({n: row})

    def progress(self) -> dict[str, int]:
        """The number of prompts judged so far, as facts to show. Raises the judge's own error from the thread."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        return {} if self._judge.on_mesh else {"judged": self._prompts_judged}

    def finish(self, responses: Sequence[Responses]) -> list[Preferences]:
        """Preferences of every prompt, in order, when all are on disk."""
        for i in self._shards.missing:
            shard = {n: responses[n] for n in self._shards.ranges[i]}
            for unit in [shard] if self._judge.on_mesh else [{n: row} for n, row in shard.items()]:
                self._submit(unit)
        self._wait(_ordered_pairs(responses[:1]))
        self._share_facts()
        pod.meet("preferences")
        found: list[Preferences] = []
        for i, members in enumerate(self._shards.ranges):
            found += self._shards.read(i, _provenance([responses[n] for n in members]))
        records.check_prompts(self._shards.paths[0].parent, found, responses)
        self._report(responses, found)
        return found

    def _submit(self, members: dict[int, Responses]) -> None:
        """Queue prompts of one shard, unless they are on disk, queued already, or another process's."""
        members = {n: row for n, row in members.items() if n not in self._taken}
        i = self._shards.holding(min(members, default=0))
        # A judge on the mesh spans the processes of a pod: all of them judge every shard together.
        if members and i in self._shards.missing and (i in self._own or self._judge.on_mesh):
            self._taken |= members.keys()
            key = records.digest(list(members.values()))
            kept = self._kept.get(key)
            self._pairs_kept += 0 if kept is None else _ordered_pairs(list(members.values()))
            self._waiting.append(self._thread.submit(self._judged, i, members, key, kept))

    def _wait(self, pairs: int) -> None:
        """Wait for the thread to empty its queue, showing progress. `pairs`: ordered pairs of one prompt."""
        if not self._waiting:
            return
        shown, total = self._pairs_judged, len(self._taken) * pairs
        with self._stage.progress("judge", total, "pairs", done=self._pairs_kept + shown) as advance:
            while self._waiting:
                futures.wait([self._waiting[0]], POLL_SECONDS)
                self.progress()
                if not self._together:
                    self._stage.metrics.poll()
                now = self._pairs_judged
                advance(now - shown)
                shown = now

    def _share_facts(self) -> None:
        """Collect what the other processes' judges report: process 0 writes and prints."""
        if pod.count() == 1:
            return
        for process, (facts, cut) in enumerate(pod.gathered("judged", [self._facts, self._cut])):
            for i, values in facts.items() if process else ():
                self._stage.scalars("judge_shard", values, step=int(i))
            if process != pod.index() and not self._together:
                self._cut += Counter(cut)

    def _report(self, responses: Sequence[Responses], found: Sequence[Preferences]) -> None:
        if self._cut:
            self._stage.say(
                "judge",
                f"reads only the beginning of {self._cut['prompts']} prompts and "
                f"{self._cut['responses']} responses (judge.source_tokens, judge.total_tokens)",
            )
        facts = _diagnostics(responses, found)
        self._stage.scalars("judge", facts)
        self._stage.say(
            "judge",
            f"prompts with a cycle {facts['cycle_share']:.1%}, ties {facts['tie_share']:.1%}, "
            f"position bias {facts['position_bias']:+.2f}, "
            f"win rate and length correlate {facts['length_correlation']:+.2f}, entropy {facts['entropy']:.2f}, "
            f"best ones the longest {facts['longest_share']:.0%}",
        )

    # What follows runs in the thread.

    def _judged(
        self, i: int, members: dict[int, Responses], key: str, kept: KeptRow[Preferences] | None
    ) -> None:
        """Compare prompts of shard i, or take their kept preferences; the shard's last prompt completes it."""
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
            self._stop.set()  # the prompts still queued would fail likewise
            raise

    def _compared(
        self, i: int, rows: list[Responses], key: str
    ) -> tuple[list[Preferences], dict[str, float]]:
        """Preferences of `rows`, with seconds and counts; a prompt judged by itself is kept on disk at once."""
        before, cut, start = self._pairs_judged, self._judge.cut, time.monotonic()

        def on_progress(done: int, _total: int) -> None:
            if self._together:
                self._stage.metrics.poll(together=True)
            elif self._stop.is_set() or self._stage.metrics.stop_requested:
                raise Terminated
            self._pairs_judged = before + done

        found = prefer(rows, self._judge, self._settings, self._read, on_progress)
        self._pairs_judged = before + _ordered_pairs(rows)  # the judge may not report progress
        facts = {"seconds": time.monotonic() - start} | _cut_counts(self._judge.cut - cut)
        if not self._judge.on_mesh:
            self._shards.keep(i, key, found[0], facts)
        return found, facts

    def _write(self, i: int, shard: _Shard) -> None:
        responses, rows = zip(*(shard.rows[n] for n in self._shards.ranges[i]), strict=True)
        facts = shard.facts
        self._cut += Counter({name: int(facts[f"cut_{name}"]) for name in ("prompts", "responses")})
        if i not in self._own:
            return
        rate = _ordered_pairs(responses) / max(facts.pop("seconds"), 1e-9)
        # Metrics before the shard: after a crash in between, the shard is redone and its line rewritten; readers keep
        # the last line.
        self._facts[i] = _diagnostics(responses, rows) | facts | {"pairs_per_second": rate}
        self._stage.scalars("judge_shard", self._facts[i], step=i)
        self._shards.write(i, rows, _provenance(responses))


def _ordered_pairs(rows: Sequence[Responses]) -> int:
    """Number of ordered pairs i != j of the responses, over all rows."""
    return sum(len(row.responses) * (len(row.responses) - 1) for row in rows)


def _provenance(responses: Sequence[Responses]) -> dict[str, str]:
    """Digests of the inputs of preferences, beyond the run's own."""
    return {"responses": records.digest(responses)}


def _cut_counts(cut: Mapping[str, int]) -> dict[str, float]:
    return {f"cut_{name}": float(cut.get(name, 0)) for name in ("prompts", "responses")}


def _diagnostics(responses: Sequence[Responses], found: Sequence[Preferences]) -> dict[str, float]:
    lengths = [[len(ids) for ids in row.response_ids] for row in responses]
    logits = records.square([row.logits for row in found])
    return preferences.diagnostics(logits, records.square([row.probability for row in found]), lengths)
