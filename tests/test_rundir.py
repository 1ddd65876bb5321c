"""The run directory holds whole files of its own configuration, or none."""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import stat

import pytest

from sppo_jax import config_file, files, records
from sppo_jax.config import Config, Fit
from sppo_jax.errors import BadInput, one_line
from sppo_jax.files import replacing
from sppo_jax.records import Responses
from sppo_jax.run import directory, manifest
from sppo_jax.run.directory import RunDir, shard_ranges
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.shards import Shards
from sppo_jax.run.stage import Stage
from tests.faults import mounted, refusing

ROW = Responses(1, "q", [1, 2], [[3], [4, 2]], ["a", "b"], ["length", "stop"], [-1.0, -2.5])


@pytest.mark.parametrize("total", [1, 2, 7, 8, 9, 20_801])
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_T13_shards_cover_every_prompt_exactly_once(total, size):
    covered = [i for part in shard_ranges(total, size) for i in part]
    assert covered == list(range(total))


def test_T14_a_write_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "deep" / "file"
    with pytest.raises(RuntimeError, match="torn"), replacing(path) as part:
        part.write_text("half")
        raise RuntimeError("torn")
    assert list(path.parent.iterdir()) == []


def test_T14_a_new_file_replaces_the_old_one_and_directories_too(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "dir") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert [p.name for p in (tmp_path / "dir").iterdir()] == ["new"]


def test_records_come_back_as_they_were(tmp_path):
    records.write(tmp_path / "x", Responses, [ROW], {"policy": "p"})
    assert records.read(tmp_path / "x", Responses, {"policy": "p"}) == [ROW]


def test_T14_a_foreign_shard_is_refused_and_named(tmp_path):
    records.write(tmp_path / "x", Responses, [ROW], {"policy": "p", "judge": "j"})
    with pytest.raises(BadInput, match="x: was made from another policy"):
        records.read(tmp_path / "x", Responses, {"policy": "q", "judge": "j"})


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_T14_a_torn_shard_is_refused(tmp_path, keep):
    path = tmp_path / "x"
    records.write(path, Responses, [ROW], {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BadInput, match="damaged"):
        records.read(path, Responses)


def test_a_directory_of_another_configuration_is_refused_naming_the_keys(tmp_path):
    config = config_file.load([], ["--out", str(tmp_path / "run")])
    with directory.opened(config) as run:
        directory.claim(run, config)
    with directory.opened(dataclasses.replace(config, iterations=5)):
        pass
    other = dataclasses.replace(config, seed=3, fit=Fit(eta=5.0))
    with (
        pytest.raises(BadInput, match=r"seed \(42 there, 3 now\), fit.eta \(1000.0 there, 5.0 now\)"),
        directory.opened(other),
    ):
        pass


def test_an_empty_value_of_another_configuration_is_shown_in_quotes(tmp_path):
    own = config_file.load([], ["--out", str(tmp_path / "run"), "--prompts.heldout=jsonl:mine.jsonl"])
    with directory.opened(own) as run:
        directory.claim(run, own)
    other = dataclasses.replace(own, prompts=dataclasses.replace(own.prompts, heldout=""))
    with (
        pytest.raises(BadInput, match=r"prompts\.heldout \(jsonl:mine\.jsonl there, '' now\)"),
        directory.opened(other),
    ):
        pass


def test_a_run_that_cannot_begin_leaves_no_directory_and_an_interrupted_claim_is_no_obstacle(tmp_path):
    config = Config(out=str(tmp_path / "run"))
    with pytest.raises(BadInput, match="wrong"), directory.opened(config):
        raise BadInput("wrong")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.part").write_text("ou")
    with directory.opened(config) as run:
        directory.claim(run, config)
    assert run.config.read_text().startswith("out: ")


def test_a_directory_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match=r"thesis\.tex"), directory.opened(Config(out=str(tmp_path))):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


