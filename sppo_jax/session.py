"""The inputs of a run, opened once, and the stages that they make."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

from sppo_jax import interchange, judges, prompts, sharding
from sppo_jax.config import Config
from sppo_jax.devices import Devices
from sppo_jax.errors import BadInput, about
from sppo_jax.files import exists
from sppo_jax.hub import names
from sppo_jax.judges import CheckedJudge
from sppo_jax.models import hf
from sppo_jax.records import Pair, Prompt
from sppo_jax.run import directory, manifest, pod, reused
from sppo_jax.run.clock import Clock
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.sampler import Sampler
from sppo_jax.settings import checks, embedded
from sppo_jax.text import chat_template, skipped, thoughts
from sppo_jax.text.answers import Answers
from sppo_jax.training import effect
from sppo_jax.training.trainer import Trainer

LARGE_ETA = 20.0  # above it log mean_k exp(eta P_k) of a handful of responses is its largest term


class Session:
    """What the stages of one run share. Raises BadInput for what is wrong with any input, before anything is computed."""

    def __init__(self, config: Config, run: RunDir, metrics: Metrics, judge: CheckedJudge):
        self.config, self.paths, self.metrics, self.judge = config, run, metrics, judge
        self.clock = Clock(metrics, config.iterations)
        self.oracle = judges.from_attribute("eval.oracle", config.eval.oracle) if config.eval.oracle else None
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        with about("model.path="):
            self.source = names.fetch(config.model.path, manifest.pinned_model(run), tell=metrics.say)
        base = self.source.directory
        # Said once, before the first iteration is there: a run that is resumed or evaluated has been told.
        read = hf.stored_architecture(base, tell=None if exists(run.iteration(1)) else metrics.say)
        self.architecture = dataclasses.replace(read, lora_rank=config.model.lora_rank)
        self.tokenizer = chat_template.load_tokenizer(base, config.model.template)
        self.eos = chat_template.eos_ids(base, self.tokenizer, self.architecture.vocab)
        self.compute_dtype = sharding.compute_dtype(config.model.compute_dtype, self.mesh)
        self.reading = judges.reading_of(config.judge, self.tokenizer)
        self.oracle_reading = judges.reading_of(config.judge, self.tokenizer, own=True)
        self.sets = prompts.load(config, self.tokenizer, self._answers())
        self.answered = self.sets.answers.rows(self.sets.train) if self.sets.answers else []
        self.given = self._given()
        self._check_prompts()
        self._try_judges()
        lengths = [len(p.ids) for p in self._sampled()]
        self.trainer = Trainer(config, self.architecture, self.mesh, self.compute_dtype)
        self.devices = Devices(
            config, run, self.source, self.architecture, self.mesh, self.compute_dtype, self.trainer,
            judges=[judge] + ([self.oracle] if self.oracle else []),
            make_sampler=functools.partial(
                Sampler, tokenizer=self.tokenizer, sampling=config.sampling, mesh=self.mesh, eos=self.eos,
                longest=max(lengths),
            ),
            lengths=lengths, doing=self.clock.doing,
        )  # fmt: skip
        self.devices.policy(BASE)
        most = [len(part) for part in self.given] or [len(part) for part in self.sets.train]
        for t, count in enumerate(most, 1):
            if not run.evaluation(t).exists():
                effect.check(config.fit, count, t, at_most=not self.given)
        inputs = manifest.digests(
            base, judge.identity, self.sets.heldout, self.sets.train, self.given, self.answered
        )
        resolved = {
            "model.compute_dtype": str(self.compute_dtype),
            "judge.strip": thoughts.strips(config.judge.strip, self.tokenizer),
        }
        self.provenance = manifest.Provenance(run, config, resolved, inputs)

    def stage(self, t: int) -> Stage:
        """Iteration t of the game: from the policy after iteration t - 1, and its prompts, or given pairs or responses."""
        kind = "pairs" if self.given else "responses" if self.answered else "prompts"
        return self._stage(t, t - 1, f"{kind}_{t}")

    def reused(self, t: int) -> str:
        """The line about what is on disk of iteration t, which an earlier start has begun."""
        prompts = 0 if self.given else len(self.sets.train[t - 1])
        return reused.line(self.paths, t, prompts, self.config.sampling.shard_prompts)

    def heldout_stage(self, t: int, *, policy: int) -> Stage:
        """Held-out prompts in iteration t, by the policy after iteration `policy`."""
        return self._stage(t, policy, "prompts_heldout")

    def _stage(self, t: int, policy: int, inputs: str) -> Stage:
        return Stage(
            self.paths,
            t,
            self.config.seed,
            self.config.sampling.shard_prompts,
            self.provenance.made_from(policy, inputs),
            self.metrics,
        )

    def notes(self) -> list[str]:
        """Lines that the user should read before the game starts."""
        lines = embedded.notes(self.config)
        lines += [skipped.summary(name, count) for name, count in self.sets.counts.items()]
        lines += self.sets.notes
        fit = self.config.fit
        if fit.baseline == "log_partition" and fit.eta > LARGE_ETA:
            lines.append(
                f"warning: fit.baseline=log_partition with fit.eta={fit.eta:g}: the estimate is nearly the largest win "
                f"rate, and lowers nearly every response; it is sensible up to an eta of about {LARGE_ETA:g}"
            )
        return lines

    def _given(self) -> list[list[Pair]]:
        """Each iteration's pairs where pairs.source names them, to train on instead of sampling and judging."""
        found = []
        for t in range(1, self.config.iterations + 1) if self.config.pairs.source else ():
            pairs, self.sets.counts[f"given pairs {t}"] = interchange.read(
                self.config,
                t,
                self.tokenizer,
                eos=self.eos,
                positions=self.architecture.max_positions,
                heldout=self.sets.heldout_ids,
            )
            name = f"given pairs {t}"
            self.sets.notes += skipped.notes(name, self.sets.counts[name], " in 'chosen' or 'rejected'")
            found.append(pairs)
        return found

    def _answers(self) -> Answers | None:
        """What reads the responses of responses.source; None where they are sampled."""
        if not self.config.responses.source:
            return None
        return Answers(self.config, self.tokenizer, self.eos, self.architecture.max_positions)

    def _sampled(self) -> list[Prompt]:
        """All prompts to which responses are sampled: the held-out ones, and those to train on unless responses are given."""
        parts = [self.sets.heldout] if self.answered else [*self.sets.train, self.sets.heldout]
        return [prompt for part in parts for prompt in part]

    def _try_judges(self) -> None:
        """Try the judge and the oracle, unless nothing is left to judge: better now than after hours of sampling."""
        numbers = range(1, self.config.iterations + 1)
        if pod.agreed("played", lambda: all(exists(self.paths.evaluation(t)) for t in numbers)):
            return
        texts = [prompt.text for prompt in self.sets.heldout[:2]]
        judges.try_out(
            self.judge, [self.reading(text, ())[0] for text in texts], self.config.sampling.responses
        )
        if self.oracle is not None:
            judges.try_out(self.oracle, [self.oracle_reading(text, ())[0] for text in texts], 2)

    def _check_prompts(self) -> None:
        asked = [p.ids for part in (*self.sets.train, self.sets.heldout) for p in part]
        given = [row for part in self.given for pair in part for row in (pair.prompt_ids, *pair.response_ids)]
        given += [ids for part in self.answered for row in part for ids in row.response_ids]
        highest, vocab = max(map(max, asked + given)), self.architecture.vocab
        if highest >= vocab:
            raise BadInput(
                f"{self.source.directory}: the tokenizer gives id {highest}, the model has {vocab} tokens"
            )
        lengths = [len(prompt.ids) for prompt in self._sampled()]
        new, room = self.config.sampling.max_new_tokens, self.architecture.max_positions
        if max(lengths) + new > room:
            raise BadInput(
                f"sampling.max_new_tokens={new} after a prompt of {max(lengths)} tokens exceeds the model's {room} "
                f"positions; {checks.shorter(lengths, new, room)}"
            )


