"""Stage 2's own process: PairRM in PyTorch behind a pipe, so that no JAX process ever imports torch.

    python -m sppo_jax.pairrm.sidecar --path DIR [--backbone DIR] [--threads N] [--batch-tokens M] [--dtype D] [limits]

Reads and writes the frames that wire.py describes: texts come in, and the logits of each batch leave as soon as they are
known. Out of memory, it goes on with smaller batches. It ends when its standard input does.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, files, protocol
from sppo_jax.pairrm.format import Formatter, Limits, PromptPairs

if TYPE_CHECKING:
    from sppo_jax.pairrm import torch_model

# Tokens of a batch, padding included. A CPU gains nothing from more, and pays for padding and for what leaves its cache.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

Scorer = Callable[[list[comparisons.Work]], np.ndarray]


class Unscored(Exception):
    """Pairs without a score; the message says why."""

    def __init__(self, why: str, cells: list[comparisons.Cell]) -> None:
        super().__init__(why)
        self.cells = cells


class Budget:
    """Tokens of a batch, padding included: what was asked for, less what memory has refused."""

    def __init__(
        self,
        tokens: int,
        give_back: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`give_back` frees memory that is only kept for later; `tell` hears a line for each batch that did not fit."""
        self.tokens, self.give_back, self._tell = tokens, give_back, tell

    def refuse(self, batch: Sequence[comparisons.Work]) -> None:
        """`batch` did not fit: half of it may, now and later. Raises Unscored when it is a single pair."""
        self.give_back()
        pairs = len(batch)
        if pairs == 1:
            raise Unscored(f"a pair of {len(batch[0].pair)} tokens does not fit into memory", batch[0].cells)
        self.tokens = pairs * len(batch[0].pair) // 2
        self._tell(f"out of memory with a batch of {pairs} pairs; going on with {pairs // 2}")


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


def needed(
    works: Sequence[comparisons.Work], cells: Sequence[Sequence[int]] | None
) -> list[comparisons.Work]:
    """Those of `works` that score one of `cells`; all of them when that is None."""
    if cells is None:
        return list(works)
    wanted = {tuple(cell) for cell in cells}
    return [work for work in works if not wanted.isdisjoint(work.cells)]


def scored(
    works: Sequence[comparisons.Work], scorer: Scorer, budget: Budget
) -> Iterator[tuple[list[comparisons.Work], np.ndarray]]:
    """Batches of `works` and their scores, float32. Raises Unscored for a pair too large for memory."""
    left = comparisons.in_order(works)
    while left:
        for batch in comparisons.batches(left, budget.tokens):
            try:
                scores = scorer(batch)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                scores = None
            if scores is None:  # out of the handler, whose error holds on to the tensors
                budget.refuse(batch)
                break
            left = left[len(batch) :]
            yield batch, np.asarray(scores, np.float32)


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: PyTorch says so in three ways, the CPU's in words only."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words)


class Cuts:
    """How many texts are read only in part, told once for each prompt: when its last pair has its score."""

    def __init__(self, texts: Sequence[PromptPairs], works: Sequence[comparisons.Work]) -> None:
        self._texts = texts
        self._open = Counter(n for work in works for n, _, _ in work.cells)

    def told(self, batch: Sequence[comparisons.Work]) -> dict[str, int]:
        """Of the prompts that `batch` completes."""
        prompts = responses = 0
        for n, count in Counter(n for work in batch for n, _, _ in work.cells).items():
            self._open[n] -= count
            if self._open[n] == 0:
                prompts += bool(self._texts[n].cut_prompt)
                responses += sum(map(bool, self._texts[n].cut_responses))
        return {"prompts": prompts, "responses": responses}


