"""The parts of a report: its first sentences, tables, samples, rings and pictures."""

import dataclasses
import re

import numpy as np
import pytest

from sppo_jax import records
from sppo_jax.evaluation import figures
from sppo_jax.records import Responses
from sppo_jax.report import headline, pictures, rings, samples, tables, trained_on
from sppo_jax.run import evaluations, intervals, metrics
from sppo_jax.run.evaluations import Change, Evaluation, Rate
from tests.run_directory import JUDGED, RING, TIES, begun, played, preferred, responses, trained


def evaluation(t, mean=0.5, stderr=0.01, per_prompt=(), **more):
    return Evaluation(t, 500, {"judge": {"base": Rate(mean, stderr, per_prompt)}}, **more)


@pytest.mark.parametrize(
    ("wins", "prompts", "kind", "said"),
    [
        (300, 500, "better", "wins 60.0 % of its comparisons with the base (95 % interval 55.6 % to 64.2 %), on 500"),
        (200, 500, "worse", "(95 % interval 35.6 % to 44.2 %), on"),
        (260, 500, "same", "interval 47.6 % to 56.4 %), which includes 50 %, on"),
        (500, 500, "better", "interval 99.3 % to 100.0 %)"),
        (18, 19, "unknown", "interval 74.0 % to 99.9 %), on 19"),  # exact, and too few to tell
        (0, 0, "unknown", "wins 60.0 % of its comparisons with the base, on 0"),
    ],
)  # fmt: skip
def test_the_headline_says_better_only_of_an_interval_above_a_half(wins, prompts, kind, said):
    each = [1.0] * wins + [0.0] * (prompts - wins)
    rate = Rate(wins / prompts if prompts else 0.6, 0.04, each)
    last = Evaluation(2, prompts, {"judge": {"base": rate}})
    [found] = headline.sentences([evaluation(0, 0.49), evaluation(1, 0.9), last])
    assert found.kind == kind
    assert said in found.figures.replace("\N{NO-BREAK SPACE}", " ")
    assert found.figures.endswith("the base wins 49.0\N{NO-BREAK SPACE}% against itself.")


def test_the_headline_says_what_is_missing():
    [found] = headline.sentences([evaluation(1, None, None)])
    assert (found.kind, found.figures) == ("unknown", "Iteration 1 has no measured win rate.")
    [found] = headline.sentences([evaluation(1)])
    assert (found.kind, "win probabilities are missing" in found.verdict) == ("unknown", True)


def test_the_reports_interval_is_that_of_evaluate():
    each = np.random.default_rng(0).beta(2, 1, 60).round(4)
    rate = Rate(float(each.mean()), 0.03, each.tolist())
    assert list(rate.interval) == figures.interval(each)
    drawn = pictures.pictures([Evaluation(t, 60, {"judge": {"base": rate}}) for t in (0, 1)], [])
    assert drawn[0]["title"] == "Win rate against the base"


def test_the_headline_has_a_sentence_for_each_judge(tmp_path):
    read = evaluations.read_all(played(tmp_path))
    found = headline.sentences([dataclasses.replace(e, prompts=intervals.FEW) for e in read])
    assert [sentence.verdict for sentence in found] == [
        "Better than the base, by the judge.",
        "Better than the base, by the oracle.",
    ]
    found = headline.sentences([dataclasses.replace(e, prompts=intervals.FEW - 1) for e in read])
    assert [sentence.kind for sentence in found] == ["unknown", "unknown"]


@pytest.mark.parametrize("figure", [0.0, -1.23456, 999.4, -99_999.4, 1.5e5, -3e38, 1e-30])
def test_the_terminals_table_is_at_most_79_characters_wide(figure):
    rate = Rate(0.625, 0.0123)
    row = Evaluation(
        100, 500, {"judge": {"base": rate}, "oracle": {"base": rate}}, abs(figure), abs(figure),
        figure, None, figure, None, figure,
    )  # fmt: skip
    text = tables.as_text([evaluation(0), row])
    assert len(tables.results([row])[0]) == 8
    assert max(map(len, text.splitlines())) <= 79
    assert re.search("^ 100  0.625 ± 0.012  0.625 ± 0.012  ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (None, "{:.2f}", "-"), (12.345, "{:+.2f}", "+12.35"), (-999.4, "{:.1f}", "-999.4"), (1234.56, "{:+.2f}", "+1235"),
        (-123456.0, "{:+.2f}", "-1.2e5"), (1e30, "{:.4f}", "1.0e30"),
    ],
)  # fmt: skip
def test_large_figures_are_short(value, form, shown):
    assert tables.figure(value, form) == shown


