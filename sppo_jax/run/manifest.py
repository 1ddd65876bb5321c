"""manifest.json: the digests of a run's inputs, and the commits of the hub to which it is pinned."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sppo_jax import config as configuration
from sppo_jax import files, records, sharding
from sppo_jax.config import Config
from sppo_jax.errors import BadInput
from sppo_jax.hub.repositories import TEMPLATES, TOKENIZER_FILES, Snapshot
from sppo_jax.models import hf
from sppo_jax.records import Pair, Prompt, Responses
from sppo_jax.run import directory
from sppo_jax.run.directory import BASE, RunDir
from sppo_jax.settings import resuming

SECTIONS = ("model", "judge", "versions", "devices", "sha256", "prompts")
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


def read(run: RunDir) -> dict[str, Any]:
    """The manifest of a run that was begun. Raises BadInput if it is missing, damaged, or another program's."""
    try:
        manifest = files.read_json(run.manifest)
    except BadInput as error:
        raise _damaged(run, str(error)) from None
    for section in SECTIONS:
        if not isinstance(manifest.setdefault(section, {}), dict):
            raise _damaged(run, f"{run.manifest}: {section} is not an object")
    return manifest


def model_revision(manifest: Mapping[str, Any]) -> str | None:
    """The hub's commit of the base policy; None for a policy from a directory."""
    found = manifest["model"].get("revision")
    return found if isinstance(found, str) else None


def pinned_model(run: RunDir) -> str | None:
    """`model_revision` of the run's manifest; None before a run was begun."""
    return model_revision(read(run)) if _begun(run) else None


def pinned_judge(run: RunDir) -> dict[str, str]:
    """{repository: commit} of the hub from which the judge came; empty before a run was begun."""
    found = read(run)["judge"].get("sources") if _begun(run) else None
    return {str(name): str(commit) for name, commit in found.items()} if isinstance(found, dict) else {}


def _begun(run: RunDir) -> bool:
    """Whether the manifest is there and the run's own: other programs have files of that name, too."""
    try:
        return files.exists(run.config) and files.exists(run.manifest)
    except BadInput as error:
        raise BadInput(f"--out {error}; choose another directory") from None


def digests(
    base: Path,
    judge: str,
    heldout: Sequence[Prompt],
    train: Sequence[Sequence[Prompt]],
    given: Sequence[Sequence[Pair]],
    answered: Sequence[Sequence[Responses]] = (),
) -> dict[str, str]:
    """sha256 of every input of a run by its name, as the manifest records it.

    `judge`: the judge's identity; `given`, `answered`: each iteration's pairs or responses that were made elsewhere.
    """

    def texts(prompts: Sequence[Prompt]) -> str:
        return files.sha256_text("\0".join(prompt.text for prompt in prompts))

    # The template named default wins over chat_template.jinja; the others in its folder are not used.
    names = (*TOKENIZER_FILES, "generation_config.json", f"{TEMPLATES}/default.jinja")
    return {
        "base_weights": files.sha256([*hf.weight_files(base), base / "config.json"]),
        "tokenizer": files.sha256([base / name for name in names if (base / name).is_file()]),
        "judge": judge,
        "prompts_heldout": texts(heldout),
        **{f"prompts_{t}": texts(prompts) for t, prompts in enumerate(train, 1)},
        **{f"pairs_{t}": records.digest(pairs) for t, pairs in enumerate(given, 1)},
        **{f"responses_{t}": records.digest(rows) for t, rows in enumerate(answered, 1)},
    }


