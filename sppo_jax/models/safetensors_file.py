"""Writing a safetensors file one tensor at a time; the library's own writer needs all tensors in memory."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to write; `read` is called to make it when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Size of the tensor in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file: the header's length (8 bytes, little-endian), the header (JSON), the tensors end to end.

    Raises ValueError for a tensor that is not of its announced shape and dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": NAMES[entry.dtype.name],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            x = entry.read()
            if x.shape != entry.shape or x.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.name} is {x.dtype}{x.shape}, announced as {entry.dtype}{entry.shape}"
                )
            file.write(np.ascontiguousarray(x).view(np.uint8).data)
