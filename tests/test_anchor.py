"""fit.anchor in a game: where the base's log-probs come from, and that they are lost and made again with the pairs."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import main, models, records, response_logprob
from sppo_jax.hub import names
from sppo_jax.records import Pair
from tests import kill_points
from tests.small_game import digest, words
from tests.test_kills import Kills

RHO = 0.5


def command(out):
    return words(out, iterations=2, fit__anchor=RHO)


@pytest.mark.usefixtures("single_device")
def test_the_bases_log_probs_lie_beside_the_references_and_a_kill_at_either_moment_changes_no_bit(
    played, tmp_path, monkeypatch, capsys
):
    whole = tmp_path / "whole"
    main.main(command(whole))
    assert "(mean (target - 0.5 log pi_t/pi_0)^2)" in capsys.readouterr().out
    first, second = (records.read(whole / f"iter_{t}/pairs.parquet", Pair) for t in (1, 2))

    assert all(pair.base_logprob == pair.ref_logprob for pair in first)
    assert digest(whole, 1)[1] == digest(played, 1)[1]  # in iteration 1 the base is the reference
    assert digest(whole, 2)[1] != digest(played, 2)[1]

    base = models.load(names.path("policy"))
    for pair in second[:2]:
        for ids, found in zip(pair.response_ids, pair.base_logprob, strict=True):
            tokens = jnp.asarray([pair.prompt_ids + ids])
            lengths = jnp.asarray([len(pair.prompt_ids)]), jnp.asarray([tokens.shape[1]])
            assert found == pytest.approx(float(response_logprob(base, tokens, *lengths)[0]), abs=1e-4)
    moved = np.array([pair.ref_logprob for pair in second]) - np.array([pair.base_logprob for pair in second])
    assert np.abs(moved).max() > 1e-3

    left = shutil.copytree(whole, tmp_path / "kills/0")
    for name in ("pairs.parquet", "eval.json"):
        (left / "iter_2" / name).unlink()
    for name in ("checkpoints", "export"):
        shutil.rmtree(left / "iter_2" / name)
    kills = Kills(tmp_path / "kills", monkeypatch, command, at="iter_2/pairs.parquet")
    out = kills.play()
    assert [when for _, when in kills.places] == ["before", "after"]
    assert kill_points.contents(out) == kill_points.contents(whole)