IMPOSSIBLE = {
    "NUL": ("a\0b", "not a possible name"),
    "half a character": ("a\ud800", "not a possible name"),
    "a byte that is no UTF-8": ("a\udcff", "not a possible name"),
    "a long name": ("x" * 300, "File name too long"),
    "a long path": ("x/" * 2500, "File name too long"),
    "a file": ("file", "a file is in the way"),
    "below a file": ("file/below", "Not a directory"),
    "a link to nothing": ("nothing", "a link to nothing is in the way"),
    "links in a circle": ("circle/below", "symbolic links"),
    "a foreign manifest": ("foreign", "holds manifest.json and is not a run directory"),
    "no permission": ("closed/run", "Permission denied"),
    "a system that is read-only": ("read-only/run", "Read-only file system"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_out_that_cannot_be_used_is_one_line_that_names_it_and_nothing_is_made(name, tmp_path):
    out, said = IMPOSSIBLE[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for made in ("foreign", "closed", "read-only"):
        (tmp_path / made).mkdir()
    (tmp_path / "foreign/manifest.json").write_text("not ours")
    before = sorted(tmp_path.rglob("*"))
    config = Config(out=f"{tmp_path}/{out}")
    with (
        refusing("*closed/run", errno.EACCES),
        refusing("*read-only/run", errno.EROFS),
        pytest.raises(BadInput, match=said) as error,
    ):
        assert manifest.pinned_judge(RunDir(config.out)) == {}
        with directory.opened(config):
            pass
    assert "--out" in str(error.value)
    assert one_line(error.value) == str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


PLACES = {
    "a new directory": lambda at: (at / "new", []),
    "a new directory below new ones": lambda at: (at / "a/b/c", []),
    "an empty directory": lambda at: (at / "mine", [(at / "mine").mkdir()]),
    "the working directory": lambda at: (".", [(at / "mine").mkdir(), os.chdir(at / "mine")]),
    "a link": lambda at: (at / "link", [(at / "mine").mkdir(), (at / "link").symlink_to(at / "mine")]),
    "a new directory below a link": lambda at: (
        at / "link/new", [(at / "mine").mkdir(), (at / "link").symlink_to(at / "mine")]
    ),
    "a volume of its own": lambda at: (at / "mine", [(at / "mine/lost+found").mkdir(parents=True)]),
    "a directory with an old lock": lambda at: (at / "mine", [(at / "mine").mkdir(), (at / "mine/.lock").touch()]),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_does_not_begin_leaves_what_was_there_and_nothing_else(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = PLACES[place](tmp_path)
    before = {p: p.lstat().st_ino for p in tmp_path.rglob("*")}
    with pytest.raises(BadInput, match="the mistake"), directory.opened(Config(out=str(out))):
        raise BadInput("the mistake")
    assert {p: p.lstat().st_ino for p in tmp_path.rglob("*")} == before


def test_a_mount_point_stays_when_a_run_does_not_begin(tmp_path):
    with mounted(tmp_path / "volume", "size=1m"):
        with (
            pytest.raises(BadInput, match="the mistake"),
            directory.opened(Config(out=str(tmp_path / "volume"))),
        ):
            raise BadInput("the mistake")
        assert list((tmp_path / "volume").iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EROFS, errno.EIO])
def test_a_clean_up_that_fails_does_not_replace_the_error(number, tmp_path, monkeypatch):
    def refuse(path, *args, **options):
        raise OSError(number, os.strerror(number), str(path))

    with (
        pytest.raises(BadInput, match="the mistake"),
        directory.opened(Config(out=str(tmp_path / "run"))),
    ):
        for name in ("rmdir", "unlink", "remove", "listdir", "scandir"):
            monkeypatch.setattr(os, name, refuse)
        raise BadInput("the mistake")
    monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_one_line(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory.opened(Config(out=str(tmp_path / "run"))):
        pass
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/run/.lock cannot be locked ({os.strerror(number)})")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_only_a_lock_that_is_held_means_that_the_directory_is_in_use(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").write_bytes(b"\xff\x00")
    with pytest.raises(BadInput, match="is in use by"), directory.opened(Config(out=str(tmp_path))):
        pass
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_directory_that_cannot_be_synced_does_not_hinder_a_write(number, tmp_path, monkeypatch):
    plain = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_json(tmp_path / "deep/x.json", {"a": 1})
    assert files.read_json(tmp_path / "deep/x.json") == {"a": 1}


def test_only_names_that_a_run_gives_are_iterations(tmp_path):
    for name in ("iter_0", "iter_12", "iter_²", "iter_007", "iter_-1", "iter_", "iter_x", "iteration"):
        (tmp_path / name).mkdir()
    assert RunDir(tmp_path).iterations() == [0, 12]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "{}", '{"key": 1}', '{"key": "k", "made_from": {"policy": "p"}, "facts": {}, "row": {"a": 1}}',
     "[" * 5000, '{"key": "k", "made_from": [], "facts": {}, "row": {}}'],
)  # fmt: skip
def test_a_damaged_line_of_a_shard_is_made_again(line, tmp_path):
    run = RunDir(tmp_path)
    shards = Shards(Stage(run, 1, 0, 1, {"policy": "p"}, Metrics(run)), "responses", Responses, 1)
    shards.keep(0, "whole", ROW)
    [file] = (tmp_path / "iter_1/responses").iterdir()
    file.write_text(file.read_text() + line)
    assert shards.kept(0) == {"whole": (ROW, {})}


def test_a_shard_that_cannot_be_read_is_not_called_damaged(tmp_path):
    records.write(tmp_path / "x", Responses, [ROW], {})
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        records.read(tmp_path / "y", Responses)
    with pytest.raises(BadInput, match="cannot be read: "):
        records.read(tmp_path / ("x" * 300), Responses)


def hold(out, held, release):
    with directory.opened(Config(out=out)):
        held.set()
        release.wait(30)


def test_two_runs_cannot_share_a_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), held, release))
    other.start()
    assert held.wait(60)
    try:
        with (
            pytest.raises(BadInput, match=f"in use by process {other.pid}"),
            directory.opened(Config(out=str(tmp_path))),
        ):
            pass
    finally:
        release.set()
        other.join()
    with directory.opened(Config(out=str(tmp_path))):  # free again, however the other process ended
        pass


def test_a_file_never_takes_the_place_of_a_directory(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("data")
    with pytest.raises(BadInput, match="Is a directory"), files.replacing(tmp_path / "kept") as part:
        part.write_text("new")
    assert (tmp_path / "kept" / "file").read_text() == "data"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
