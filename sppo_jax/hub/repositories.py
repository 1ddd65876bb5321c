"""Checkpoints from and to the hub: a name becomes a directory of one pinned commit, and an export a repository.

Only files that the package reads, or an export passes on, are fetched: configuration, tokenizer and safetensors at the top
of a repository, and the folder of further chat templates.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_jax.command import say
from sppo_jax.errors import BadInput
from sppo_jax.files import expand, is_dir
from sppo_jax.hub import adapters, environment, failures

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",  # of older processors
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's further templates, NAME.jinja
# Open weights are published on the condition that these files stay with them.
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# Files that a checkpoint has besides model and config.json.
BESIDE = ("generation_config.json", *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja", *LICENCES)
FETCHED = ("config.json", "*.safetensors", "model.safetensors.index.json", adapters.CONFIG, *BESIDE)
# How git begins what it keeps in the place of a large file until git lfs fetches that.
POINTER = b"version https://git-lfs.github.com/spec/"


def _folders_but(name: str) -> tuple[str, ...]:
    """Return patterns, in which * matches slashes too, of all files in folders except those directly in the folder `name`."""
    differ = [f"{name[:i]}[!{letter}]*/*" for i, letter in enumerate(name)]
    shorter = [f"{name[:i]}/*" for i in range(1, len(name))]
    return *differ, *shorter, f"{name}?*/*"


# Second copies of whole models (folders such as original/, Mistral's consolidated files), and adapters.
LEFT_OUT = (
    *_folders_but(TEMPLATES),
    f"{TEMPLATES}/*.safetensors",
    "consolidated*.safetensors",
    "adapter*.safetensors",
)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint on this machine's disk."""

    directory: Path
    name: str  # as the user gave it, without a revision
    revision: str | None  # commit on the hub; None for a directory of the user's own


def fetch(name: str, revision: str | None = None, *, tell: Callable[[str], None] = say) -> Snapshot:
    """Return the language model `name` as `snapshot` does. Raises BadInput also for an adapter, and without safetensors."""
    found = snapshot(name, revision, FETCHED, tell=tell)
    adapters.refuse(found.directory, found.name)
    if found.revision is not None and not any(found.directory.glob("*.safetensors")):
        raise BadInput(
            f"{found.name}: has no safetensors weights; make them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained('{found.name}').save_pretrained('DIR'), the same for its "
            "AutoTokenizer, and give DIR"
        )
    return found


def snapshot(
    name: str, revision: str | None, files: Sequence[str], *, tell: Callable[[str], None] = say
) -> Snapshot:
    """Return the repository `name`: a directory as it is, or `owner/repo[@revision]` on the hub, downloaded.

    `files` are the patterns to download; a repository need not have all of them. With `revision` (a branch, tag or
    commit; a commit pins) the name is always the hub's, even where a directory has it. Files that are complete in the
    cache are not fetched again; with HF_HUB_OFFLINE=1 only the cache is used. `tell` receives two lines: the source and
    the directory. Raises BadInput, with one line for each kind of failure.
    """
    if revision is None and name and is_dir(directory := Path(expand(name))):
        return Snapshot(directory, name, None)
    repo, wanted = parse(name)
    wanted = revision or wanted
    tell(
        f"{repo}: from the hub, revision {wanted or 'main'}; files that are here already are not fetched again"
    )
    found = _download(repo, wanted, files)
    tell(f"{repo}: revision {found.name} in {found}")
    return Snapshot(found, repo, found.name)


def unreadable(file: Path, error: Exception) -> str:
    """Return what is wrong with a safetensors file that cannot be opened, and what to do. `error` is the library's."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            return "a pointer of git lfs, which stands for the file itself; get that with: git lfs pull"
    return f"damaged or not safetensors ({error}); restore it, or download it again"


def parse(name: str) -> tuple[str, str | None]:
    """Split `owner/repo[@revision]` into (owner/repo, revision or None). Raises BadInput for any other form."""
    repo, at, revision = name.partition("@")
    segments = repo.split("/")
    if len(segments) != 2 or not all(_is_segment(s) for s in segments):
        raise BadInput(
            f"{name}: no such directory, and not a name on the hub (owner/repo or owner/repo@revision)"
        )
    if at and not all(_is_segment(s) for s in revision.split("/")):
        raise BadInput(f"{name}: {revision!r} is not a revision (a branch, tag or commit)")
    return repo, revision if at else None


def push(directory: Path, repo: str, *, private: bool = False) -> str:
    """Upload a complete export to `repo`, created if absent, and return its address. Raises BadInput on failure."""
    from huggingface_hub import HfApi

    endpoint = environment.endpoint()
    try:
        api = HfApi(endpoint=endpoint)
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message="sppo_jax export")
    except Exception as error:  # of huggingface_hub, its HTTP client or its transfer library
        raise BadInput(failures.unwritten(error, repo)) from None
    return f"{environment.address()}/{repo}"


def _download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Download `files` and return their directory in the cache, whose name is the commit of `revision`."""
    endpoint = environment.endpoint()
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    connected = True
    try:
        validate_repo_id(repo)
        connected = not environment.offline() and not environment.unreachable()
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(LEFT_OUT),
            endpoint=endpoint,
            local_files_only=not connected,
            tqdm_class=_bar(),
        )
    except Exception as error:  # as in `push`
        raise BadInput(failures.unread(error, repo, revision, connected=connected)) from None
    return Path(found)


def _bar() -> Any:
    """Return huggingface_hub's progress bar for a terminal, and a silent one for logs, where it would fill lines."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    return None if sys.stderr.isatty() else Silent


def _is_segment(text: str) -> bool:
    """Return whether `text` can stand between the slashes of a repository's name or revision."""
    return re.fullmatch(r"[A-Za-z0-9._-]+", text) is not None and ".." not in text and text != "."