class Provenance:
    """The inputs of each file of a run: `made_from` picks them from the digests of the run's inputs."""

    def __init__(
        self,
        run: RunDir,
        config: Config,
        resolved: Mapping[str, str],
        inputs: Mapping[str, str],
        unread: tuple[str, ...] = (),
    ):
        """`resolved`: what knobs at "auto" come to; `inputs`: the result of `digests`.

        `unread`: how the names of knobs begin that are left out, to compare files that do not depend on them.
        """
        self.inputs, self.resolved = dict(inputs), dict(resolved)
        self._run = run
        self._policies = {BASE: self.inputs["base_weights"]}
        knobs = configuration.flat(config)
        fixed = {k: v for k, v in knobs.items() if not k.startswith(resuming.FREE_TO_CHANGE)}
        fixed.update(resolved)
        later = resuming.LATER
        fixed = {k: v for k, v in fixed.items() if k not in later or v != later[k]}
        fixed = {k: v for k, v in fixed.items() if not k.startswith(unread)}
        self._configuration = files.sha256_text(json.dumps(fixed, sort_keys=True))

    def made_from(self, t: int, prompts: str) -> dict[str, str]:
        """The digests of a file's inputs: the policy after iteration t, and the input named `prompts`."""
        if t not in self._policies:
            self._policies[t] = files.sha256(hf.weight_files(self._run.export(t)))
        return {
            "policy": self._policies[t],
            "judge": self.inputs["judge"],
            "prompts": self.inputs[prompts],
            "configuration": self._configuration,
        }


def write(
    run: RunDir,
    config: Config,
    *,
    source: Snapshot,
    mesh: Mesh,
    judge_sources: Mapping[str, str],
    inputs: Mapping[str, str],
    prompts: Mapping[str, Mapping[str, int]],
) -> None:
    """Claim OUT for this configuration and write its manifest.

    Raises BadInput if OUT was begun with other files. Another judge is none of them as long as nothing was judged there.
    `prompts`: counts of each set of prompts: rows read, left out and kept.
    """
    if files.exists(run.manifest):
        _check_inputs(run, inputs)
    manifest = {
        "versions": {name: installed(name) for name in PACKAGES} | {"python": platform.python_version()},
        "devices": {
            "platform": sharding.platform(mesh),
            "names": [str(device) for device in mesh.devices.flat],
            "mesh": dict(mesh.shape),
        },
        "seed": config.seed,
        "model": {"name": source.name, "revision": source.revision, "template": dict(config.model.template)},
        "judge": {"sources": dict(judge_sources)},
        "sha256": dict(inputs),
        "prompts": prompts,
    }
    directory.claim(run, config)
    files.write_json(run.manifest, manifest)


def installed(package: str) -> str:
    """The version of a package, "unknown" where it is not installed: its source may be on the path all the same."""
    try:
        return version(package) or "unknown"
    except PackageNotFoundError:
        return "unknown"


def _check_inputs(run: RunDir, inputs: Mapping[str, str]) -> None:
    """Raise BadInput unless the run was begun with these inputs, or with another judge that has judged nothing yet."""
    before = read(run)["sha256"]
    if not before:
        raise _damaged(run, f"{run.manifest}: there are no digests in it")
    other = sorted(name for name in before if inputs.get(name, before[name]) != before[name])
    judged = _judged(run) if "judge" in other else None
    if judged is None:
        other = [name for name in other if name != "judge"]
    if other:
        by = f" ({judged.relative_to(run.root)} is by the judge of then)" if judged else ""
        shown = ", ".join(other)
        raise BadInput(f"--out {run.root}: {shown} differ from when it was begun{by}; choose another --out")


def _judged(run: RunDir) -> Path | None:
    """The first file of a run that its judge had a part in; None if nothing was judged yet."""
    for t in run.iterations():
        shards = sorted((run.iteration(t) / "preferences").glob("*"))  # with the hidden ones of single rows
        rest = (run.heldout(t, "probe"), run.pairs(t), run.evaluation(t))
        if found := next((path for path in (*shards, *rest) if files.exists(path)), None):
            return found
    return None


def _damaged(run: RunDir, what: str) -> BadInput:
    """The one line about a manifest that is not one: a run's own has its configuration beside it."""
    if not files.exists(run.manifest):
        return BadInput(f"{run.manifest}: no such file: no run was begun there")
    if not files.exists(run.config):
        return BadInput(f"{what}: not the manifest of a run; choose another --out")
    return BadInput(f"{what}: damaged; delete it and run the same command again")
