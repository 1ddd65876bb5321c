"""The hub that this process talks to: HF_ENDPOINT and HF_HUB_OFFLINE as they are now.

huggingface_hub itself reads them once, when it is imported, which may be long before they were set.
"""

import os
import threading
from urllib.parse import urlsplit

from sppo_jax.errors import BadInput

WAIT = 3.5  # seconds for a reply; finding the address may take a second more, which no timeout of the client limits


def endpoint() -> str | None:
    """Return HF_ENDPOINT, or None for huggingface_hub's default. Raises BadInput for what is not an address."""
    found = os.environ.get("HF_ENDPOINT") or None
    try:
        parts = urlsplit(found or "https://x")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return found
    except ValueError:  # brackets without an end, a port that is not a number
        pass
    raise BadInput("HF_ENDPOINT is not the address of a hub: set it to https://HOST, or unset it")


def unreachable() -> str:
    """Return why the hub gives no reply within WAIT + 1 seconds, in a few words; "" if it gives any.

    Without a reply, its clients would ask again and again, for minutes.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    target, found = endpoint() or constants.ENDPOINT, [f"no reply within {WAIT:g} s"]

    def ask() -> None:
        try:
            get_session().head(target, timeout=WAIT)
            found[0] = ""
        except Exception as error:  # of the HTTP client, which is not always the same one
            lost = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
            found[0] = (str(error) or type(error).__name__) if lost else ""

    # In a thread, because the search for the address has no limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT + 1)
    return found[0]


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def address() -> str:
    """Return the hub's address, for people: without credentials that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(endpoint() or constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
