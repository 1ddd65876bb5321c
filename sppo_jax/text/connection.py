"""Whether the hub replies, asked once: the `datasets` library asks again and again, for half a minute."""

import contextlib
import logging
from collections.abc import Iterator

from sppo_jax.hub import environment

ATTEMPTS = 3  # of a download again, 2.4 seconds in all


@contextlib.contextmanager
def asked_once() -> Iterator[str]:
    """Yield why the hub cannot be reached, "" if it can, or if it must not be asked.

    Where it cannot be reached, `datasets` uses its cache alone within the context, as with HF_HUB_OFFLINE=1.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        yield ""
        return
    if not (reason := environment.unreachable()):
        yield ""
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield f"no connection to {environment.address()} ({reason})"
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


@contextlib.contextmanager
def few_attempts() -> Iterator[None]:
    """Within the context tensorflow-datasets gives a download up after seconds, not minutes, and in silence."""
    from tensorflow_datasets.core.download import downloader

    log, before = logging.getLogger("urllib3.connectionpool"), getattr(downloader, "MAX_RETRIES", None)
    level = log.level
    log.setLevel(logging.ERROR)
    downloader.MAX_RETRIES = ATTEMPTS
    try:
        yield
    finally:
        log.setLevel(level)
        downloader.MAX_RETRIES = before
