"""The updates of a run: batches of its pairs, compiled programs, and log-probs by training's own forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.models import Architecture, Transformer
from sppo_jax.records import Pair
from sppo_jax.run import pod
from sppo_jax.training import memory, update
from sppo_jax.training.batches import Batches


class Trainer:
    """One architecture on one mesh under one configuration. Programs are kept: iterations of equal shapes compile once."""

    def __init__(self, config: Config, architecture: Architecture, mesh: Mesh, compute_dtype: Any):
        self.config, self.architecture, self.mesh = config, architecture, mesh
        self.compute_dtype = compute_dtype
        self._programs: dict[int, update.Programs] = {}  # by updates per epoch

    def programs(self, steps_per_epoch: int) -> update.Programs:
        """The compiled update under a schedule of `steps_per_epoch` updates an epoch."""
        if steps_per_epoch not in self._programs:
            self._programs[steps_per_epoch] = update.make_programs(
                self.architecture,
                self.compute_dtype,
                self.mesh,
                self.config.fit,
                steps_per_epoch,
                self.config.model.attention,
            )
        return self._programs[steps_per_epoch]

    def batches(self, pairs: Sequence[Pair], iteration: int) -> Batches:
        """The batches of an iteration, packed as the devices' memory allows."""
        c = self.config
        longest = max(len(p.prompt_ids) + max(map(len, p.response_ids)) for p in pairs)
        tree = max(len(p.prompt_ids) + sum(map(len, p.response_ids)) for p in pairs)
        needs = memory.Update.of(c, self.architecture, self.mesh, longest, tree)
        return Batches(
            pairs,
            global_batch=c.fit.global_batch,
            epochs=c.fit.epochs,
            seed=c.seed,
            iteration=iteration,
            packing=needs.packing(pod.least("memory", sharding.memory_limit(self.mesh))),
        )

    def logprobs(
        self,
        policy: Transformer,
        pairs: Sequence[Pair],
        iteration: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """log pi(y|x) [n, R] of every pair's responses, in nats, computed in the batches of `iteration`. Raises BadInput."""
        batches = self.batches(pairs, iteration)
        programs = self.programs(batches.steps_per_epoch)
        return logprobs(policy, batches, len(pairs), programs, self.mesh, on_progress)


def logprobs(
    model: Transformer,
    batches: Batches,
    count: int,
    programs: update.Programs,
    mesh: Mesh,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """log pi(y|x) of `count` pairs' responses [count, R], from one pass over `batches`' first epoch.

    `on_progress` is called after each batch with the number of its pairs.
    Raises BadInput where a log-probability is not finite.
    """
    _, params, frozen = update.split(model)
    out: np.ndarray | None = None
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        found = [programs.forward(params, frozen, part)[0] for part in batch.placed(mesh)]
        for part, pair_G, logprob_GR in zip(batch.microbatches, batch.pairs, found, strict=True):
            if out is None:
                out = np.full((count, logprob_GR.shape[-1]), np.nan)
            out[pair_G[part.real]] = sharding.whole(logprob_GR, mesh)[part.real]
        if on_progress is not None:
            on_progress(batch.prompts)
    assert out is not None
    if bad := np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist():
        raise BadInput(
            f"the policy gives pair {bad[0]} a log-probability that is not finite: its weights are damaged"
        )
    return out
