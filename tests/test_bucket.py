"""OUT in a bucket: the same files as in a directory, on whichever machine the run goes on, and nothing lost when it fails."""

import contextlib
import importlib
import re
import shutil
import signal
import sys
import time

import fsspec
import jax
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sppo_jax import errors, files, main
from sppo_jax.errors import BadInput
from sppo_jax.report import page
from sppo_jax.run import bucket, holding, objects
from sppo_jax.run.bucket import Mirror
from sppo_jax.run.directory import RunDir
from sppo_jax.run.shards import Shards
from sppo_jax.training.checkpoint import Checkpoints
from tests import run_directory
from tests.small_game import words

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


@pytest.fixture(autouse=True)
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
    page.main(["--run", RUN])
    assert f"{RUN}/report.html" in capsys.readouterr().out
    assert b"iteration" in stored()["report.html"]
    interchange.main(["--run", RUN, "--iteration", "1", "--to", str(tmp_path / "pairs.parquet")])
    assert (tmp_path / "pairs.parquet").exists()
    export.main(["--run", RUN, "--iteration", "1", "--to", str(tmp_path / "policy")])
    weights = (tmp_path / "policy/model.safetensors").read_bytes()
    assert weights == moments["end"]["iter_1/export/model.safetensors"]
    with pytest.raises(BadInput, match="--run memory://b/other: no such directory"):
        page.main(["--run", "memory://b/other"])
    with pytest.raises(BadInput, match=f"--iteration 3: {RUN} has no policy of it"):
        export.main(["--run", RUN, "--iteration", "3", "--to", str(tmp_path / "third")])


# The local copy and the bucket.


@pytest.fixture
def two(tmp_path):
    """The local copies of two processes of one run."""
    return [Mirror(RUN, tmp_path / name) for name in ("first", "second")]


def write(mirror, name, text):
    path = mirror.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_one_process_has_sent_the_other_fetches(two):
    first, second = two
    write(first, "iter_1/responses/.shard-00000-of-00002.partial.jsonl", "row\n")
    write(first, "iter_1/responses/shard-00001-of-00002.parquet", "rows")
    write(first, "iter_1/.pairs.parquet.part", "half")
    first.push()
    second.pull(start=True)
    assert of_directory(second.root) == {
        name: content for name, content in of_directory(first.root).items() if not name.endswith(".part")
    }
    # The second completes the first shard, and the first learns of it.
    (second.root / "iter_1/responses/.shard-00000-of-00002.partial.jsonl").unlink()
    write(second, "iter_1/responses/shard-00000-of-00002.parquet", "all")
    second.push()
    first.pull()
    assert sorted(stored()) == [f"iter_1/responses/shard-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert of_directory(first.root)["iter_1/responses/shard-00000-of-00002.parquet"] == b"all"
    assert not (first.root / "iter_1/responses/.shard-00000-of-00002.partial.jsonl").exists()


def test_only_what_has_changed_is_sent(two, monkeypatch):
    first, sent = two[0], []
    monkeypatch.setattr(objects.Objects, "send", lambda _, name, path: sent.append(name) or "v")
    write(first, "metrics.jsonl", "1\n")
    write(first, "eval.json", "{}")
    first.push()
    with (first.root / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    first.push()
    first.push()
    assert sent == ["metrics.jsonl", "eval.json", "metrics.jsonl"]


def test_what_was_lost_here_is_not_deleted_there(two, tmp_path):
    first = two[0]
    for name in ("config.yaml", "iter_1/pairs.parquet", "iter_1/export/config.json"):
        write(first, name, "text")
    first.push()
    before = stored()
    shutil.rmtree(first.root)
    first.push()
    assert stored() == before
    again = Mirror(RUN, tmp_path / "first")  # the next start
    again.pull(start=True)
    assert (again.root / "iter_1/pairs.parquet").exists()


def test_of_two_changes_the_longer_counts(two):
    first, second = two
    write(first, "metrics.jsonl", "1\n")
    first.push()
    second.pull(start=True)
    write(first, "metrics.jsonl", "1\n2\n")
    write(second, "metrics.jsonl", "1\n2\n3\n")
    first.push()
    second.pull(start=True)
    second.push()
    first.pull()
    assert stored()["metrics.jsonl"] == b"1\n2\n3\n" == (first.root / "metrics.jsonl").read_bytes()


def test_a_directory_counts_when_it_is_whole(two, monkeypatch):
    first, second = two
    send = objects.Objects.send

    def sent(self, name, path):
        if name.endswith("model.safetensors"):
            raise BadInput("the host is gone")
        return send(self, name, path)

    monkeypatch.setattr(bucket, "AT_ONCE", 1)
    write(first, "iter_1/export/config.json", "{}")
    write(first, "iter_1/export/model.safetensors", "weights")
    with monkeypatch.context() as patch:
        patch.setattr(objects.Objects, "send", sent)
        with pytest.raises(BadInput, match="gone"):
            first.push()
    assert "iter_1/export/config.json" in stored()
    second.pull(start=True)
    assert not second.root.exists()
    first.pull(start=True)  # nothing is deleted here, since nobody has deleted it there
    first.push()
    second.pull()
    assert of_directory(second.root) == of_directory(first.root)
    # Written anew with other files, which do not mix with the old ones.
    shutil.rmtree(first.root / "iter_1/export")
    write(first, "iter_1/export/model-00001-of-00001.safetensors", "weights")
    first.push()
    assert sorted(stored()) == ["iter_1/export/.complete", "iter_1/export/model-00001-of-00001.safetensors"]


def test_a_deleted_checkpoint_is_deleted_in_the_bucket(two):
    first, second = two
    write(first, "iter_1/checkpoints/1/default/d/x", "numbers")
    first.push()
    second.pull(start=True)
    shutil.rmtree(first.root / "iter_1/checkpoints/1")
    write(first, "iter_1/checkpoints/2/default/d/x", "numbers")
    write(first, "iter_1/checkpoints/3.orbax-checkpoint-tmp/default/d/x", "half")
    first.push()
    assert sorted(stored()) == ["iter_1/checkpoints/2/.complete", "iter_1/checkpoints/2/default/d/x"]
    second.pull()
    assert not (second.root / "iter_1/checkpoints/1/default/d/x").exists()


def test_a_damaged_file_is_named_by_the_bucket(tmp_path):
    run = run_directory.measured(tmp_path)
    put(of_directory(run.root) | {"manifest.json": b"{"})
    with pytest.raises(BadInput, match=f"{RUN}/manifest.json: not JSON"), bucket.opened(RUN):
        files.read_json(RunDir(RUN).manifest)


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
