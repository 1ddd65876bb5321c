"""Without a network a dataset of the hub is one line, at once."""

import socket
import time

import datasets
import huggingface_hub
import pytest

from sppo_jax.errors import BadInput
from sppo_jax.hub import environment
from sppo_jax.text import connection, rows
from sppo_jax.text.source import Source
from tests import dataset_hub


def closed_port(listening):
    """Return the address of a port where nothing listens, or where nobody replies."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    if listening:
        found.listen(1)
    return found, f"http://127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The libraries take the hub for reachable, as without HF_HUB_OFFLINE."""
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(environment, "WAIT", 0.3)
    return monkeypatch


@pytest.mark.parametrize("listening", [False, True])
def test_without_a_network_the_hub_is_asked_once_and_the_error_is_one_line(online, capfd, listening):
    server, address = closed_port(listening)
    online.setenv("HF_ENDPOINT", address)
    begun = time.monotonic()
    with server, pytest.raises(BadInput, match=r"^prompts.source=hf:some/thing: ") as caught:
        list(rows.rows(Source("prompts.source", "hf:some/thing", "train"), ["prompt"]))
    assert time.monotonic() - begun < 5
    assert f"no connection to {address}" in str(caught.value)
    assert "check the network" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("reachable", [True, False])
def test_only_without_a_network_the_library_is_confined_to_its_cache(online, reachable):
    with dataset_hub.serving() as hub:
        server, closed = closed_port(False)
        online.setenv("HF_ENDPOINT", hub.url if reachable else closed)
        with server, connection.asked_once() as reason:
            assert bool(reason) is not reachable
            assert datasets.config.HF_HUB_OFFLINE is huggingface_hub.constants.HF_HUB_OFFLINE is not reachable
    assert datasets.config.HF_HUB_OFFLINE is huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_with_hf_hub_offline_the_hub_is_not_asked(online):
    online.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    online.setattr(environment, "unreachable", lambda: pytest.fail("the hub was asked"))
    with connection.asked_once() as reason:
        assert reason == ""


def test_a_download_of_tfds_gives_up_in_seconds_and_in_silence(capfd):
    from tensorflow_datasets.core.download import downloader

    server, address = closed_port(False)
    begun = time.monotonic()
    with server, connection.few_attempts(), pytest.raises(OSError), downloader._open_with_requests(address):
        pass
    assert time.monotonic() - begun < 5
    assert capfd.readouterr() == ("", "")
    assert downloader.MAX_RETRIES > connection.ATTEMPTS