def answer(
    message: dict[str, Any], formatter: Formatter, scorer: Scorer, budget: Budget
) -> Iterator[dict[str, Any]]:
    """A request → the frames that answer it, without its id. Raises ValueError for what is no request, and Unscored."""
    prompts, responses = check_request(message)
    budget.tokens = min(budget.tokens, message.get("tokens") or budget.tokens)
    texts = comparisons.read(formatter, prompts, responses)
    works = needed(comparisons.distinct(texts), message.get("cells"))
    cuts = Cuts(texts, works)
    for batch, scores in scored(works, scorer, budget):
        good = np.isfinite(scores)
        bad = [cell for work, fine in zip(batch, good, strict=True) if not fine for cell in work.cells]
        batch = [work for work, fine in zip(batch, good, strict=True) if fine]
        counts = [len(work.cells) for work in batch]
        yield {
            "cells": [cell for work in batch for cell in work.cells],
            "logits": np.repeat(scores[good], counts).tolist(),
            "cut": cuts.told(batch),
        }
        if bad:
            n, i, j = bad[0]
            raise Unscored(f"the score of responses {i} and {j} to prompt {n} is not a finite number", bad)
    yield {"end": True, "cut": {"prompts": 0, "responses": 0}}


def load(options: argparse.Namespace) -> tuple["torch_model.PairRM", Formatter, str]:
    """The network, what feeds it, and the device that it is on. Raises BadInput."""
    import torch

    from sppo_jax.pairrm import torch_model

    if options.threads > 0:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    checkpoint = files.read(options.path, options.backbone)
    formatter = Formatter.of(checkpoint, Limits(options.source, options.candidate, options.total))
    return torch_model.load(checkpoint, device=device, dtype=dtype), formatter, device


def serve(
    replies: protocol.Replies, model: "torch_model.PairRM", formatter: Formatter, budget: Budget
) -> None:
    """Answer requests until they end. One that fails is answered with its error; the next may succeed."""

    def scorer(batch: list[comparisons.Work]) -> np.ndarray:
        return model.logits([work.pair for work in batch])

    for message in replies.requests(sys.stdin.buffer):
        name = {"id": message.get("id")}
        try:
            for frame in answer(message, formatter, scorer, budget):
                replies.send(name | frame)
        except BrokenPipeError:
            raise
        except Unscored as error:
            replies.send(name | {"error": str(error), "cells": error.cells})
        except Exception as error:  # whatever it was, the asker is told
            replies.send(name | {"error": f"{type(error).__name__}: {error}", "cells": []})
        budget.give_back()  # the next request may be an hour away, and others need the device


def giver_back(device: str) -> Callable[[], None]:
    """What gives back the memory that PyTorch keeps of the device for its next tensors; a CPU's is kept nowhere."""
    import torch

    return torch.cuda.empty_cache if device == "cuda" else lambda: None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sppo_jax.pairrm.sidecar", description=__doc__)
    parser.add_argument("--path", required=True, help="directory of a PairRM")
    parser.add_argument("--backbone", help="directory that completes a ranker's")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for PyTorch (0: its own choice)")
    parser.add_argument(
        "--batch-tokens", type=int, default=0, help="tokens per forward, padding included (0: the device's)"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    for name in ("source", "candidate", "total"):
        parser.add_argument(f"--{name}", type=int, default=0, help="tokens (0: as the checkpoint says)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Load the model, say so, serve. Returns the exit status."""
    options = arguments(argv)
    protocol.stay_with_parent()
    replies = protocol.Replies(protocol.private_stdout())  # before the imports that take seconds
    try:
        try:
            model, formatter, device = load(options)
        except BadInput as error:
            replies.send({"error": str(error)})
            return 2
        tokens = options.batch_tokens or BATCH_TOKENS[device]
        replies.send({"ready": True, "device": device, "tokens": tokens})
        budget = Budget(tokens, giver_back(device), lambda line: replies.send({"told": line}))
        serve(replies, model, formatter, budget)
    except BrokenPipeError:  # the reader is gone: nothing is left to do
        return 0
    except protocol.FrameError as error:
        print(f"sidecar: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # no orderly end of threads and libraries that nobody waits for
