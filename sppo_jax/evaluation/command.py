"""The command `python -m sppo_jax.evaluate`: policies are asked, compared, measured, and written to files."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sppo_jax import compilation, files, prompts, sharding
from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import best_of, comparing, figures, formats, games, place, presets, questions, tables
from sppo_jax.evaluation.comparing import Named
from sppo_jax.evaluation.flags import Asked, run_of
from sppo_jax.evaluation.place import Place
from sppo_jax.evaluation.policies import Policy
from sppo_jax.evaluation.questions import Question
from sppo_jax.records import Responses
from sppo_jax.run import cluster, pod

Figures = dict[str, Any]
OTHERS = re.compile(r"[^A-Za-z0-9@._-]+")  # characters that a name of figures does not have
SHOWN = ("temperature", "top_p", "top_k", "max_new_tokens")  # knobs of sampling that a preset sets


def run(asked: Asked) -> None:
    """Answer what the command line asks. The result goes to standard output, and as JSON into a file below --out."""
    sampling = _sampling(asked)
    compilation.keep_programs()
    with cluster.joined(asked.config.distributed):
        with place.opened(asked.out) as at:
            evaluation = Evaluation(asked, at, sampling)
            with at.metrics.stopping_on_signals():
                evaluation.answer()
        pod.end()


class Evaluation:
    """One command: its policies, the questions that they are asked, and the sampling."""

    def __init__(self, asked: Asked, at: Place, sampling: Sampling):
        """Open the policies and read the questions. Raises BadInput for what is wrong with any of them."""
        self.asked, self.place, self.sampling, self.config = asked, at, sampling, asked.config
        # A run's own options are its own, unless the command line names options for all.
        of_all = "model.template" in asked.named or run_of(asked.policies[0]) is None
        options = asked.config.model.template if of_all else None
        self.policies = [Policy(name, asked.config, at.metrics.say, options) for name in asked.policies]
        self.questions = self._read()
        if asked.write:
            name, file = asked.write
            formats.check(name, Path(files.expand(file)), self.questions, arena_format=asked.arena_format)
        c = asked.config.mesh
        self.mesh: Mesh = sharding.make_mesh(c.data, c.fsdp, c.tensor)

    def answer(self) -> None:
        """Sample, compare, print and write."""
        if self.asked.write and not self.asked.best_of:
            name = self.asked.write[0]
            turns = formats.turns(name, self.questions, self._one_each)
            rows = [] if turns else self.respond(self.policies[0], 1, whole=name == "jsonl")
            self._write(turns or [row.responses[0] for row in rows])
            if len(self.policies) == 1:
                return
        texts = [question.prompt for question in self.questions]
        with comparing.opened(self.config, self.policies, self.place, texts) as judges:
            if self.asked.round_robin:
                self._tell("round-robin", judges, self.round_robin(judges), tables.round_robin)
            elif self.asked.best_of:
                self._tell(f"best-of-{self.asked.best_of}", judges, self.best_of(judges), tables.best_of)
            else:
                self._tell("win-rate", judges, self.win_rate(judges), tables.win_rate)

    def respond(self, policy: Policy, count: int, *, whole: bool = False) -> list[Responses]:
        """`count` responses of a policy to each question, as judges read them, or `whole`, with their thoughts."""
        sampling = dataclasses.replace(self.sampling, responses=count)
        texts = [question.prompt for question in self.questions]
        found = policy.respond(self.place, texts, self.mesh, sampling, self.config.seed)
        return found if whole else [policy.said(row) for row in found]

    def _one_each(self, texts: Sequence[str], temperature: float) -> list[str]:
        """One response of the first policy to each prompt text, at this temperature."""
        sampling = dataclasses.replace(self.sampling, responses=1, temperature=temperature)
        found = self.policies[0].respond(self.place, texts, self.mesh, sampling, self.config.seed)
        return [self.policies[0].said(row).responses[0] for row in found]

    def win_rate(self, judges: Sequence[Named]) -> Figures:
        """The figures of the first policy against the second. The same policy twice: its first response against its second."""
        mine, theirs = self.policies
        own = self.respond(mine, 1)
        same = mine.draws_as(theirs)
        others = self.respond(theirs, 2 if same else 1)
        ks = [(0, int(same))] * len(own)
        probabilities = {
            judge.name: judge.probabilities(self.place, f"{mine.name} against {theirs.name}", own, others, ks)
            for judge in judges
        }
        texts = [row.responses[0] for row in own]
        against = [row.responses[int(same)] for row in others]
        categories = [question.category for question in self.questions]
        return figures.of_pair(probabilities, texts, against, categories, own, others)

    def round_robin(self, judges: Sequence[Named]) -> Figures:
        """The matrix of win rates of all pairs, by each judge, with its ring and its von Neumann mixture."""
        for i, policy in enumerate(self.policies):
            if twin := next((other for other in self.policies[:i] if policy.draws_as(other)), None):
                raise BadInput(
                    f"--round-robin: {twin.name} and {policy.name} are the same policy: leave one of them out"
                )
        answers = [self.respond(policy, 1) for policy in self.policies]
        m, ks = len(answers), [(0, 0)] * len(self.questions)
        found: Figures = {"judges": {}}
        for judge in judges:
            matrix = np.full((m, m), 0.5)
            intervals: dict[str, list[float | None]] = {}
            for i in range(m):
                for j in range(i + 1, m):
                    title = f"{self.policies[i].name} against {self.policies[j].name}"
                    p = judge.probabilities(self.place, title, answers[i], answers[j], ks)
                    matrix[i, j], matrix[j, i] = p.mean(), 1 - p.mean()
                    intervals[f"{i},{j}"] = figures.interval(p)
            mixture = games.mixture(matrix)
            found["judges"][judge.name] = {
                "win_rate": matrix.tolist(),
                "interval": intervals,
                "cycle": games.cycle(matrix),
                "mixture": list(map(float, mixture.weights)),
                "gap": float(mixture.gap),
            }
        return found

    def best_of(self, judges: Sequence[Named]) -> Figures:
        """Win rates of the best of 1, 2, 4 ... N responses by the judge against one response of the opponent."""
        n, policy, opponent = self.asked.best_of, self.policies[0], self.policies[-1]
        alone = policy.draws_as(opponent)
        if self.sampling.temperature == 0:
            raise BadInput(
                "--best-of: at sampling.temperature=0 all responses to a prompt are equal; give one above 0"
            )
        own = self.respond(policy, n + alone)
        others = own if alone else self.respond(opponent, 1)
        logits = judges[0].logits(self.place, f"{policy.name}, best of {n}", comparing.as_rows(own, n))
        curve: list[Figures] = []
        picks = best_of.chosen(logits)
        for m, picked in picks.items():
            ks = [(int(k), n if alone else 0) for k in picked]
            title = f"{policy.name}, best of {m}"
            curve.append(
                {"n": m, "win_rate": {}}
                | {
                    "characters": float(
                        np.mean([len(row.responses[k]) for row, (k, _) in zip(own, ks, strict=True)])
                    )
                }
            )
            for judge in judges:
                p = judge.probabilities(self.place, title, own, others, ks)
                curve[-1]["win_rate"][judge.name] = figures.rate(p)
        if self.asked.write:
            self._write([row.responses[int(k)] for row, k in zip(own, picks[n], strict=True)])
        return {"curve": curve}

    def _read(self) -> list[Question]:
        """The questions: of --prompts, else the held-out prompts of the configuration."""
        p = self.config.prompts
        if self.asked.prompts:
            limit = self.config.eval.prompts if "eval.prompts" in self.asked.named else None
            return questions.read(
                self.asked.prompts,
                split=p.heldout_split,
                column=p.column,
                limit=limit,
                turns=p.turns,
                tell=self.place.metrics.say,
            )
        sets = prompts.load(self.config, self.policies[0].tokenizer)
        return [Question(prompt.text, "", {}) for prompt in sets.heldout]

    def _write(self, outputs: Sequence[Any]) -> None:
        """Write the file of --write: a response of the first policy to each question, or what the format draws itself."""
        assert self.asked.write is not None
        if not pod.first():
            return
        policy = self.policies[0]
        name, file = self.asked.write
        lines = formats.write(
            name, Path(files.expand(file)), self.questions, outputs,
            model=policy.name, preset=self.asked.preset, arena_format=self.asked.arena_format,
            tstamp=policy.made, weights=policy.weights,
        )  # fmt: skip
        for line in lines:
            self.place.metrics.say(line)
        self.place.metrics.say(f"{len(self.questions)} responses: {file}")

    def _head(self) -> Figures:
        return {
            "policies": [policy.name for policy in self.policies],
            "prompts": len(self.questions),
            "seed": self.config.seed,
            "sampling": {key: getattr(self.sampling, key) for key in SHOWN},
        }

    def _tell(
        self, kind: str, judges: Sequence[Named], found: Figures, table: Callable[[Figures], str]
    ) -> None:
        """Print the figures, and write them below --out: in one file for each question, prompts, sampling and judges."""
        if not pod.first():
            return
        texts = "\0".join(question.prompt for question in self.questions)
        head = self._head() | {
            "prompts_sha256": files.sha256_text(texts),
            "judge_identities": {judge.name: judge.judge.identity for judge in judges},
        }
        names = OTHERS.sub("_", "-".join(name.strip("/") for name in self.asked.policies))[-100:]
        path = self.place.root / f"{kind}-{names}-{files.sha256_text(json.dumps(head))[:8]}.json"
        self.place.metrics.say(table(head | found))
        files.write_json(path, head | found)
        self.place.metrics.say(f"figures: {path}")


def _sampling(asked: Asked) -> Sampling:
    """The configured sampling, with a preset's settings for what the command line does not name."""
    found = presets.applied(asked.config.sampling, asked.write[0] if asked.write else "", asked.preset)
    own = {key: getattr(asked.config.sampling, key) for key in SHOWN if f"sampling.{key}" in asked.named}
    return dataclasses.replace(found, **own)
