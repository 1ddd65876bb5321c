"""`sppo_jax compare`, without playing: its command line, its figures, its tables and its page."""

import json
import re

import numpy as np
import pytest

from sppo_jax import files
from sppo_jax.compare import __main__ as compare
from sppo_jax.compare import figures, flags, page, sharing, tables, variants
from sppo_jax.config import kinds
from sppo_jax.errors import BadInput
from sppo_jax.run.directory import RunDir
from tests.run_directory import MANIFEST

QUICK = ("--config", "quickstart")


def names(*words):
    return [variant.name for variant in flags.read([*QUICK, *words]).variants]


def test_help_has_headings_and_an_example_that_is_taken(capsys):
    compare.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert {"What is compared", "What is common", "What comes out"} <= set(shown)
    assert max(map(len, shown)) <= 120
    examples = [line.split()[3:] for line in shown if line.startswith("  python -m sppo_jax.compare")]
    assert [len(flags.read(words).games) for words in examples] == [9, 9]


def test_a_variant_is_files_then_knobs_and_has_their_name_or_its_own():
    read = variants.read(["a.yaml+b", "dpo=iterative_dpo,fit.eta=5", "sppo=", "fit.eta=3"], [], [])
    assert [(v.name, v.files, v.knobs) for v in read] == [
        ("a+b", ("a.yaml", "b"), ()),
        ("dpo", ("iterative_dpo",), (("fit.eta", "5"),)),
        ("sppo", (), ()),
        ("fit.eta=3", (), (("fit.eta", "3"),)),
    ]
    assert variants.read(["low=fit.eta=3,fit.epochs=2"], [], []) == [
        variants.Variant("low", (), (("fit.eta", "3"), ("fit.epochs", "2")))
    ]


def test_a_grid_gives_all_combinations_of_every_variant():
    assert names("--configs", "sppo=", "dpo=iterative_dpo", "--grid", "fit.eta=1,2", "fit.epochs=3,4") == [
        f"{name},fit.eta={eta},fit.epochs={epochs}" for name in ("sppo", "dpo") for eta in (1, 2) for epochs in (3, 4)
    ]  # fmt: skip
    assert names("--grid", "fit.eta=1,2") == ["fit.eta=1", "fit.eta=2"]
    assert names() == ["quickstart"]


def test_games_are_every_variant_with_each_seed_in_a_directory_of_its_own():
    asked = flags.read([*QUICK, "--configs", "sppo=", "dpo=iterative_dpo", "--seeds", "3", "0", "--out", "D"])
    assert [(game.variant.name, game.seed, game.config.out) for game in asked.games] == [
        ("sppo", 3, "D/sppo/seed-3"), ("dpo", 3, "D/dpo/seed-3"), ("sppo", 0, "D/sppo/seed-0"), ("dpo", 0, "D/dpo/seed-0"),
    ]  # fmt: skip
    assert [game.config.seed for game in asked.games] == [3, 3, 0, 0]
    assert [game.config.fit.loss for game in asked.games] == ["sppo", "dpo"] * 2
    assert flags.read([*QUICK]).seeds == [0, 1, 2]


