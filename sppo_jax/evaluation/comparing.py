"""Judges in an evaluation: texts compared in parts that are kept on disk, and the probabilities that follow."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sppo_jax import files, judges, records
from sppo_jax.config import Config
from sppo_jax.errors import Terminated
from sppo_jax.evaluation.flags import run_of
from sppo_jax.evaluation.place import Place, Task
from sppo_jax.evaluation.policies import Policy
from sppo_jax.judges import CheckedJudge, prefer
from sppo_jax.preferences import probability_matrix
from sppo_jax.records import Preferences, Responses
from sppo_jax.run import manifest, pod
from sppo_jax.run.directory import RunDir, shard_ranges
from sppo_jax.run.metrics import from_totals
from sppo_jax.text import reading, thoughts
from sppo_jax.text.reading import Reading

PART = 1280  # ordered pairs of one part of a comparison


@dataclass(frozen=True)
class Named:
    """A judge with the name that the figures carry, and how it reads."""

    name: str  # judge or oracle
    judge: CheckedJudge
    read: Reading
    settings: Any  # config.Judge
    knobs: str  # the values of the knobs that change its logits

    def probabilities(
        self,
        place: Place,
        title: str,
        first: Sequence[Responses],
        second: Sequence[Responses],
        ks: Sequence[tuple[int, int]],
    ) -> np.ndarray:
        """P(first's response > second's) [n], both orders averaged. `ks`: for each prompt the numbers of the two responses.

        judge.sharpness and judge.estimator do not matter here, as in a run's own held-out win rates.
        """
        rows = [
            _together(a.prompt_id, a.prompt, [a.responses[i], b.responses[j]])
            for a, b, (i, j) in zip(first, second, ks, strict=True)
        ]
        # Both orders of two policies are one comparison on disk: that of the texts which come first in the alphabet.
        turned = [row.responses[::-1] for row in rows] < [row.responses for row in rows]
        if turned:
            rows = [dataclasses.replace(row, responses=row.responses[::-1]) for row in rows]
        logits = self.logits(place, title, rows)
        return probability_matrix(logits[:, ::-1, ::-1] if turned else logits)[:, 0, 1]

    def logits(self, place: Place, title: str, rows: Sequence[Responses]) -> np.ndarray:
        """Logits [n, K, K] of every ordered pair of each row's responses; parts that are on disk are read."""
        k = len(rows[0].responses)
        if k == 1:  # nothing to compare
            return np.zeros((len(rows), 1, 1))
        texts = [self.read(row.prompt, row.responses) for row in rows]
        made_from = {
            "judge": self.judge.identity,
            "configuration": self.knobs,
            "prompts": files.sha256_text(json.dumps(texts)),
        }
        task = place.task("comparisons", title, made_from)
        parts = shard_ranges(len(rows), max(1, PART // max(1, k * (k - 1))))
        paths = [task.run.shard(0, self.name, i, len(parts)) for i in range(len(parts))]
        done = sum(len(part) for part, path in zip(parts, paths, strict=True) if files.exists(path))
        done = pod.agreed("compared", lambda: done)
        found: list[Preferences] = []
        pairs = k * (k - 1)
        with task.progress(self.name, len(rows) * pairs, "pairs", done=done * pairs, minor=True) as advance:
            for part, path in zip(parts, paths, strict=True):
                asked = [rows[n] for n in part]
                found += task.kept(path, Preferences, functools.partial(self._compared, task, asked, advance))
        return records.square([row.logits for row in found])

    def _compared(self, task: Task, asked: Sequence[Responses], advance: Any) -> list[Preferences]:
        count = from_totals(advance)

        def on_progress(done: int, total: int) -> None:
            count(done, total)
            if task.metrics.stop_requested and pod.count() == 1:
                raise Terminated

        return prefer(asked, judges.Shared(self.judge), self.settings, self.read, on_progress)


@contextlib.contextmanager
def opened(
    config: Config, policies: Sequence[Policy], place: Place, trial: Sequence[str]
) -> Iterator[list[Named]]:
    """The configured judge and, if there is one, the oracle, tried on the prompts `trial`.

    Responses come to them as `Policy.said` gives them. judge.prompt=chat renders prompts as the first policy reads them. A run's
    judge from the hub is the one that the run is pinned to.
    """
    with contextlib.ExitStack() as stack:
        run = run_of(policies[0].name)
        judge = judges.open_judge(config.judge, manifest.pinned_judge(RunDir(run[0])) if run else None)
        stack.callback(judge.close)
        judge.report_to(place.metrics.say)
        c = config.judge
        knobs = str((c.compute_dtype, c.source_tokens, c.candidate_tokens, c.total_tokens))
        found = [Named("judge", judge, _reading(config, policies, own=False), c, knobs)]
        if config.eval.oracle:
            oracle = judges.from_attribute("eval.oracle", config.eval.oracle)
            stack.callback(oracle.close)
            found.append(Named("oracle", oracle, _reading(config, policies, own=True), c, ""))
        for named in found:
            judges.try_out(named.judge, [named.read(text, ())[0] for text in trial[:2]], 2)
        yield found


def _reading(config: Config, policies: Sequence[Policy], *, own: bool) -> Reading:
    """How the judge, or as `own` the oracle, reads responses from which each policy's thoughts are taken out already."""
    judge, first = config.judge, policies[0]
    read = judges.reading_of(dataclasses.replace(judge, strip="none"), first.tokenizer, own=own)
    if first.thinks and judge.prompt == "chat" and not own:
        read = reading.rendered(first.tokenizer, without=thoughts.of_header(first.tokenizer)[0])
    thinking = any(policy.thinks for policy in policies)
    return reading.answers_only(read, opened=False) if thinking else read


def _together(prompt_id: int, prompt: str, texts: list[str]) -> Responses:
    """Texts to be compared, as the judge gets them: their ids play no part."""
    blank: list[Any] = [[] for _ in texts]
    return Responses(prompt_id, prompt, [], blank, texts, ["stop"] * len(texts), [0.0] * len(texts))


def as_rows(answers: Sequence[Responses], count: int) -> list[Responses]:
    """The first `count` responses of each prompt, to be compared with each other."""
    return [_together(row.prompt_id, row.prompt, row.responses[:count]) for row in answers]
