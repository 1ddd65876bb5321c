"""The tiny world's true preference with something changed: judges for `python -m sppo_jax.compare` on the quickstart.

    --judge.backend benchmarks.tiny_judges:noisy --eval.oracle sppo_jax.tiny.world:oracle

`noisy` has one comparison in five the wrong way round, `very_noisy` one in three; `length` likes long responses, too; to
`cyclic` the cycle of tones matters more than all else. `truth` is the true preference itself.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sppo_jax.tiny import world

CYCLIC = 4.0  # strength of the cycle of tones; the world's own is 0.8
A_WORD = 0.15  # logits for each word more


class Changed(world.Oracle):
    """The true logits plus `more(prompt, response, other)`, and a share `noise` of the comparisons turned round."""

    def __init__(
        self, name: str, more: Callable[[str, str, str], float] = lambda *_: 0.0, noise: float = 0.0
    ):
        super().__init__()
        self.identity, self._more, self._noise = f"{self.identity}:{name}", more, noise

    def compare(
        self, prompts: Sequence[str], responses: Sequence[Sequence[str]], on_progress: Any = None
    ) -> np.ndarray:
        """Logits [n, K, K], antisymmetric: a function of the three texts alone."""
        logits = super().compare(prompts, responses, on_progress)
        for row, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
            for i, j in itertools.combinations(range(len(texts)), 2):
                found = logits[row, i, j] + self._more(prompt, texts[i], texts[j])
                found *= -1 if self._wrong(prompt, *sorted((texts[i], texts[j]))) else 1
                logits[row, i, j], logits[row, j, i] = found, -found
        return logits

    def _wrong(self, *texts: str) -> bool:
        digest = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self._noise * 2**64


def _cycle(prompt: str, response: str, other: str) -> float:
    tones = (world.features(prompt, text).tone for text in (response, other))
    return (CYCLIC - world.CYCLE) * world.cycle(*tones)


def truth() -> world.Oracle:
    """The true preference."""
    return world.oracle()


def noisy() -> Changed:
    """Wrong about one comparison in five."""
    return Changed("noise .2", noise=0.2)


def very_noisy() -> Changed:
    """Wrong about one comparison in three."""
    return Changed("noise .33", noise=1 / 3)


def length() -> Changed:
    """Each word more is worth something."""
    return Changed(
        f"words {A_WORD}", lambda _, text, other: A_WORD * (len(text.split()) - len(other.split()))
    )


def cyclic() -> Changed:
    """A strongly intransitive world."""
    return Changed(f"cycle {CYCLIC}", _cycle)
