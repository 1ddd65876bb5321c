"""The interface of a judge, how the configured judge is opened and tried, and how its logits become preferences.

A judge may be the user's own object. Its code runs in `_run` alone, so whatever it raises or returns is one line or usable.
"""

import importlib
import inspect
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sppo_jax import config as configuration
from sppo_jax import pairrm, preferences
from sppo_jax.command import say
from sppo_jax.errors import BadInput, Terminated, about, one_line
from sppo_jax.records import Preferences, Responses
from sppo_jax.run import pod
from sppo_jax.text import reading, thoughts
from sppo_jax.text.reading import Reading

TRIAL = ("one", "another")  # responses on which a judge is tried
Progress = Callable[[int, int], None]
_SHOWN = 300  # characters of an exception's text in a message
_MEND = "repair it, and run the same command again"
_HOW_TO_NAME = (
    "a judge is module:attribute, a function without arguments in a module that Python finds from here"
)


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

    A backend may also have: `on_mesh` (bool), `sources` ({repository: commit}), `cut` (a Counter), `tell` (a callable
    that prints its news, replaced here), `release()` and `close()`.
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
                f"{logits[p, i, j]:g} for responses {i} and {j}; {_MEND}"
            )
        return np.where(bad, 0, logits) if bad.any() else logits

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


class OwnJudge:
    """The user's object as a backend: each of its members is usable, or refused with one line (BadInput)."""

    def __init__(self, made: object, name: str, module: str):
        """`name`: the knob and its value, for messages; `module`: where the user's code is."""
        self._made, self._name, self._module = made, name, module
        if not callable(self._member("compare")):
            raise BadInput(f"{name}: what it makes, {_kind(made)}, has no method compare; {_MEND}")
        identity = self._member("identity")
        if not isinstance(identity, str) or not identity.strip():
            raise BadInput(
                f"{name}: identity must be a text that changes whenever the scores would, found {_shown(identity)}; {_MEND}"
            )
        self.identity = str(identity)
        on_mesh = self._member("on_mesh")
        if not isinstance(on_mesh, bool | np.bool_ | None):
            raise BadInput(f"{name}: on_mesh must be True or False, found {_shown(on_mesh)}; {_MEND}")
        self.on_mesh = bool(on_mesh)

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """What the user's `compare` returns, as float64. Raises BadInput for what it raises, or unless it gives numbers."""
        pairs = sum(len(row) * (len(row) - 1) for row in responses)
        ours: list[BaseException] = []  # raised by our own callback inside the user's code

        def count(done: int, total: int = pairs) -> None:
            shown = min(max(int(done), 0), pairs)
            try:
                if on_progress is not None:
                    on_progress(shown, pairs)
            except BaseException as error:
                ours.append(error)
                raise

        def call() -> Any:
            # Copies, since records must not change where a judge sorts its arguments.
            return self._made.compare(list(prompts), [list(row) for row in responses], count)  # type: ignore[attr-defined]

        try:
            value = self._run("compare raised ", call)
        except BadInput:
            if ours:
                raise ours[0] from None
            raise
        return self._run("what compare gave raised ", lambda: numbers(value))

    @property
    def sources(self) -> dict[str, str]:
        """The user's `sources`. Raises BadInput unless it is {text: text}."""
        found = self._run("sources raised ", lambda: dict(getattr(self._made, "sources", None) or {}))
        if not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise BadInput(f"{self._name}: sources must be texts, {{repository: commit}}; {_MEND}")
        return found

    @property
    def cut(self) -> dict[str, int]:
        """The user's `cut`. Raises BadInput unless it is {text: a number of at least 0}."""
        found = self._run("cut raised ", lambda: dict(getattr(self._made, "cut", None) or {}))
        for key, value in found.items():
            if not isinstance(key, str) or not isinstance(value, int | np.integer) or value < 0:
                raise BadInput(
                    f"{self._name}: cut must count prompts and responses, found {_shown(value)} for {_shown(key)}; {_MEND}"
                )
        return {key: int(value) for key, value in found.items()}

    @property
    def tell(self) -> Callable[[str], None] | None:
        """The user's `tell`, which a run replaces if there is one."""
        return self._member("tell")

    @tell.setter
    def tell(self, say: Callable[[str], None]) -> None:
        if self._member("tell") is not None:
            self._run("setting tell raised ", lambda: setattr(self._made, "tell", say))

    def release(self) -> None:
        """Call the user's `release`. Raises BadInput for what it raises."""
        if (release := self._member("release")) is not None:
            self._run("release raised ", lambda: release())

    def close(self) -> None:
        """Call the user's `close`. What it raises is printed only: no work depends on it any more."""
        try:
            if (close := self._member("close")) is not None:
                self._run("close raised ", lambda: close())
        except BadInput as error:
            say(f"warning: {error}")

    def _member(self, member: str) -> Any:
        return self._run(f"{member} raised ", lambda: getattr(self._made, member, None))

    def _run(self, what: str, call: Callable[[], Any]) -> Any:
        return _run(self._name, what, self._module, call, _MEND)


