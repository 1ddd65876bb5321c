"""The report is written again from whatever is whole; the rest is named, and shown as `-`."""

import dataclasses
import html
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest

from sppo_jax import files, records
from sppo_jax.errors import BadInput
from sppo_jax.records import Responses
from sppo_jax.report import __main__ as report
from sppo_jax.report import model_card, page, pictures
from sppo_jax.run import evaluations, metrics
from sppo_jax.text.messages import written
from tests.run_directory import JUDGED, MOVED, RATE, begun, evaluated, lines, measured, responses


@pytest.fixture
def run(tmp_path):
    """The directory of a run of one complete iteration."""
    return measured(tmp_path)


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Pictures take most of a page's time: only the tests of pictures draw them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(pictures, "PANELS", [])


def cells(run, heading="Results</h2>"):
    """The cells of the first table behind a heading of the page, row by row."""
    table = run.report.read_text().split(heading)[1].split("</table>")[0]
    return [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]


def notes(run):
    found = re.search(r'<ul class="notes">(.*?)</ul>', run.report.read_text(), re.DOTALL)
    return re.findall(r"<li>(.*?)</li>", found[1]) if found else []


def change(path, **values):
    files.write_json(path, json.loads(path.read_text()) | values)


def test_a_whole_run_has_a_page_without_notes(run, capsys):
    report.main(["--run", str(run.root)])
    assert capsys.readouterr().out == f"{run.report}\n"
    assert notes(run) == []
    rate = "0.625 ± 0.012"
    assert cells(run) == [
        ["0", rate, "-", "-", "-", "20.2", "1.0"],
        ["1", rate, "+1.50", "-2.50", "0.0123", "20.2", "1.0"],
    ]
    assert cells(run, "matrices hold</h2>") == [["1", "12.5%", "25.0%", "-0.50", "+0.75", "0.62", "1", "2"]]
    assert "before 3" in run.report.read_text()


UNREADABLE = {
    "missing": lambda path: path.unlink(),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_text("{"),
    "a list": lambda path: path.write_text("[]"),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "UTF-16": lambda path: path.write_bytes("{".encode("utf-16")),
}


SPOILT = (
    "iter_0/eval.json",
    "metrics.jsonl",
    "manifest.json",
    "config.yaml",
    "iter_0/heldout/responses.parquet",
)
# A run directory has a config.yaml, whose nesting has a test of its own; empty files of these two are whole.
ELSEWHERE = {
    ("config.yaml", "missing"),
    ("config.yaml", "nested too deeply"),
    ("config.yaml", "empty"),
    ("metrics.jsonl", "empty"),
}


@pytest.mark.parametrize(
    ("name", "damage"), [case for case in itertools.product(SPOILT, UNREADABLE) if case not in ELSEWHERE]
)
def test_the_page_is_written_without_a_file_that_cannot_be_read_and_names_it(run, name, damage):
    UNREADABLE[damage](run.root / name)
    report.main(["--run", str(run.root)])
    (note,) = notes(run)
    assert note.startswith(f"{name}: ")
    assert ("missing" in note) == (damage == "missing")
    assert cells(run)[-1][0] == "1"


@pytest.mark.parametrize("damage", UNREADABLE)
def test_without_any_readable_evaluation_the_one_line_says_why(run, damage):
    for t in (0, 1):
        UNREADABLE[damage](run.evaluation(t))
    why = "no iteration is complete" if damage == "missing" else r"iter_0/eval\.json: damaged"
    with pytest.raises(BadInput, match=why):
        page.write(run)
    assert not run.report.exists()


@pytest.mark.parametrize(
    "section", [{"win_rate": None}, {"win_rate": {"judge": {"base": None}}}, {"length": {"tokens": None}},
                {"log_ratio": None}, {"log_ratio": MOVED | {"winners": None}}, {"length": {"words": float("nan")}},
                {"win_rate": {"judge": {"base": {"mean": float("inf")}}}}, {"prompts": None}]
)  # fmt: skip
def test_a_figure_that_is_null_is_shown_as_a_dash_in_page_table_and_card(run, section):
    change(run.evaluation(1), **section)
    page.write(run)
    whole = len(cells(run)[1]) == 7 and "-" not in cells(run)[1]
    assert whole == (section.get("prompts", 0) is None)
    assert len(page.table(run).splitlines()) == 5  # with the footnote
    required = section.get("win_rate", 0) is None
    if not required:
        assert notes(run) == []
        assert "SPPO iteration 1" in model_card.text(run, 1)


