"""The scoring process of stage 2: PairRM in PyTorch behind a pipe, so that no JAX process ever imports torch.

    python -m sppo_jax.pairrm.sidecar --path DIR [--backbone DIR] [--threads N] [--batch-tokens M] [--dtype D] [limits]

It reads and writes the frames of protocol.py: texts come in, and the logits of each batch are sent as soon as they are
computed. When memory runs out it continues with smaller batches. It ends when its standard input ends.
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

# Tokens of a batch, padding included. On a CPU larger batches are no faster; they cost padding and cache misses.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}

Scorer = Callable[[list[comparisons.Comparison]], np.ndarray]


class Unscored(Exception):
    """Some pairs cannot be scored: `cells`, for the reason in the message."""

    def __init__(self, why: str, cells: list[comparisons.Cell]) -> None:
        super().__init__(why)
        self.cells = cells


class Budget:
    """The most tokens of a batch, padding included: as requested, then halved whenever memory did not suffice."""

    def __init__(
        self,
        tokens: int,
        give_back: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`give_back` frees memory that is cached for later; `tell` receives a line for each batch that did not fit."""
        self.tokens, self.give_back, self._tell = tokens, give_back, tell

    def refuse(self, batch: Sequence[comparisons.Comparison]) -> None:
        """Halve the budget, because `batch` did not fit. Raises Unscored when the batch is a single pair."""
        self.give_back()
        pairs = len(batch)
        if pairs == 1:
            raise Unscored(f"a pair of {len(batch[0].pair)} tokens does not fit into memory", batch[0].cells)
        self.tokens = pairs * len(batch[0].pair) // 2
        self._tell(f"out of memory with a batch of {pairs} pairs; going on with {pairs // 2}")


