"""manifest.json: what a run was begun with, and what may differ when it goes on."""

import pytest

from sppo_jax import config_file, files, main
from sppo_jax.errors import BadInput
from sppo_jax.hub.repositories import Snapshot
from sppo_jax.run import manifest
from sppo_jax.run.directory import RunDir
from tests.small_game import words

BEGUN = {"judge": "first", "base_weights": "b", "prompts_1": "p"}


@pytest.fixture
def write(tmp_path, one_device):
    """Return a function that writes the manifest of a run with these inputs."""
    run, config = RunDir(tmp_path), config_file.load(overrides=["--out", str(tmp_path)])

    def write(**inputs):
        manifest.write(
            run,
            config,
            source=Snapshot(tmp_path, "name", None),
            mesh=one_device,
            judge_sources={},
            inputs=BEGUN | inputs,
            prompts={},
        )
        return manifest.read(run)

    return write


def test_another_judge_is_accepted_as_long_as_nothing_was_judged(tmp_path, write):
    write()
    for name in ("iter_1/responses/shard-00000-of-00001.parquet", "iter_0/heldout/responses.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert write(judge="second")["sha256"] == BEGUN | {"judge": "second"}
    with pytest.raises(BadInput, match=r"base_weights differ from when it was begun; choose another --out"):
        write(judge="third", base_weights="c")


@pytest.mark.parametrize(
    "name",
    [
        "iter_1/preferences/.shard-00000-of-00001.partial.jsonl",
        "iter_1/preferences/shard-00000-of-00001.parquet",
        "iter_1/heldout/probe.parquet",
        "iter_2/pairs.parquet",
        "iter_0/eval.json",
    ],
)
def test_another_judge_is_refused_and_the_file_named_where_one_was_judged(tmp_path, write, name):
    write()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    with pytest.raises(
        BadInput, match=f"judge differ from when it was begun .{name} is by the judge of then"
    ):
        write(judge="second")
    assert write()["sha256"] == BEGUN


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe\x00",
        b'{"sha256": 3}',
        b'{"judge": ["x"]}',
        b"[" * 5000,
        b"9" * 5001,
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_manifest_that_is_damaged_or_foreign_is_one_line_with_advice(tmp_path, data, begun):
    run = RunDir(tmp_path)
    run.manifest.write_bytes(data)
    if begun:
        run.config.touch()
    said = "damaged; delete it and run" if begun else "not the manifest of a run; choose another --out"
    for call in (manifest.read, *((manifest.pinned_judge, manifest.pinned_model) if begun else ())):
        with pytest.raises(BadInput, match=rf"manifest\.json: .*{said}"):
            call(run)
    if not begun:  # of another program, which is said where OUT is claimed
        assert not manifest.pinned_judge(run)
        assert manifest.pinned_model(run) is None


def test_a_manifest_that_is_a_directory_is_one_line(tmp_path):
    RunDir(tmp_path).manifest.mkdir()
    RunDir(tmp_path).config.touch()
    with pytest.raises(BadInput, match="damaged; delete it and run"):
        manifest.pinned_judge(RunDir(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", '{"manifest_version": 3, "name": "a browser extension"}'])
def test_a_directory_with_another_programs_manifest_is_refused_and_kept(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match="choose another"):
        main.main(words(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize("text", ["{}", '{"name": "another program"}', '{"sha256": {}}'])
def test_a_manifest_without_digests_is_damaged(write, tmp_path, text):
    write()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"no digests in it: damaged; delete it"):
        write()


def test_packages_that_are_not_installed_have_an_unknown_version(monkeypatch, write):
    def version(name):
        if name == "jax":
            return "0.10"
        if name == "flax":
            return None  # metadata without a version
        raise manifest.PackageNotFoundError(name)

    monkeypatch.setattr(manifest, "version", version)
    found = write()["versions"]
    assert (found["jax"], found["flax"], found["sppo_jax"]) == ("0.10", "unknown", "unknown")


def test_a_missing_manifest_pins_nothing(tmp_path):
    assert manifest.pinned_model(RunDir(tmp_path / "new")) is None
    with pytest.raises(BadInput, match="no run was begun there"):
        manifest.read(RunDir(tmp_path))
    RunDir(tmp_path).config.touch()
    files.write_json(tmp_path / "manifest.json", {"model": {"revision": "c" * 40}})
    assert manifest.pinned_model(RunDir(tmp_path)) == "c" * 40
