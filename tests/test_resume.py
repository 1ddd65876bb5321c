"""The same command again: what is complete is kept, what is missing is made, and foreign or damaged files are refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from sppo_jax import files, main, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Responses
from tests.small_game import digest, words

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.fixture
def run(played, tmp_path):
    """Return a copy of the played game."""
    return shutil.copytree(played, tmp_path / "copy")


def test_the_same_run_twice_is_bitwise_the_same_and_a_third_command_only_reports(played, tmp_path, capsys):
    main.main(words(tmp_path / "again", iterations=2))
    assert digest(played, 2) == digest(tmp_path / "again", 2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*.parquet")}
    capsys.readouterr()
    main.main(words(tmp_path / "again", iterations=2))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*.parquet")}
    assert "respond" not in capsys.readouterr().out


def test_a_finished_run_can_be_continued_with_more_iterations(played, tmp_path):
    main.main(words(tmp_path / "run", iterations=1))
    main.main(words(tmp_path / "run", iterations=2))
    assert digest(tmp_path / "run", 2) == digest(played, 2)


def test_a_card_alone_does_not_make_an_export(run):
    """A finished iteration's export that was deleted to save room stays deleted."""
    shutil.rmtree(run / "iter_1/export")
    main.main(words(run, iterations=2))
    assert not (run / "iter_1/export").exists()


def test_T14_a_missing_shard_is_redone_and_a_foreign_or_torn_one_refused(run, played):
    for name in ("iter_2/eval.json", "iter_2/pairs.parquet", "iter_2/responses/shard-00001-of-00003.parquet"):
        (run / name).unlink()
    main.main(words(run, iterations=2))
    assert digest(run, 2) == digest(played, 2)

    shard = run / "iter_2/preferences/shard-00001-of-00003.parquet"
    (run / "iter_2/eval.json").unlink()
    shutil.copy(run / "iter_1/preferences/shard-00001-of-00003.parquet", shard)
    with pytest.raises(
        BadInput, match=r"shard-00001-of-00003\.parquet: was made from another policy and prompts"
    ):
        main.main(words(run, iterations=2))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(BadInput, match="damaged"):
        main.main(words(run, iterations=2))


def test_T14_a_copied_shard_is_refused_and_judgements_of_other_responses_too(run):
    (run / "iter_2/eval.json").unlink()
    shards = run / "iter_2/responses"
    kept = (shards / "shard-00001-of-00003.parquet").read_bytes()
    shutil.copy(shards / "shard-00000-of-00003.parquet", shards / "shard-00001-of-00003.parquet")
    with pytest.raises(BadInput, match="belongs to other prompts than asked"):
        main.main(words(run, iterations=2))
    (shards / "shard-00001-of-00003.parquet").write_bytes(kept)

    path = shards / "shard-00002-of-00003.parquet"
    made_from = json.loads(pq.read_schema(path).metadata[b"made_from"])
    rows = records.read(path, Responses)
    rows[0].responses[0] += " indeed"
    records.write(path, Responses, rows, made_from)
    with pytest.raises(BadInput, match="was made from another responses"):
        main.main(words(run, iterations=2))


def test_a_report_that_a_crash_left_out_is_written_by_the_next_command(run):
    (run / "report.html").unlink()
    main.main(words(run, iterations=2))
    assert (run / "report.html").exists()


def test_T16_another_mesh_before_the_first_checkpoint_is_no_obstacle(tmp_path, single_device):
    """The reference of another mesh differs in its last bits, and the log-ratio must start at exactly 0."""
    main.main(words(tmp_path / "run"))
    for name in ("checkpoints", "export"):
        shutil.rmtree(tmp_path / "run/iter_1" / name)
    for name in ("eval.json", "heldout/responses.parquet"):
        (tmp_path / "run/iter_1" / name).unlink()
    before = reference_log_probs(tmp_path / "run")
    single_device.undo()
    main.main(words(tmp_path / "run", mesh__fsdp=4, mesh__tensor=2))
    after = reference_log_probs(tmp_path / "run")
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert after != before


def reference_log_probs(out):
    return [row["ref_logprob"] for row in pq.read_table(out / "iter_1/pairs.parquet").to_pylist()]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"sha256": 3}'])
def test_a_damaged_manifest_is_one_line(run, text):
    (run / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        main.main(words(run, iterations=2))


def test_another_configuration_or_other_weights_in_the_same_directory_are_refused(run):
    with pytest.raises(BadInput, match=r"fit\.eta"):
        main.main(words(run, iterations=2, fit__eta=5))
    manifest = json.loads((run / "manifest.json").read_text())
    files.write_json(
        run / "manifest.json", manifest | {"sha256": manifest["sha256"] | {"base_weights": "0" * 64}}
    )
    with pytest.raises(BadInput, match="base_weights differ"):
        main.main(words(run, iterations=2))
