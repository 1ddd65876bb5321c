"""Progress: one line that fits its terminal, the important numbers first, and a last line of what was done."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from sppo_jax.run import progress
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics


@pytest.fixture
def now(monkeypatch):
    """The time of the clock, as a list of one number that a test may raise."""
    found = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: found[0])
    return found


def shown(count, width):
    """What a terminal of this width shows of a count."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    console.print(progress.Line(count))
    return screen.getvalue().removesuffix("\n")


def half(now, label="iteration 1 respond"):
    """A count of which half is done after ten seconds, with facts."""
    count = progress.Count(label, 128, "prompts", 0)
    now[0] += 10
    count.add(64, {"tokens/s": 10915, "slots in use": 40, "judged": 23})
    return count


@pytest.mark.parametrize("label", ["fit", "iteration 12 win rate, oracle", "语" * 30, "x" * 99])
@pytest.mark.parametrize("over", [False, True])
def test_a_line_is_narrower_than_its_terminal(label, over, now):
    count = half(now, label)
    if over:
        count.add(64, {"tokens/s": 10915})
    for width in (*range(20, 82), 100, 120, 200):
        line = shown(count, width)
        assert "\n" not in line
        assert cell_len(line) < width
        assert f"{count.done}/128" in line


LINES = {
    120: "iteration 1 respond ━━━━━━━━━━━━━━╸               64/128 prompts, 6.4/s, 10s left, tokens/s 10915, slots in use 40",
    80: "iteration 1 respond ━━━━╸     64/128 prompts, 6.4/s, 10s left, tokens/s 10915",
    60: "iteration 1 respond 64/128 prompts, 6.4/s, 10s left",
    40: "…1 respond 64/128, 6.4/s, 10s left",
    30: "…1 respond 64/128, 6.4/s",
    20: "…1 respond 64/128",
}


@pytest.mark.parametrize("width", LINES)
def test_facts_are_dropped_before_numbers_and_the_label_loses_its_beginning(width, now):
    assert shown(half(now), width) == LINES[width]


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (80, "iteration 1 fit: 32/32 updates in 6s, 5.3/s, loss 1.751, margin 2.803"),
        (40, "iteration 1 fit: 32/32 in 6s, 5.3/s"),
    ],
)
def test_a_finished_line_says_what_was_done(width, line, now):
    count = progress.Count("iteration 1 fit", 32, "updates", 0)
    now[0] += 6
    count.add(32, {"loss": 1.7512, "margin": 2.8031})
    assert shown(count, width) == line


def test_what_was_there_before_counts_but_does_not_hurry_the_clock(tmp_path, capsys, now):
    with (
        Metrics(RunDir(tmp_path)) as metrics,
        metrics.progress("respond", 1000, "prompts", done=900) as advance,
    ):
        on_progress = metrics.chunks(advance, lambda: {"judged": 3})
        now[0] += 10
        on_progress(0, 500, 8)  # none is finished yet: no time left is known
        now[0] += 10
        on_progress(20, 500, 7)
        on_progress(0, 1, 1)  # too soon
        now[0] += 20
        on_progress(80, 1000, 0)
        on_progress(0, 0, 0)  # over
    assert capsys.readouterr().out.splitlines() == [
        "respond: 900/1000 prompts, tokens/s 50, slots in use 8, judged 3",
        "respond: 920/1000 prompts, 1.0/s, 1m20s left, tokens/s 50, slots in use 7, judged 3",
        "respond: 1000/1000 prompts in 40s, 2.5/s, tokens/s 50, judged 3",
    ]


def test_before_the_first_unit_is_done_the_tokens_drawn_bound_the_time_that_is_left(tmp_path, capsys, now):
    with Metrics(RunDir(tmp_path)) as metrics, metrics.progress("respond", 4, "prompts") as advance:
        on_progress = metrics.chunks(advance, most=2000)
        now[0] += 10
        on_progress(0, 500, 8)  # 50 a second, and 1500 are left at most
        now[0] += 10
        on_progress(1, 500, 8)
    assert capsys.readouterr().out.splitlines() == [
        "respond: 0/4 prompts, at most 30s left, tokens/s 50, slots in use 8",
        "respond: 1/4 prompts, 20.0s each, 1m00s left, tokens/s 50, slots in use 8",
    ]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1012.3, "1012/s"), (12.34, "12.3/s"), (1, "1.0/s"), (0.8, "1.2s each"), (0.05, "20.0s each"), (0.008, "2m05s each")],
)  # fmt: skip
def test_a_rate_below_one_a_second_is_the_time_of_each(rate, text):
    assert progress.speed(rate) == text


def on_terminal(metrics, width):
    """The screen of a terminal to which these metrics write from now on."""
    screen = io.StringIO()
    metrics._console = Console(file=screen, force_terminal=True, width=width, soft_wrap=True)
    return screen


@pytest.mark.parametrize("width", [40, 160])
def test_a_bar_begins_where_the_last_run_ended_and_leaves_its_last_line(tmp_path, width):
    with Metrics(RunDir(tmp_path)) as metrics:
        screen = on_terminal(metrics, width)
        with metrics.progress("respond", 10, "prompts", done=6) as advance:
            metrics.chunks(advance)(4, 70, 0)
    first, *_, last = screen.getvalue().split("\r")
    assert "6/10" in first
    assert "respond: 10/10" in last
    assert "slots" not in last


def test_nothing_is_shown_of_what_was_done_already(tmp_path):
    with Metrics(RunDir(tmp_path)) as metrics:
        screen = on_terminal(metrics, 80)
        with metrics.progress("fit", 6, "updates", done=6) as advance:
            advance(0)
    assert screen.getvalue() == ""


def test_a_quiet_run_prints_its_warnings_and_its_result_only(tmp_path, capsys):
    with Metrics(RunDir(tmp_path), quiet=True) as metrics:
        metrics.say("iteration 1 of 3")
        metrics.say("iteration 1 fit: warning: lower fit.learning_rate")
        with metrics.progress("fit", 6, "updates") as advance:
            advance(6)
        metrics.say("report: here", always=True)
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1 fit: warning: lower fit.learning_rate",
        "report: here",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (90_000, "25h00m")]
)
def test_a_duration_is_read_in_two_units(seconds, text):
    assert progress.duration(seconds) == text
