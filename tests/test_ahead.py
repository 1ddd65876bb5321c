"""The host never holds up the devices: training, sampling and judging start the next program before they read a result.

Stand-ins for slow programs give a result only once the next program has been started; a host that reads first waits in vain.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from sppo_jax import fit
from sppo_jax.config import Sampling
from sppo_jax.pairrm import files, mesh_judge
from sppo_jax.pairrm.mesh_judge import JaxJudge
from sppo_jax.sampler import Sampler
from sppo_jax.sampler.decoding import STEPS
from sppo_jax.training.update import Programs
from tests.test_fit import SETTINGS, pairs_of, train
from tests.test_pairrm import MODEL

PATIENCE = 1.0  # seconds for which a result waits for the next program


class Slow:
    """Programs whose results wait for the next program's start, and the results that waited in vain, by number."""

    def __init__(self) -> None:
        self.started, self.in_vain = 0, list[int]()
        self._next = threading.Condition()

    def result(self, value: Any) -> "Late":
        """The result of a program that is started now."""
        with self._next:
            self.started += 1
            self._next.notify_all()
            return Late(self, self.started, value)

    def wait(self, number: int) -> None:
        """Wait for the start of the program after this one."""
        with self._next:
            if not self._next.wait_for(lambda: self.started > number, PATIENCE):
                self.in_vain.append(number)


@dataclasses.dataclass
class Late:
    """A result on its way; the host reads it as it reads a jax array."""

    slow: Slow
    number: int
    value: Any

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        self.slow.wait(self.number)
        return np.asarray(self.value)


def test_training_starts_an_update_before_it_reads_the_one_before(
    tmp_path: Path, one_device: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, step, get, read = Slow(), Programs.train_step, jax.device_get, itertools.count(1)

    def started(*args: Any) -> Any:
        slow.result(None)
        return step(*args)

    def late(arrays: Any) -> Any:
        if isinstance(arrays, dict) and "loss" in arrays:
            slow.wait(next(read))
        return get(arrays)

    monkeypatch.setattr(Programs, "train_step", started)
    monkeypatch.setattr(fit.jax, "device_get", late)
    train(tmp_path, pairs_of(20), dataclasses.replace(SETTINGS, checkpoint_every=100), one_device)
    assert slow.started > 3
    assert slow.in_vain == [slow.started]  # the last one


def test_the_sampler_starts_a_chunk_before_it_reads_the_one_before(policy: Any, tokenizer: Any) -> None:
    sampler = Sampler(policy, tokenizer, Sampling(responses=2, max_new_tokens=4 * STEPS), eos=())
    prompts = ["Where can I find the fox?", "What is the opposite of hot?"]
    sampler.generate(prompts, seed=0)  # which compiles
    assert sampler.programs is not None
    slow, decode = Slow(), sampler.programs.decode

    def wrapped(program: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any) -> Any:
            slots, pages, found = program(*args)
            return slots, pages, slow.result(found)

        return late

    for size in list(decode):
        decode[size] = wrapped(decode[size])
    sampler.generate(prompts, seed=1)
    assert slow.started >= 4
    assert set(slow.in_vain) <= {slow.started}


def test_the_judge_on_the_mesh_starts_a_batch_before_it_reads_the_one_before(
    one_device: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mesh_judge.BUCKETS, "cpu", (128,))
    monkeypatch.setitem(mesh_judge.DEVICE_TOKENS, "cpu", 256)  # two pairs a batch
    slow = Slow()
    with JaxJudge(files.read(MODEL), mesh=one_device) as opened:
        monkeypatch.setattr(
            opened, "_forward", lambda weights, ids, *rest: slow.result(np.zeros(len(ids), np.float32))
        )
        opened.compare(["Why?", "How?"], [["a", "b", "c"], ["d", "e", "f"]])
    assert slow.started == 6
    assert slow.in_vain == [slow.started]
