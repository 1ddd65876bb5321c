"""What a checkpoint holds, and how it is saved and restored with orbax."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sppo_jax.errors import BadInput


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that resuming needs; the step is also the data position."""

    step: Any  # updates done, int32 scalar
    params: Any  # float32 masters of the trained parameters: all weights, or the adapters alone
    opt_state: Any


def begun(directory: Path) -> bool:
    """Whether `directory` has a complete checkpoint to resume from."""
    if not directory.is_dir():
        return False
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.latest() is not None


def _abstract(like: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


class Checkpoints:
    """The checkpoints of one iteration: the latest two while training, the last one for good."""

    def __init__(self, directory: Path, *, read_only: bool = False):
        """Open `directory`, and make it if need be. `read_only`: make and delete nothing; another process may own it."""
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False)  # its own read_only logs three warnings
        else:
            directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self.directory = directory.resolve()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to write `state` in the background. Raises the error of the write before, if it failed."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """Read the state of `step` in the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

        Raises BadInput where it is damaged, or has other shapes.
        """
        return self._restore(step, ocp.args.StandardRestore(_abstract(like)))

    def restore_params(self, step: int, like: Any) -> Any:
        """Read the parameters of the TrainState of `step`, as `restore` does, without the optimiser's state."""
        item = {"params": _abstract(like)}
        as_asked = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_asked, partial_restore=True)
        return self._restore(step, args)["params"]

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = " ".join(str(error).split())[:300]
            raise BadInput(
                f"{self.directory}/{step}: damaged, or not a checkpoint of this model: {reason}"
            ) from None

    def keep_only(self, step: int) -> None:
        """Delete the other checkpoints: a finished iteration is not resumed from its middle."""
        for other in self._manager.all_steps():
            if other != step:
                self._manager.delete(other)

    def wait(self) -> None:
        """Wait until all saved states are whole on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for all writes, and free the manager's threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