@contextlib.contextmanager
def opened(config: Config, *, quiet: bool = False) -> Iterator[Session]:
    """Claim OUT, start the judge's process before any device is touched, and open every input.

    A `quiet` run prints warnings and its result only.
    """
    # The judge starts before the run directory is made: a missing judge must not leave a directory behind.
    # Signals are ours to the very end, and so outside of all that is closed before.
    with contextlib.ExitStack() as signals, contextlib.ExitStack() as stack:
        judge = judges.open_judge(config.judge, manifest.pinned_judge(RunDir(config.out)))
        stack.callback(judge.close)
        run = stack.enter_context(directory.opened(config))
        metrics = stack.enter_context(Metrics(run, config, quiet=quiet))
        judge.report_to(functools.partial(metrics.say, always=True))
        session = Session(config, run, metrics, judge)
        if session.oracle is not None:
            stack.callback(session.oracle.close)
        pod.same("inputs", session.provenance.inputs, "the sha256 of {key}")
        pod.written(
            "manifest",
            lambda: manifest.write(
                run,
                config,
                source=session.source,
                mesh=session.mesh,
                judge_sources=judge.sources,
                inputs=session.provenance.inputs,
                prompts=session.sets.counts,
            ),
        )
        # Only now: until here nothing is lost, and a signal ends a download or a long reading at once.
        signals.enter_context(metrics.stopping_on_signals())
        yield session
