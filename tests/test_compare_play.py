"""`sppo_jax compare` plays: what runs share is made once, a stop loses nothing, and a game that cannot go on stops no other."""

import re
import shutil

import jax
import pytest

from sppo_jax import main, records, selfplay
from sppo_jax.compare import __main__ as compare
from sppo_jax.compare import playing
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.judges import CheckedJudge
from sppo_jax.sampler import Sampler
from tests.small_game import digest, words

pytestmark = pytest.mark.usefixtures("single_device")


def asked(*variants, seeds="0"):
    """The command line of a comparison of the small game in the working directory."""
    common = words("both")
    seed = common.index("--seed")
    return ["--configs", *variants, "--seeds", *seeds.split(), *common[:seed], *common[seed + 2 :]]


BOTH = asked("sppo=", "dpo=,fit.loss=dpo,fit.eta=5")


class Counts:
    """Prompts that the samplers of all runs got, and ordered pairs that their judges got."""

    def __init__(self, patch):
        self.prompts = self.pairs = 0
        stream, judged = Sampler.stream, CheckedJudge.compare

        def counting(sampler, prompts, **more):
            self.prompts += len(prompts)
            return stream(sampler, prompts, **more)

        def comparing(judge, prompts, responses, *more):
            self.pairs += sum(len(row) * (len(row) - 1) for row in responses)
            return judged(judge, prompts, responses, *more)

        patch.setattr(Sampler, "stream", counting)
        patch.setattr(CheckedJudge, "compare", comparing)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a comparison that nothing has interrupted, and what it asked its samplers and judges."""
    place, devices = tmp_path_factory.mktemp("whole"), jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(jax, "devices", lambda *_: devices[:1])
        counts = Counts(patch)
        compare.main(BOTH)
    return place, counts


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    shutil.copytree(whole[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy/both"


def outputs(out):
    return {name: (out / name).read_bytes() for name in (playing.RESULTS, playing.REPORT)}


def files_of(run):
    """The bytes of everything that a run made before training."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for folder in ("iter_0/heldout", "iter_1/responses", "iter_1/preferences", "iter_1/heldout")
        for path in (run / folder).glob("*.parquet")
    }


def test_equal_stages_are_made_once_and_a_run_has_the_bits_that_it_has_alone(whole, tmp_path, monkeypatch):
    place, together = whole
    alone = Counts(monkeypatch)
    main.main(words(tmp_path / "alone", fit__loss="dpo", fit__eta=5))
    assert files_of(tmp_path / "alone") == files_of(place / "both/dpo/seed-0")
    assert len(files_of(tmp_path / "alone")) == 1 + 3 + 3 + 2
    assert digest(tmp_path / "alone") == digest(place / "both/dpo/seed-0")
    # Two games alone would ask twice as often. Of the second one, the trained policy's 6 held-out responses were new, but
    # not those to 7 prompts to train on, to 6 held-out ones and to 4 of the probe, nor the pairs of 3 responses to 7 and 4.
    assert 2 * alone.prompts - together.prompts == 7 + 6 + 4
    assert 2 * alone.pairs - together.pairs == (7 + 4) * 3 * 2


def test_a_stage_that_reads_what_differs_is_not_shared(copied, capsys):
    """Sharpness changes preferences, not responses."""
    compare.main(asked("sppo=", "sharp=,judge.sharpness=2"))
    printed = capsys.readouterr().out
    assert "run 1 of 2: sppo, seed 0: finished" in printed
    assert re.search(r"run 2 of 2: sharp, seed 0; about \d+\w+ left for 1 run\n", printed)
    line = "reused 2 of 4 stages before training, of sppo, seed 0: the base's held-out responses, responses\n"
    assert line in printed
    name = next(name for name in files_of(copied / "sppo/seed-0") if "preferences" in name)
    theirs, ours = (
        records.read(copied / run / "seed-0" / name, records.Preferences) for run in ("sppo", "sharp")
    )
    assert [row.logits for row in theirs] == [row.logits for row in ours]
    assert [row.probability for row in theirs] != [row.probability for row in ours]


def test_the_same_command_again_only_prints(copied, monkeypatch, capsys):
    before = outputs(copied)
    monkeypatch.setattr(selfplay, "play", None)
    compare.main(BOTH)
    assert outputs(copied) == before
    printed = capsys.readouterr().out
    assert "run 2 of 2: dpo, seed 0: finished" in printed
    last = "One seed: there is no interval, and a difference may be chance.\nreport: both/report.html\n"
    assert printed.endswith(last)


def test_stopped_at_every_seventh_write_it_ends_with_the_same_report(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace, writes, stops = records.replace, 0, 0

    def stopping(*given):
        nonlocal writes
        writes += 1
        if writes % 7 == 0:
            raise Terminated
        replace(*given)

    monkeypatch.setattr(records, "replace", stopping)
    while True:
        try:
            compare.main(BOTH)
            break
        except Terminated:
            stops += 1
    assert stops >= 2
    assert outputs(tmp_path / "both") == outputs(whole[0] / "both")
    assert digest(tmp_path / "both/dpo/seed-0") == digest(whole[0] / "both/dpo/seed-0")


def test_a_run_that_cannot_go_on_stops_no_other_and_is_named_at_the_end(copied, capsys):
    (copied / "report.html").unlink()
    line = "long, seed 0: sampling.max_new_tokens=99999 after a prompt"
    with pytest.raises(BadInput, match=f"^1 of 2 runs failed: {line}"):
        compare.main(asked("long=,sampling.max_new_tokens=99999", "sppo="))
    printed = capsys.readouterr()
    assert "warning: long, seed 0 failed: sampling.max_new_tokens=99999" in printed.err
    assert re.search(r"^sppo +1 +0\.", printed.out, re.MULTILINE)
    assert "long, seed 0 failed: sampling.max_new_tokens=99999" in (copied / "report.html").read_text()
    assert not (copied / "long").exists()


def test_a_directory_of_something_else_is_refused(copied):
    other = [word.replace("fit.eta=5", "fit.eta=6") for word in BOTH]
    line = r"dpo, seed 0: --out .* belongs to another configuration: fit.eta \(5.0 there, 6.0 now\)"
    with pytest.raises(BadInput, match=line):
        compare.main(other)
    with pytest.raises(BadInput, match="is a run directory"):
        compare.main([*BOTH[:-1], "both/sppo/seed-0"])
    (copied / "results.json").write_text("{}")
    with pytest.raises(BadInput, match="not a comparison's"):
        compare.main(BOTH)