@pytest.mark.parametrize(
    "section", [{"win_rate": 3}, {"win_rate": {"judge": [1]}}, {"win_rate": {"judge": {"base": {"mean": "0.6"}}}},
                {"win_rate": {"judge": {"base": {"mean": 7.0, "stderr": 0.1}}}}, {"length": {"tokens": [20]}}, {"length": "long"},
                {"win_rate": {"judge": {"base": {"mean": 0.5, "stderr": -1}}}}, {"log_ratio": {"winners": True}},
                {"win_rate": {"judge": {"base": RATE | {"per_prompt": [0.5, 2]}}}}, {"features": [1]}, {"features": {"right": "x"}}, {"features_change": {"right": 1}},
                {"win_rate": {"judge": {"base": RATE | {"per_prompt": 0.5}}}}, {"iteration": 5}, {"iteration": "1"}, {"prompts": -3}, {"length": {"tokens": 10**400}}]
)  # fmt: skip
def test_a_figure_of_another_kind_is_a_dash_with_a_note_and_refused_by_the_card(run, section):
    change(run.evaluation(1), **section)
    page.write(run)
    (note, *_) = notes(run)
    assert note.startswith("iter_1/eval.json: damaged: ")
    assert cells(run)[1][0] == "1"
    with pytest.raises(BadInput, match=r"eval\.json: damaged.*delete it and run again"):
        model_card.text(run, 1)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 10**400, "x", [1], True])
def test_a_diagnostic_that_is_no_number_is_shown_as_a_dash(run, value):
    whole = {"iteration": 1, "stage": "judge", "step": 0} | JUDGED
    lines(run, whole, whole | {"iteration": 2, "position_bias": value})
    page.write(run)
    assert [row[3] for row in cells(run, "matrices hold</h2>")] == ["-0.50", "-"]
    lines(run, {"iteration": 1, "stage": "judge", "step": 0})
    page.write(run)
    assert cells(run, "matrices hold</h2>")[0] == ["1", "0", "0"]


def test_the_cards_advice_about_the_bases_measurement_makes_it_anew(run):
    run.evaluation(0).write_text("{")
    with pytest.raises(
        BadInput,
        match=r"iter_0/eval\.json: damaged.*delete it, together with iter_1/eval\.json, and run again",
    ):
        model_card.text(run, 1)


BAD_LINES = ("{", "3", "[]", "{}", "null", '{"iteration": 1}', '{"iteration": "1", "stage": "judge", "step": 0}',
             '{"iteration": 1, "stage": null, "step": 0}', '{"iteration": 1, "stage": "fit", "step": [0]}',
             '{"iteration": true, "stage": "fit", "step": 0}', '{"iteration": 1, "stage": "fit", "step": NaN}', "[" * 9999)  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_damaged_line_of_metrics_is_counted_and_the_others_are_read(run, bad):
    whole = metrics.read(run)
    with run.metrics.open("a") as file:
        file.write(f"{bad}\n\n{bad}\n")
    told = []
    assert metrics.read(run, told.append) == whole
    assert told == ["metrics.jsonl: 2 damaged lines"]
    page.write(run)
    assert notes(run) == told


@pytest.mark.parametrize(
    "name", ["iter_²", "iter_01", "iter_x", "iter_", "iter_٣", "iter_-1", "iter_1.part", "iter_+2"]
)
def test_a_directory_whose_name_is_no_iteration_is_no_iteration(run, name):
    shutil.copytree(run.iteration(1), run.root / name)
    assert run.iterations() == [0, 1]
    page.write(run)
    assert len(cells(run)) == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (responses("after", prompts=5), "belong to different prompts"),
        ([Responses(9, "other", [1], [[1]], ["x"], ["stop"], [0.0])] * 6, "belong to different prompts"),
        ([Responses(i, f"question {i}", [1], [], [], [], []) for i in range(6)], "no response"),
        ([Responses(i, None, [1], [[1]], ["x"], ["stop"], [0.0]) for i in range(6)], "no prompt"),
    ],
)
def test_responses_that_cannot_be_shown_beside_each_other_are_left_out(run, rows, said):
    records.replace(run.heldout(1, "responses"), Responses, rows, {})
    page.write(run)
    (note,) = notes(run)
    assert said in note
    assert "before 3" not in run.report.read_text()


def test_a_prompt_of_several_messages_is_shown_role_by_role(run):
    talk = [
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": 'One "a"?'},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two\n?"},
    ]
    rows = [dataclasses.replace(row, prompt=written(talk)) for row in responses("after", prompts=6)]
    for t in (0, 1):
        records.write(run.heldout(t, "responses"), Responses, rows, {})
    page.write(run)
    text = run.report.read_text()
    assert "&#34;role&#34;" not in text
    shown = html.unescape(
        re.sub(r"<[^>]*>", "|", re.search(r'<div class="prompt text">(.*?)</div>', text, re.S)[1])
    )
    assert shown == '|system|Be <b>brief</b>.||user|One "a"?||assistant|1||user|Two\n?'


def test_text_of_a_run_is_never_markup_or_a_template(tmp_path):
    run = measured(
        tmp_path, "--prompts.column", "{{ 7 * 7 }}<script>", model={"name": "\ud800\x1b[2J{% x %}"}
    )
    rows = [Responses(i, "{{ 7 * 7 }}\x00", [1], [[1]], ["<b>{% x %}"], ["stop"], [0.0]) for i in range(6)]
    for t in (0, 1):
        records.replace(run.heldout(t, "responses"), Responses, rows, {})
    change(run.evaluation(1), length="<script>{{ 7 * 7 }}")
    page.write(run)
    text = run.report.read_text(encoding="utf-8")
    assert "{{ 7 * 7 }}" in text
    assert not re.search("<script>|<b>\\{|49|\x1b|\x00", text)


