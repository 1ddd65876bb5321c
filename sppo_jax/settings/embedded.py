"""The embedded policy, judge and prompts go together: each is the default beside the others, and never beside a user's own.

A part that is named, in a file or a flag, is taken as it is; `notes` then warns of a mixture.
"""

import contextlib
import dataclasses

from sppo_jax.config import EMBEDDED, Config
from sppo_jax.errors import BadInput

JUDGE = f"{EMBEDDED}pairrm"
TRAINING = f"{EMBEDDED}prompts/train_{{iteration}}.jsonl"
HELD_OUT = f"{EMBEDDED}prompts/heldout.jsonl"
ORACLE = "sppo_jax.tiny.world:oracle"  # the true preference of the embedded prompts' world
NO_ORACLE = "--eval.oracle= (in a file oracle: '')"


def resolve(config: Config) -> Config:
    """Return the configuration with judge.path, prompts.source and prompts.heldout filled in where they are empty.

    prompts.heldout stays empty beside training prompts, pairs or responses of the user's own, a share of which is then held
    out, and prompts.source beside responses, which have prompts of their own.
    Raises BadInput, with all that has to be named, where the policy is the user's own. A judge or prompts that are not
    read, beside a judge.backend or pairs of the user's own, get the embedded names. Whether the embedded oracle knows the
    held-out prompts is seen when it is tried.
    """
    judge, prompts = config.judge, config.prompts
    if not _is_embedded(config.model.path) and (missing := _missing(config)):
        raise BadInput(
            f"model.path={config.model.path} is a model of your own, and the embedded judge and prompts belong to the "
            f"embedded policy alone: give {' and '.join(missing)}"
        )
    policy = _is_embedded(config.model.path)
    source = prompts.source or ("" if config.responses.source else TRAINING)
    # Beside pairs of the user's own for a policy of the user's own, the embedded training prompts are not read.
    embedded = _is_embedded(source) and (policy or not config.pairs.source)
    heldout = prompts.heldout or (HELD_OUT if embedded else "")
    return dataclasses.replace(
        config,
        judge=dataclasses.replace(judge, path=judge.path or JUDGE),
        prompts=dataclasses.replace(prompts, source=source, heldout=heldout),
    )


def unnamed(config: Config) -> list[str]:
    """Return which of judge.path, prompts.source and prompts.heldout could be left empty, and would be filled in as they are."""
    found = []
    for section, name in (("judge", "path"), ("prompts", "source"), ("prompts", "heldout")):
        blank = dataclasses.replace(getattr(config, section), **{name: ""})
        with contextlib.suppress(BadInput):
            if resolve(dataclasses.replace(config, **{section: blank})) == config:
                found.append(f"{section}.{name}")
    return found


def notes(config: Config) -> list[str]:
    """Return a warning for each embedded part of a resolved configuration that meets parts of the user's own."""
    policy, prompts = config.model.path, config.prompts
    own = not _is_embedded(policy)
    read = {"prompts.heldout": prompts.heldout} if prompts.heldout else {}
    key, name = trained_on(config)
    read |= {key: name}
    lines = []
    theirs = [f"{key}={name}" for key, name in read.items() if not _is_embedded(name)]
    if _has_pairrm(config) and _is_embedded(config.judge.path) and (own or theirs):
        lines.append(
            f"judge.path={config.judge.path} is a toy that can judge the embedded policy and prompts alone"
        )
    if not own and theirs:
        lines.append(
            f"model.path={policy} is a toy that knows only the embedded prompts, not {' and '.join(theirs)}"
        )
    if own:
        lines += [
            f"{key}={name} are prompts of a toy's small world"
            for key, name in read.items()
            if _is_embedded(name)
        ]
        if config.eval.oracle == ORACLE:
            lines.append(f"eval.oracle={ORACLE} is the true preference of a toy's small world")
    return [f"warning: {line}" for line in lines]


def trained_on(config: Config) -> tuple[str, str]:
    """Return the knob that names what is trained on, and its value: pairs, responses or prompts."""
    if config.pairs.source:
        return "pairs.source", config.pairs.source
    if config.responses.source:
        return "responses.source", config.responses.source
    return "prompts.source", config.prompts.source


def _missing(config: Config) -> list[str]:
    """Return the flags, with examples, that a policy of the user's own needs."""
    missing = []
    if _has_pairrm(config) and not config.judge.path:
        missing.append(f"--judge.path llm-blender/PairRM-hf ({JUDGE} to take the toy's on purpose)")
    if not trained_on(config)[1]:
        missing.append("--prompts.source jsonl:PATH, parquet:PATH, hf:NAME or tfds:NAME")
    if missing and config.eval.oracle == ORACLE and not _is_embedded(_held_out(config)):
        missing.append(f"{NO_ORACLE}, since it knows the embedded prompts alone")
    return missing


def _held_out(config: Config) -> str:
    """Return the source of the held-out prompts, which the oracle judges."""
    return config.prompts.heldout or trained_on(config)[1]


def _has_pairrm(config: Config) -> bool:
    """Return whether the judge is PairRM, which judge.path names, and not a function of the user's own."""
    return ":" not in config.judge.backend


def _is_embedded(name: str) -> bool:
    return name.startswith(EMBEDDED)
