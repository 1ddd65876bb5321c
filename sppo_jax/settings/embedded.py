"""The embedded policy, judge and prompts go together: each is the default beside the others, and never beside a user's own.

A part that is named, in a file or a flag, is taken as it is; `notes` then warns of a mixture.
"""

import dataclasses

from sppo_jax.config import EMBEDDED, Config
from sppo_jax.errors import BadInput

JUDGE = f"{EMBEDDED}pairrm"
TRAINING = f"{EMBEDDED}prompts/train_{{iteration}}.jsonl"
HELD_OUT = f"{EMBEDDED}prompts/heldout.jsonl"


def resolve(config: Config) -> Config:
    """Return the configuration with judge.path, prompts.source and prompts.heldout filled in where they are empty.

    prompts.heldout stays empty beside training prompts of the user's own, a share of which is then held out. Raises
    BadInput, with all that has to be named, where the policy is the user's own. A judge or prompts that are not read,
    beside a judge.backend or pairs of the user's own, get the embedded names.
    """
    judge, prompts = config.judge, config.prompts
    if not _is_embedded(config.model.path) and (missing := _missing(config)):
        raise BadInput(
            f"model.path={config.model.path} is a model of your own, and the embedded judge and prompts belong to the "
            f"embedded policy alone: give {' and '.join(missing)}"
        )
    source = prompts.source or TRAINING
    heldout = prompts.heldout or (HELD_OUT if _is_embedded(source) else "")
    return dataclasses.replace(
        config,
        judge=dataclasses.replace(judge, path=judge.path or JUDGE),
        prompts=dataclasses.replace(prompts, source=source, heldout=heldout),
    )


def notes(config: Config) -> list[str]:
    """Return a warning for each embedded part of a resolved configuration that meets parts of the user's own."""
    policy, prompts = config.model.path, config.prompts
    own = not _is_embedded(policy)
    read = {"pairs.source": config.pairs.source, "prompts.heldout": prompts.heldout}
    if not (config.pairs.source and prompts.heldout):
        read["prompts.source"] = prompts.source
    read = {key: name for key, name in read.items() if name}
    lines = []
    theirs = [f"{key}={name}" for key, name in read.items() if not _is_embedded(name)]
    if _has_pairrm(config) and _is_embedded(config.judge.path) and (own or theirs):
        lines.append(f"judge.path={config.judge.path} is a toy that knows only the embedded prompts")
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
    return [f"warning: {line}" for line in lines]


def _missing(config: Config) -> list[str]:
    """Return the flags, with examples, that a policy of the user's own needs."""
    missing = []
    if _has_pairrm(config) and not config.judge.path:
        missing.append(f"--judge.path llm-blender/PairRM-hf ({JUDGE} to take the toy's on purpose)")
    prompts = "jsonl:PATH, parquet:PATH, hf:NAME or tfds:NAME"
    if not config.pairs.source and not config.prompts.source:
        missing.append(f"--prompts.source {prompts}")
    if config.pairs.source and not config.prompts.source and not config.prompts.heldout:
        missing.append(f"--prompts.heldout {prompts}")
    return missing


def _has_pairrm(config: Config) -> bool:
    """Return whether the judge is PairRM, which judge.path names, and not a function of the user's own."""
    return ":" not in config.judge.backend


def _is_embedded(name: str) -> bool:
    return name.startswith(EMBEDDED)
