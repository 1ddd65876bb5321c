"""OUT in a bucket: the same files as in a directory, on whichever machine the run goes on, and nothing lost when it fails."""

import contextlib
import errno
import signal
import sys
import time

import jax
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sppo_jax import errors, files, main
from sppo_jax.errors import BadInput
from sppo_jax.report import __main__ as report
from sppo_jax.run import bucket, holding, objects
from sppo_jax.run.directory import RunDir
from sppo_jax.run.shards import Shards
from sppo_jax.training.checkpoint import Checkpoints
from tests.buckets import RUN, Flaky, of_directory, put, registry, same, stored
from tests.small_game import words

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """What a bucket holds when a host is lost in the middle of sampling, training and sending; and at the end."""
    found, devices = {}, jax.devices()
    keep, save, send = Shards.keep, Checkpoints.save, objects.Objects.send

    def kept(self, i, *args):
        keep(self, i, *args)
        if i == 1 and "sampling" not in found:
            bucket.send()
            found["sampling"] = stored()

    def saved(self, step, state):
        save(self, step, state)
        if step == 1 and "training" not in found:
            self.wait()
            bucket.send()
            found["training"] = stored()

    def sent(self, name, path):
        if name == "iter_1/export/config.json":
            found["sending"] = stored()
        return send(self, name, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        patch.setattr(jax, "devices", lambda *_: devices[:1])
        patch.setattr(bucket, "EVERY", 1000.0)
        patch.setattr(MemoryFileSystem, "store", {})
        patch.setattr(Shards, "keep", kept)
        patch.setattr(Checkpoints, "save", saved)
        patch.setattr(objects.Objects, "send", sent)
        patch.setattr(bucket, "AT_ONCE", 1)
        main.main(words(RUN, iterations=2))
        found["end"] = stored()
    return found


def test_a_game_leaves_the_same_files_in_a_bucket_as_in_a_directory(moments, played):
    assert same(moments["end"]) == same(of_directory(played))
    lines = (
        moments["end"]["config.yaml"].decode().splitlines(),
        (played / "config.yaml").read_text().splitlines(),
    )
    assert [a for a, b in zip(*lines, strict=True) if a != b] == [f"out: {RUN}"]
    assert ".lock" not in moments["end"]


def test_the_moments_are_in_the_middle(moments):
    partial = [name for name in moments["sampling"] if "/.shard-" in name]
    assert partial
    assert "iter_1/pairs.parquet" not in moments["sampling"]
    assert "iter_1/checkpoints/1/.complete" in moments["training"]
    assert "iter_1/export/config.json" not in moments["training"]
    assert any(name.startswith("iter_1/export/") for name in moments["sending"])
    assert "iter_1/export/.complete" not in moments["sending"]


@pytest.mark.parametrize("moment", ["sampling", "training", "sending"])
def test_another_host_goes_on_from_the_bucket_alone(moment, moments, single_device, capsys, monkeypatch):
    monkeypatch.setattr(holding, "STALE", 0.0)
    put(moments[moment])
    main.main(words(RUN, iterations=2))
    assert same(stored()) == same(moments["end"])
    printed = capsys.readouterr().out
    if moment != "sampling":
        assert "iteration 1 respond: " not in printed
    if moment == "training":
        assert "iteration 1 fit: 1/1 updates" in printed


def test_a_finished_run_fetches_no_weights_of_earlier_iterations(moments, caches, single_device, capsys):
    put(moments["end"])
    main.main(words(RUN, iterations=2))
    root = RunDir(RUN).root
    assert root.is_relative_to(caches)
    assert (root / "iter_1/export/config.json").exists()
    assert not list(root.glob("iter_1/**/*.safetensors"))
    assert not (root / "iter_1/checkpoints").exists()
    assert (root / "iter_2/export/model.safetensors").exists()
    assert same(stored()) == same(moments["end"])
    assert f"report: {RUN}/report.html" in capsys.readouterr().out


def test_commands_read_a_run_in_a_bucket(moments, tmp_path, capsys):
    from sppo_jax import export, interchange

    put({name: content for name, content in moments["end"].items() if name != "report.html"})
    report.main(["--run", RUN])
    assert f"{RUN}/report.html" in capsys.readouterr().out
    assert b"iteration" in stored()["report.html"]
    interchange.main(["--run", RUN, "--iteration", "1", "--to", str(tmp_path / "pairs.parquet")])
    assert (tmp_path / "pairs.parquet").exists()
    export.main(["--run", RUN, "--iteration", "1", "--to", str(tmp_path / "policy")])
    weights = (tmp_path / "policy/model.safetensors").read_bytes()
    assert weights == moments["end"]["iter_1/export/model.safetensors"]
    with pytest.raises(BadInput, match="--run memory://b/other: no such directory"):
        report.main(["--run", "memory://b/other"])
    with pytest.raises(BadInput, match=f"--iteration 3: {RUN} has no policy of it"):
        export.main(["--run", RUN, "--iteration", "3", "--to", str(tmp_path / "third")])


# The lock.


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(holding, "STALE", 0.4)
    monkeypatch.setattr(holding, "EVERY", 0.1)


def test_a_second_run_is_refused_while_the_first_lives(short, tmp_path, monkeypatch):
    with bucket.opened(RUN):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another host"))
        refused = pytest.raises(
            BadInput, match=f"--out {RUN} is in use by process [0-9]+ on .*; choose another"
        )
        lock = holding.Lock(objects.Objects(RUN), "another")
        with refused, lock.held():
            pass
    with lock.held():  # it was freed
        assert b"another" in stored()[".lock"]
    assert ".lock" not in stored()


def test_the_lock_of_a_lost_host_is_taken_over(short):
    put({".lock": b'{"holder": "process 7 on lost", "own": "x"}'})
    start = time.monotonic()
    with bucket.opened(RUN):
        assert b"lost" not in stored()[".lock"]
    assert time.monotonic() - start >= 0.4


def test_after_a_kill_the_same_host_goes_on_at_once(monkeypatch):
    with bucket.opened(RUN):
        left = stored()[".lock"]
    put({".lock": left})
    start = time.monotonic()
    with bucket.opened(RUN):
        pass
    assert time.monotonic() - start < holding.STALE / 4


def test_a_lock_that_is_no_json_is_a_lock(short):
    put({".lock": b"\xff"})
    with bucket.opened(RUN):
        pass
    assert stored() == {}


def test_a_run_whose_lock_was_taken_over_ends(short):
    with terminating(), pytest.raises(BadInput, match="taken over by process 9 on other"), bucket.opened(RUN):
        put({".lock": b'{"holder": "process 9 on other", "own": "y"}'})
        time.sleep(10)
    assert b"other" in stored()[".lock"]


def test_two_processes_of_one_machine_do_not_share_a_local_copy():
    with bucket.opened(RUN), pytest.raises(BadInput, match="in use by another process"), bucket.opened(RUN):
        pass


# Failures.


@contextlib.contextmanager
def terminating():
    """SIGTERM raises Terminated, as in every command."""

    def end(*_):
        raise errors.Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    monkeypatch.setattr(objects, "ENDING", 0.3)
    monkeypatch.setattr(objects, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(bucket, "EVERY", 0.05)


def test_a_network_that_comes_back_costs_a_line(hasty, capsys):
    with bucket.opened("flaky://b/run"):
        Flaky.failures = 2
        files.write_json(RunDir("flaky://b/run").evaluation(1), {"iteration": 1})
    assert "iter_1/eval.json" in stored("flaky://b/run")
    assert capsys.readouterr().err.count("the network is gone; trying again for 0 s\n") == 1


def test_a_network_that_is_gone_ends_the_run_and_loses_nothing(hasty, caches):
    url = "flaky://b/run"
    with terminating(), pytest.raises(BadInput) as raised, bucket.opened(url):
        Flaky.failures = 10**6
        files.write_json(RunDir(url).evaluation(1), {"iteration": 1})
        time.sleep(10)  # until the thread has given up, and the run is stopped
    kept = bucket._home(url, 0)
    assert str(raised.value) == (
        f"{url}: the network is gone; what it lacks is in {kept}, and the same command on this machine sends it"
    )
    assert "iter_1/eval.json" not in stored(url)
    Flaky.failures = 0
    with bucket.opened(url):
        pass
    assert "iter_1/eval.json" in stored(url)


def test_a_failure_at_the_end_does_not_hide_what_ended_the_run(hasty, capsys, monkeypatch):
    monkeypatch.setattr(bucket, "EVERY", 1000.0)
    with pytest.raises(ZeroDivisionError), bucket.opened("flaky://b/run"):
        files.write_json(RunDir("flaky://b/run").evaluation(1), {})
        Flaky.failures = 10**6
        raise ZeroDivisionError
    assert "warning: flaky://b/run: the network is gone" in capsys.readouterr().err


def test_a_bucket_that_never_answers_is_given_up_early(hasty, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 1000.0)
    monkeypatch.setattr(objects, "FIRST", 0.2)
    monkeypatch.setattr(Flaky, "failures", 10**6)
    with (
        pytest.raises(BadInput, match=r"^flaky://b/run: the network is gone$"),
        bucket.opened("flaky://b/run"),
    ):
        pass


def test_a_full_disk_here_is_not_tried_again(monkeypatch):
    def full(self, name, path, **_):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    put({"config.yaml": b"seed: 1"}, "flaky://b/run")
    monkeypatch.setattr(Flaky, "get_file", full)
    line = "flaky://b/run/.config.yaml.part: cannot be written: No space left on device; make room"
    with pytest.raises(BadInput, match=line), bucket.opened("flaky://b/run"):
        pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError("no access"), "no access; check its name, and your access to it"),
        (OSError("Forbidden: b/run/x"), "Forbidden: b/run/x; check its name, and your access to it"),
        (FileNotFoundError("b"), "b; check its name, and your access to it"),
    ],
)
def test_a_refusal_is_not_tried_again(error, line, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(Flaky, "pipe_file", refuse)
    with pytest.raises(BadInput) as raised, bucket.opened("flaky://b/run"):
        pass
    assert str(raised.value) == f"flaky://b/run: {line}"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("nowhere://b/run", "Protocol not known: nowhere; name a directory, or a bucket as gs://BUCKET/RUN"),
        ("gs://b/run", "this needs another package: pip install gcsfs"),
        ("s3://b/run", "this needs another package: pip install s3fs"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url, line, monkeypatch):
    for protocol, name in (("gs", "gcsfs"), ("s3", "s3fs")):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(registry._registry, protocol, raising=False)
    with pytest.raises(BadInput) as raised:
        main.main(words(url))
    assert str(raised.value) == f"{url}: {line}"


def test_without_caches_there_is_no_local_copy(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(BadInput, match=f"{RUN}: its local copy needs a home directory"), bucket.opened(RUN):
        pass