def test_columns_in_which_nothing_was_measured_are_left_out():
    assert tables.results([evaluation(0), evaluation(1, tokens=3.0)]) == [
        ["iteration", "win rate, judge", "tokens"],
        ["0", "0.500 ± 0.010", "-"],
        ["1", "0.500 ± 0.010", "3.0"],
    ]


def test_features_have_a_row_each_and_a_column_for_each_policy():
    found = [
        evaluation(0, features={"right": 0.42, "same": 9.0}),
        evaluation(1),
        evaluation(2, features={"right": 0.78, "same": 9.0, "new": 2.0}),
    ]
    assert tables.features(found) == [
        ["responses", "base", "iteration 2"],
        ["new", "-", "2.000"],
        ["right", "0.420", "0.780"],
        ["same", "9.000", "9.000"],
    ]
    assert tables.features([evaluation(0)]) == []


def test_the_last_policys_features_show_their_change_with_its_interval():
    changes = {"right": Change(0.36, 0.1), "one": Change(-0.5, None), "longer": Change(1234.4, 1000.0)}
    means = {"right": 0.42, "one": 1.0, "longer": 3.0, "unknown": 2.0}
    found = [evaluation(t, features=means, changes=changes if t else {}) for t in range(3)]
    shown = {row[0]: row[-1] for row in tables.features(found)}
    assert shown == {  # Student's t with 499 degrees of freedom: 1.9647
        "responses": "change, 95 %",
        "right": "+0.360 ± 0.196",
        "one": "-0.500",
        "longer": "+1234 ± 1965",
        "unknown": "-",
    }
    few = [dataclasses.replace(e, prompts=19) for e in found]
    assert {row[0]: row[-1] for row in tables.features(few)}["right"] == "+0.360"


def test_the_most_improved_and_the_most_worsened_prompts_come_first():
    chances = [0.5, 0.9, 0.1, 0.6, 0.95, 0.2]
    found = samples.groups(responses("a"), responses("b"), evaluation(1, per_prompt=chances))
    assert [(group.heading, [s.before for s in group.samples]) for group in found] == [
        ("Most improved, by the judge", ["a 4", "a 1", "a 3"]),
        ("Most worsened, by the judge", ["a 2", "a 5"]),
        ("Other prompts", ["a 0"]),
    ]
    assert found[0].samples[0].chances == {"judge": 0.95}
    assert found[0].samples[0].after == "b 4"


@pytest.mark.parametrize("kept", [(), (0.5, 0.9)])
def test_without_a_probability_for_each_prompt_the_samples_have_no_order(kept):
    [group] = samples.groups(responses("a", 30), responses("b", 30), evaluation(1, per_prompt=kept))
    assert (group.heading, len(group.samples), group.samples[1].before) == ("", 12, "a 2")
    assert group.samples[0].chances == {}


def test_a_ring_is_found_with_the_clearest_weakest_preference():
    assert rings.ring_of(np.array(RING)) == ([0, 1, 2], [0.75, 0.625, 0.875])
    clear = np.full((4, 4), 0.5)
    for (i, j), p in {(0, 1): 0.9, (1, 2): 0.9, (2, 0): 0.55, (1, 3): 0.8, (3, 0): 0.8}.items():
        clear[i, j], clear[j, i] = p, 1 - p
    places, chances = rings.ring_of(clear)
    assert sorted(places) == [0, 1, 3]
    assert min(chances) == 0.8


@pytest.mark.parametrize(
    "p", [TIES, [[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.1, 0.5]]]
)
def test_responses_in_an_order_are_no_ring(p):
    assert rings.ring_of(np.array(p)) is None


