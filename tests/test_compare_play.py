"""`sppo_jax compare` plays: what runs share is made once, a stop loses nothing, and a game that cannot go on stops no other."""

import re

import pytest

from sppo_jax import main, selfplay
from sppo_jax.compare import __main__ as compare
from sppo_jax.compare import playing
from sppo_jax.errors import BadInput
from sppo_jax.judges import CheckedJudge
from sppo_jax.sampler import Sampler
from tests.small_game import digest, words

pytestmark = pytest.mark.usefixtures("single_device")
VARIANTS = ("--configs", "sppo=", "dpo=,fit.loss=dpo,fit.eta=5", "--seeds", "0")
RUNS = [("sppo", 0), ("dpo", 0)]


def asked(out, *more, **options):
    """The command line of two variants of the small game."""
    given = list(words(out, **options))
    seed = given.index("--seed")
    return [*VARIANTS, *given[:seed], *given[seed + 2 :], *more]


@pytest.fixture
def counted(monkeypatch):
    """Counts of prompts that the samplers of all runs got, and of ordered pairs that their judges got."""
    counts = {"prompts": 0, "pairs": 0}
    stream, judged = Sampler.stream, CheckedJudge.compare

    def counting(sampler, prompts, **more):
        counts["prompts"] += len(prompts)
        return stream(sampler, prompts, **more)

    def comparing(judge, prompts, responses, *more):
        counts["pairs"] += sum(len(row) * (len(row) - 1) for row in responses)
        return judged(judge, prompts, responses, *more)

    monkeypatch.setattr(Sampler, "stream", counting)
    monkeypatch.setattr(CheckedJudge, "compare", comparing)
    return counts


def outputs(out):
    return {name: (out / name).read_bytes() for name in (playing.RESULTS, playing.REPORT)}


def files_of(run):
    """The bytes of everything that a run made before training."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for folder in ("iter_0/heldout", "iter_1/responses", "iter_1/preferences", "iter_1/heldout")
        for path in (run / folder).glob("*.parquet")
    }


def test_equal_stages_are_made_once_and_runs_are_what_they_are_alone(tmp_path, counted, capsys, monkeypatch):
    compare.main(asked(tmp_path / "both"))
    printed = capsys.readouterr().out
    together = dict(counted)
    assert "run 1 of 2: sppo, seed 0\n" in printed
    assert re.search(r"run 2 of 2: dpo, seed 0; about \d+\w+ left for 1 run\n", printed)
    assert (
        "reused 4 of 4 stages before training, of sppo, seed 0: the base's held-out responses, responses, preferences, the probe"
        in printed
    )
    assert "±" not in printed.rpartition("variant")[2]

    # The variant that took its stages from the other run has the bytes of one that was played alone.
    counted.update(prompts=0, pairs=0)
    main.main(words(tmp_path / "alone", fit__loss="dpo", fit__eta=5))
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "both/dpo/seed-0")
    assert len(files_of(tmp_path / "alone")) == 1 + 3 + 3 + 2
    assert digest(tmp_path / "alone") == digest(tmp_path / "both/dpo/seed-0")
    # Two games alone would ask twice as often. Of the second one, only the trained policy's 6 held-out responses were new;
    # 7 prompts to train on, 6 held-out ones and 4 of the probe were not, nor the pairs of 7 and 4 prompts with 3 responses.
    assert 2 * counted["prompts"] - together["prompts"] == 7 + 6 + 4
    assert 2 * counted["pairs"] - together["pairs"] == (7 + 4) * 3 * 2

    # The same command again only prints, and the report is the same.
    before = outputs(tmp_path / "both")
    counted.update(prompts=0, pairs=0)
    monkeypatch.setattr(selfplay, "play", None)
    compare.main(asked(tmp_path / "both"))
    assert counted == {"prompts": 0, "pairs": 0}
    assert outputs(tmp_path / "both") == before
    assert "run 2 of 2: dpo, seed 0: finished" in capsys.readouterr().out

    with pytest.raises(
        BadInput,
        match=r"dpo, seed 0: --out .* belongs to another configuration: fit.eta \(5.0 there, 6.0 now\)",
    ):
        compare.main([word.replace("fit.eta=5", "fit.eta=6") for word in asked(tmp_path / "both")])
    with pytest.raises(BadInput, match="is a run directory"):
        compare.main(asked(tmp_path / "alone"))
    (tmp_path / "both/results.json").write_text("{}")
    with pytest.raises(BadInput, match="not a comparison's"):
        compare.main(asked(tmp_path / "both"))
