"""The user's own object as a judge. Its code runs in `_run` alone, so whatever it raises or returns is one line or usable."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sppo_jax.command import say
from sppo_jax.errors import BadInput, Terminated, one_line
from sppo_jax.preferences import LARGEST

Progress = Callable[[int, int], None]
MEND = "repair it, and run the same command again"
_SHOWN = 300  # characters of an exception's text in a message
_HOW_TO_NAME = (
    "a judge is module:attribute, a function without arguments in a module that Python finds from here"
)


def made(key: str, name: str) -> "OwnJudge":
    """Call the factory `module:attribute` without arguments and return what it makes as a backend. Raises BadInput."""
    module, _, attribute = name.partition(":")
    shown = f"{key}={name}"
    found = _run(
        shown, "", module, lambda: getattr(importlib.import_module(module), attribute)(), _HOW_TO_NAME
    )
    return OwnJudge(found, shown, module)


class OwnJudge:
    """The user's object as a backend: each of its members is usable, or refused with one line (BadInput)."""

    def __init__(self, made: object, name: str, module: str):
        """`name`: the knob and its value, for messages; `module`: where the user's code is."""
        self._made, self._name, self._module = made, name, module
        if not callable(self._member("compare")):
            raise BadInput(f"{name}: what it makes, {_kind(made)}, has no method compare; {MEND}")
        identity = self._member("identity")
        if not isinstance(identity, str) or not identity.strip():
            raise BadInput(
                f"{name}: identity must be a text that changes whenever the scores would, found {_shown(identity)}; {MEND}"
            )
        self.identity = str(identity)
        on_mesh = self._member("on_mesh")
        if not isinstance(on_mesh, bool | np.bool_ | None):
            raise BadInput(f"{name}: on_mesh must be True or False, found {_shown(on_mesh)}; {MEND}")
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

    def features(self, prompt: str, response: str) -> dict[str, float]:
        """The user's `features`, empty without one. Raises BadInput for what it raises, or unless it gives {text: number}."""
        if (call := self._member("features")) is None:
            return {}
        found: dict[Any, Any] = self._run("features raised ", lambda: dict(call(prompt, response)))
        for key, value in found.items():
            real = isinstance(value, int | float | np.integer | np.floating | np.bool_)
            if not isinstance(key, str) or not real or not abs(value) <= LARGEST:  # NaN too
                raise BadInput(
                    f"{self._name}: features must be finite numbers, {{name: number}}, found {_shown(value)} for "
                    f"{_shown(key)}; {MEND}"
                )
        return {key: float(value) for key, value in found.items()}

    @property
    def sources(self) -> dict[str, str]:
        """The user's `sources`. Raises BadInput unless it is {text: text}."""
        found = self._run("sources raised ", lambda: dict(getattr(self._made, "sources", None) or {}))
        if not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise BadInput(f"{self._name}: sources must be texts, {{repository: commit}}; {MEND}")
        return found

    @property
    def cut(self) -> dict[str, int]:
        """The user's `cut`. Raises BadInput unless it is {text: a number of at least 0}."""
        found = self._run("cut raised ", lambda: dict(getattr(self._made, "cut", None) or {}))
        for key, value in found.items():
            if not isinstance(key, str) or not isinstance(value, int | np.integer) or value < 0:
                raise BadInput(
                    f"{self._name}: cut must count prompts and responses, found {_shown(value)} for {_shown(key)}; {MEND}"
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
        return _run(self._name, what, self._module, call, MEND)


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
        raise BadInput(f"compare gave rows of different lengths, needed numbers [n, K, K]; {MEND}") from None
    real = array.dtype.kind in "biuf" or array.dtype.type.__module__ == "ml_dtypes"  # jax's bfloat16
    if not real:
        of = "texts" if array.dtype.kind in "SU" else array.dtype.name
        kind = _kind(value) if array.ndim == 0 else f"an array of {of}"
        raise BadInput(f"compare gave {kind}, needed numbers [n, K, K]; {MEND}")
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
            raise BadInput(f"compare gave complex numbers, needed real ones [n, K, K]; {MEND}")
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
