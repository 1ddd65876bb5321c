"""The interface of a judge, how the configured judge is opened, and how its logits become preferences."""

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sppo_jax import config as configuration
from sppo_jax import pairrm, preferences
from sppo_jax.errors import BadInput, one_line
from sppo_jax.records import Preferences, Responses


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
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Logits [n, K, K]: response i, shown first, beats j. `on_progress(done, total)` counts ordered pairs."""
        ...


class CheckedJudge:
    """A judge whose scores are checked before anything is made from them, with defaults for optional members.

    A backend may also have: `on_mesh` (bool), `sources` ({repository: commit}), `cut` (a Counter), `tell` (a callable
    that prints its news, replaced here), `release()` and `close()`.
    """

    def __init__(self, judge: Judge, key: str):
        """`key`: the knob that names the judge, for messages."""
        self._judge, self._key = judge, key

    @property
    def identity(self) -> str:
        """The backend's identity."""
        return self._judge.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Logits of the backend's `compare`. Raises BadInput unless they are finite and [n, K, K]."""
        logits = np.asarray(self._judge.compare(prompts, responses, on_progress))
        n, k = len(prompts), len(responses[0]) if responses else 0
        if logits.shape != (n, k, k):
            raise BadInput(f"{self._key}: compare gave an array {logits.shape}, needed {(n, k, k)}")
        if bad := np.flatnonzero(~np.isfinite(logits).all(axis=(1, 2))).tolist():
            raise BadInput(f"{self._key}: a score of prompt {prompts[bad[0]][:80]!r} is not a finite number")
        return logits

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
    return CheckedJudge(opened, "judge.backend")


def from_attribute(key: str, name: str) -> CheckedJudge:
    """Call the factory `module:attribute` without arguments and return the judge that it makes. Raises BadInput."""
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # the user's own code
        raise BadInput(f"{key}={name}: {type(error).__name__}: {one_line(error)}") from None
    if not callable(getattr(made, "compare", None)) or not isinstance(getattr(made, "identity", None), str):
        raise BadInput(f"{key}={name}: what it makes has no method compare and no text identity")
    return CheckedJudge(made, key)


def prefer(
    responses: Sequence[Responses],
    judge: Judge,
    settings: configuration.Judge,
    as_shown: Callable[[str], str],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Preferences]:
    """Preferences from all ordered pairs of every prompt's K responses.

    `as_shown` maps an instruction to the text that the judge reads.
    """
    logits = judge.compare(
        [as_shown(r.prompt) for r in responses], [r.responses for r in responses], on_progress
    )
    p = preferences.probability_matrix(logits, settings.estimator, sharpness=settings.sharpness)
    rates = preferences.win_rates(p, leave_one_out=settings.estimator == "pairwise_loo")
    return [
        Preferences(r.prompt_id, logits[i].tolist(), p[i].tolist(), rates[i].tolist(), settings.estimator)
        for i, r in enumerate(responses)
    ]
