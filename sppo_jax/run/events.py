"""A run's scalars as TensorBoard reads them: one file of records per process, written at once and by the caller's thread.

TensorBoard's own writer has a thread of its own, whose errors come late, and as a traceback.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_jax import files

# tensorboard takes a while to import; it comes with the first scalar.
if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event


class Events:
    """An event file in `directory`, which is made with the first scalars."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._file: Path | None = None

    def add(self, values: Mapping[str, float], step: int, wall_time: float) -> None:
        """Append one event per value, {name: value}. Raises BadInput where the system refuses the write."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self._file is None:
            with files.writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(wall_time):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
            files.append(
                self._directory / name, _record(Event(wall_time=wall_time, file_version="brain.Event:2"))
            )
            self._file = self._directory / name
        files.append(
            self._file,
            b"".join(_record(_scalar(name, value, step, wall_time)) for name, value in values.items()),
        )


def _scalar(name: str, value: float, step: int, wall_time: float) -> "Event":
    """Return the event of one scalar."""
    import numpy as np
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, SummaryMetadata
    from tensorboard.plugins.scalar import metadata
    from tensorboard.util import tensor_util

    with np.errstate(over="ignore"):  # beyond float32: infinite
        data = np.float32(value)
    event = Event(wall_time=wall_time, step=step)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    event.summary.value.add(
        tag=name,
        tensor=tensor_util.make_tensor_proto(data),
        metadata=SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_SCALAR),
    )
    return event


def _record(event: "Event") -> bytes:
    """Return an event as a record of the file: its length and itself, each with a checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
