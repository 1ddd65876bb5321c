"""Checkpoints: a damaged one falls back to the last whole one, and one that cannot be written ends in one line at once."""

import contextlib
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sppo_jax import config_file, export, main
from sppo_jax.errors import BadInput
from sppo_jax.hub import names as hub_names
from sppo_jax.models import hf, lora
from sppo_jax.training.checkpoint import Checkpoints, NoneWhole, TrainState, begun
from tests import test_export
from tests.run_directory import begun as begun_run
from tests.small_game import digest, words
from tests.test_fit import SETTINGS, leaves, pairs_of, train


def state(step, size=4000):
    values = np.random.default_rng(step).normal(size=(2, size)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(values[0])}, {"nu": jnp.asarray(values[1])})


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def saved(directory, *steps, size=4000):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step, size))
    return directory


def resumed(directory, last=100):
    """(what is resumed from, the lines about it)."""
    lines = []
    with Checkpoints(directory) as checkpoints:
        return checkpoints.resume(state(0), last=last, say=lines.append), lines


def numbers(checkpoint):
    """The file with the arrays."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def replaced(path, make):
    shutil.rmtree(path)
    make()


DAMAGE = {
    "truncated": lambda at: numbers(at).write_bytes(numbers(at).read_bytes()[:-500]),
    "zeros": lambda at: numbers(at).write_bytes(bytes(numbers(at).stat().st_size)),
    "a changed bit": lambda at: flip(numbers(at)),
    "a missing file": lambda at: numbers(at).unlink(),
    "a missing part": lambda at: shutil.rmtree(at / "default/d"),
    "a missing item": lambda at: shutil.rmtree(at / "default"),
    "an empty directory": lambda at: replaced(at, at.mkdir),
    "a file": lambda at: replaced(at, lambda: at.write_text("12")),
    "a link to nothing": lambda at: replaced(at, lambda: at.symlink_to("nowhere")),
    "garbage for metadata": lambda at: (at / "default/_METADATA").write_bytes(b"\xff{"),
    "no metadata": lambda at: (at / "_CHECKPOINT_METADATA").unlink(),
    "another model's": lambda at: replaced(at, lambda: saved(at.parent, 12, size=3999)),
    "another update's": lambda at: replaced(at, lambda: shutil.copytree(at.parent / "8", at)),
}


def test_a_reply_that_comes_after_a_failed_reading_is_not_printed(tmp_path, monkeypatch):
    """Python's hook for errors in threads that are not its own, with what tensorstore's raise then."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    saved(tmp_path / "c", 4)
    late, other = (
        types.SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "anything else")
    )
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert printed == [other]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one_in_one_line_and_its_step_is_written_again(
    kind, tmp_path, capfd
):
    directory = saved(tmp_path / "c", 8, 12)
    DAMAGE[kind](directory / "12")
    (step, found), lines = resumed(directory)
    assert step == 8
    assert same(found, state(8))
    assert len(lines) == 1
    assert f"{directory}/12: damaged" in lines[0]
    assert "training goes on from the checkpoint of update 8" in lines[0]
    assert "\n" not in lines[0]
    saved(directory, 12)
    (step, found), lines = resumed(directory)
    assert (step, lines) == (12, [])
    assert same(found, state(12))
    assert capfd.readouterr() == ("", "")


def test_several_damaged_checkpoints_are_one_line_and_leave_with_the_end_of_the_iteration(tmp_path):
    directory = saved(tmp_path / "c", 4, 8)
    saved(tmp_path / "other", 12)
    (tmp_path / "other/12").rename(directory / "12")
    for step in (8, 12):
        flip(numbers(directory / str(step)))
    (step, _), (line,) = resumed(directory)
    assert step == 4
    assert line.count("damaged, or") == 2
    assert sorted(p.name for p in directory.iterdir()) == ["12.damaged", "4", "8.damaged"]
    with Checkpoints(directory) as checkpoints:
        checkpoints.keep_only(4)
    assert [p.name for p in directory.iterdir()] == ["4"]


