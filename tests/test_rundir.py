"""The run directory holds whole files of its own configuration, or none."""

import dataclasses
import multiprocessing

import pytest

from sppo_jax import config_file, files, records
from sppo_jax.config import Config, Fit
from sppo_jax.errors import BadInput
from sppo_jax.files import replacing
from sppo_jax.records import Responses
from sppo_jax.run import directory
from sppo_jax.run.directory import shard_ranges

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


def test_an_out_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below", "x" * 300):
        with pytest.raises(BadInput, match="--out"), directory.opened(Config(out=str(tmp_path / out))):
            pass


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
