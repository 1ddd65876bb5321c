"""A faulty program at the other end of the judge's pipe: the real sidecar, or a stand-in that scores by checksum.

    python tests/faulty_sidecar.py PLAN (real SIDECAR-ARGUMENTS… | stand-in [SECONDS-OF-A-BEAT])

PLAN is a file with JSON [[fault, batches], …]: each fault occurs after that many batches since the one before, or since the
start of the process. PLAN.fired has a line for each fault that has occurred, so that the next process continues the plan.
"""

import importlib.util
import json
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
POISON = "POISON"  # a request with this text ends the stand-in
MODEL = ("nan", "cuda", "cpu", "memory")  # faults of the network; the others are of the stream
BROKEN_CELLS = {
    "range": ([[9999, 0, 1]], [0.5]),
    "negative": ([[-1, 0, 1]], [0.5]),
    "diagonal": ([[0, 1, 1]], [0.5]),
    "halves": ([[0.5, 0, 1]], [0.5]),
    "ragged": ([[0, 0, 1], [0, 1]], [0.5, 0.5]),
    "fewer": ([[0, 0, 1], [0, 1, 0]], [0.5]),
    "words": ([[0, 0, 1]], ["high"]),
    "huge": ([[0, 0, 1]], [1e300]),
}
WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "id": lambda message: message | {"id": message["id"] - 1},
    "early": lambda message: {"id": message["id"], "end": True},
    "none": lambda message: {"id": message["id"], "hello": 1},
    "cut": lambda message: message | {"cut": {"prompts": "many"}},
}


class Faults:
    """The next fault and the batches left before it, for one process."""

    def __init__(self, plan: str) -> None:
        self._plan, self._fired = json.loads(Path(plan).read_text()), Path(f"{plan}.fired")
        self._batches = {True: 0, False: 0}  # batches of the network, and of the stream

    def due(self, model: bool) -> str | None:
        """Return the fault due at this batch, after noting it as fired; None if there is none."""
        done = len(self._fired.read_text().splitlines()) if self._fired.exists() else 0
        if done == len(self._plan):
            return None
        kind, batches = self._plan[done]
        self._batches[model] += 1
        if (kind in MODEL) != model or self._batches[model] <= batches:
            return None
        with self._fired.open("a") as file:
            file.write(f"{kind} {os.getpid()} {time.time()}\n")
        self._batches = {True: 0, False: 0}
        return str(kind)


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)  # until the signal arrives


def faulty(protocol: Any, faults: Faults) -> type:
    """Return a class of Replies with the faults of the stream."""

    class Faulty(protocol.Replies):  # type: ignore[misc]
        def send(self, message: dict[str, Any]) -> None:
            kind = faults.due(model=False) if "logits" in message else None
            if kind is None:
                super().send(message)
                return
            if kind in BROKEN_CELLS:
                cells, logits = BROKEN_CELLS[kind]
                super().send(message | {"cells": cells, "logits": logits})
            elif kind in WRONG:
                super().send(WRONG[kind](message))
            else:
                self._befall(kind, protocol.encode(message))
            time.sleep(30)  # one fault per process, which the judge then ends
            os._exit(4)  # if it does not, no test should wait for ever

        def _befall(self, kind: str, frame: bytes) -> None:
            if kind == "torn":
                self._out.write(frame[: len(frame) // 2])
            if kind == "exit":
                print("a warning\nout of luck", file=sys.stderr, flush=True)
                os._exit(3)
            if kind in ("kill", "torn"):
                die(signal.SIGKILL)
            elif kind == "crash":
                die(signal.SIGSEGV)
            elif kind == "stop":
                die(signal.SIGSTOP)
            elif kind == "closed":
                os.close(self._out.fileno())
            elif kind == "announced":  # 32 MiB, of which only heartbeats arrive
                self._out.write(b"\x02\x00\x00\x00")
            elif kind == "length":
                self._out.write(b"\xff\xff\xff\xff" + frame)
            elif kind == "json":
                self._out.write(b"\x00\x00\x00\x02{]")
            elif kind == "list":
                self._out.write(b"\x00\x00\x00\x02[]")
            elif kind == "bytes":
                self._out.write(bytes(range(65, 91)) * 100)
            elif kind in ("NaN", "Infinity"):
                body = json.dumps(json.loads(frame[4:])).replace('"logits": [', f'"logits": [{kind}, ', 1)
                body = body.replace('"cells": [', '"cells": [[0, 0, 1], ', 1)
                self._out.write(struct.pack(">I", len(body)) + body.encode())

    return Faulty


def checksum(prompt: str, first: str, second: str) -> float:
    """Return the stand-in's logit, exact in float32."""
    text = json.dumps([prompt, first, second])
    return (zlib.crc32(text.encode()) % 4001 - 2000) / 128


def stand_in(protocol: Any, faults: Faults) -> None:
    protocol.stay_with_parent()
    replies = faulty(protocol, faults)(protocol.private_stdout())
    replies.send({"ready": True, "device": "abacus"})
    for message in replies.requests(sys.stdin.buffer):
        if any(POISON in prompt for prompt in message["prompts"]):
            print("poisoned", file=sys.stderr, flush=True)
            die(signal.SIGKILL)
        k = len(message["responses"][0])
        cells = message.get("cells") or [
            [p, i, j] for p in range(len(message["prompts"])) for i in range(k) for j in range(k) if i != j
        ]
        print(len(cells), message.get("tokens"), file=sys.stderr, flush=True)
        for start in range(0, len(cells), 4):
            part, rows = cells[start : start + 4], message["responses"]
            logits = [checksum(message["prompts"][p], rows[p][i], rows[p][j]) for p, i, j in part]
            replies.send({"id": message["id"], "cells": part, "logits": logits})
        replies.send({"id": message["id"], "end": True, "cut": {"prompts": 0, "responses": 1}})


def real(faults: Faults, arguments: list[str]) -> int:
    import numpy as np
    import torch

    from sppo_jax.pairrm import protocol, sidecar, torch_model

    logits = torch_model.PairRM.logits

    def befallen(model: Any, pairs: list[Any]) -> Any:
        kind = faults.due(model=True)
        if kind == "nan":
            return np.where(np.arange(len(pairs)) == 0, np.nan, logits(model, pairs))
        if kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if kind == "cpu":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        if kind == "memory":
            raise MemoryError
        return logits(model, pairs)

    torch_model.PairRM.logits = befallen  # type: ignore[method-assign,assignment]
    protocol.Replies = faulty(protocol, faults)  # type: ignore[misc]
    protocol.BEAT_SECONDS = 0.1
    return sidecar.main(arguments)


def main() -> int:
    plan, which, *arguments = sys.argv[1:]
    if which == "real":
        return real(Faults(plan), arguments)
    # Loaded as a file, as by a program in an interpreter without this package.
    spec = importlib.util.spec_from_file_location("protocol", ROOT / "sppo_jax" / "pairrm" / "protocol.py")
    assert spec is not None
    assert spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    protocol.BEAT_SECONDS = float(arguments[0]) if arguments else 0.05  # type: ignore[attr-defined]
    stand_in(protocol, Faults(plan))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
