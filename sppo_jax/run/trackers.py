"""Where curves and sample texts go beside metrics.jsonl: TensorBoard's file in OUT, wandb, trackio (log.to)."""

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sppo_jax import files
from sppo_jax.config import Config, flat
from sppo_jax.errors import BadInput, one_line
from sppo_jax.run.curves import ITERATIONS, PLACE, UPDATES, Curves
from sppo_jax.run.directory import RunDir
from sppo_jax.run.events import COLUMNS, Events

PROJECT = "sppo_jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account


class Sample(NamedTuple):
    """A held-out prompt with the responses of the base and of the last policy."""

    prompt: str
    base: str
    policy: str


class Tracker(Protocol):
    """One place that curves go to."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Begin, with the knobs of the run, {"section.key": value}. Called once, before everything else."""

    def scalars(self, values: Mapping[str, float], step: int, axis: str) -> None:
        """Take one point of each curve, at `step` of the axis named `axis`."""

    def samples(self, rows: Sequence[Sample], step: int) -> None:
        """Take the sample texts of iteration `step`."""

    def close(self, failed: bool) -> None:
        """Pass on what is left. `failed`: the run ends with an error."""


class Tracking:
    """All trackers of a run, which get every line of metrics.jsonl as soon as it is written."""

    def __init__(
        self,
        run: RunDir,
        config: Config | None,
        say: Callable[[str], None],
        before: Sequence[Mapping[str, Any]] = (),
    ):
        """`before`: the lines of earlier starts. Without a configuration TensorBoard's file has the lines' own names alone.

        Raises BadInput where a package is missing or needs an account.
        """
        names = ["tensorboard"] if config is None else config.log.to
        # Looked for and not imported, which takes a while.
        if "tensorboard" in names and not importlib.util.find_spec("tensorboard"):
            raise BadInput(
                "log.to=tensorboard: the package tensorboard is not installed; pip install tensorboard, or take it out of log.to "
                "(--log.to '[]')"
            )
        self._events = Events(run.tensorboard) if "tensorboard" in names else None
        self._trackers: list[Tracker] = [
            _Guarded(name, OTHERS[name](run), say) for name in names if name in OTHERS
        ]
        if self._events is not None:
            self._trackers.insert(0, self._events)
        self._knobs = None if config is None else flat(config)
        self._curves = None if config is None else Curves(config.fit.eta, before)
        self._begun = False

    def line(self, line: Mapping[str, Any]) -> None:
        """Take one line. Raises BadInput where the system refuses to write TensorBoard's file."""
        if self._events is not None:
            place = f"{line['stage']}/iter_{line['iteration']}"
            named = {f"{place}/{name}": x for name, x in line.items() if name not in PLACE and x is not None}
            self._events.add(named, line["step"], line["time"])
        if self._curves is None or self._knobs is None:
            return
        found = self._curves.of(line)
        # With the first points: shards' lines, which have none, come from the judge's thread, and wandb wants the main one.
        for tracker in self._trackers if found and not self._begun else ():
            tracker.config(self._knobs)
        self._begun |= bool(found)
        for points in found:
            for tracker in self._trackers:
                tracker.scalars(*points)

    def samples(self, t: int, rows: Sequence[Sample]) -> None:
        """Take the sample texts of iteration t, after a line of it."""
        texts = [Sample(*(text.encode("utf-8", "replace").decode() for text in row)) for row in rows]
        for tracker in self._trackers:
            tracker.samples(texts, t)

    def close(self, failed: bool = False) -> None:
        """Close all trackers. `failed`: the run ends with an error."""
        for tracker in self._trackers:
            tracker.close(failed)


class _Guarded:
    """A tracker outside of OUT, whose failures cost nothing but its own curves: after the first it is off."""

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._tracker: Tracker | None = tracker
        self._begun = False

    def config(self, values: Mapping[str, Any]) -> None:
        self._begun = True
        self._try(lambda tracker: tracker.config(values))

    def scalars(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self._try(lambda tracker: tracker.scalars(values, step, axis))

    def samples(self, rows: Sequence[Sample], step: int) -> None:
        self._try(lambda tracker: tracker.samples(rows, step))

    def close(self, failed: bool) -> None:
        if self._begun:
            self._try(lambda tracker: tracker.close(failed))
            self._tracker = None

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:  # of a package that is not ours: whatever it is, the run goes on
            self._tracker = None
            self._say(
                f"warning: log.to: {self._name} has failed ({type(error).__name__}: {one_line(error)[:200]}) and gets nothing more "
                "in this start; the run goes on"
            )


class _Wandb:
    """A run of wandb, which a resumed run continues. Its files lie in OUT/wandb, unless WANDB_DIR names another folder."""

    def __init__(self, run: RunDir):
        self._wandb, self._out = _package("wandb"), run
        if os.environ.get("WANDB_MODE", "online") not in OFFLINE:
            try:  # asks for the key in a terminal, now rather than in the middle of the run
                self._wandb.login(verify=False)
            except Exception as error:
                raise BadInput(
                    f"log.to=wandb: {one_line(error)[:200]}; run `wandb login` once, or set WANDB_MODE=offline"
                ) from None

    def config(self, values: Mapping[str, Any]) -> None:
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_identity(self._out),
            name=_name(self._out),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(self._out.root)),
        )
        self._run.config.update(dict(values), allow_val_change=True)
        for axis, curves in ((ITERATIONS, "*"), (UPDATES, "train/*")):
            self._run.define_metric(axis)
            self._run.define_metric(curves, step_metric=axis)

    def scalars(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self._run.log({**values, axis: step})

    def samples(self, rows: Sequence[Sample], step: int) -> None:
        table = self._wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({"samples": table, ITERATIONS: step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, which a resumed run continues."""

    def __init__(self, run: RunDir):
        self._trackio, self._out = _package("trackio"), run

    def config(self, values: Mapping[str, Any]) -> None:
        self._run = self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{_name(self._out)}-{_identity(self._out)}",
            config=dict(values),
            resume="allow",
            embed=False,
        )

    def scalars(self, values: Mapping[str, float], step: int, axis: str) -> None:
        self._run.log({**values, axis: step}, step=step)

    def samples(self, rows: Sequence[Sample], step: int) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({"samples": table, ITERATIONS: step}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


OTHERS: dict[str, Callable[[RunDir], Tracker]] = {"wandb": _Wandb, "trackio": _Trackio}


def _package(name: str) -> Any:
    """Return the package. Raises BadInput where it is missing or cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "is not installed" if missing else f"cannot be imported ({one_line(error)[:200]})"
        raise BadInput(
            f"log.to={name}: the package {name} {reason}; pip install '{PROJECT}[{name}]', or take it out of log.to"
        ) from None


def _identity(run: RunDir) -> str:
    """Return this run's name among all others, which lies in OUT and so is the same after a resumption."""
    if not files.exists(run.tracked):
        files.write_json(run.tracked, {"id": secrets.token_hex(4)})
    return str(files.read_json(run.tracked)["id"])


def _name(run: RunDir) -> str:
    return run.root.resolve().name or PROJECT
