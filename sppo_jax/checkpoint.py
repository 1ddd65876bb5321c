"""Save and restore of the training state with orbax; the data position is the state's step."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sppo_jax.errors import BadInput


def begun(directory: Path) -> bool:
    """Is there a complete checkpoint to resume from?"""
    if not directory.is_dir():
        return False
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest() is not None


class Checkpoints:
    """The checkpoints of one iteration: the latest two while training, the last one for good."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to write; a failure of the write before surfaces here."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step` in the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs)."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = " ".join(str(error).split())[:300]
            raise BadInput(
                f"{self.directory}/{step}: damaged, or not a checkpoint of this model: {reason}"
            ) from None

    def keep_only(self, step: int) -> None:
        """Delete every other checkpoint: nobody resumes a finished iteration from its middle."""
        for other in self._manager.all_steps():
            if other != step:
                self._manager.delete(other)

    def wait(self) -> None:
        """Until what was saved is whole on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
