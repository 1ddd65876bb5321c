"""Whether the hub replies, asked once: the `datasets` library asks again and again, for half a minute."""

import contextlib
import logging
import threading
from collections.abc import Iterator

from sppo_jax.hub import environment

WAIT = 2.5  # seconds; finding the address may take as long again, which no timeout of the client limits
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
    if not (reason := _unreachable()):
        yield ""
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield f"no connection to {environment.address()} ({reason})"
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False


def _unreachable() -> str:
    """Return why the hub gives no reply, in a few words; "" if it gives any."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    found = [f"no reply within {WAIT:g} s"]

    def ask() -> None:
        try:
            get_session().head(environment.endpoint() or constants.ENDPOINT, timeout=WAIT)
            found[0] = ""
        except Exception as error:  # of the HTTP client, which is not always the same one
            lost = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
            found[0] = (str(error) or type(error).__name__) if lost else ""

    # In a thread, because the search for the address has no limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT + 1)
    return found[0]


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
