"""The hub that this process talks to: HF_ENDPOINT and HF_HUB_OFFLINE as they are now.

huggingface_hub itself reads them once, when it is imported, which may be long before they were set.
"""

import os
from urllib.parse import urlsplit


def endpoint() -> str | None:
    """Return HF_ENDPOINT, or None for huggingface_hub's default."""
    return os.environ.get("HF_ENDPOINT") or None


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def address() -> str:
    """Return the hub's address, for people: without credentials that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(endpoint() or constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
