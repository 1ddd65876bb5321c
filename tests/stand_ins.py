"""A sampler and judges without models, for tests of what happens around them."""

import random
import threading
import time
from collections import Counter
from concurrent import futures

import jax
import numpy as np

from sppo_jax.config import Sampling
from sppo_jax.records import Prompt, Responses
from sppo_jax.run import cluster
from sppo_jax.sampler import Stats

PROMPTS = [Prompt(f"Question {n}?", [1, 2, 3 + n]) for n in range(7)]
K = 3


def answer(prompt: Prompt, seed: int = 0) -> Responses:
    """Return K responses that depend on the prompt and the seed alone, with log-probs that use all their bits."""
    draw = random.Random(prompt.prompt_id + seed)
    ids = [[draw.randrange(99) for _ in range(draw.randint(1, 9))] for _ in range(K)]
    return Responses(
        prompt.prompt_id, prompt.text, prompt.ids, ids, [" ".join(map(str, row)) for row in ids],
        [draw.choice(["stop", "length"]) for _ in ids], [-draw.random() / 3 for _ in ids],
    )  # fmt: skip


class Streaming:
    """A sampler whose `stream` finishes two prompts a chunk, in the order of their ids, and calls `chunk(i)` before each."""

    def __init__(self, chunk=lambda i: None, alone=True):
        self.chunk, self.alone = chunk, alone
        self.stats = Stats(slots=6, steps=1000, tokens=7)
        self.sampling = Sampling(responses=K, max_new_tokens=9)
        self.made, self.asked = 0, []  # how often a test made it; the prompts' texts of each call

    def stream(self, prompts, *, seed, iteration=0, responses=None, limits=None, on_progress=None):
        self.asked.append([prompt.text for prompt in prompts])
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].prompt_id)
        for start in range(0, len(order), 2):
            self.chunk(start // 2)
            rows = [(i, answer(prompts[i], seed)) for i in order[start : start + 2]]
            tokens = sum(len(ids) for _, row in rows for ids in row.response_ids)
            self.stats.steps += 9
            self.stats.slot_steps += 9 * self.stats.slots
            self.stats.tokens += tokens
            on_progress(len(rows), tokens, min(6, K * (len(order) - start)))
            yield from rows


class Counting:
    """A judge that keeps the prompts of each call, and whose scores depend on how many prompts it gets at once."""

    identity = "counting"

    def __init__(self, on_mesh=False):
        self.on_mesh, self.calls, self.cut = on_mesh, [], Counter()

    def compare(self, prompts, responses, on_progress=None):
        self.calls.append(list(prompts))
        self.cut += Counter(prompts=len(prompts), responses=2)
        lengths = np.array([[len(text) for text in row] for row in responses])
        logits = (lengths[:, :, None] - lengths[:, None, :]) / 7 + len(prompts)
        if on_progress is not None:
            on_progress(logits[:, 0, 1:].size * K, logits[:, 0, 1:].size * K)
        return logits


class Pod:
    """Two processes, played by threads, with a store between them. `waits`: the names of their meetings, by process."""

    def __init__(self, monkeypatch):
        self._who, self._store, self.waits = threading.local(), {}, [[], []]
        self._members = []
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: self._who.i)
        monkeypatch.setattr(cluster, "member", lambda: self._members[self._who.i])
        submit = futures.ThreadPoolExecutor.submit

        def inherited(executor, call, *words):
            """Threads that a process starts are the process's."""
            who = getattr(self._who, "i", None)

            def as_process(*words):
                if who is not None:
                    self._who.i = who
                return call(*words)

            return submit(executor, as_process, *words)

        monkeypatch.setattr(futures.ThreadPoolExecutor, "submit", inherited)

    def run(self, process):
        """Return [process(0), process(1)], which run at the same time."""
        self._store.clear()
        self._members = [Member(self, i) for i in range(2)]

        def as_process(i):
            self._who.i = i
            return process(i)

        with futures.ThreadPoolExecutor(2, "process") as threads:
            return list(threads.map(as_process, range(2), timeout=60))


class Member:
    """One process of a Pod."""

    def __init__(self, pod, index):
        self.index, self.count, self.calls, self.read = index, 2, Counter(), []
        self._pod, self._store = pod, pod._store

    def set(self, key, text):
        assert key not in self._store
        if key.startswith("meet ") and key.endswith(f"/{self.index}"):
            self._pod.waits[self.index].append(key.removeprefix("meet ").rpartition(" ")[0])
        self._store[key] = text

    def get(self, key):
        for _ in range(20_000):
            if key in self._store:
                return self._store[key]
            time.sleep(0.001)
        raise AssertionError(f"{key} did not come")

    def entries(self, folder):
        return {key: text for key, text in dict(self._store).items() if key.startswith(f"{folder}/")}

    def forget(self, key):
        for name in [name for name in self._store if name == key or name.startswith(f"{key}/")]:
            del self._store[name]

    def check(self):
        pass
