"""Killed before and after each rename, and started again each time: the same bits."""

import fnmatch
import shutil
import threading

import pytest

from sppo_jax import files, main
from tests import kill_points
from tests.small_game import words

# Each is renamed to its name once, and the run is killed before and after that.
RENAMED = [
    "config.yaml",
    "manifest.json",
    "iter_0/heldout/responses.parquet",
    "iter_0/eval.json",
    *(f"iter_1/{kind}/shard-0000{i}-of-00003.parquet" for kind in ("responses", "preferences") for i in range(3)),
    "iter_1/pairs.parquet",
    "iter_1/heldout/probe.parquet",
    "iter_1/checkpoints/1",
    "iter_1/checkpoints/2",
    "iter_1/export",
    "iter_1/heldout/responses.parquet",
    "iter_1/eval.json",
    "iter_1/export/README.md",
    "report.html",
]  # fmt: skip


class Killed(BaseException):
    """Ends the game where a signal would."""


class Kills:
    """Plays games that are killed at each place that was not met before; what lay on disk then is copied, and goes on."""

    def __init__(self, parent, patch, command=words, at="*"):
        """`command`: from OUT to the game's command line; `at`: the paths at which games are killed."""
        self._parent, self._command, self._paths, self.places = parent, command, at, []
        self._killed = threading.Event()
        patch.setattr(files, "append", self._append(files.append))

    def play(self):
        """Start the game until it is finished. Returns the directory in which it was."""
        out = self._parent / "0"
        while True:
            self._out, self._killed = out, threading.Event()
            end = kill_points.watch(out, self._at)
            try:
                main.main(self._command(out))
            except Killed:
                pass
            finally:
                end()
            if not self._killed.is_set():
                return out
            shutil.rmtree(out, ignore_errors=True)
            out = self._next()

    def _next(self):
        return self._parent / str(len(self.places))

    def _at(self, path, when):
        new = (path, when) not in self.places and fnmatch.fnmatch(path, self._paths)
        if new and not self._killed.is_set():
            self.places.append((path, when))
            kill_points.copy(self._out, self._next())
            self._killed.set()
        self._end()

    def _append(self, append):
        def appended(path, data):
            self._end()
            append(path, data)

        return appended

    def _end(self):
        """Nothing that is done after the kill counts; orbax's threads are left to end by themselves."""
        if self._killed.is_set() and threading.current_thread() is threading.main_thread():
            raise Killed


@pytest.mark.usefixtures("single_device")
def test_T16_killed_before_and_after_each_rename_gives_the_same_bits(played, tmp_path, monkeypatch):
    kills = Kills(tmp_path, monkeypatch)
    out = kills.play()
    for path in RENAMED:
        assert [when for name, when in kills.places if name == path] == ["before", "after"], path
    found, expected = kill_points.contents(out), kill_points.contents(played)
    assert found == {path: data for path, data in expected.items() if path in found}
    assert len(found) == 13
