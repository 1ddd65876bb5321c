"""Checkpoints from and to the hub: a name becomes a directory of one pinned commit, and an export a repository.

Only what the package reads is fetched: configuration, tokenizer and safetensors at the top of the repository.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sppo_jax import command
from sppo_jax.errors import BadInput

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # which those of open weights want kept with them
BESIDE = (
    "generation_config.json",
    *TOKENIZER_FILES,
    *LICENCES,
)  # what a checkpoint has besides model and config.json
FETCHED = ("config.json", "*.safetensors", "model.safetensors.index.json", *BESIDE)
# Whole models a second time: folders such as original/, and Mistral's consolidated files. Adapters are not weights.
LEFT_OUT = ("*/*", "consolidated*.safetensors", "adapter*.safetensors")
LOG_IN = "log in (hf auth login) or set HF_TOKEN"
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint on this machine's disk."""

    directory: Path
    name: str  # as the user gave it, without a revision
    revision: str | None  # commit on the hub; None: a directory of the user's own


def fetch(name: str, revision: str | None = None, *, tell: Callable[[str], None] = command.say) -> Snapshot:
    """The language model `name`, as `snapshot` finds it. Raises BadInput where a repository has no safetensors too."""
    found = snapshot(name, revision, FETCHED, tell=tell)
    if found.revision is not None and not any(found.directory.glob("*.safetensors")):
        raise BadInput(
            f"{found.name}: has no safetensors weights; make them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained('{found.name}').save_pretrained('DIR'), the same for its "
            "AutoTokenizer, and give DIR"
        )
    return found


def snapshot(
    name: str, revision: str | None, files: Sequence[str], *, tell: Callable[[str], None] = command.say
) -> Snapshot:
    """The repository `name`: a directory, or those of the `files` of `owner/repo[@revision]` on the hub that it has.

    With `revision` (a branch, tag or commit; a commit pins) the name is the hub's, whatever lies here. Files that
    are complete in the cache are not fetched again; HF_HUB_OFFLINE=1 asks the cache alone. `tell` hears where it
    comes from and where it lies. Raises BadInput, one line for each way in which this fails.
    """
    directory = os.path.expanduser(name)
    if revision is None and os.path.isdir(directory):
        return Snapshot(Path(directory), name, None)
    repo, wanted = parse(name)
    wanted = revision or wanted
    tell(
        f"{repo}: from the hub, revision {wanted or 'main'}; files that are here already are not fetched again"
    )
    found = _download(repo, wanted, files)
    tell(f"{repo}: revision {found.name} in {found}")
    return Snapshot(found, repo, found.name)


def parse(name: str) -> tuple[str, str | None]:
    """(owner/repo, revision or None) of `owner/repo[@revision]`. Raises BadInput for any other form."""
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
    """Upload a complete export to the repository `repo`, made if there is none; its address. Raises BadInput."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=_endpoint())
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=repo, commit_message="sppo_jax export")
    except Exception as error:  # huggingface_hub's own, its HTTP client's and its transfer library's
        raise BadInput(_unwritten(error, repo)) from None
    return f"{_host()}/{repo}"


def _download(repo: str, revision: str | None, files: Sequence[str]) -> Path:
    """Directory of the snapshot in the cache; its name is the commit that the revision was resolved to."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(LEFT_OUT),
            endpoint=_endpoint(),
            local_files_only=_offline(),
            tqdm_class=_bar(),
        )
    except Exception as error:  # as above
        raise BadInput(_unread(error, repo, revision)) from None
    return Path(found)


def _bar() -> Any:
    """huggingface_hub's bar on a terminal; in a log none, where it would be a hundred lines."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    return None if sys.stderr.isatty() else Silent


# Why the hub did not serve, and what to do, in one line. Nothing of a request is quoted: it may hold a token.


def _unread(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    chain, status = list(_causes(error)), _status(error)
    missing = f"{repo}: neither a directory here nor"
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return f"{repo}: gated ({status}): accept its licence at {_host()}/{repo}, then {LOG_IN}"
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"{repo}: the hub has no revision {revision or 'main'}"
    if status == 401 and any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return f"{missing} a public repository on the hub (401); for a private one {LOG_IN}"
    if status == 401:
        return f"{repo}: the hub refuses your credentials (401): {LOG_IN} anew"
    if status == 403:
        return f"{repo}: your account or token may not read it (403)"
    if status == 404:
        return f"{missing} a repository on the hub (404)"
    if status is not None:
        return f"{repo}: the hub answers {status}; try again later"
    if _forbidden(chain):
        at = f" at revision {revision}" if revision else ""
        return f"{missing} complete in the hub's cache{at}, and HF_HUB_OFFLINE forbids to fetch it"
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return f"{repo}: the disk of the hub's cache is full; make room, or set HF_HOME to another place"
    if _unreachable(chain):
        return f"{missing} in the hub's cache, and there is no connection to {_host()}"
    if isinstance(error, ValueError):  # huggingface_hub's rules for names are narrower than ours
        return f"{repo}: not a name on the hub (owner/repo)"
    return f"{repo}: the connection to {_host()} broke ({type(error).__name__}); run again, what is complete is kept"


def _unwritten(error: Exception, repo: str) -> str:
    chain, status = list(_causes(error)), _status(error)
    if status == 401:
        return f"{repo}: the hub wants to know who writes (401): {LOG_IN}"
    if status == 403:
        return f"{repo}: your account or token may not write it (403)"
    if status == 404:
        return f"{repo}: the hub knows no such account (404)"
    if status is not None:
        return f"{repo}: the hub answers {status}"
    if _forbidden(chain):
        return f"{repo}: HF_HUB_OFFLINE forbids to write to the hub"
    if _unreachable(chain):
        return f"{repo}: there is no connection to {_host()}"
    if isinstance(error, ValueError):
        return f"{repo}: not a name on the hub (owner/repo)"
    return f"{repo}: the connection to {_host()} broke ({type(error).__name__})"


def _status(error: Exception) -> int | None:
    """Of the hub's answer, if it gave one."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)


def _forbidden(chain: list[Any]) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return _offline() or any(isinstance(e, OfflineModeIsEnabled) for e in chain)


def _unreachable(chain: list[Any]) -> bool:
    return any(type(e).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError") for e in chain)


def _causes(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_segment(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9._-]+", text) is not None and ".." not in text and text != "."


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now: huggingface_hub reads it when it is imported, which may be long ago."""
    return os.environ.get("HF_ENDPOINT") or None


def _offline() -> bool:
    found = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return found.upper() in ("1", "ON", "YES", "TRUE")


def _host() -> str:
    """The hub's address without credentials that may stand in it."""
    from huggingface_hub import constants

    parts = urlsplit(_endpoint() or constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
