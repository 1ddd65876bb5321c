"""The local copy of a run in a bucket: what is sent, fetched and deleted, and what counts as whole."""

import shutil

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sppo_jax import files
from sppo_jax.errors import BadInput
from sppo_jax.run import bucket, objects
from sppo_jax.run.bucket import Mirror
from sppo_jax.run.directory import RunDir
from tests import run_directory
from tests.buckets import RUN, of_directory, put, stored

pytestmark = pytest.mark.usefixtures("caches")


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


def test_a_run_that_was_deleted_in_the_bucket_does_not_come_back(two, tmp_path):
    first = two[0]
    write(first, "config.yaml", "seed: 1")
    first.push()
    write(first, "iter_1/pairs.parquet", "not sent")
    MemoryFileSystem.store.clear()
    again = Mirror(RUN, tmp_path / "first")
    again._known = first._known
    again.pull(start=True)
    again.push()
    assert stored() == {}
    assert not again.root.exists()


def test_names_that_no_file_can_have_are_left_out(two):
    put({"../outside": b"x", "a//b": b"x", "iter_1/..": b"x", "iter_1/pairs.parquet": b"rows", "x\0": b"x"})
    two[0].pull(start=True)
    assert list(of_directory(two[0].root)) == ["iter_1/pairs.parquet"]


def test_a_state_that_is_damaged_only_costs_a_comparison(two, tmp_path):
    write(two[0], "iter_1/pairs.parquet", "rows")
    two[0].push()
    two[0].save()
    (tmp_path / "first/state.json").write_text('{"own": "x"}')
    again = Mirror(RUN, tmp_path / "first")
    again.pull(start=True)
    again.push()
    assert stored() == {"iter_1/pairs.parquet": b"rows"}


def test_a_damaged_file_is_named_by_the_bucket(tmp_path):
    run = run_directory.measured(tmp_path)
    put(of_directory(run.root) | {"manifest.json": b"{"})
    with pytest.raises(BadInput, match=f"{RUN}/manifest.json: not JSON"), bucket.opened(RUN):
        files.read_json(RunDir(RUN).manifest)
