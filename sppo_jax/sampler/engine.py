"""Draw K responses per prompt from the policy: a fixed number of slots, refilled while the devices decode.

A response is a function of (weights, seed, iteration, prompt, k) alone: a prompt is padded by its own length only, the
programs have one shape whatever is in the slots, a slot's arithmetic does not see its neighbours, and the random key of each
token folds (seed, iteration, prompt_id, k, position).
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sppo_jax import compilation, sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models.transformer import Transformer
from sppo_jax.records import Prompt, Responses
from sppo_jax.run import pod
from sppo_jax.sampler import capacity, paging
from sppo_jax.sampler.paging import PAGE, AnyPages
from sppo_jax.sampler.programs import Programs
from sppo_jax.sampler.schedule import Response
from sppo_jax.sampler.stream import Stats, Stream
from sppo_jax.sampler.weights import placed
from sppo_jax.text.chat_template import chat_prompt, own_eos_ids, response_text

# Called after each chunk with the number of prompts finished, of tokens drawn, and of slots in use.
Progress = Callable[[int, int, int], None]


class Sampler:
    """A policy ready to decode: weights cast once, programs compiled before the first token and kept for every call."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Any,
        sampling: Sampling,
        mesh: Mesh | None = None,
        *,
        eos: Sequence[int] | None = None,
        longest: int = 0,
    ):
        """Place the weights. `mesh` is the mesh of `model`; its devices decode as replicas (capacity.sampling_mesh).

        Raises BadInput for a setting or an id of `eos` that is out of its range.

        `eos`: ids that end a response; default: the ids that the tokenizer and its template define. `longest`: number of
        tokens in the longest prompt to come, if known; a longer prompt needs new programs.
        """
        _check_settings(sampling)
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
        self.tokenizer, self.sampling, self.architecture = tokenizer, sampling, model.architecture
        self.eos = tuple(own_eos_ids(tokenizer) if eos is None else eos)
        _check_ids("eos", self.eos, model.architecture.vocab)
        limit = pod.least("memory", sharding.memory_limit(mesh))  # of all processes: they choose the same
        whole = capacity.choose(model, mesh, sampling, limit)
        self.capacity = whole.own()
        self._whole, self.mesh, self.replicas = whole.mesh, self.capacity.mesh, self.capacity.replicas
        self.stats = Stats(self.capacity.slots)
        self._longest = longest
        self.programs: Programs | None = None
        self.pages: list[AnyPages] | None = None
        self._streaming = False
        self.set_weights(model)

    @property
    def alone(self) -> bool:
        """Whether this process samples on its own devices alone, so that its prompts may differ from other processes'.

        False where a replica spans processes: all of them must then pass the same prompts.
        """
        return jax.process_count() == 1 or self.mesh.size < self._whole.size

    def set_weights(self, model: Transformer) -> None:
        """Sample from another model of the same architecture from now on; its matrices are cast or rounded once, here."""
        self._check_idle()
        self.weights = None  # free the old ones first
        self.graph, self.weights = placed(model, self._whole, self.mesh, self.capacity.int8)

    def release_cache(self) -> None:
        """Free the pages, whose contents are of no use between streams; the next prompt allocates them anew."""
        self._check_idle()
        self.pages = None

    def release(self) -> None:
        """Free the devices' memory; `set_weights` must come before the next prompt. Programs are kept."""
        self._check_idle()
        self.weights = self.pages = None

    def generate(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int,
        iteration: int = 0,
        responses: int | None = None,
        on_progress: Progress | None = None,
    ) -> list[Responses]:
        """Return K `responses` (default: sampling.responses) for each prompt, in the order given. Raises as `stream`."""
        found = dict(
            self.stream(prompts, seed=seed, iteration=iteration, responses=responses, on_progress=on_progress)
        )
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int,
        iteration: int = 0,
        responses: int | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[tuple[int, Responses]]:
        """Iterate over (index, K responses), each prompt as soon as its last response has ended: roughly in the order given.

        `limits[i][k]` caps single responses below max_new_tokens, to replay recorded lengths. `seed` and `iteration` lie in
        [0, 2**32). Raises BadInput, before anything is sampled, for a number out of its range, an id that the model does
        not have, and a prompt that is empty or leaves no room for max_new_tokens in the model's context.
        """
        self._check_idle()
        _check_number("seed", seed, 0, 2**32)
        _check_number("iteration", iteration, 0, 2**32)
        count, most = (
            self.sampling.responses if responses is None else responses,
            self.sampling.max_new_tokens,
        )
        _check_number("responses", count, 1, 2**16)
        records = self._records(prompts)
        rows = [[most] * count] * len(records) if limits is None else limits
        if len(rows) != len(records) or not all(row and all(_fits(n, 1, 2**31) for n in row) for row in rows):
            raise BadInput("limits need a row for each prompt, and in it a number above 0 for each response")
        asked = [{k: min(limit, most) for k, limit in enumerate(row)} for row in rows]
        if not records:
            return iter(())
        self.warm_up([len(record.ids) for record in records], sum(map(len, asked)))
        return self._stream(records, asked, np.asarray([seed, iteration], np.uint32), on_progress)

    def warm_up(self, lengths: Sequence[int], responses: int | None = None) -> int:
        """Compile the programs for prompts of these lengths in tokens. Returns the number of programs compiled.

        `responses`: the number of responses of the largest stream to come, if known. On a CPU it decides how many slots there
        are: no more than it takes, and at most sampling.slots.
        """
        self._check_idle()
        buckets = {capacity.bucket(length - 1) for length in lengths}
        longest = max(*lengths, self._longest)
        # Slots that are a little too few cost less than compiling anew.
        few = self.programs is not None and 2 * self.programs.shape.slots < self.capacity.slots_for(responses)
        if self.programs is None or longest > self._longest or few or self.graph != self.programs.graph:
            self._longest = self.capacity.longest_prompt(longest)
            self.programs, self.pages = None, None
            shape = self.capacity.shape(
                longest=self._longest,
                eos=self.eos,
                in_use=capacity.memory_in_use(self.mesh),
                responses=responses,
                agree=int if self.alone else capacity.fewest,
            )
            self.programs = Programs(self.graph, self.weights, self.mesh, shape)
        with self._memory_errors():
            if self.pages is None:
                compilation.collect()
                self.pages = [paging.empty(layer) for layer in self.programs.pages]
            return self.programs.compile(buckets)

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Turn the devices' lack of memory into BadInput with one line."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            assert self.programs is not None
            raise BadInput(
                f"the devices have no memory for {self.stats.slots} slots and {self.programs.shape.pages * PAGE} tokens of "
                "keys and values: lower sampling.slots or sampling.cache_tokens"
            ) from None

    def _stream(
        self,
        records: list[Prompt],
        asked: list[dict[int, int]],
        seeds: np.ndarray,
        on_progress: Progress | None,
    ) -> Iterator[tuple[int, Responses]]:
        self._check_idle()
        assert self.programs is not None
        assert self.pages is not None
        # The stream owns the pages until it ends. If it breaks off they are lost, and warm_up makes new ones.
        pages, self.pages, self._streaming = self.pages, None, True
        try:
            with self._memory_errors():
                stream = Stream(self.programs, self.weights, pages, self.stats, records, asked, seeds)
            while True:
                with self._memory_errors():
                    more = stream.advance()
                if not more:
                    break
                for i, found in stream.finished:
                    yield i, self._record(records[i], found)
                # Report after yielding: the callback may raise to stop the run, and finished prompts must be out by then.
                if on_progress is not None:
                    on_progress(len(stream.finished), stream.new_tokens, stream.running)
            self.pages = stream.pages
        finally:
            self._streaming = False

    def _check_idle(self) -> None:
        if self._streaming:
            raise RuntimeError("this sampler is in the middle of a stream: finish or close that one first")

    def _records(self, prompts: Sequence[Prompt | str]) -> list[Prompt]:
        """Return the prompts with their ids. Raises BadInput for one that the model cannot read."""
        if isinstance(prompts, str):
            raise BadInput(f"prompts is one text, {prompts[:80]!r}; give a list: [text]")
        found = []
        for prompt in prompts:
            if not isinstance(prompt, str | Prompt):
                raise BadInput(f"a prompt is a {type(prompt).__name__}; needed texts or Prompts")
            found.append(chat_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
            self._check(found[-1])
        return found

    def _check(self, prompt: Prompt) -> None:
        a, new = self.architecture, self.sampling.max_new_tokens
        if not hasattr(prompt.ids, "__len__") or isinstance(prompt.ids, str):
            raise BadInput(
                f"the ids of the prompt {prompt.text[:80]!r} are {prompt.ids!r:.80}; needed a list of numbers"
            )
        if not len(prompt.ids):
            raise BadInput(f"the prompt {prompt.text[:80]!r} has no tokens")
        if len(prompt.ids) + new > a.max_positions:
            raise BadInput(
                f"a prompt of {len(prompt.ids)} tokens and sampling.max_new_tokens={new} exceed the model's "
                f"{a.max_positions} positions"
            )
        _check_ids("a prompt", prompt.ids, a.vocab)

    def _record(self, prompt: Prompt, found: dict[int, Response]) -> Responses:
        rows = [found[k] for k in sorted(found)]
        return Responses(
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            prompt_ids=list(prompt.ids),
            response_ids=[row.tokens for row in rows],
            responses=[response_text(self.tokenizer, row.tokens) for row in rows],
            finish_reason=["stop" if row.tokens[-1] in self.eos else "length" for row in rows],
            logprobs=[math.fsum(row.logprobs) for row in rows],
        )


def _fits(value: Any, low: int, below: int) -> bool:
    """Return whether `value` is an integer, of Python or NumPy, in [low, below). True and False are not integers."""
    try:
        return not isinstance(value, bool) and low <= operator.index(value) < below
    except TypeError:
        return False


def _check_number(name: str, value: Any, low: int, below: int) -> None:
    if not _fits(value, low, below):
        raise BadInput(f"{name} {value!r} must be a whole number in [{low}, 2**{below.bit_length() - 1})")


def _check_ids(holder: str, ids: Sequence[Any], vocab: int) -> None:
    for i in ids:
        if not _fits(i, 0, vocab):
            raise BadInput(
                f"{holder} holds token id {i!r}, and the model has {vocab} tokens; ids are whole numbers from 0 to {vocab - 1}"
            )


def _check_settings(sampling: Sampling) -> None:
    """Raise BadInput for a setting out of its knob's range. One response, from which no pair can come, is allowed here."""
    for field in dataclasses.fields(sampling):
        value, accepted = getattr(sampling, field.name), field.metadata["range"]
        if accepted is None or (field.name == "responses" and _fits(value, 1, 2**31)):
            continue
        whole = field.type is not int or _fits(value, 0, 2**31)
        if not whole or not isinstance(value, int | float) or value not in accepted:
            raise BadInput(f"sampling.{field.name}={value!r} must be {accepted.whole()}")
