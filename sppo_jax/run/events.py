"""A run's curves, sample texts and knobs as TensorBoard reads them: one file per process, written by the caller's thread.

TensorBoard's own writer has a thread of its own, whose errors come late, and as a traceback.
"""

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sppo_jax import files

# tensorboard takes a while to import; it comes with the first scalar.
if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

COLUMNS = ("prompt", "base", "policy")  # of sample texts


class Events:
    """An event file in `directory`, which is made with the first values. Methods raise BadInput where the system refuses."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._file: Path | None = None

    def add(self, values: Mapping[str, float], step: int, wall_time: float) -> None:
        """Append one event per value, {name: value}."""
        self._append((_scalar(name, value, step, wall_time) for name, value in values.items()), wall_time)

    def config(self, values: Mapping[str, Any]) -> None:
        """Append the knobs of a run, {"section.key": value}, as hyperparameters."""
        now = time.time()
        self._append([_hyperparameters(values, now)], now)

    def scalars(self, values: Mapping[str, float], step: int, axis: str) -> None:
        """Append one point of each curve, {name: value}."""
        self.add(values, step, time.time())

    def samples(self, rows: Sequence[tuple[str, str, str]], step: int) -> None:
        """Append a table of prompts with the responses of the base and of the policy after iteration `step`."""
        now = time.time()
        self._append([_table("samples", [COLUMNS, *rows], step, now)], now)

    def close(self, failed: bool) -> None:
        """Do nothing: all is on disk already."""

    def _append(self, events: Iterable["Event"], wall_time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._file is None:
            with files.writing(self._directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(wall_time):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
            files.append(
                self._directory / name, _record(Event(wall_time=wall_time, file_version="brain.Event:2"))
            )
            self._file = self._directory / name
        files.append(self._file, b"".join(_record(event) for event in events))


def _scalar(name: str, value: float, step: int, wall_time: float) -> "Event":
    """Return the event of one scalar."""
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


def _table(name: str, rows: Sequence[Sequence[str]], step: int, wall_time: float) -> "Event":
    """Return the event of a table of texts, whose first row is its head."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.text import metadata
    from tensorboard.util import tensor_util

    data = [[text.encode() for text in row] for row in rows]
    event = Event(wall_time=wall_time, step=step)
    event.summary.value.add(
        tag=name,
        tensor=tensor_util.make_tensor_proto(np.array(data, dtype=object)),
        metadata=metadata.create_summary_metadata(display_name=name, description=""),
    )
    return event


def _hyperparameters(values: Mapping[str, Any], wall_time: float) -> "Event":
    """Return the event of {name: value}; a value that is neither number, text nor truth is shown as text."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import summary_v2

    plain = {name: x if isinstance(x, bool | int | float | str) else str(x) for name, x in values.items()}
    event = Event(wall_time=wall_time)
    event.summary.CopyFrom(summary_v2.hparams_pb(plain, start_time_secs=wall_time))
    return event


def _record(event: "Event") -> bytes:
    """Return an event as a record of the file: its length and itself, each with a checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