def open_judge(judge: configuration.Judge, pinned: Mapping[str, str] | None = None) -> CheckedJudge:
    """The judge that the configuration names. `pinned`: {repository: commit} of the hub that a run was begun with.

    A PairRM in its own process is started and loads in the background; for one on the mesh only its files are checked.
    """
    if ":" in judge.backend:
        return from_attribute("judge.backend", judge.backend)
    with about("judge.path: "):
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
    module, _, attribute = name.partition(":")
    shown = f"{key}={name}"
    made = _run(
        shown, "", module, lambda: getattr(importlib.import_module(module), attribute)(), _HOW_TO_NAME
    )
    return CheckedJudge(OwnJudge(made, shown, module), shown)


def try_out(judge: CheckedJudge, prompts: Sequence[str], responses: int) -> None:
    """Have a judge compare short texts as the game will, so that its faults are found before anything is computed.

    It compares `responses` responses to the first prompt, then two to each of the first two. Its memory is freed then.
    """
    for asked, k in ((prompts[:1], responses), (prompts[:2], 2)):
        judge.compare(asked, [[TRIAL[i % 2] for i in range(k)] for _ in asked], lambda _done, _total: None)
    _ = judge.sources, judge.cut
    judge.release()


def numbers(value: Any) -> np.ndarray:
    """Return numbers of any real type as a new float64 array: arrays, tensors of torch, and lists of both.

    Raises BadInput for anything else: ragged lists, texts, complex numbers, objects.
    """
    if inspect.iscoroutine(value):
        value.close()  # else Python warns that it was never awaited
    try:
        array = np.asarray(_arrays(value))
    except ValueError as error:
        if "inhomogeneous" not in str(error):
            raise
        raise BadInput(f"compare gave rows of different lengths, needed numbers [n, K, K]; {_MEND}") from None
    real = array.dtype.kind in "biuf" or array.dtype.type.__module__ == "ml_dtypes"  # jax's bfloat16
    if not real:
        of = "texts" if array.dtype.kind in "SU" else array.dtype.name
        kind = _kind(value) if array.ndim == 0 else f"an array of {of}"
        raise BadInput(f"compare gave {kind}, needed numbers [n, K, K]; {_MEND}")
    # A long double may be infinite now, which the check of finite numbers refuses.
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float64)


def _arrays(value: Any) -> Any:
    """`value` with arrays for tensors of torch, whatever their device, dtype and gradient, and NaN for masked numbers."""
    if isinstance(value, list | tuple):
        return [_arrays(one) for one in value]
    if np.ma.isMaskedArray(value) and value.dtype.kind in "biuf":
        return value.astype(np.longdouble).filled(np.nan)
    if hasattr(value, "detach") and hasattr(value, "is_complex"):  # torch's, without importing torch here
        if value.is_complex():
            raise BadInput(f"compare gave complex numbers, needed real ones [n, K, K]; {_MEND}")
        return value.detach().cpu().double().numpy()
    return value


def _run(name: str, what: str, module: str, call: Callable[[], Any], mend: str) -> Any:
    """Return the result of `call`, which runs the user's own code.

    Raises BadInput, with `name`, `what` and the place in the user's module, for whatever it raises, SystemExit too; a
    request to stop is passed on.
    """
    try:
        with np.errstate():  # undoes a np.seterr of the user's
            return call()
    except (KeyboardInterrupt, Terminated):
        raise
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    except BaseException as error:
        raise BadInput(f"{name}: {what}{_described(error)}{_place(error, module)}; {mend}") from None


def _described(error: BaseException) -> str:
    """The type and the text of an exception, whose own code makes the text and may fail."""
    try:
        text = one_line(error)[:_SHOWN]
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException, module: str) -> str:
    """Where in the user's module an exception was raised, as ` (line 7 of my_rule)`; empty if it was not there."""
    lines = [
        n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_globals.get("__name__") == module
    ]
    return f" (line {lines[-1]} of {module})" if lines else ""


def _shown(value: object) -> str:
    """A value in a message: short ones as they are, others by their type."""
    short = type(value) is int and abs(value) < 10**9
    plain = short or type(value) in (float, bool) or (type(value) is str and len(value) < 80)
    return repr(value) if plain else _kind(value)


def _kind(value: object) -> str:
    """The type of a value as words."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


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
