"""The updates of a run: batches of its pairs, compiled programs, and log-probs by training's own forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sppo_jax import fit, sharding
from sppo_jax.config import Config
from sppo_jax.models import Architecture, Transformer
from sppo_jax.models.attention import choose
from sppo_jax.records import Pair
from sppo_jax.training import memory
from sppo_jax.training.batches import Batches


class Trainer:
    """One architecture on one mesh under one configuration; programs are compiled once."""

    def __init__(self, config: Config, architecture: Architecture, mesh: Mesh, compute_dtype: Any):
        self.config, self.architecture, self.mesh = config, architecture, mesh
        self.compute_dtype = compute_dtype

    def programs(self, steps_per_epoch: int) -> Any:
        return fit.make_programs(
            self.architecture,
            self.compute_dtype,
            self.mesh,
            self.config.fit,
            steps_per_epoch,
            self.config.model.attention,
        )

    def batches(self, pairs: Sequence[Pair], iteration: int) -> Batches:
        c = self.config
        kernel = choose(c.model.attention, self.mesh, self.architecture, self.compute_dtype).name
        width = self.compute_dtype.itemsize
        longest = max(len(p.prompt_ids) + len(ids) for p in pairs for ids in p.response_ids)
        update = memory.Update(self.architecture, self.mesh, width, kernel, c.fit.remat, longest)
        return Batches(
            pairs,
            global_batch=c.fit.global_batch,
            epochs=c.fit.epochs,
            seed=c.seed,
            iteration=iteration,
            shards=sharding.batch_shards(self.mesh),
            most_tokens=update.most_tokens(sharding.memory_limit(self.mesh)),
            pack=kernel != "cudnn",
        )

    def logprobs(
        self,
        policy: Transformer,
        pairs: Sequence[Pair],
        iteration: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """log pi(y|x) [n, R] of every pair's responses, in nats, in the batches of `iteration`."""
        batches = self.batches(pairs, iteration)
        programs = self.programs(batches.steps_per_epoch)
        return fit.logprobs(policy, batches, len(pairs), programs, self.mesh, on_progress)
