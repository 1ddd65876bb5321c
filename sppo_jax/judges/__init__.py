"""The interface of a judge, how the configured judge is opened and tried, and how its logits become preferences."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sppo_jax import config as configuration
from sppo_jax import pairrm, preferences
from sppo_jax.command import say
from sppo_jax.errors import BadInput, about
from sppo_jax.judges.own import MEND, Progress, made
from sppo_jax.records import Preferences, Responses
from sppo_jax.run import pod
from sppo_jax.text import reading, thoughts
from sppo_jax.text.reading import Reading

TRIAL = ("one", "another")  # responses on which a judge is tried


class Judge(Protocol):
    """A backend: any object with these two members (docs/judges.md has examples)."""

    @property
    def identity(self) -> str:
        """A hash or a name of everything that the scores depend on."""
        ...

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits [n, K, K]: response i, shown first, beats j. `on_progress(done, total)` counts ordered pairs."""
        ...


class CheckedJudge:
    """A judge whose scores are checked before anything is made from them, with defaults for optional members.

    A backend may also have: `features(prompt, response)`, `on_mesh` (bool), `sources` ({repository: commit}), `cut` (a
    Counter), `tell` (a callable that prints its news, replaced here), `release()` and `close()`.
    """

    def __init__(self, judge: Judge, name: str):
        """`name`: the knob that names the judge, with its value where it is the user's own, for messages."""
        self._judge, self._name = judge, name

    @property
    def identity(self) -> str:
        """The backend's identity."""
        return self._judge.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits of the backend's `compare`, with 0 for what is not a number on the diagonal, which nobody reads.

        Raises BadInput unless they are [n, K, K], finite, and in float32's range.
        """
        logits = np.asarray(self._judge.compare(prompts, responses, on_progress))
        n, k = len(prompts), len(responses[0]) if responses else 0
        if logits.shape != (n, k, k):
            raise BadInput(
                f"{self._name}: compare gave an array {logits.shape}, needed {(n, k, k)}, a logit for each ordered pair "
                "of each prompt's responses; rewards r [n, K] give r[:, :, None] - r[:, None, :]"
            )
        bad = ~(np.abs(logits) <= preferences.LARGEST)  # NaN too
        if wrong := np.argwhere(bad & ~np.eye(k, dtype=bool)).tolist():
            p, i, j = wrong[0]
            raise BadInput(
                f"{self._name}: a score of prompt {prompts[p][:80]!r} is not a finite number in float32's range: "
                f"{logits[p, i, j]:g} for responses {i} and {j}; {MEND}"
            )
        return np.where(bad, 0, logits) if bad.any() else logits

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """Named numbers that the backend finds in a response, such as {"polite": 1.0}; empty of a backend without `features`."""
        return self._judge.features(prompt, response) if hasattr(self._judge, "features") else {}

    @property
    def on_mesh(self) -> bool:
        """Whether the judge computes on the devices that sample, and so waits for them."""
        return bool(getattr(self._judge, "on_mesh", False))

    @property
    def sources(self) -> dict[str, str]:
        """{repository: commit} of the files that came from the hub."""
        return dict(getattr(self._judge, "sources", {}))

    @property
    def cut(self) -> Counter[str]:
        """How many prompts and responses so far were too long to be read whole."""
        return Counter(getattr(self._judge, "cut", {}))

    def report_to(self, say: Callable[[str], None]) -> None:
        """Print the judge's own messages with `say` from now on: a judge is opened before the run's log is."""
        if hasattr(self._judge, "tell"):
            self._judge.tell = say

    def release(self) -> None:
        """Free the devices' memory until the next comparison."""
        if hasattr(self._judge, "release"):
            self._judge.release()

    def close(self) -> None:
        """Free everything; the judge is not used again."""
        if hasattr(self._judge, "close"):
            self._judge.close()


