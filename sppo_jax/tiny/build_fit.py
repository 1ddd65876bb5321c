"""The training loop of the embedded policy and preference model: AdamW with warm-up and a cosine schedule."""

import math
import time
from collections.abc import Callable

import torch

_REPORTS = 40  # progress lines per training


def fit(
    name: str,
    module: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    *,
    steps: int,
    rate: float,
    warmup: int,
    weight_decay: float,
) -> float:
    """Minimise `loss(step)` over `module`'s parameters for `steps` steps; return the mean loss of the last 5 %."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay)

    def scale(step: int) -> float:
        """Return the factor of the learning rate."""
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
    module.train()
    losses: list[float] = []
    every = max(1, steps // _REPORTS)
    started = time.monotonic()
    for step in range(steps):
        value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(value.detach()))
        if (step + 1) % every == 0 or step + 1 == steps:
            pace = (step + 1) / (time.monotonic() - started)
            recent = sum(losses[-every:]) / len(losses[-every:])
            left = (steps - step - 1) / pace
            print(
                f"{name}: step {step + 1}/{steps}  loss {recent:.4f}  {pace:.1f} steps/s  {left:.0f} s left",
                flush=True,
            )
    module.eval()
    tail = losses[-max(1, steps // 20) :]
    return sum(tail) / len(tail)