def test_the_ring_of_the_last_iteration_that_has_one_is_shown(tmp_path):
    run, told = begun(tmp_path), []
    assert rings.strongest(run, 2, told.append) is None
    preferred(run, 1, [RING, TIES], responses=3)
    preferred(run, 2, [TIES, TIES], responses=3)
    found = rings.strongest(run, 2, told.append)
    assert (found.iteration, found.prompt[0]["content"], found.texts[0][2:]) == (
        1,
        "prompt 0",
        "of iteration 1",
    )
    assert told == []


def test_shards_that_cannot_be_read_or_do_not_fit_are_named(tmp_path):
    run, told = begun(tmp_path), []
    preferred(run, 1, [RING, RING], responses=3)
    run.shard(1, "responses", 0, 2).write_bytes(b"PAR1")
    run.shard(1, "preferences", 1, 2).write_bytes(run.shard(1, "preferences", 0, 2).read_bytes())
    preferred(
        run, 2, [[[0.5, 0.9], [0.1]], [[None] * 3] * 3, [[float("nan")] * 3] * 3, RING[:2]], responses=3
    )
    assert rings.strongest(run, 2, told.append) is None
    assert [line.split(":")[0] for line in told] == [
        *(f"iter_2/preferences/shard-{i:05d}-of-00004.parquet" for i in range(4)),
        "iter_1/responses/shard-00000-of-00002.parquet",
        "iter_1/preferences/shard-00001-of-00002.parquet",
    ]


def test_pictures_without_figures_are_left_out(tmp_path):
    run = played(tmp_path)
    found, lines = evaluations.read_all(run), metrics.read(run)
    drawn = pictures.pictures(found, lines, ([3, 4], [5, 60]))
    assert [picture["title"] for picture in drawn] == [title for title, *_ in pictures.PANELS]
    old = [line for line in lines if line["stage"] not in ("seconds", "respond")]
    names = [picture["title"] for picture in pictures.pictures([evaluation(0), evaluation(1)], old)]
    assert names == [
        "Win rate against the base",
        "Training loss",
        "Cycles and ties",
        "What the judge leans to",
    ]


def test_examples_of_training_have_all_responses_the_best_first_and_what_was_trained_on(tmp_path):
    run, told = begun(tmp_path), []
    assert trained_on.examples(run, 1, told.append) == []
    for t in (1, 2):
        preferred(run, t, [RING], responses=3)
    trained(run, 1, {0: [2, 1], 7: [0, 1]})
    [example] = trained_on.examples(run, 1, told.append)
    assert example.prompt[0]["content"] == "prompt 0"
    assert example.trained
    assert [(one.text[0], one.role, one.tokens, one.cut) for one in example.responses] == [
        ("C", "best", 2, True), ("A", "", 2, False), ("B", "worst", 2, False),
    ]  # fmt: skip
    assert [one.win_rate for one in example.responses] == pytest.approx([1.75 / 3, 1.375 / 3, 1.375 / 3])
    trained(run, 1, {0: [2, 0, 1]})
    assert [one.role for one in trained_on.examples(run, 1, told.append)[0].responses] == [
        "best",
        "kept",
        "worst",
    ]
    trained(run, 1, {7: [0, 1]})
    [example] = trained_on.examples(run, 1, told.append)
    assert not example.trained
    assert trained_on.examples(run, 2, told.append) == []  # interrupted before its pairs were there
    assert told == []
    run.pairs(1).write_bytes(b"PAR1")
    assert trained_on.examples(run, 1, told.append) == []
    assert told[0].startswith("iter_1/pairs.parquet: damaged")


def test_of_equal_responses_one_is_the_best_and_one_the_worst(tmp_path):
    run = begun(tmp_path)
    preferred(run, 1, [RING], responses=3)
    row = records.read(run.shard(1, "responses", 0, 1), Responses)[0]
    equal = dataclasses.replace(row, response_ids=[[2, 2]] * 3)
    records.replace(run.shard(1, "responses", 0, 1), Responses, [equal], {})
    trained(run, 1, {0: [2, 2]})
    [example] = trained_on.examples(run, 1, lambda _: None)
    assert [one.role for one in example.responses] == ["best", "", "worst"]


