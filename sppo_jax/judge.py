"""Stage 2: responses → every ordered pair compared → K x K probabilities and win rates, shard by shard on disk."""

import importlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sppo_jax import config as configuration
from sppo_jax import pairrm, preferences, records, tiny
from sppo_jax.errors import BadInput
from sppo_jax.metrics import Metrics, from_totals
from sppo_jax.records import Preferences, Responses
from sppo_jax.rundir import RunDir, replacing, shard_ranges


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
    embedded = judge.path.startswith(configuration.EMBEDDED)
    opened = pairrm.load(
        tiny.resolve(judge.path) if embedded else judge.path,
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


def judge_all(
    responses: Sequence[Responses],
    judge: Checked,
    settings: configuration.Judge,
    as_shown: Callable[[str], str],
    *,
    run: RunDir,
    iteration: int,
    shard_prompts: int,
    made_from: dict[str, str],
    metrics: Metrics,
) -> list[Preferences]:
    """Preferences for every prompt, in order; as in stage 1, shards on disk are read and the others made."""
    ranges = shard_ranges(len(responses), shard_prompts)
    paths = [run.shard(iteration, "preferences", i, len(ranges)) for i in range(len(ranges))]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    k = len(responses[0].responses)
    pairs = sum(len(ranges[i]) for i in missing) * k * (k - 1)
    if missing:
        before = judge.cut
        with metrics.progress(f"iteration {iteration} judge", pairs, "pairs") as advance:
            for i in missing:
                metrics.poll()
                shard, shown = [responses[n] for n in ranges[i]], from_totals(advance)

                def on_progress(done: int, total: int, shown: Callable[[int, int], None] = shown) -> None:
                    shown(done, total)
                    metrics.poll()  # a shard of a large judge takes longer than those who stop us wait

                start, cut = time.monotonic(), judge.cut
                rows = prefer(shard, judge, settings, as_shown, on_progress)
                shown(len(shard) * k * (k - 1), pairs)  # for judges that report nothing
                facts = _diagnostics(shard, rows) | _cut(judge.cut - cut)
                rate = len(shard) * k * (k - 1) / max(time.monotonic() - start, 1e-9)
                # Before the shard itself: what a crash comes between is said again, and the last line counts.
                metrics.scalars(iteration, "judge_shard", i, **facts, pairs_per_second=rate)
                with replacing(paths[i]) as part:
                    records.write(part, Preferences, rows, _judged(made_from, shard))
        if cut := judge.cut - before:
            metrics.say(
                f"iteration {iteration} judge: reads only the beginning of {cut['prompts']} prompts and "
                f"{cut['responses']} responses (judge.source_tokens, judge.total_tokens)"
            )
        judge.release()
    found: list[Preferences] = []
    for path, members in zip(paths, ranges, strict=True):
        found += records.read(path, Preferences, _judged(made_from, [responses[n] for n in members]))
    if [row.prompt_id for row in found] != [row.prompt_id for row in responses]:
        raise BadInput(f"{paths[0].parent}: judged other prompts than were answered; delete it and run again")
    facts = _diagnostics(responses, found)
    metrics.scalars(iteration, "judge", 0, **facts)
    metrics.say(
        f"iteration {iteration} judge: prompts with a cycle {facts['cycle_share']:.1%}, ties {facts['tie_share']:.1%}, "
        f"position bias {facts['position_bias']:+.2f}, win rate and length correlate {facts['length_correlation']:+.2f}, "
        f"entropy {facts['entropy']:.2f}"
    )
    return found


def _judged(made_from: dict[str, str], responses: Sequence[Responses]) -> dict[str, str]:
    return made_from | {"responses": records.digest(responses)}


def _cut(cut: Mapping[str, int]) -> dict[str, float]:
    return {f"cut_{name}": float(cut.get(name, 0)) for name in ("prompts", "responses")}


def _diagnostics(responses: Sequence[Responses], found: Sequence[Preferences]) -> dict[str, float]:
    lengths = [[len(ids) for ids in row.response_ids] for row in responses]
    logits = records.square([row.logits for row in found])
    return preferences.diagnostics(logits, records.square([row.probability for row in found]), lengths)
