"""What a plan assumes about texts: lengths are unknown before a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: int = 180
    response: int = 350
