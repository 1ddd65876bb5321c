"""The policies of an evaluation: a name that the user gave → its files, its tokenizer, and its responses to prompts."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sppo_jax import config_file, files, respond, sharding
from sppo_jax.config import Config, Sampling
from sppo_jax.errors import BadInput
from sppo_jax.evaluation.flags import run_of
from sppo_jax.evaluation.place import Place
from sppo_jax.hub import names
from sppo_jax.hub.repositories import TOKENIZER_FILES
from sppo_jax.models import hf
from sppo_jax.records import Prompt, Responses
from sppo_jax.run import manifest
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.sampler import Sampler
from sppo_jax.text import chat_template, thoughts


class Policy:
    """A policy that was named: `iteration` is that of its run, else 0, and goes into its responses' random keys."""

    def __init__(
        self, name: str, config: Config, tell: Callable[[str], None], options: Mapping[str, Any] | None
    ):
        """Find its files; a name on the hub is downloaded. `options`: of its template; None: those of its own run.

        Raises BadInput for a name that is none.
        """
        self.name, self._config = name, config
        found = run_of(name)
        self.iteration = BASE if found is None else found[1]
        self.directory = names.fetch(name, tell=tell).directory if found is None else _of_run(*found, tell)
        self.architecture = hf.stored_architecture(self.directory)
        if options is None and found is not None:
            options = config_file.load([RunDir(found[0]).config]).model.template
        self.tokenizer = chat_template.load_tokenizer(self.directory, options)
        self.eos = chat_template.eos_ids(self.directory, self.tokenizer, self.architecture.vocab)

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether judges are to read its responses without their thoughts."""
        return thoughts.strips(self._config.judge.strip, self.tokenizer) == "think"

    @functools.cached_property
    def _weights(self) -> str:
        return files.sha256(hf.weight_files(self.directory))

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of its weights, with their configuration, and of what makes its tokens."""
        tokenizer = [self.directory / name for name in (*TOKENIZER_FILES, "generation_config.json")]
        return {
            "policy": files.sha256([*hf.weight_files(self.directory), self.directory / "config.json"]),
            "tokenizer": files.sha256([path for path in tokenizer if path.is_file()]),
        }

    @property
    def made(self) -> float:
        """When its weights were written, in seconds since 1970: a time that does not depend on this command's."""
        return max(path.stat().st_mtime for path in hf.weight_files(self.directory))

    @property
    def weights(self) -> str:
        """What another program loads: its directory, or its name on the hub."""
        return str(self.directory) if run_of(self.name) or files.exists(Path(self.name)) else self.name

    def respond(
        self, place: Place, prompts: Sequence[str], mesh: Mesh, sampling: Sampling, seed: int
    ) -> list[Responses]:
        """Return sampling.responses responses to each prompt, in order. Those on disk in `place` are read, the rest are sampled.

        Of a run's policy they are the ones of the run, where prompts, seed and sampling are the same.
        """
        dtype = sharding.compute_dtype(self._config.model.compute_dtype, mesh)
        every = [self._prompt(n, text) for n, text in enumerate(prompts)]
        # Prompts that differ in the white space around them have the same random keys, and are asked once.
        once: dict[int, Prompt] = {}
        for prompt in every:
            once.setdefault(prompt.prompt_id, prompt)
        asked = list(once.values())
        made_from = self.digests | {
            "prompts": files.sha256_text(json.dumps([[p.text, p.ids] for p in asked])),
            "configuration": _digest(sampling, seed, self.iteration, dtype),
        }
        task = place.task("policies", self.name, made_from, seed=seed, iteration=self.iteration)

        def sampler() -> Sampler:
            model = hf.load(
                self.directory,
                mesh=mesh,
                dtype=dtype,
                param_dtype=dtype,
                attention=self._config.model.attention,
            )
            longest = max(len(p.ids) for p in asked)
            return Sampler(model, self.tokenizer, sampling, mesh, eos=self.eos, longest=longest)

        found = {row.prompt_id: row for row in respond.respond(asked, sampler, _NoFollower(), task)}
        return [found[prompt.prompt_id] for prompt in every]

    def said(self, row: Responses) -> Responses:
        """The responses as judges read them: without thoughts, where the policy's template knows them (judge.strip)."""
        if not self.thinks:
            return row
        opened = thoughts.of_header(self.tokenizer)[1]
        texts = [thoughts.taken_out(text, opened=opened) for text in row.responses]
        return dataclasses.replace(row, responses=texts)

    def draws_as(self, other: "Policy") -> bool:
        """Whether both give the same responses to the same prompts."""
        return self.iteration == other.iteration and self._weights == other._weights

    def _prompt(self, n: int, text: str) -> Prompt:
        """Prompt number n. Raises BadInput for a conversation that the policy's template refuses: none is left out silently."""
        try:
            return chat_template.chat_prompt(self.tokenizer, text)
        except chat_template.Refused as error:
            raise BadInput(f"{self.name}, prompt {n + 1}: {error}; leave it out of --prompts") from None


class _NoFollower:
    """Nobody waits for the responses one by one."""

    def take(self, n: int, row: Responses) -> None:
        """Leave it."""

    def progress(self) -> dict[str, Any]:
        """No facts."""
        return {}


def _digest(sampling: Sampling, seed: int, iteration: int, dtype: Any) -> str:
    """The digest of what a response depends on, beyond the policy and the prompts."""
    moved_about = ("slots", "cache_tokens", "shard_prompts")
    kept = {k: v for k, v in dataclasses.asdict(sampling).items() if k not in moved_about}
    return files.sha256_text(str((sorted(kept.items()), seed, iteration, str(dtype))))


def _of_run(root: str, t: int, tell: Callable[[str], None]) -> Path:
    """The directory of a run's policy after iteration t. Raises BadInput where there is none."""
    run = RunDir(root)
    if t == BASE:
        config = config_file.load([run.config])
        return names.fetch(config.model.path, manifest.pinned_model(run), tell=tell).directory
    if not run.export(t).exists():
        there = [str(i) for i in sorted({BASE, *run.iterations()}) if i == BASE or run.export(i).exists()]
        raise BadInput(f"{root}@{t}: the run has no policy of iteration {t}; there are {', '.join(there)}")
    return run.export(t)
