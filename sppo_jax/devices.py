"""Turns on the devices: the only place where weights are cast, handed over or freed.

One policy is in memory at a time. Beside it lie, in turns, the sampler's copy of its weights and the cache, a judge on the
mesh, or training. Devices with a memory of their own hold one of these at a time, so a policy is cast for sampling at
most twice: for its held-out responses, and for the next iteration's responses and probe. In a host's memory (a CPU) the
sampler's copy, without its cache, stays until the policy is trained or another one comes: one cast.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.hub.repositories import Snapshot
from sppo_jax.judges import CheckedJudge
from sppo_jax.models import Architecture, Transformer, hf, lora
from sppo_jax.records import Pair
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.stage import Stage
from sppo_jax.sampler import Sampler
from sppo_jax.training.trainer import Trainer


class Devices:
    """The policy in memory and the turns on the devices: `sampling`, `judging`, `scoring`, `training`.

    Each turn is a context, and one turn ends before the next begins. A turn loads nothing until it is used, so that a
    finished stage costs nothing.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        source: Snapshot,
        architecture: Architecture,
        mesh: Mesh,
        compute_dtype: Any,
        trainer: Trainer,
        judges: Sequence[CheckedJudge],
        make_sampler: Callable[[Transformer], Sampler],
        lengths: Sequence[int],
        doing: Callable[[str], AbstractContextManager[None]],
    ):
        """`make_sampler` makes the run's sampler from a first policy; `lengths`: tokens of every prompt of the run.

        `doing` returns the context in which each turn's time is counted.
        """
        self._config, self._run, self._source = config, run, source
        self._architecture, self._mesh, self._compute_dtype = architecture, mesh, compute_dtype
        self._trainer, self._judges, self._make_sampler, self._lengths = (
            trainer,
            judges,
            make_sampler,
            lengths,
        )
        self._doing = doing
        self._exclusive = own_memory(mesh)
        self._turn = ""
        self._policy: tuple[int, Transformer] | None = None
        self._sampler: Sampler | None = None  # kept for its programs
        self._sampled: int | None = None  # the iteration of the policy whose weights the sampler holds

    def policy(self, t: int) -> Transformer:
        """The policy after iteration t. Trained weights are float32, on disk too, so that a resumed run loses nothing."""
        if self._policy is None or self._policy[0] != t:
            self.free()  # before another one is loaded
            self.put(t, self._adapted(t) if self._architecture.lora_rank else self._whole(t))
        assert self._policy is not None
        return self._policy[1]

    def put(self, t: int, policy: Transformer) -> None:
        """Make a policy that was just trained the policy after iteration t."""
        self.free()
        self._policy = (t, policy)

    @contextmanager
    def sampling(self, t: int) -> Iterator[Callable[[], Sampler]]:
        """The sampler's turn. Yields a function that returns the sampler with the weights of the policy after iteration t."""
        with self._taking("sampling"):
            yield lambda: self._sampler_with(t)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """The judges' turn. A judge on the mesh has the devices' own memory to itself; judges free theirs at the end."""
        with self._taking("judging"):
            if self._exclusive and any(judge.on_mesh for judge in self._judges):
                self._rest_sampler()
            yield
            for judge in self._judges:
                judge.release()

    @contextmanager
    def scoring(self, t: int, stage: Stage) -> Iterator[Callable[..., np.ndarray]]:
        """The turn of training's forward pass.

        Yields a function from pairs to log pi(y|x) [n, R], in nats, under the policy after iteration t, or after another
        one that is its second argument.
        """

        def logprob(pairs: Sequence[Pair], policy: int = t) -> np.ndarray:
            if self._exclusive:
                self._rest_sampler()
            elif self._sampler is not None:
                self._sampler.release_cache()
            with stage.progress("log-probs", len(pairs), "pairs", minor=True) as advance:

                def on_progress(done: int) -> None:
                    advance(done)
                    stage.metrics.poll(together=True)

                return self._trainer.logprobs(self.policy(policy), pairs, stage.iteration, on_progress)

        with self._taking("scoring"):
            yield logprob

    @contextmanager
    def training(self, t: int) -> Iterator[Callable[[], Transformer]]:
        """The update's turn. Yields a function that hands over the policy after iteration t.

        Training donates the policy's arrays, so this object keeps none of them.
        """

        def hand_over() -> Transformer:
            policy = self.policy(t)
            self.free()
            return policy

        with self._taking("training"):
            yield hand_over

    @contextmanager
    def _taking(self, turn: str) -> Iterator[None]:
        if self._turn:
            raise RuntimeError(f"the devices are {self._turn}; that turn ends before {turn} begins")
        self._turn = turn
        try:
            with self._doing(turn):
                yield
        finally:
            self._turn = ""

    def _sampler_with(self, t: int) -> Sampler:
        """The sampler, holding the weights of policy t and every program that the run's prompts need."""
        policy = self.policy(t)
        if self._sampler is None:
            self._sampler = self._make_sampler(policy)
        elif self._sampled != t:
            self._sampler.set_weights(policy)
        if self._sampled != t:
            prompts = self._config.prompts.per_iteration or len(self._lengths)
            self._sampler.warm_up(self._lengths, prompts * self._config.sampling.responses)
            self._sampled = t
        return self._sampler

    def _rest_sampler(self) -> None:
        """Free the sampler's weights and cache; its programs stay."""
        self._sampled = None
        if self._sampler is not None:
            self._sampler.release()

    def free(self) -> None:
        """Free the policy, its parameters and the sampler's copy."""
        self._policy = None
        self._rest_sampler()

    def _whole(self, t: int) -> Transformer:
        directory = self._source.directory if t == BASE else self._run.export(t)
        found = hf.load(
            directory, mesh=self._mesh, dtype=self._compute_dtype, attention=self._config.model.attention
        )
        if (
            found.architecture != self._architecture
        ):  # a run of an earlier version that did not read the base's head
            raise BadInput(f"{directory}: not of the base's architecture; begin anew with another --out")
        return found

    def _adapted(self, t: int) -> Transformer:
        """The frozen base with the adapters after iteration t.

        The base is held in the compute dtype where its files have that dtype, and in float32 otherwise:
        frozen weights keep their values, in exports too.
        """
        base, dtype = self._source.directory, self._compute_dtype
        frozen = hf.load(
            base,
            mesh=self._mesh,
            dtype=dtype,
            param_dtype=dtype if hf.stored_dtypes(base) == {dtype.name} else jnp.float32,
            attention=self._config.model.attention,
        )
        if t == BASE:
            key = jax.random.key(self._config.seed)
            return lora.attach(frozen, self._architecture.lora_rank, key, self._mesh)
        return lora.load(frozen, self._run.adapter(t), self._mesh)


def own_memory(mesh: Mesh) -> bool:
    """Whether the devices have a memory of their own, which one tenant at a time fills: all but CPUs."""
    return sharding.platform(mesh) != "cpu"