@pytest.mark.parametrize("data", [b"\x80\xff" * 99, b'{"iteration": 1, "promp'])
def test_a_damaged_evaluation_of_the_only_iteration_is_called_damaged(run, data):
    for t in run.iterations()[1:]:
        run.evaluation(t).write_bytes(data)
    with pytest.raises(BadInput, match=r"iter_1/eval\.json: damaged.*nothing to report"):
        page.write(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --run OUT"), (["--run"], "expected one argument"), (["--out", "x"], "unknown flag --out"), (["x"], "give --run OUT"),
        (["--run", "{out}", "--run", "{out}"], "given twice"), (["--run", "{out}", "--x"], "unknown flag --x"),
        (["--run", "{out}", "{out}"], "unrecognized arguments"), (["--run", "{out}/config.yaml"], "not a directory"),
        (["--run", "{out}/config.yaml/x"], "no such directory"), (["--run", "{out}/nothing"], "no such directory"),
        (["--run", "{out}/iter_1"], "not a run directory"), (["--run", ""], "not a run directory"), (["--run", "x" * 5000], "name too long"),
        (["--run", "a\0b"], "not a possible name"), (["--run", "~nobody_of_this_name"], "no home directory"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line_that_names_the_flag(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=re.compile(said, re.IGNORECASE)) as raised:
        report.main([word.replace("{out}", str(run.root)) for word in words])
    assert "\n" not in str(raised.value)
    assert not run.report.exists()


def test_a_directory_that_may_not_be_entered_is_named(run, monkeypatch):
    stat = os.stat

    def refuse(path, **how):
        if str(path).startswith(str(run.root)):
            raise PermissionError(13, "Permission denied")
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", refuse)  # root may enter any
    with pytest.raises(BadInput, match="Permission denied"):
        report.main(["--run", str(run.root)])


def test_a_page_of_one_line_of_help(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    assert "--run OUT" in capsys.readouterr().out


@pytest.mark.parametrize("gone", [None, "nan", 1e300, 1e30, "text"])
def test_pictures_leave_out_the_points_that_are_not_there(tmp_path, gone):
    run = begun(tmp_path)
    for t in (0, 1, 2):
        value = evaluated(t, base=RATE if t else {"mean": gone, "stderr": gone}) | {
            "log_ratio": dict.fromkeys(MOVED, gone)
        }
        value["length"] = {"tokens": gone if t == 1 else 0, "words": gone}
        files.write_json(run.evaluation(t), value)
    lines(
        run,
        {"iteration": 1, "stage": "judge", "step": 0} | dict.fromkeys(JUDGED, gone),
        {"iteration": 2, "stage": "judge", "step": 0},
        {"iteration": 1, "stage": "fit", "step": 0, "loss": gone},
    )
    page.write(run)
    drawn = re.findall('<svg .*?aria-label="(.*?)"', run.report.read_text())
    assert drawn == ["Win rate against the base", "Response length"]


@pytest.mark.parametrize("knob", ["prompts.source", "pairs.source"])
def test_page_and_card_say_how_many_prompts_were_held_out_of_which_source(tmp_path, knob):
    counts = {f"held_out_of_{knob.replace('.', '_')}": 20, "kept": 20}
    run = measured(tmp_path, prompts={"heldout": counts})
    page.write(run)
    assert f"Held out: 20 of the prompts of {knob}." in run.report.read_text()
    assert f"On 6 held-out prompts (held out of {knob}):" in model_card.text(run, 1)


def test_a_run_with_held_out_prompts_of_their_own_says_nothing_of_a_share(run):
    page.write(run)
    assert "Held out:" not in run.report.read_text()
    assert "held out of" not in model_card.text(run, 1)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"prompts": None},
        {"prompts": []},
        {"prompts": {"heldout": 3}},
        {"prompts": {"heldout": {"held_out_of_x": "9"}}},
    ],
)
def test_counts_that_a_manifest_lacks_are_none(manifest):
    assert evaluations.held_out(manifest) is None


def test_json_has_each_list_of_numbers_on_one_line_and_texts_as_they_are(tmp_path):
    value = {
        "a": [0.25, -1e-9, 3],
        "b": ["[\n1,\n2\n]", "[ 1,  2 ]"],
        "c": [],
        "d": [[1, 2], [3.5]],
        "e": [None, 1],
    }
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert '"a": [0.25, -1e-09, 3],' in text
    assert '  "b": [\n' in text


def test_numbers_are_finite_and_within_range():
    assert evaluations.number(np.float64(0.5)) == 0.5
    for value in (None, "1", True, float("nan"), float("inf"), 1e39, 10**400, [1]):
        assert evaluations.number(value) is None
