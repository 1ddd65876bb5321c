"""What the stages of one run share: inputs opened once, the policy in memory, its sampler and training programs."""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from sppo_jax import config as configuration
from sppo_jax import files, fit, interchange, judge, prompts, records, sharding
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.hub import names, repositories
from sppo_jax.models import Transformer, hf, lora
from sppo_jax.records import Pair, Prompt
from sppo_jax.report import model_card
from sppo_jax.run import directory
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.sampler.engine import Sampler
from sppo_jax.text import chat_template
from sppo_jax.training import batches, memory, update

PACKAGES = (
    "sppo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "torch",
    "transformers",
    "datasets",
    "tensorflow-datasets",
)

LARGE_ETA = 20.0  # above it log mean_k exp(eta P_k) of a handful of responses is its largest term


class Session:
    """One run's inputs and its policy. At any time one policy is in memory: the one last asked for."""

    def __init__(self, config: Config, run: RunDir, metrics: Metrics, judge_: judge.Checked):
        """Open every input, so that what is wrong with one of them is known before anything is computed."""
        self.config, self.run, self.metrics, self.judge = config, run, metrics, judge_
        self.oracle = judge.from_attribute("eval.oracle", config.eval.oracle) if config.eval.oracle else None
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.source = self._source()
        self.base = self.source.directory
        self.architecture = dataclasses.replace(
            hf.read_architecture(self.base), lora_rank=config.model.lora_rank
        )
        self.tokenizer = chat_template.load_tokenizer(self.base)
        self.eos = chat_template.eos_ids(self.base, self.tokenizer, self.architecture.vocab)
        self.compute_dtype = sharding.compute_dtype(config.model.compute_dtype, self.mesh)
        self._policy: tuple[int, Transformer] | None = None
        self._sampler: Sampler | None = None  # kept for its programs, whatever policy is in it
        self._sampled: int | None = None  # the policy that is
        self._programs: dict[int, update.Programs] = {}  # by updates of an epoch
        self.sets = prompts.load(config, self.tokenizer)
        self.given = self._given()
        self._check_prompts()
        if self.oracle is not None:  # does it know these prompts? Better asked now than after an hour
            self.oracle.compare([self.sets.heldout[0].text], [["one", "another"]])
        self.policy(BASE)
        self.inputs = self._inputs()
        self._hashes = {BASE: self.inputs["base_weights"]}

    def policy(self, t: int) -> Transformer:
        """The policy after iteration t; what is trained of it is float32, on disk too: a resumed run loses nothing."""
        if self._policy is None or self._policy[0] != t:
            self._free()  # the other one first
            self.put_policy(t, self._adapted(t) if self.architecture.lora_rank else self._whole(t))
        assert self._policy is not None
        return self._policy[1]

    def _whole(self, t: int) -> Transformer:
        directory = self.base if t == BASE else self.run.export(t)
        return hf.load(
            directory, mesh=self.mesh, dtype=self.compute_dtype, attention=self.config.model.attention
        )

    def _adapted(self, t: int) -> Transformer:
        """The frozen base with the adapters after iteration t.

        It is kept in the compute dtype where its files are in that, and as float32 otherwise: what is frozen stays
        what it was, in exports too.
        """
        dtype = self.compute_dtype
        kept = dtype if hf.stored_dtypes(self.base) == {dtype.name} else jnp.float32
        frozen = hf.load(
            self.base,
            mesh=self.mesh,
            dtype=dtype,
            param_dtype=kept,
            attention=self.config.model.attention,
        )
        if t == BASE:
            key = jax.random.key(self.config.seed)
            return lora.attach(frozen, self.architecture.lora_rank, key, self.mesh)
        return lora.load(frozen, self.run.adapter(t), self.mesh)

    def write_adapter(self, t: int) -> None:
        """The adapters after iteration t as a PEFT directory, for serving beside the base and for resuming."""
        with files.replacing(self.run.adapter(t)) as part:
            part.mkdir()
            lora.save(self.policy(t), part, self.source.name, self.source.revision)

    def take_policy(self, t: int) -> Transformer:
        """The same, given up by the session: training consumes its arrays."""
        policy = self.policy(t)
        self._free()
        return policy

    def put_policy(self, t: int, policy: Transformer) -> None:
        self._free()
        self._policy = (t, policy)

    def sampler(self, t: int) -> Sampler:
        """The sampler with the policy after iteration t in it, and every program that the run's prompts need."""
        policy = self.policy(t)
        if self._sampled == t and self._sampler is not None:
            return self._sampler
        lengths = [len(p.ids) for part in (*self.sets.train, self.sets.heldout) for p in part]
        if self._sampler is None:
            sampling = self.config.sampling
            self._sampler = Sampler(
                policy, self.tokenizer, sampling, self.mesh, eos=self.eos, longest=max(lengths)
            )
        else:
            self._sampler.set_weights(policy)
        self._sampler.warm_up(lengths)
        self._sampled = t
        return self._sampler

    def rest_sampler(self) -> None:
        """Free what the sampler holds of the devices, for a judge on the mesh and for training's forward."""
        self._sampled = None
        if self._sampler is not None:
            self._sampler.release()

    def _free(self) -> None:
        """Nothing of a policy stays on the devices: neither its parameters nor the sampler's copy."""
        self._policy = None
        self.rest_sampler()

    def programs(self, steps_per_epoch: int) -> update.Programs:
        """Training's programs; kept, so that iterations of equal shapes compile once."""
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

    def batches(self, pairs: Sequence[Pair], t: int) -> batches.Batches:
        c = self.config
        longest = max(len(p.prompt_ids) + len(ids) for p in pairs for ids in p.response_ids)
        needs = memory.Update.of(c, self.architecture, self.mesh, longest)
        return batches.Batches(
            pairs,
            global_batch=c.fit.global_batch,
            epochs=c.fit.epochs,
            seed=c.seed,
            iteration=t,
            packing=needs.packing(sharding.memory_limit(self.mesh)),
        )

    def logprobs(self, t: int, pairs: Sequence[Pair], iteration: int) -> np.ndarray:
        """log pi(y|x) [n, R] under the policy after iteration t, in `iteration`'s batches and by training's forward."""
        self.rest_sampler()
        batches = self.batches(pairs, iteration)
        programs = self.programs(batches.steps_per_epoch)

        def on_progress(done: int) -> None:
            advance(done)
            self.metrics.poll()

        label = f"iteration {iteration} log-probs"
        with self.metrics.progress(label, len(pairs), "pairs", minor=True) as advance:
            return fit.logprobs(self.policy(t), batches, len(pairs), programs, self.mesh, on_progress)

    def as_judged(self, text: str) -> str:
        """An instruction as the judge reads it."""
        return chat_template.chat_text(self.tokenizer, text) if self.config.judge.prompt == "chat" else text

    def trained_on(self, t: int) -> str:
        """What iteration t starts from besides its policy, as the manifest names it."""
        return f"pairs_{t}" if self.given else f"prompts_{t}"

    def made_from(self, t: int, prompts: str) -> dict[str, str]:
        """What a file is made from: the policy after iteration t, and `prompts` as the manifest names them."""
        if t not in self._hashes:
            self._hashes[t] = files.sha256(hf.weight_files(self.run.export(t)))
        return {
            "policy": self._hashes[t],
            "judge": self.inputs["judge"],
            "prompts": self.inputs[prompts],
            "configuration": self._configuration(),
        }

    def notes(self) -> list[str]:
        """What the user should know before it starts."""
        lines = [
            f"prompts, {name}: " + ", ".join(f"{key} {n}" for key, n in sorted(count.items()))
            for name, count in self.sets.counts.items()
        ]
        fit_ = self.config.fit
        if fit_.baseline == "log_partition" and fit_.eta > LARGE_ETA:
            lines.append(
                f"warning: fit.baseline=log_partition with fit.eta={fit_.eta:g}: the estimate is all but the largest "
                f"win rate, and pushes nearly every response down; it is sensible up to an eta of about {LARGE_ETA:g}"
            )
        return lines

    def write_manifest(self) -> None:
        """What the run is made of; OUT is ours from here on. Raises BadInput if OUT was begun with other files."""
        if self.run.manifest.exists():
            before = files.read_json(self.run.manifest).get("sha256")
            if not isinstance(before, dict):
                raise BadInput(f"{self.run.manifest}: damaged; delete it and run again")
            other = sorted(name for name in before if self.inputs.get(name, before[name]) != before[name])
            if other:
                shown = ", ".join(other)
                raise BadInput(
                    f"--out {self.config.out}: {shown} differ from when it was begun; choose another --out"
                )
        devices = [str(device) for device in self.mesh.devices.flat]
        manifest = {
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "devices": {
                "platform": sharding.platform(self.mesh),
                "names": devices,
                "mesh": dict(self.mesh.shape),
            },
            "seed": self.config.seed,
            "model": {"name": self.source.name, "revision": self.source.revision},
            "judge": {"sources": self.judge.sources},
            "sha256": self.inputs,
            "prompts": self.sets.counts,
        }
        directory.claim(self.run, self.config)
        files.write_json(self.run.manifest, manifest)

    def _given(self) -> list[list[Pair]]:
        """Each iteration's pairs where pairs.source names them, to train on instead of playing."""
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
            found.append(pairs)
        return found

    def _source(self) -> repositories.Snapshot:
        """The base policy on disk; from the hub, the commit that the run was begun with."""
        pinned = model_card.revision(self.run) if self.run.manifest.exists() else None
        return names.fetch(self.config.model.path, pinned, tell=self.metrics.say)

    def _inputs(self) -> dict[str, str]:
        def texts(prompts: Sequence[Prompt]) -> str:
            return files.sha256_text("\0".join(prompt.text for prompt in prompts))

        names = (*repositories.TOKENIZER_FILES, "generation_config.json")
        found = [self.base / name for name in names if (self.base / name).is_file()]
        return {
            "base_weights": files.sha256([*hf.weight_files(self.base), self.base / "config.json"]),
            "tokenizer": files.sha256(found),
            "judge": self.judge.identity,
            "prompts_heldout": texts(self.sets.heldout),
            **{f"prompts_{t}": texts(prompts) for t, prompts in enumerate(self.sets.train, 1)},
            **{f"pairs_{t}": records.digest(pairs) for t, pairs in enumerate(self.given, 1)},
        }

    def _configuration(self) -> str:
        knobs = configuration.flat(self.config)
        fixed = {k: v for k, v in knobs.items() if not k.startswith(configuration.FREE_TO_CHANGE)}
        fixed["model.compute_dtype"] = str(self.compute_dtype)  # what auto came to
        return files.sha256_text(json.dumps(fixed, sort_keys=True))

    def _check_prompts(self) -> None:
        ids = [p.ids for part in (*self.sets.train, self.sets.heldout) for p in part]
        ids += [row for part in self.given for pair in part for row in (pair.prompt_ids, *pair.response_ids)]
        highest = max(map(max, ids))
        if highest >= self.architecture.vocab:
            raise BadInput(
                f"{self.base}: the tokenizer gives id {highest}, the model has {self.architecture.vocab} tokens"
            )
        longest = max(len(p.ids) for part in (*self.sets.train, self.sets.heldout) for p in part)
        new, room = self.config.sampling.max_new_tokens, self.architecture.max_positions
        if longest + new > room:
            raise BadInput(
                f"sampling.max_new_tokens={new} after a prompt of {longest} tokens exceeds the model's {room} "
                f"positions; lower it, or prompts.max_length to {room - new}"
            )


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Session]:
    """Claim OUT, start the judge's process before any device is touched, and open every input."""
    # The judge starts before the run directory is made: a missing judge must not leave a directory behind.
    with contextlib.ExitStack() as stack:
        judge_ = judge.open_judge(config.judge, model_card.judge_sources(RunDir(config.out)))
        stack.callback(judge_.close)
        run = stack.enter_context(directory.opened(config))
        metrics = stack.enter_context(Metrics(run))
        judge_.tell(metrics.say)
        stack.enter_context(metrics.stopping_on_sigterm())
        session = Session(config, run, metrics, judge_)
        if session.oracle is not None:
            stack.callback(session.oracle.close)
        session.write_manifest()
        yield session