def test_where_no_checkpoint_is_whole_training_begins_again_and_ends_in_the_same_bits(
    tmp_path, one_device, capsys
):
    rows = pairs_of(4)
    whole = train(tmp_path, rows, SETTINGS, one_device)
    (step,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    flip(numbers(tmp_path / f"checkpoints/{step}"))
    with pytest.raises(NoneWhole):
        train(tmp_path, rows, SETTINGS, one_device)
    assert (
        "no other checkpoint is whole, and the iteration's training begins again" in capsys.readouterr().out
    )
    assert not begun(tmp_path / "checkpoints")
    again = train(tmp_path, rows, SETTINGS, one_device)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(whole), leaves(again), strict=True))


@pytest.mark.usefixtures("single_device")
def test_a_game_whose_only_checkpoint_is_damaged_trains_again_to_the_same_policy(played, tmp_path, capsys):
    run = shutil.copytree(played, tmp_path / "copy")
    (checkpoint,) = (run / "iter_2/checkpoints").iterdir()
    flip(numbers(checkpoint))
    shutil.rmtree(run / "iter_2/export")
    (run / "iter_2/eval.json").unlink()
    main.main(words(run, iterations=2))
    assert digest(run, 2) == digest(played, 2)
    assert f"{checkpoint}: damaged" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("name", [".DS_Store", "lost+found", "012", "١٢", "12.old", "notes.txt"])
def test_what_is_no_checkpoint_is_left_alone(name, tmp_path):
    directory = saved(tmp_path / "c", 8)
    (directory / name).mkdir()
    assert resumed(directory)[0][0] == 8
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(12, state(12))
        checkpoints.keep_only(12)
    assert {p.name for p in directory.iterdir()} == {name, "12"}


def test_what_a_killed_run_left_unfinished_is_deleted_and_written_again(tmp_path):
    directory = saved(tmp_path / "c", 8, 12)
    (directory / "12").rename(directory / "12.orbax-checkpoint-tmp")
    assert resumed(directory)[0][0] == 8
    assert [p.name for p in directory.iterdir()] == ["8"]


def test_a_checkpoint_beyond_the_last_update_is_not_resumed_from(tmp_path):
    (step, _), (line,) = resumed(saved(tmp_path / "c", 8, 12), last=10)
    assert step == 8
    assert "12: beyond the last update of this training, 10" in line


def test_a_checkpoint_of_an_earlier_version_has_no_sums_and_is_read(tmp_path):
    directory = saved(tmp_path / "c", 8)
    path = directory / "8/_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    assert same(resumed(directory)[0][1], state(8))


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_a_checkpoint_that_could_be_read_later_is_not_given_up(error, tmp_path, monkeypatch):
    directory = saved(tmp_path / "c", 8, 12)

    def refused(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.AsyncCheckpointer, "restore", refused)
        with pytest.raises(BadInput, match=rf"c/12: cannot be read: {error.strerror}; mend that"):
            resumed(directory)
    assert resumed(directory)[0][0] == 12