def open_judge(judge: configuration.Judge, pinned: Mapping[str, str] | None = None) -> CheckedJudge:
    """The judge that the configuration names. `pinned`: {repository: commit} of the hub that a run was begun with.

    A PairRM in its own process is started and loads in the background; for one on the mesh only its files are checked.
    """
    if ":" in judge.backend:
        if judge.path and not judge.path.startswith("embedded:"):
            say(
                f"warning: judge.path={judge.path} is not read: judge.backend={judge.backend} is the judge; for PairRM give "
                "--judge.backend torch or jax"
            )
        return from_attribute("judge.backend", judge.backend)
    with about("judge.path="):
        opened = pairrm.load(
            judge.path,
            judge.backend,
            python=judge.python,
            limits=pairrm.Limits(judge.source_tokens, judge.candidate_tokens, judge.total_tokens),
            dtype=judge.compute_dtype,
            pinned=pinned or {},
        )
    return CheckedJudge(opened, f"judge.backend={judge.backend}")


def reading_of(judge: configuration.Judge, tokenizer: Any, *, own: bool = False) -> Reading:
    """How the configured judge reads prompts and responses; `own`: how the oracle does. `tokenizer`: the policy's."""
    strip = thoughts.strips(judge.strip, tokenizer) == "think"
    end, opened = thoughts.of_header(tokenizer) if strip else ("", False)
    if own or (judge.prompt == "raw" and judge.backend not in pairrm.BACKENDS):
        read: Reading = reading.as_it_is
    else:
        read = reading.rendered(tokenizer, without=end) if judge.prompt == "chat" else reading.joined
    return reading.answers_only(read, opened=opened) if strip else read


def from_attribute(key: str, name: str) -> CheckedJudge:
    """Call the factory `module:attribute` without arguments and return the judge that it makes. Raises BadInput."""
    return CheckedJudge(made(key, name), f"{key}={name}")


def try_out(judge: CheckedJudge, prompts: Sequence[str], responses: int) -> None:
    """Have a judge compare short texts as the game will, so that its faults are found before anything is computed.

    It compares `responses` responses to the first prompt, then two to each of the first two. Its memory is freed then.
    """
    for asked, k in ((prompts[:1], responses), (prompts[:2], 2)):
        judge.compare(asked, [[TRIAL[i % 2] for i in range(k)] for _ in asked], lambda _done, _total: None)
    judge.features(prompts[0], TRIAL[0])
    _ = judge.sources, judge.cut
    judge.release()


class Shared:
    """A judge whose comparisons the processes of a run share: all of them call `compare` together, with the same texts."""

    def __init__(self, judge: CheckedJudge):
        self._judge = judge

    @property
    def identity(self) -> str:
        """The judge's identity."""
        return self._judge.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits [n, K, K] of the judge's `compare`, in every process. A judge on the mesh is not shared out: all compute."""
        if self._judge.on_mesh or pod.count() == 1:
            return self._judge.compare(prompts, responses, on_progress)
        own = pod.dealt(prompts), pod.dealt(responses)
        logits = self._judge.compare(*own, on_progress).tolist() if own[0] else []
        return np.asarray(pod.collected("compared", logits))


def prefer(
    responses: Sequence[Responses],
    judge: Judge,
    settings: configuration.Judge,
    read: Reading,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Preferences]:
    """Preferences from all ordered pairs of every prompt's K responses. `read`: how the judge reads them."""
    shown = [read(r.prompt, r.responses) for r in responses]
    logits = judge.compare([prompt for prompt, _ in shown], [texts for _, texts in shown], on_progress)
    p = preferences.probability_matrix(logits, settings.estimator, sharpness=settings.sharpness)
    rates = preferences.win_rates(p, leave_one_out=settings.estimator == "pairwise_loo")
    return [
        Preferences(r.prompt_id, logits[i].tolist(), p[i].tolist(), rates[i].tolist(), settings.estimator)
        for i, r in enumerate(responses)
    ]