def test_a_knob_of_all_wins_over_the_variants_files_and_a_variants_own_knob_over_both():
    asked = flags.read([*QUICK, "--configs", "a=iterative_dpo,fit.eta=3", "b=iterative_dpo", "--fit.eta=7"])
    assert [game.config.fit.eta for game in asked.games[:2]] == [3, 7]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--configs", "sppo=", "dpo=iterative_dop"], "variant dpo: --config iterative_dop: no such file"),
        (["--configs", "a=", "b=,fit.lr=1"], "variant b: unknown flag --fit.lr"),
        (["--configs", "a=", "fit.lr=1"], "variant fit.lr=1: unknown flag --fit.lr"),
        (["--configs", "a=", "b=,fit.epochs=9"], "variant b: fit.schedule_epochs=8 is shorter than fit.epochs=9"),
        (["--configs", "a=", "b=,judge.backend=nowhere:judge"], "variant b: judge.backend=nowhere:judge: there is no module"),
        (["--configs", "a=", "b=,fit.eta=10"], "variants a and b are the same configuration"),
        (["--grid", "fit.eta=1,1.0"], "variants fit.eta=1 and fit.eta=1.0 are the same"),
        (["--configs", "a=", "a=iterative_dpo"], "variant a is there twice"),
        (["--configs", "a=,fit.eta=1", "--grid", "fit.eta=2,3"], "variant a: fit.eta is given twice"),
        (["--configs", "a++b"], "an empty name of a file"),
        (["--configs", ""], "--configs needs a value, found an empty one"),
        (["--configs", "a=,fit.eta"], "'fit.eta' is not section.key=value"),
        (["--configs", f"{'x' * 201}="], "not a possible name of a directory"),
        (["--grid", "fit.eta=1,"], "an empty value"),
        (["--grid", "seed=1,2"], "give --seeds 0 1 2"),
        (["--seed", "1"], "--seed: give --seeds 0 1 2"),
        (["--seeds", "1", "1"], "--seeds names 1 twice"),
        (["--seeds", "one"], "--seeds one: must be a whole number"),
        (["--seeds"], "--seeds needs one value or more"),
        (["--iteration", "4"], "--iteration 4: variant quickstart has 3 iterations"),
        (["--out", "gs://bucket/x"], "a directory of this machine"),
        (["--out", "a", "--out", "b"], "--out is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_line_before_anything_is_played(
    words, line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=re.escape(line)) as refused:
        compare.main([*QUICK, *words])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interval_over_seeds_is_students():
    """t(.975, 2) = 4.302653; sd of 1, 2, 4 is sqrt(7/3)."""
    found = figures.across([1.0, 2.0, 4.0])
    assert found == {
        "n": 3,
        "mean": 7 / 3,
        "least": 1.0,
        "half_width": pytest.approx(4.302653 * np.sqrt(7 / 3 / 3)),
    }
    assert figures.across([0.7])["half_width"] is None


def test_every_unread_knob_is_one():
    for unread in (sharing.SAMPLED, sharing.JUDGED, sharing.SCORED):
        for beginning in unread:
            assert any(key.startswith(beginning) for key in kinds()), beginning


RATES = {"sppo": [[0.60, 0.70], [0.62, 0.74]], "dpo": [[0.58, 0.66], [0.66, 0.76]]}  # by seed, then iteration


def evaluate(run, t, rate):
    moved = {"winners": 0.3 * rate, "losers": -rate, "kl_per_token": 0.02 * t}
    found = {
        "iteration": t,
        "prompts": 60,
        "win_rate": {name: {"base": {"mean": rate, "stderr": 0.01}} for name in ("judge", "oracle")},
        "length": {"tokens": 20.0 + t, "words": 9.0},
    }
    files.write_json(run.evaluation(t), found | ({"log_ratio": moved} if t else {}))


def written(out, *words, rates=RATES, seeds=2):
    """The comparison of `rates`, whose runs nothing has played, in a directory."""
    asked = flags.read([
        *QUICK, "--configs", *(f"{name}=,fit.eta={i + 2}" for i, name in enumerate(rates)),
        "--seeds", *map(str, range(seeds)), "--iterations=2", "--out", str(out), *words,
    ])  # fmt: skip
    for game in asked.games:
        run = RunDir(game.config.out)
        run.root.mkdir(parents=True)
        run.config.write_text("")
        files.write_json(run.manifest, MANIFEST)
        for t, rate in enumerate([0.5, *rates[game.variant.name][game.seed]]):
            evaluate(run, t, rate)
    return asked


@pytest.fixture
def found(tmp_path):
    return figures.collected(written(tmp_path))


def test_figures_are_means_over_seeds_and_differences_seed_by_seed(found):
    sppo, dpo = found["variants"]
    assert [of["iteration"] for of in sppo["over_seeds"]] == [0, 1, 2]
    assert figures.shown(dpo)["win_rate_oracle"]["mean"] == pytest.approx(0.71)
    assert figures.shown(dpo)["win_rate_oracle"]["least"] == 0.66
    assert sppo["against_first"] == {}
    assert dpo["against_first"]["win_rate_oracle"]["mean"] == pytest.approx(-0.01)
    # Differences -.04 and .02: sd .0424, t(.975, 1) = 12.7062
    assert dpo["against_first"]["win_rate_oracle"]["half_width"] == pytest.approx(12.7062 * 0.03, rel=1e-4)
    assert found["differ"] == {"fit.eta": [2.0, 3.0]}
    assert json.loads(json.dumps(found)) == found


def test_another_iteration_can_be_shown(tmp_path):
    found = figures.collected(written(tmp_path, "--iteration", "1"))
    assert figures.shown(found["variants"][1])["win_rate_oracle"]["mean"] == pytest.approx(0.62)
    assert "After iteration 1," in tables.as_text(found)


