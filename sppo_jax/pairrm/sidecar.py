"""Stage 2's own process: PairRM in PyTorch behind a pipe, so that no JAX process ever imports torch.

    python -m sppo_jax.pairrm.sidecar --path DIR [--threads N] [--batch-tokens M]

Reads frames (see wire.py) from standard input and writes frames to what was standard output:

    → nothing                                          ← {"identity": "sha256:…"}, or {"error": "…"}, once at the start
    → {"id": 7, "prompts": [n], "responses": [n][K]}   ← {"id": 7, "done": pairs, "total": pairs}, after each batch
                                                       ← {"id": 7, "logits": [n][K][K]}, or {"id": 7, "error": "…"}

It ends when standard input does.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import layout, pairing, torch_model, wire
from sppo_jax.pairrm.format import Formatter

BATCH_TOKENS = 8192


def private_stdout() -> BinaryIO:
    """A private copy of standard output for frames; the public one then leads to standard error, so that a library's
    print cannot break the stream."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the thread that started us ends; elsewhere the end of standard input has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def check_request(message: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Prompts [n] and responses [n][K] of a request. Raises ValueError unless both are there and rectangular."""
    prompts, responses = message.get("prompts"), message.get("responses")
    if not isinstance(prompts, list) or not isinstance(responses, list) or len(prompts) != len(responses):
        raise ValueError("a request needs prompts [n] and responses [n][K]")
    if not all(isinstance(row, list) and len(row) == len(responses[0]) for row in responses):
        raise ValueError("each prompt of a request needs the same number of responses")
    if not all(isinstance(text, str) for text in (*prompts, *(text for row in responses for text in row))):
        raise ValueError("prompts and responses must be text")
    return prompts, responses


def score(
    model: torch_model.PairRM,
    formatter: Formatter,
    prompts: list[str],
    responses: list[list[str]],
    batch_tokens: int,
    on_progress: Callable[[int, int], None],
) -> np.ndarray:
    """Logits of all ordered pairs, float32 [n, K, K] with a zero diagonal; raises ValueError for a score that is no number."""
    k = len(responses[0]) if responses else 0
    logits = np.zeros((len(prompts), k, k), np.float32)
    works = pairing.plan(formatter, prompts, responses)
    done, total = 0, len(prompts) * k * (k - 1)
    for batch in pairing.batches(works, batch_tokens):
        scores = model.logits([work.pair for work in batch])
        if not np.isfinite(scores).all():
            n, i, j = batch[int(np.flatnonzero(~np.isfinite(scores))[0])].cells[0]
            raise ValueError(f"the score of responses {i} and {j} to prompt {n} is not a finite number")
        done += pairing.scatter(logits, batch, scores)
        on_progress(done, total)
    return logits


def serve(
    requests: BinaryIO, frames: BinaryIO, model: torch_model.PairRM, formatter: Formatter, tokens: int
) -> None:
    """Answer requests until `requests` ends. A request that fails is answered with its error; the next may succeed."""
    while (message := wire.read_frame(requests)) is not None:
        name = message.get("id")

        def report(done: int, total: int, name: Any = name) -> None:
            wire.write_frame(frames, {"id": name, "done": done, "total": total})

        try:
            logits = score(model, formatter, *check_request(message), tokens, report)
            answer = wire.encode({"id": name, "logits": logits.tolist()})
        except BrokenPipeError:
            raise
        except Exception as error:  # whatever it was, the asker is told
            answer = wire.encode({"id": name, "error": f"{type(error).__name__}: {error}"})
        frames.write(answer)
        frames.flush()


def main(argv: list[str] | None = None) -> int:
    """Load the model, say who it is, serve. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sppo_jax.pairrm.sidecar", description=__doc__)
    parser.add_argument("--path", required=True, help="directory in the PairRM-hf layout")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for PyTorch (0: its own choice)")
    parser.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens per forward, padding included"
    )
    parser.add_argument(
        "--die-with-parent", action="store_true", help="end when the thread that started us ends"
    )
    options = parser.parse_args(argv)
    # A SIGTERM to the whole job is for the parent, which still needs us until it has saved its work.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.die_with_parent:
        die_with_parent()
    frames = private_stdout()
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    try:
        try:
            checkpoint = layout.read(options.path)
            model = torch_model.load(checkpoint)
            formatter = Formatter.of(checkpoint)
            hello = {"identity": checkpoint.identity}
        except BadInput as error:
            wire.write_frame(frames, {"error": str(error)})
            return 2
        wire.write_frame(frames, hello)
        serve(sys.stdin.buffer, frames, model, formatter, options.batch_tokens)
    except BrokenPipeError:  # the reader is gone: nothing is left to do
        frames = open(os.devnull, "wb")  # noqa: SIM115  (what was buffered must not fail again at exit)
        return 0
    except wire.FrameError as error:
        print(f"sidecar: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
