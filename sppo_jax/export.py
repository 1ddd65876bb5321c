"""Stage 6: parameters → a directory that `transformers` loads: safetensors, config.json, tokenizer, model card.

`python -m sppo_jax.export --run OUT --iteration 3 --to DIR` makes such a directory from a run's orbax checkpoint; with
`--push` it is uploaded afterwards.
"""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sppo_jax import command, config_file, files
from sppo_jax.command import Flags, call
from sppo_jax.errors import BadInput, one_line
from sppo_jax.hub import names, repositories
from sppo_jax.run.directory import BASE, RunDir

# jax and modules that import it come in the functions, after the flags are checked: --help and bad flags need no jax.
if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sppo_jax.config import Config
    from sppo_jax.hub.repositories import Snapshot
    from sppo_jax.models.transformer import Transformer

DTYPES = ("float32", "bfloat16", "float16")


def export(
    model: "Transformer", base: Path, to: Path, *, dtype: str = "float32", card: str | None = None
) -> None:
    """Write directory `to`: the weights as `dtype`, with configuration and tokenizer files of `base`; whole or not at all.

    `card` becomes README.md. Raises BadInput if the disk has no room or `to` cannot be written.
    """
    from safetensors import SafetensorError

    from sppo_jax.models import hf

    _check_room(model, to, dtype)
    try:
        with files.replacing(to) as part:
            part.mkdir()
            hf.save(model, part, dtype=dtype)
            config = files.read_json(base / "config.json")
            config |= {key: dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in config}
            if hf.read_architecture(base).tied and not model.architecture.tied:
                config["tie_word_embeddings"] = False  # the base's files hold a head of its own
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in (f for pattern in repositories.BESIDE for f in base.glob(pattern) if f.is_file()):
                copy = part / file.relative_to(base)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
            if card is not None:
                (part / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise BadInput(f"{to}: cannot be written: {reason}") from None


def export_policy(policy: "Transformer", source: "Snapshot", run: "RunDir", t: int) -> None:
    """Write the policy after iteration t, and its adapters, if it has any, as a PEFT directory.

    The adapters serve beside the base, and a resumed run reads them. All processes that hold the policy call this together;
    process 0 writes.
    """
    from sppo_jax.files import replacing
    from sppo_jax.models import hf, lora
    from sppo_jax.run import pod

    if not pod.first():
        if policy.architecture.lora_rank:
            hf.take_part(policy, lora.table())
        hf.take_part(policy)
        pod.meet("export")
        return
    if policy.architecture.lora_rank:
        with replacing(run.adapter(t)) as part:
            part.mkdir()
            lora.save(policy, part, source.name, source.revision)
    export(policy, source.directory, run.export(t))
    pod.meet("export")


def main(words: Sequence[str]) -> None:
    """Export the policy of one iteration, push an export, or export and push it."""
    flags = Flags(
        "sppo_jax.export",
        "Write the policy after an iteration of a run as a Hugging Face checkpoint.",
        "With --push and without --run, an existing export is uploaded.",
    )
    flags.add_argument("--run", metavar="OUT", help="run directory")
    flags.add_argument(
        "--iteration", type=int, metavar="T", help="iteration after which the policy is exported; 0: the base"
    )
    flags.add_argument("--to", required=True, metavar="DIR", help="a new directory")
    flags.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the written weights (default: the base checkpoint's)"
    )
    flags.add_argument(
        "--push", metavar="OWNER/NAME", help="upload DIR to this repository of the hub at the end"
    )
    flags.add_argument("--private", action="store_true", help="make the repository private if it is new")
    args = flags.read(words)
    to = _path("--to", args.to)
    if (args.run is None) != (args.iteration is None):
        raise BadInput("--run and --iteration go together: give both, as --run OUT --iteration 3")
    if args.run is None and not args.push:
        raise BadInput("nothing to do: give --run and --iteration, or --push")
    if args.run is None and args.dtype:
        raise BadInput(f"--dtype {args.dtype}: {to} is uploaded as it is; give --run and --iteration too")
    if args.private and not args.push:
        raise BadInput("--private is for the repository that --push OWNER/NAME makes; give that too")
    if args.push and repositories.parse(args.push)[1] is not None:
        raise BadInput(f"--push {args.push}: no revision here; the hub makes a commit")
    if args.run is not None:
        from sppo_jax.run import bucket

        with bucket.reading(args.run, bucket.weights_of(args.iteration)):
            _from_run(_path("--run", str(bucket.local(args.run))), args.iteration, to, args.dtype)
        print(to)
    if args.push:
        _push(to, args.push, args.private)


def _path(flag: str, name: str) -> Path:
    """Return the path that a flag names. Raises BadInput for a name that no file can have."""
    try:
        path = Path(files.expand(name))
        files.exists(path)  # too long, half of a character, below a directory that is closed
    except BadInput as error:
        raise BadInput(f"{flag} {error}") from None
    return path


def _from_run(root: Path, t: int, to: Path, dtype: str | None) -> None:
    """Write the policy after iteration t of the run at `root`, with its model card."""

    from sppo_jax import sharding
    from sppo_jax.models import hf
    from sppo_jax.report import model_card
    from sppo_jax.run import manifest
    from sppo_jax.run.directory import BASE, RunDir

    run = RunDir(root)
    if not files.is_file(run.config):
        raise BadInput(
            f"--run {root}: {'not a run directory (it has no config.yaml)' if files.exists(root) else 'no such directory'}; "
            "give the OUT of a run"
        )
    config = config_file.load([run.config])
    _check_target(to)
    if t not in (there := _iterations(run)):
        shown = ", ".join(str(i) for i in there)
        raise BadInput(f"--iteration {t}: {root} has no policy of it; there are {shown} ({BASE}: the base)")
    base = names.fetch(config.model.path, manifest.pinned_model(run)).directory

    mesh = sharding.make_mesh(1, -1, 1, devices=sharding.all_devices(of_this_process=True))
    model = hf.load(base, mesh=mesh) if t == BASE else _policy(run, config, t, base, mesh)
    described = None if t == BASE else model_card.text(run, t)
    export(model, base, to.absolute(), dtype=dtype or own_dtype(base), card=described)


def _policy(run: RunDir, config: "Config", t: int, base: Path, mesh: "Mesh") -> "Transformer":
    """The policy after iteration t, float32, from its newest orbax checkpoint, which any mesh may have written.

    Adapters are put beside the base's weights. Those of a finished iteration are read from its export, and merged as the run
    merged them.
    """
    from sppo_jax.models import hf
    from sppo_jax.training import checkpoint

    finished = run.export(t).exists()
    if (finished and config.model.lora_rank) or not checkpoint.begun(run.checkpoints(t)):
        return hf.load(run.export(t), mesh=mesh)
    found = _from_checkpoint(run, config, t, base, mesh, last=finished)
    if found is None and finished:
        command.say(f"iteration {t}: its policy is read from {run.export(t)} instead")
        return hf.load(run.export(t), mesh=mesh)
    if found is None:
        raise BadInput(
            f"--iteration {t}: no checkpoint of it is whole (each is damaged, or not a checkpoint of this model); run the "
            "game's command again, which trains it again, or choose an iteration before"
        )
    if not finished:
        command.say(f"iteration {t} is unfinished: this is its policy after update {found[0]}")
    return found[1]


def _from_checkpoint(
    run: RunDir, config: "Config", t: int, base: Path, mesh: "Mesh", *, last: bool
) -> "tuple[int, Transformer] | None":
    """The step and the policy, float32, of iteration t's newest whole checkpoint; None where there is none.

    `last`: also None where the newest checkpoint is not whole. Damaged ones are reported on standard error.
    """
    from flax import nnx

    from sppo_jax.models import hf, lora
    from sppo_jax.models.transformer import Adapter, Transformer
    from sppo_jax.training import checkpoint

    if rank := config.model.lora_rank:
        whole = hf.load(base, mesh=mesh)
        architecture = dataclasses.replace(whole.architecture, lora_rank=rank)
        adapted = lora.beside(whole, architecture, lora.abstract(architecture, mesh))
        graph, trained, *frozen = nnx.split(adapted, Adapter, ...)
    else:
        architecture = hf.stored_architecture(base)
        graph, trained, *frozen = nnx.split(Transformer(architecture, dict(hf.abstract(architecture, mesh))))
    with checkpoint.Checkpoints(run.checkpoints(t), read_only=True) as saved:
        found = saved.newest_params(trained, command.say)
        if found is None or (last and found[0] != saved.latest()):
            return None
    return found[0], nnx.merge(graph, found[1], *frozen)


def mend(
    run: RunDir, config: "Config", source: "Snapshot", t: int, mesh: "Mesh", free: Callable[[], None]
) -> None:
    """Write the export of the finished iteration t again from its checkpoint, if it is damaged or was deleted.

    `free` frees the policy in memory before another is read. Raises BadInput where no checkpoint is whole.
    """
    from sppo_jax.run import pod
    from sppo_jax.training import checkpoint

    if t == BASE or not (fault := pod.agreed("fault", lambda: _fault(run, config, t))):
        return
    free()
    found = None
    if checkpoint.begun(run.checkpoints(t)):
        found = _from_checkpoint(run, config, t, source.directory, mesh, last=True)
    if found is None:
        raise BadInput(
            f"{fault}; no checkpoint of iteration {t} is whole either: restore {run.export(t)} from a copy, or delete "
            f"{run.iteration(t)} and the iterations after it, and run the same command again, which plays them again"
        )
    export_policy(found[1], source, run, t)
    if pod.first():
        command.say(f"{fault}; it is written again from its checkpoint")


def _fault(run: RunDir, config: "Config", t: int) -> str:
    """What is wrong with the export of iteration t or with its adapters, by their headers; empty where nothing is."""
    from sppo_jax.models import hf, lora

    try:
        if not files.is_dir(run.export(t)):
            return f"{run.export(t)}: missing"
        architecture = hf.read_architecture(run.export(t))
        hf.check_tensors(
            run.export(t),
            hf.table(architecture),
            architecture,
            hf.tensor_files(hf.weight_files(run.export(t))),
        )
        if rank := config.model.lora_rank:
            adapted = dataclasses.replace(architecture, lora_rank=rank)
            hf.check_tensors(
                run.adapter(t), lora.table(), adapted, hf.tensor_files([run.adapter(t) / lora.WEIGHTS])
            )
            files.read_json(run.adapter(t) / lora.CONFIG)
    except BadInput as error:
        return f"{run.export(t)}: {one_line(error)}"
    return ""


def own_dtype(directory: Path) -> str:
    """The dtype in a checkpoint's config.json, else that of its first tensor; float32 for one that is not in DTYPES."""
    from safetensors import SafetensorError, safe_open

    from sppo_jax.models import config_json, hf

    dtype = config_json.dtype(files.read_json(directory / "config.json"))
    if dtype is None:
        file = hf.weight_files(directory)[0]
        try:
            with safe_open(file, "numpy") as tensors:
                first = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: {repositories.unreadable(file, error)}") from None
        dtype = {"BF16": "bfloat16", "F16": "float16"}.get(first, "float32")
    return dtype if dtype in DTYPES else "float32"


def _iterations(run: RunDir) -> list[int]:
    """The iterations whose policy is on disk, complete or in the middle of its training."""
    from sppo_jax.training import checkpoint

    trained = (t for t in run.iterations() if t != BASE)
    return [BASE, *(t for t in trained if run.export(t).exists() or checkpoint.begun(run.checkpoints(t)))]


def _check_target(to: Path) -> None:
    """Raise BadInput, before an hour of reading, unless `to` can be written without losing anything."""
    if to.is_symlink():
        raise BadInput(f"--to {to}: a link; give a directory's own name")
    if files.exists(to) and not files.is_dir(to):
        raise BadInput(f"--to {to}: a file is in the way; choose another directory")
    try:
        full = to.is_dir() and any(to.iterdir())
    except OSError as error:
        raise BadInput(f"--to {to}: {error.strerror}; choose another directory") from None
    if full:
        raise BadInput(f"--to {to}: not empty; choose another directory")
    here = _existing(to)
    if not files.is_dir(here):
        raise BadInput(f"--to {to}: {here} is a file; choose another directory")
    longest = max(len(os.fsencode(name)) for name in (*to.parts, files.part_of(to.absolute()).name))
    if longest > os.pathconf(here, "PC_NAME_MAX"):
        raise BadInput(f"--to {to}: a part of the name is too long; choose a shorter one")
    if not os.access(here, os.W_OK | os.X_OK):
        raise BadInput(f"--to {to}: {here} cannot be written to; choose another directory")


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it, that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))


def _check_room(model: "Transformer", to: Path, dtype: str) -> None:
    """Raise BadInput unless the disk has room for the weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    numbers = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    size = numbers * jnp.dtype(dtype).itemsize
    free = shutil.disk_usage(_existing(to)).free
    if size > free:
        raise BadInput(
            f"{to}: {size / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free; make room or go elsewhere"
        )


def _push(directory: Path, repo: str, private: bool) -> None:
    """Upload a complete export. This is the last step, so that a failure loses nothing."""
    from sppo_jax.models import hf

    files.read_json(directory / "config.json")
    hf.weight_files(directory)
    try:
        print(repositories.push(directory, repo, private=private))
    except BadInput as error:
        again = f"python -m sppo_jax.export --to {shlex.quote(str(directory))} --push {repo}{' --private' if private else ''}"
        raise BadInput(f"{error}; the checkpoint is safe in {directory}; to push it again: {again}") from None


if __name__ == "__main__":
    call(main, resumes=False)