def test_an_export_of_an_unfinished_iteration_falls_back_too_and_changes_nothing(tmp_path, capsys):
    run, model = begun_run(tmp_path), hf.load(hub_names.path("policy"))
    for step in (3, 5):
        test_export.save(run, 1, step, model)
    flip(numbers(run.checkpoints(1) / "5"))
    before = sorted(run.root.rglob("*"))
    export.main(test_export.command(run, tmp_path / "to"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{run.checkpoints(1)}/5: damaged" in lines[0]
    assert lines[1] == "iteration 1 is unfinished: this is its policy after update 3"
    assert sorted(run.root.rglob("*")) == before
    flip(numbers(run.checkpoints(1) / "3"))
    with pytest.raises(BadInput, match=r"no checkpoint of it is whole .*; run the game's command again"):
        export.main(test_export.command(run, tmp_path / "other"))


def test_an_export_of_a_finished_iteration_with_a_damaged_checkpoint_is_read_from_the_runs_own(
    tmp_path, capsys
):
    run, model = begun_run(tmp_path), hf.load(hub_names.path("policy"))
    for step in (3, 5):
        test_export.save(run, 1, step, model)
    export.export(model, hub_names.path("policy"), run.export(1))
    flip(numbers(run.checkpoints(1) / "5"))
    export.main(test_export.command(run, tmp_path / "to"))
    assert f"its policy is read from {run.export(1)} instead" in capsys.readouterr().err
    assert test_export.same(test_export.weights(tmp_path / "to"), test_export.weights(run.export(1)))


SPOILT = {
    "truncated": lambda at: numbers(at).write_bytes(numbers(at).read_bytes()[:-100]),
    "empty": lambda at: numbers(at).write_bytes(b""),
    "without weights": lambda at: numbers(at).unlink(),
    "deleted": shutil.rmtree,
    "without config.json": lambda at: (at / "config.json").unlink(),
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("rank", [0, 2])
def test_an_export_that_a_run_needs_is_written_again_from_its_checkpoint(
    kind, rank, tmp_path, one_device, capsys
):
    run, source = (
        begun_run(tmp_path, "--model.lora_rank", str(rank)),
        hub_names.fetch("embedded:policy", None),
    )
    config, model = config_file.load([run.config]), hf.load(source.directory)
    if rank:
        model = lora.attach(model, rank, jax.random.key(1), one_device)
        model.layers["q_lora_b"][...] = model.layers["q_lora_b"][...] + 0.01
    test_export.save(run, 1, 5, model)
    export.export_policy(model, source, run, 1)
    before = {p.relative_to(run.root): p.read_bytes() for p in run.root.rglob("*") if p.is_file()}

    def mend():
        export.mend(run, config, source, 1, one_device, lambda: None)
        return capsys.readouterr().err

    assert mend() == ""
    SPOILT[kind](run.export(1))
    assert "it is written again from its checkpoint" in mend()
    after = {p.relative_to(run.root): p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    assert after == before

    SPOILT[kind](run.export(1))
    flip(numbers(run.checkpoints(1) / "5"))
    with pytest.raises(
        BadInput, match=r"no checkpoint of iteration 1 is whole either: .* or delete .*iter_1 and "
    ):
        mend()


@pytest.mark.usefixtures("single_device")
def test_a_game_goes_on_after_a_truncated_export_of_the_iteration_before(played, tmp_path):
    run = shutil.copytree(played, tmp_path / "copy")
    (run / "iter_2/eval.json").unlink()
    SPOILT["truncated"](run / "iter_1/export")
    main.main(words(run, iterations=2))
    assert [digest(run, t) for t in (1, 2)] == [digest(played, t) for t in (1, 2)]


@contextlib.contextmanager
def a_limit_on_file_sizes(_):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(directory, *options):
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system of its own")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


FAULTS = {
    "a limit on file sizes": (a_limit_on_file_sizes, "File too large; raise the limit"),
    "a full disk": (lambda at: mounted(at, "size=300k"), "No space left on device; make room"),
    "no more inodes": (lambda at: mounted(at, "nr_inodes=6"), "No space left on device; make room"),
    "a read-only disk": (lambda at: mounted(at, "ro"), "Read-only file system"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_cannot_be_written_is_one_line_at_once_and_the_same_training_then_ends_in_the_same_bits(
    fault, tmp_path, one_device, capfd
):
    settings, rows = dataclasses.replace(SETTINGS, checkpoint_every=1), pairs_of(8)
    whole = train(tmp_path / "whole", rows, settings, one_device)
    faulty, reason = FAULTS[fault]
    directory = tmp_path / "run/checkpoints"
    with faulty(directory):
        capfd.readouterr()
        begin = time.monotonic()
        with pytest.raises(BadInput, match=reason) as raised:
            train(tmp_path / "run", rows, settings, one_device)
        assert time.monotonic() - begin < 60
        assert str(directory) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert capfd.readouterr().err == ""
        assert not [t for t in threading.enumerate() if type(t).__module__.startswith("orbax")]
    again = train(tmp_path / "run", rows, settings, one_device)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(whole), leaves(again), strict=True))
    assert [p.name for p in directory.iterdir()] == ["4"]


def test_a_directory_of_checkpoints_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "c").write_text("a file in the way")
    with pytest.raises(BadInput, match="c: cannot be written: File exists"):
        saved(tmp_path / "c", 8)


def test_two_checkpoints_are_kept_while_training(tmp_path):
    assert sorted(p.name for p in saved(tmp_path / "c", 4, 8, 12, 16).iterdir()) == ["12", "16"]
