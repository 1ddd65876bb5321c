"""The cache of compiled programs: a place that cannot be used, and a failure later, cost one line and nothing else."""

import os
import pwd
import weakref

import jax
import numpy as np
import pytest

from sppo_jax import compilation
from sppo_jax.models.hf import aligned


@pytest.fixture
def settings(monkeypatch):
    """No folder is set; all settings come back after the test."""
    names = (
        "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes",
    )  # fmt: skip
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compilation, "_guard", lambda: None)
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.keep_programs()
    assert settings() == f"{tmp_path}/sppo_jax/programs"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cache", ["file", "relative", "no home", "~", "NUL below"])
def test_without_a_place_for_programs_there_is_one_line_and_no_cache(
    cache, settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)

    def unknown(_):
        raise KeyError("no entry")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "file").write_text("")
    if cache == "NUL below":
        jax.config.update("jax_compilation_cache_dir", f"{tmp_path}/a\0b")
    elif cache != "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if cache == "file" else cache)
    compilation.keep_programs()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("no cache of compiled programs (")
    assert not jax.config.values["jax_enable_compilation_cache"]
    assert os.listdir(tmp_path) == ["file"]


class Cache:
    """What the guard sees of JAX's cache."""

    def __init__(self, path):
        self.path, self.uses = path, 0

    def put(self, key, value):
        self.uses += 1
        (self.path / f"{key}-cache").write_bytes(value[:3])
        raise OSError(28, "No space left on device")

    def get(self, key):
        self.uses += 1
        raise TimeoutError("the lock is held")


@pytest.mark.parametrize(("use", "value"), [(Cache.put, [b"program"]), (Cache.get, [])])
def test_the_first_failure_of_the_cache_is_one_line_and_its_last_use(use, value, tmp_path, capsys):
    cache, guarded = Cache(tmp_path), compilation._guarded(use, [])
    for _ in range(3):
        assert guarded(cache, "key", *value) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"no cache of compiled programs from now on ({tmp_path}: ")
    assert cache.uses == 1
    assert list(tmp_path.iterdir()) == []  # no half of an entry for the next run to trip over


def test_the_memory_of_loaded_weights_goes_with_them(one_device):
    """jax on a CPU uses it without a copy, and holds it beyond the array."""
    weights = aligned((1024,), np.dtype(np.float32))
    memory = weakref.ref(weights.base)
    array = jax.device_put(weights, one_device.devices.flat[0])
    assert array.unsafe_buffer_pointer() == weights.ctypes.data
    del weights
    jax.block_until_ready(array)
    del array
    compilation.collect()
    assert memory() is None
