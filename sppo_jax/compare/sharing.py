"""What runs of one seed have in common is made once: the files of stages that come before any training.

A file names what it was made from (run/manifest.py). Where two runs' names are equal without the knobs that its stage does not
read, the one run's file is the very file that the other would make, and is written there under that one's name.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sppo_jax import records
from sppo_jax.compare.flags import Game
from sppo_jax.errors import BadInput
from sppo_jax.files import exists
from sppo_jax.records import Pair, Preferences, Responses
from sppo_jax.run import manifest
from sppo_jax.run.directory import BASE, RunDir, shard_ranges
from sppo_jax.run.manifest import Provenance
from sppo_jax.session import Session

FIRST = 1  # the iteration that begins with the base, as that of every run
# How the knobs begin that a stage does not read. What is not listed counts, a knob of tomorrow, too.
JUDGED = ("pairs.", "fit.", "eval.", "judge.target")
SAMPLED = (*JUDGED, "judge.")
# The probe's log-probs are training's own, in batches that fit.global_batch and fit.epochs shape.
SCORED = (
    "pairs.select", "fit.loss", "fit.eta", "fit.baseline", "fit.learning_rate", "fit.warmup",
    "fit.schedule_epochs", "fit.max_grad_norm", "fit.anchor", "judge.target", "eval.prompts", "eval.oracle",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The files of a stage that runs may share, made of the prompts that the manifest calls `prompts`."""

    name: str
    kind: type
    files: list[str]  # below the run directory
    prompts: str
    unread: tuple[str, ...]

    def paths(self, run: RunDir) -> list[Path]:
        """Its files in a run."""
        return [run.root / name for name in self.files]

    def missing(self, run: RunDir) -> bool:
        """Whether a run lacks some of its files."""
        return not all(map(exists, self.paths(run)))


def take(session: Session, others: Sequence[Game]) -> None:
    """Write what earlier runs of the comparison have made, and this one would make equally, into this one's directory.

    Prints what was reused, and of which run. What cannot be reused is made by the run itself.
    """
    run = session.paths
    parts = _parts(session)
    taken: dict[str, list[str]] = {}
    for part in parts if not exists(run.evaluation(FIRST)) else ():
        # Preferences name their responses, which are there by now, if they can be reused.
        if part.missing(run) and not (part.kind is Preferences and parts[1].missing(run)):
            for game in others:
                if game.seed == session.config.seed and _taken(part, session, game):
                    taken.setdefault(game.title, []).append(part.name)
                    break
    for title, names in taken.items():
        session.metrics.say(
            f"reused {len(names)} of {len(parts)} stages before training, of {title}: {', '.join(names)}"
        )


def _parts(session: Session) -> list[Part]:
    """What may be shared, in the order in which it is made."""
    held_out, asked = "prompts_heldout", f"responses_{FIRST}" if session.answered else f"prompts_{FIRST}"
    base, probe = session.paths.heldout(BASE, "responses"), session.paths.heldout(FIRST, "probe")
    found: list[tuple[str, type, list[Path], str, tuple[str, ...]]] = [
        ("the base's held-out responses", Responses, [base], held_out, SAMPLED)
    ]
    if not session.given:  # by pairs.source
        found += [
            ("responses", Responses, _shards(session, "responses"), asked, SAMPLED),
            ("preferences", Preferences, _shards(session, "preferences"), asked, JUDGED),
        ]
    found.append(("the probe", Pair, [probe], held_out, SCORED))
    return [
        Part(name, kind, [str(path.relative_to(session.paths.root)) for path in paths], prompts, unread)
        for name, kind, paths, prompts, unread in found
    ]


def _shards(session: Session, stage: str) -> list[Path]:
    """The files of a stage of the first iteration."""
    count = len(shard_ranges(len(session.sets.train[0]), session.config.sampling.shard_prompts))
    return [session.paths.shard(FIRST, stage, i, count) for i in range(count)]


def _taken(part: Part, session: Session, game: Game) -> bool:
    """Whether a part was there in another run, is what this one would make, and is in this one's directory now."""
    run, other, mine = session.paths, RunDir(game.config.out), session.provenance
    if not exists(other.manifest) or part.missing(other):
        return False
    try:
        inputs = manifest.read(other)["sha256"]
        if part.prompts not in inputs:
            return False

        def made_from(unread: tuple[str, ...] = ()) -> dict[str, str]:
            return Provenance(other, game.config, mine.resolved, inputs, unread).made_from(BASE, part.prompts)

        ours = Provenance(run, session.config, mine.resolved, mine.inputs, part.unread)
        records.check_made_from(
            other.root, part.kind, made_from(part.unread), ours.made_from(BASE, part.prompts)
        )
        # Files of other names, such as those of another device's dtype, are refused here.
        rows = [
            records.read(path, part.kind, made_from() | named)
            for path, named in zip(part.paths(other), _named(part, run), strict=True)
        ]
        if part.kind is Pair:
            rows = [_with_targets(rows[0], game.config.fit.eta, session.config.fit.eta)]
    except BadInput:
        return False
    own = mine.made_from(BASE, part.prompts)
    for path, found, named in zip(part.paths(run), rows, _named(part, run), strict=True):
        if not exists(path):
            records.replace(path, part.kind, found, own | named)
    return True


def _named(part: Part, run: RunDir) -> list[dict[str, str]]:
    """What each file of a part names beyond the run's own inputs: preferences their responses."""
    if part.kind is not Preferences:
        return [{} for _ in part.files]
    of = [run.root / name.replace("preferences", "responses", 1) for name in part.files]
    return [{"responses": records.digest(records.read(path, Responses))} for path in of]


def _with_targets(probe: Sequence[Any], theirs: float, eta: float) -> list[Any]:
    """A probe made with the eta `theirs` as one made with `eta` is. Raises BadInput where its targets are something else."""

    def targets(pair: Pair, eta: float) -> list[float]:
        found: list[float] = (eta * (np.asarray(pair.win_rate) - pair.baseline)).tolist()
        return found

    if any(pair.target != targets(pair, theirs) for pair in probe):
        raise BadInput("the probe has other targets than those of its win rates")
    return [dataclasses.replace(pair, target=targets(pair, eta)) for pair in probe]