def check_request(message: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return prompts [n] and responses [n][K] of a request. Raises ValueError unless both are present and rectangular."""
    prompts, responses = message.get("prompts"), message.get("responses")
    if not isinstance(prompts, list) or not isinstance(responses, list) or len(prompts) != len(responses):
        raise ValueError("a request needs prompts [n] and responses [n][K]")
    if not all(isinstance(row, list) and len(row) == len(responses[0]) for row in responses):
        raise ValueError("each prompt of a request needs the same number of responses")
    if not all(isinstance(text, str) for text in (*prompts, *(text for row in responses for text in row))):
        raise ValueError("prompts and responses must be text")
    return prompts, responses


def needed(
    todo: Sequence[comparisons.Comparison], cells: Sequence[Sequence[int]] | None
) -> list[comparisons.Comparison]:
    """Return the comparisons that have one of `cells` [m][3]; all comparisons for None."""
    if cells is None:
        return list(todo)
    wanted = {tuple(cell) for cell in cells}
    return [comparison for comparison in todo if not wanted.isdisjoint(comparison.cells)]


def scored(
    todo: Sequence[comparisons.Comparison], scorer: Scorer, budget: Budget
) -> Iterator[tuple[list[comparisons.Comparison], np.ndarray]]:
    """Yield batches of comparisons with their scores, float32 [batch]. Raises Unscored for a pair too large for memory."""
    left = comparisons.in_order(todo)
    while left:
        for batch in comparisons.batches(left, budget.tokens):
            try:
                scores = scorer(batch)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                scores = None
            if scores is None:  # outside the handler, whose error keeps the tensors alive
                budget.refuse(batch)
                break
            left = left[len(batch) :]
            yield batch, np.asarray(scores, np.float32)


def out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed. PyTorch has three ways to raise this, on the CPU only by a message."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words)


class CutCounter:
    """Counts the texts that are read only in part, once for each prompt: when its last pair has its score."""

    def __init__(self, texts: Sequence[PromptPairs], todo: Sequence[comparisons.Comparison]) -> None:
        self._texts = texts
        self._open = Counter(n for comparison in todo for n, _, _ in comparison.cells)

    def completed(self, batch: Sequence[comparisons.Comparison]) -> dict[str, int]:
        """Return the counts {"prompts", "responses"} over the prompts whose last pair is in `batch`."""
        prompts = responses = 0
        for n, count in Counter(n for comparison in batch for n, _, _ in comparison.cells).items():
            self._open[n] -= count
            if self._open[n] == 0:
                prompts += bool(self._texts[n].cut_prompt)
                responses += sum(map(bool, self._texts[n].cut_responses))
        return {"prompts": prompts, "responses": responses}


def replies_to(
    message: dict[str, Any], formatter: Formatter, scorer: Scorer, budget: Budget
) -> Iterator[dict[str, Any]]:
    """Yield the frames that reply to a request, without its id. Raises ValueError for a malformed request, and Unscored."""
    prompts, responses = check_request(message)
    budget.tokens = min(budget.tokens, message.get("tokens") or budget.tokens)
    texts = comparisons.tokenise(formatter, prompts, responses)
    todo = needed(comparisons.distinct(texts), message.get("cells"))
    cuts = CutCounter(texts, todo)
    for batch, scores in scored(todo, scorer, budget):
        good = np.isfinite(scores)
        bad = [
            cell
            for comparison, fine in zip(batch, good, strict=True)
            if not fine
            for cell in comparison.cells
        ]
        batch = [comparison for comparison, fine in zip(batch, good, strict=True) if fine]
        counts = [len(comparison.cells) for comparison in batch]
        yield {
            "cells": [cell for comparison in batch for cell in comparison.cells],
            "logits": np.repeat(scores[good], counts).tolist(),
            "cut": cuts.completed(batch),
        }
        if bad:
            n, i, j = bad[0]
            raise Unscored(f"the score of responses {i} and {j} to prompt {n} is not a finite number", bad)
    yield {"end": True, "cut": {"prompts": 0, "responses": 0}}


def load(options: argparse.Namespace) -> tuple["torch_model.PairRM", Formatter, str]:
    """Return the network, its formatter, and the name of its device. Raises BadInput."""
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
    """Reply to requests until they end. A request that fails gets its error as reply; the next may succeed."""

    def scorer(batch: list[comparisons.Comparison]) -> np.ndarray:
        return model.logits([comparison.pair for comparison in batch])

    for message in replies.requests(sys.stdin.buffer):
        name = {"id": message.get("id")}
        try:
            for frame in replies_to(message, formatter, scorer, budget):
                replies.send(name | frame)
        except BrokenPipeError:
            raise
        except Unscored as error:
            replies.send(name | {"error": str(error), "cells": error.cells})
        except Exception as error:  # of any kind: the client gets it as the reply
            replies.send(name | {"error": f"{type(error).__name__}: {error}", "cells": []})
        budget.give_back()  # the next request may be an hour away, and other processes need the device


def memory_freer(device: str) -> Callable[[], None]:
    """Return a function that frees the device memory in PyTorch's cache; on a CPU, where there is none, it does nothing."""
    import torch

    return torch.cuda.empty_cache if device == "cuda" else lambda: None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m sppo_jax.pairrm.sidecar", description=__doc__)
    parser.add_argument("--path", required=True, help="directory of a PairRM")
    parser.add_argument("--backbone", help="directory that completes a ranker's")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for PyTorch (0: its own choice)")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=0,
        help="tokens per forward pass, padding included (0: the device's)",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    for name in ("source", "candidate", "total"):
        parser.add_argument(f"--{name}", type=int, default=0, help="tokens (0: as the checkpoint says)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Load the model, send the ready frame, reply to requests. Returns the exit status."""
    options = arguments(argv)
    protocol.stay_with_parent()
    replies = protocol.Replies(protocol.private_stdout())  # before the imports that take seconds
    try:
        try:
            model, formatter, device = load(options)
        except BadInput as error:
            replies.send({"error": str(error)})
            return 2
        except ImportError as error:
            replies.send(
                {"error": f"PyTorch cannot be loaded: {error}; install it, or take judge.backend=jax"}
            )
            return 2
        tokens = options.batch_tokens or BATCH_TOKENS[device]
        replies.send({"ready": True, "device": device, "tokens": tokens})
        budget = Budget(tokens, memory_freer(device), lambda line: replies.send({"told": line}))
        serve(replies, model, formatter, budget)
    except BrokenPipeError:  # the client is gone: nothing is left to do
        return 0
    except protocol.FrameError as error:
        print(f"sidecar: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # without waiting for threads and libraries to shut down
