"""OUT on Google Cloud Storage, played against a stub of its interface: gcsfs sends the files, orbax the checkpoints."""

import shutil

import pytest

from sppo_jax import main
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.run import bucket, objects
from sppo_jax.run.directory import RunDir
from sppo_jax.training import places
from sppo_jax.training.checkpoint import Checkpoints
from tests import gcs_stub
from tests.small_game import digest, words

pytest.importorskip("gcsfs", reason="gcsfs is not installed (pip install gcsfs)")
pytestmark = pytest.mark.filterwarnings("ignore")  # of google's packages
RUN = "gs://bucket/run"


@pytest.fixture
def store(tmp_path, monkeypatch):
    import gcsfs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(bucket, "EVERY", 1000.0)
    with gcs_stub.served() as served:
        gcsfs.GCSFileSystem.clear_instance_cache()
        from etils.epath import backend

        backend.fsspec_backend._get_filesystem.cache_clear()
        yield served


def test_objects(store, tmp_path):
    found = objects.Objects(RUN)
    assert found.listed() == {}
    assert found.create(".lock", b"first")
    assert not found.create(".lock", b"second")
    assert found.read(".lock") == b"first"
    assert found.read("none") is None
    (tmp_path / "file").write_bytes(b"x" * 5000)
    version = found.send("a b/ü?#%", tmp_path / "file")
    assert found.listed() == {".lock": (5, "5 1"), "a b/ü?#%": (5000, version)}
    assert found.fetch("a b/ü?#%", tmp_path / "copy/file") == version
    assert (tmp_path / "copy/file").read_bytes() == b"x" * 5000
    assert found.fetch("none", tmp_path / "copy/none") is None
    assert found.send("a b/ü?#%", tmp_path / "file") != version
    objects.Objects("gs://bucket/run2").write("other", b"")
    found.delete("a b/ü?#%")
    found.delete("a b/ü?#%")
    assert list(found.listed()) == [".lock"]


def test_a_large_file_goes_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "IN_MEMORY", 100)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 30_000)
    found = objects.Objects(RUN)
    found.send("large", tmp_path / "file")
    found.fetch("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_bucket_without_access_is_refused_at_once(status, store):
    store.refuse = status
    with pytest.raises(BadInput, match=f"{RUN}: .*; check its name, and your access to it"):
        main.main(words(RUN))


def test_a_bucket_needs_a_folder(store):
    with pytest.raises(BadInput, match="gs://bucket: name a folder in the bucket, as gs://bucket/run"):
        main.main(words("gs://bucket"))


def test_a_run_stopped_in_training_goes_on_elsewhere(store, tmp_path, single_device, played, capsys):
    save = Checkpoints.save

    def stopped(self, step, state):
        save(self, step, state)
        self.wait()
        raise Terminated

    single_device.setattr(Checkpoints, "save", stopped)
    with pytest.raises(Terminated):
        main.main(words(RUN, iterations=2))
    single_device.setattr(Checkpoints, "save", save)
    assert "run/iter_1/checkpoints/1/commit_success.txt" in store.objects
    assert not RunDir(RUN).root.joinpath("iter_1/checkpoints").exists()  # written there alone
    # Another host, on which a later checkpoint was cut off.
    shutil.rmtree(tmp_path / "caches")
    store.objects["run/iter_1/checkpoints/2/default/_METADATA"] = 10**6, b"{"
    main.main(words(RUN, iterations=2))
    assert "iteration 1 fit: resumes at update 1 of 2" in capsys.readouterr().out
    assert digest(RunDir(RUN).root, 2) == digest(played, 2)
    kept = {name.split("/")[3] for name in store.objects if name.startswith("run/iter_1/checkpoints/")}
    assert kept == {"2"}
    assert "run/.lock" not in store.objects


@pytest.fixture
def trained(store, single_device):
    """Where a small run's checkpoints lie, of which the first iteration's export is lost."""
    main.main(words(RUN))
    for name in [n for n in store.objects if n.startswith(("run/iter_1/export/", "run/iter_1/eval"))]:
        del store.objects[name]
    return RunDir(RUN).checkpoints(1)


def test_checkpoints_that_are_damaged_are_moved_aside(trained, store, capsys, tmp_path):
    shutil.rmtree(tmp_path / "caches")
    name = next(n for n in store.objects if n.endswith("checkpoints/2/default/manifest.ocdbt"))
    store.objects[name] = 10**6, b"nothing"
    main.main(words(RUN))
    printed = capsys.readouterr().out
    assert f"{trained}/2: damaged, or not a checkpoint of this model" in printed
    assert f"({trained}/2.damaged may be deleted)" in printed
    assert places.steps(trained) == [2]
    assert not any(".damaged" in n for n in store.objects)  # the end of the training has deleted it


def test_no_answer_is_no_damage(trained, store, tmp_path):
    store.refuse, store.refused = 403, "ocdbt"
    shutil.rmtree(tmp_path / "caches")
    with pytest.raises(BadInput, match=f"{trained}/2: cannot be read: .*; run the same command again"):
        main.main(words(RUN))
    store.refuse = 0
    assert places.steps(trained) == [2]  # where it was


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(store, single_device):
    store.refuse, store.refused = 403, "checkpoints/1"
    with pytest.raises(BadInput, match=f"{RUN}/iter_1/checkpoints"):
        main.main(words(RUN))
    assert "run/iter_1/pairs.parquet" in store.objects
