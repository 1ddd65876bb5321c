"""What a checkpoint holds, and how it is written and read with orbax: whole or not at all, and never in silence."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sppo_jax import files
from sppo_jax.errors import BadInput, one_line
from sppo_jax.run import pod
from sppo_jax.training import orbax_faults, places
from sppo_jax.training.places import Place

ITEM = "default"  # orbax's name of a checkpoint's only item
KEPT = 2  # checkpoints of a training that goes on
DAMAGED = ".damaged"  # ends the names of those moved aside


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that resuming needs; the step is also the data position."""

    step: Any  # updates done, int32 scalar
    params: Any  # float32 masters of the trained parameters: all weights, or the adapters alone
    opt_state: Any


class Damaged(BadInput):
    """A checkpoint that is not what was written: parts are missing or changed, or it is another model's."""


class NoneWhole(Exception):
    """An iteration had checkpoints, and none is whole. They have been moved aside, so that its training begins again."""


def begun(directory: Place) -> bool:
    """Whether `directory` has a checkpoint to resume from. Raises BadInput where it cannot be read.

    All processes of a run call this together, as all functions here.
    """
    return bool(_steps(directory))


class Checkpoints:
    """The checkpoints of one iteration: the latest two while training, the last one for good."""

    def __init__(self, directory: Place, *, read_only: bool = False):
        """Open `directory`, and make it if need be. `read_only`: make and delete nothing; another process may own it.

        Raises BadInput where it cannot be made or written.
        """
        self._shown, self.directory = directory, places.absolute(directory)
        if not read_only and pod.first():
            with places.changing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                places.tidy(self.directory)
        pod.meet("checkpoints")
        # Directories are made before `save` returns: else a thread would wait five minutes for one that cannot be made.
        at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=at_once)
        )
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=at_once)
        self._reader = self._orbax if pod.count() == 1 else _own_reader()
        self._writing: int | None = None  # the step that is written in the background
        self._silence = contextlib.ExitStack()
        self._silence.enter_context(orbax_faults.silent_threads())
        orbax_faults.drop_late_replies()

    def latest(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return max(_steps(self._shown), default=None)

    def save(self, step: int, state: TrainState) -> None:
        """Begin to write `state` in the background, and delete all but the latest two checkpoints before it.

        Raises BadInput if this write cannot begin, or if the one before has failed.
        """
        self.wait()
        with self._reported(step):
            self._orbax.save(
                self.directory / str(step),
                args=ocp.args.Composite(**{ITEM: ocp.args.StandardSave(state)}),
                custom_metadata={"sums": sums(vars(state))},
                force=True,
            )
        self._writing = step

    def resume(
        self, like: TrainState, *, last: int, say: Callable[[str], None]
    ) -> tuple[int, TrainState] | None:
        """Read the newest whole checkpoint: its step and its state, in the shapes and shardings of `like`.

        Returns None where there is no checkpoint. Damaged ones, and those of steps beyond `last`, are moved aside and
        reported in one line to `say`. Raises NoneWhole if no other is left; BadInput where one cannot be read or moved.
        """
        steps = _steps(self._shown)
        found, damaged = self._newest(steps, lambda step: self.restore(step, like), last)
        if not damaged:
            return found
        for error in damaged:
            error.add_note(str(self._aside(max(steps))))
            steps.remove(max(steps))
        then = (
            f"training goes on from the checkpoint of update {found[0]}"
            if found
            else "no other checkpoint is whole, and the iteration's training begins again"
        )
        kept = ", ".join(note for error in damaged for note in error.__notes__)
        say(f"warning: {'; '.join(map(str, damaged))}: {then} ({kept} may be deleted)")
        if found is None:
            raise NoneWhole
        return found

    def newest_params(self, like: Any, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """Read the parameters of the newest whole checkpoint: its step, and they in the shapes of `like`.

        Returns None where no checkpoint is whole; damaged ones are reported to `say`, and stay where they are. Raises
        BadInput where one cannot be read.
        """
        found, damaged = self._newest(_steps(self._shown), lambda step: self.restore_params(step, like))
        for error in damaged:
            say(f"warning: {error}")
        return found

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read the state of `step` in the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

        Raises Damaged where it is damaged or has other shapes, BadInput where it cannot be read.
        """
        state: TrainState = self._restore(step, ocp.args.StandardRestore(_abstract(like)), vars)
        return state

    def restore_params(self, step: int, like: Any) -> Any:
        """Read the parameters of the TrainState of `step`, as `restore` does, without the optimiser's state."""
        item = {"params": _abstract(like)}
        as_asked = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_asked, partial_restore=True)
        return self._restore(step, args, dict)["params"]

    def keep_only(self, step: int) -> None:
        """Delete the other checkpoints, and damaged ones: a finished iteration is not resumed from its middle."""
        with places.changing(self._shown):
            for other in _steps(self._shown):
                if other != step and pod.first():
                    places.remove(self.directory / str(other))
            if pod.first():
                places.tidy(self.directory, DAMAGED)

    def wait(self) -> None:
        """Wait until all saved states are whole on disk, and delete all but the latest two.

        Raises BadInput if a write has failed.
        """
        step, self._writing = self._writing, None
        if step is None:
            return
        with self._reported(step):
            self._orbax.wait_until_finished()
        with places.changing(self._shown):
            for old in _steps(self._shown)[:-KEPT]:
                if pod.first():
                    places.remove(self.directory / str(old))

    def close(self) -> None:
        """Wait for all writes, and free orbax's threads. Raises BadInput if a write has failed."""
        try:
            self.wait()
        finally:
            with (
                self._silence,
                contextlib.suppress(Exception),
            ):  # it raises a second time what `wait` has raised
                self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An error that is on its way already is the one to report.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.close()

    @contextlib.contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        """Turn the error of a write into BadInput, and delete what it has written."""
        reason = None
        with orbax_faults.silent() as free:
            try:
                yield
            except Exception as error:
                reason = orbax_faults.of_system(error)
                self._writing = None
                if pod.count() == 1:  # of several, each ends now; the next start tidies up
                    orbax_faults.join_threads()  # they may be writing yet, and complain later
                    self._tidy()
                if reason is None:
                    raise
            if reason is not None:
                free()
        if reason is not None:
            raise files.unwritten(self._shown / str(step), reason)

    def _tidy(self) -> None:
        """Delete what a failed write has left, as well as can be: tensorstore's own threads may still add to it."""
        for _ in range(10):
            try:
                places.tidy(self.directory)
                return
            except (OSError, BadInput):
                time.sleep(0.1)

    def _restore(self, step: int, args: Any, fields: Callable[[Any], dict[str, Any]]) -> Any:
        """Read a checkpoint, and compare its step and its bits with what was written."""
        path, reason, refusal = self._shown / str(step), "", ""
        with orbax_faults.silent() as free:
            try:
                written = _sums_written(self.directory / str(step))
                read = self._reader.restore(
                    self.directory / str(step), args=ocp.args.Composite(**{ITEM: args})
                )[ITEM]
            except Exception as error:  # orbax and tensorstore raise many kinds
                if orbax_faults.out_of_memory(error):
                    raise
                reason, refusal = one_line(error)[:120], _refusal(error)
            # Each process reads its own part; what one of them cannot read, all of them leave.
            reason, refusal = (
                max(found) for found in zip(*pod.gathered("read", [reason, refusal]), strict=True)
            )
            if not reason:
                if written and any(written.get(k) != v for k, v in sums(fields(read)).items()):
                    reason = "its numbers differ from the numbers that were written"
                elif int(fields(read).get("step", step)) != step:
                    reason = f"it holds update {int(fields(read)['step'])}"
            if reason:
                free()
        if refusal:
            raise BadInput(f"{path}: cannot be read: {refusal}")
        if reason:
            raise Damaged(f"{path}: damaged, or not a checkpoint of this model ({reason})")
        return read

    def _newest(
        self, steps: list[int], read: Callable[[int], Any], last: int | None = None
    ) -> tuple[tuple[int, Any] | None, list[Damaged]]:
        """(The newest whole checkpoint's step and content, the errors of those after it, newest first)."""
        damaged: list[Damaged] = []
        for step in reversed(steps):
            if last is not None and step > last:
                damaged.append(
                    Damaged(f"{self._shown / str(step)}: beyond the last update of this training, {last}")
                )
                continue
            try:
                return (step, read(step)), damaged
            except Damaged as error:
                damaged.append(error.with_traceback(None))  # which would hold what was read
        return None, damaged

    def _aside(self, step: int) -> Place:
        """Give a checkpoint a name that is not a step's, and return it."""
        name = f"{step}{DAMAGED}"
        if pod.first():
            with places.changing(self._shown / name):
                places.remove(self.directory / name)
                (self.directory / str(step)).rename(self.directory / name)
        pod.meet("aside")
        return self._shown / name


def _refusal(error: Exception) -> str:
    """Why the system does not let a checkpoint be read, and what to do; "" where it is the checkpoint's own fault."""
    system, unreachable = orbax_faults.of_system(error), orbax_faults.unreachable(error)
    if system is not None and system.errno and system.errno not in orbax_faults.MISSING:
        return (
            f"{system.strerror}; mend that, and run the same command again, or delete it to go on without it"
        )
    return f"{unreachable}; run the same command again" if unreachable else ""


def _own_reader() -> ocp.Checkpointer:
    """A reader that waits for no other process: one that finds a checkpoint damaged must not leave the others waiting."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _steps(directory: Place) -> list[int]:
    """The steps whose checkpoints are whole, in order, as process 0 sees them."""
    found: list[int] = pod.agreed("steps", lambda: places.steps(directory))
    return found


def _abstract(like: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def sums(fields: dict[str, Any]) -> dict[str, int]:
    """The sum of each field's bits, modulo 2^32. Integers add up to the same on every mesh.

    Nothing else would notice a changed bit: the compressed numbers on disk have no checksum of their own.
    """
    return {name: int(total) for name, total in jax.device_get(_added(fields)).items()}


@jax.jit
def _added(fields: dict[str, Any]) -> dict[str, jax.Array]:
    def bits(x: jax.Array) -> jax.Array:
        unsigned = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    zero = jnp.uint32(0)
    return {name: sum(map(bits, jax.tree.leaves(tree)), zero) for name, tree in fields.items()}


def _sums_written(checkpoint: Place) -> dict[str, int] | None:
    """The sums in a checkpoint's metadata; None in one of a version that wrote none."""
    custom = files.read_json(checkpoint / "_CHECKPOINT_METADATA").get("custom_metadata") or {}
    found = custom.get("sums")
    return found if isinstance(found, dict) else None
