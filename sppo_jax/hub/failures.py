"""Why the hub could not be read or written, and what to do about it, in one line.

Nothing is quoted from a request, because it may hold a token.
"""

import errno
from collections.abc import Iterator
from typing import Any

from sppo_jax.hub import environment

LOG_IN = "log in (hf auth login) or set HF_TOKEN"


def unread(error: Exception, repo: str, revision: str | None, *, connected: bool = True) -> str:
    """Return the line for an error of huggingface_hub while files of `repo` were downloaded.

    `connected`: whether the hub was asked, and not its cache alone.
    """
    from huggingface_hub import errors

    chain, status = list(_causes(error)), _status(error)
    missing = f"{repo}: neither a directory here nor"
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return (
            f"{repo}: gated ({status}): accept its licence at {environment.address()}/{repo}, then {LOG_IN}"
        )
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
    if _offline(chain):
        at = f" at revision {revision}" if revision else ""
        return f"{missing} complete in the hub's cache{at}, and HF_HUB_OFFLINE forbids to fetch it: unset it, or name a directory"
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return f"{repo}: the disk of the hub's cache is full; make room, or set HF_HOME to another place"
    if not connected or _unreachable(chain):
        return f"{missing} in the hub's cache, and there is no connection to {environment.address()}"
    if isinstance(error, ValueError):  # huggingface_hub's rules for names are narrower than ours
        return f"{repo}: not a name on the hub (owner/repo)"
    return f"{_broken(error, repo)}; run again, what is complete is kept"


def unwritten(error: Exception, repo: str) -> str:
    """Return the line for an error of huggingface_hub while `repo` was created or uploaded."""
    chain, status = list(_causes(error)), _status(error)
    if status == 401:
        return f"{repo}: the hub wants to know who writes (401): {LOG_IN}"
    if status == 403:
        return f"{repo}: your account or token may not write it (403)"
    if status == 404:
        return f"{repo}: the hub has no such account (404)"
    if status is not None:
        return f"{repo}: the hub answers {status}"
    if _offline(chain):
        return f"{repo}: HF_HUB_OFFLINE forbids to write to the hub"
    if _unreachable(chain):
        return f"{repo}: there is no connection to {environment.address()}"
    if isinstance(error, ValueError):
        return f"{repo}: not a name on the hub (owner/repo)"
    return _broken(error, repo)


def _broken(error: Exception, repo: str) -> str:
    return f"{repo}: the connection to {environment.address()} broke ({type(error).__name__})"


def _status(error: Exception) -> int | None:
    """Return the HTTP status of the hub's reply; None where no reply came."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError)), None)


def _offline(chain: list[Any]) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return environment.offline() or any(isinstance(e, OfflineModeIsEnabled) for e in chain)


def _unreachable(chain: list[Any]) -> bool:
    return any(type(e).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError") for e in chain)


def _causes(error: BaseException | None) -> Iterator[Any]:
    """Yield an exception and all that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
