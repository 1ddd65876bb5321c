"""Buckets in memory for tests, one of them behind a network that fails."""

import importlib
import re

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sppo_jax.run import bucket

registry = importlib.import_module("fsspec.registry")  # fsspec has another attribute of this name
RUN = "memory://b/run"
# Other times, names of hosts, and names that orbax draws by chance.
VARIES = re.compile(
    r"metrics\.jsonl|report\.html|config\.yaml|tensorboard/.*|.*/checkpoints/.*|\.lock|.*/\.complete"
)


class Flaky(MemoryFileSystem):
    """Objects in memory behind a network that fails as often as `failures` says."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    failures, calls = 0, 0

    def _call(self):
        Flaky.calls += 1
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("the network is gone")

    def pipe_file(self, *args, **options):
        self._call()
        return super().pipe_file(*args, **options)

    def get_file(self, *args, **options):
        self._call()
        return super().get_file(*args, **options)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The user's caches, and empty buckets. Nothing is sent but at the end of a run, or when a test says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(bucket, "EVERY", 1000.0)
    for kind in (MemoryFileSystem, Flaky):
        monkeypatch.setattr(kind, "store", {})
        monkeypatch.setattr(kind, "pseudo_dirs", [""])
    monkeypatch.setattr(Flaky, "failures", 0)
    return tmp_path / "caches"


def stored(url=RUN):
    """{path below the URL: content} of a bucket in memory."""
    fs, base = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{base}/"): fs.cat_file(path) for path in fs.find(base)}


def same(store):
    """The objects that are the same in every run, by name."""
    return {name: content for name, content in store.items() if not VARIES.fullmatch(name)}


def of_directory(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def put(content, url=RUN):
    fs, base = fsspec.core.url_to_fs(url)
    for name, data in content.items():
        fs.pipe_file(f"{base}/{name}", data)