def test_the_table_is_at_most_79_wide_and_says_what_its_figures_are(found):
    text = tables.as_text(found)
    assert max(map(len, text.splitlines())) <= 79
    sppo = next(line for line in text.splitlines() if line.startswith("sppo"))
    assert sppo.split()[1:] == [
        "0.720",
        "±",
        "0.254",
        "0.720",
        "±",
        "0.254",
        "0.700",
        "+0.22",
        "-0.72",
        "0.0400",
        "22.0",
    ]
    assert "Means over 2 seeds. ±: half of the 95% interval of that mean, by\nStudent's t over seeds." in text


def test_long_names_get_letters(tmp_path):
    long = f"sppo,{'fit.learning_rate=1e-3,' * 4}x"
    found = figures.collected(written(tmp_path))
    found["variants"][0]["name"] = long
    text = tables.as_text(found)
    assert max(map(len, text.splitlines())) <= 79
    assert text.splitlines()[0].startswith("A  sppo,fit.learning_rate")
    assert re.search(r"^B  +0.710", text, re.MULTILINE)


def test_one_seed_has_no_interval_and_it_is_said(tmp_path):
    found = figures.collected(written(tmp_path, seeds=1))
    text, shown = tables.as_text(found), tables.results(found)
    assert "±" not in text
    assert "One seed: there is no interval" in text
    assert shown[1][2] == "0.700"
    page.write(tmp_path / "report.html", found)
    written_page = (tmp_path / "report.html").read_text()
    assert "One seed: there is no interval" in written_page
    assert "Each seed faint" not in written_page


def test_missing_and_failed_runs_are_said_and_others_count(tmp_path):
    asked = written(tmp_path)
    RunDir(asked.games[1].config.out).evaluation(2).unlink()
    found = figures.collected(asked, {asked.games[1].title: "the sixth in a row"})
    assert figures.shown(found["variants"][1])["win_rate_oracle"]["n"] == 1
    page.write(tmp_path / "report.html", found)
    assert "dpo, seed 0 failed: the sixth in a row" in (tmp_path / "report.html").read_text()
    assert re.search(r"^dpo +1 +0\.760 ", tables.as_text(found), re.MULTILINE)
    assert figures.collected(asked)["missing"] == ["dpo, seed 0"]


def test_runs_with_another_judge_or_other_versions_are_said(tmp_path):
    asked = written(tmp_path)
    run = RunDir(asked.games[1].config.out)
    files.write_json(
        run.manifest,
        MANIFEST | {"sha256": {"base_weights": "c0ffee", "judge": "k"}, "versions": {"jax": "1"}},
    )
    assert figures.collected(asked)["notes"] == [
        "another judge than sppo, seed 0: dpo, seed 0", "other versions of packages than sppo, seed 0: dpo, seed 0",
    ]  # fmt: skip


def test_the_headline_says_whether_the_seeds_tell_two_variants_apart(tmp_path):
    apart = {"a": [[0.6, 0.70], [0.6, 0.72]], "b": [[0.6, 0.60], [0.6, 0.621]]}
    near = figures.collected(written(tmp_path / "near"))
    far = figures.collected(written(tmp_path / "far", rates=apart))
    assert "these seeds do not tell the two apart" in page.headline(near)[0]
    assert page.headline(far) == [
        "a has the highest mean win rate by the oracle, 0.710; b follows with 0.611. Seed by seed the difference is "
        "0.099 ± 0.006 over 2 seeds."
    ]


def test_the_page_is_one_file_in_the_style_of_a_runs_report(found, tmp_path):
    page.write(tmp_path / "report.html", found)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b|@import|\burl\((?!#)", text)
    assert text.count('<svg role="img"') == 6
    assert text.count("stroke-opacity: 0.45") == 6 * 2 * 2  # two variants of two seeds
    assert text.count("stroke-width: 2.2") == 6 * 2  # and their means
    assert (
        len(re.findall("<table", text))
        == len(re.findall('<div class="scroll" tabindex="0"><table', text))
        == 4
    )
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    schemes = re.findall(r":root \{(.*?)\}", text)
    assert len(schemes) == 2  # light and dark
    for scheme in schemes:
        assert used <= set(re.findall(r"--(\w[\w-]*):", scheme)), scheme
    assert found["command"].replace("'", "&#39;") in text