@pytest.mark.parametrize(
    "damage", [{"finish_reason": None}, {"response_ids": [[1]]}, {"response_ids": [None] * 3}]
)
def test_examples_leave_out_rows_that_are_not_whole(tmp_path, damage):
    run = begun(tmp_path)
    preferred(run, 1, [RING], responses=3)
    trained(run, 1, {0: [2, 1]})
    row = records.read(run.shard(1, "responses", 0, 1), Responses)[0]
    records.replace(run.shard(1, "responses", 0, 1), Responses, [dataclasses.replace(row, **damage)], {})
    assert trained_on.examples(run, 1, lambda _: None) == []


def test_a_point_that_is_alone_has_its_value_and_a_word_and_a_lone_update_is_visible():
    lines = [
        {"iteration": 1, "stage": "respond", "step": 0, "tokens_per_second": 937.0},
        {"iteration": 1, "stage": "fit", "step": 0, "loss": 4.0},
    ]
    drawn = {p["title"]: p for p in pictures.pictures([evaluation(0), evaluation(1)], lines)}
    speed, loss = drawn["Sampling speed"], drawn["Training loss"]
    assert speed["caption"].endswith("One iteration so far, so a point.")
    texts = re.findall("<text[^>]*>([^<]*)</text>", speed["svg"])
    assert texts[:2] == ["1", "iteration"]
    assert "937" in texts
    assert "<use" in loss["svg"].split("clip-path")[1]  # a marker, since a line of one point is nothing
    more = [line | {"iteration": t} for line in lines for t in (1, 2)]
    drawn = {p["title"]: p for p in pictures.pictures([evaluation(t) for t in range(3)], more)}
    assert "so a point" not in drawn["Sampling speed"]["caption"]
    assert "937" not in re.findall("<text[^>]*>([^<]*)</text>", drawn["Sampling speed"]["svg"])


@pytest.mark.parametrize("iterations", [1, 3, 9])
def test_legends_lie_above_the_plot(iterations, monkeypatch):
    from matplotlib.figure import Figure

    work = dict.fromkeys(pictures.WORK, 1.0)
    lines = [
        {"iteration": t, "stage": stage, "step": 0} | values
        for t in range(1, iterations + 1)
        for stage, values in (("seconds", work | {"total": 9.0}), ("fit", {"loss": 1.0}), ("judge", dict.fromkeys(JUDGED, 0.5)))
    ]  # fmt: skip
    save, seen = Figure.savefig, []

    def look(figure, *given, **how):
        save(figure, *given, **how)
        (axes,) = figure.axes
        if legend := axes.get_legend():
            inside, box = legend.get_window_extent(), axes.get_window_extent()
            seen.append(
                (inside.y0 >= box.y1, inside.x1 <= figure.bbox.x1, box.height > 0.4 * figure.bbox.height)
            )

    monkeypatch.setattr(Figure, "savefig", look)
    pictures.pictures([evaluation(t, per_prompt=[0.5, 0.6]) for t in range(iterations + 1)], lines)
    assert len(seen) == 6
    assert set(seen) == {(True, True, True)}


@pytest.mark.parametrize("iterations", [1, 2, 9])
def test_ticks_of_iterations_and_updates_are_whole_numbers(iterations):
    lines = [
        {"iteration": t, "stage": stage, "step": step, "loss": 1.0, "tokens_per_second": 2.0, "total": 3.0, "sampling": 1.0}
        for t in range(1, iterations + 1)
        for stage, steps in (("fit", 3), ("respond", 1), ("seconds", 1))
        for step in range(steps)
    ]  # fmt: skip
    found = [evaluation(t, kl_per_token=0.1) for t in range(iterations + 1)]
    for picture in pictures.pictures(found, lines):
        texts = re.findall("<text[^>]*>([^<]*)</text>", picture["svg"])
        axis = "update" if picture["title"] == "Training loss" else "iteration"
        ticks = texts[: texts.index(axis)]
        assert ticks
        assert all(re.fullmatch(r"(\N{MINUS SIGN}?)\d+", tick) for tick in ticks), (picture["title"], ticks)
