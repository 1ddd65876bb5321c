"""Where an iteration's time goes, and what is left of the run's."""

import pytest

from sppo_jax.config import Config
from sppo_jax.run import clock, metrics
from sppo_jax.run.clock import Clock
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics


@pytest.fixture
def now(monkeypatch):
    """The time of the clock, as a list of one number that a test may raise."""
    found = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: found[0])
    return found


def played(run, t, now, *, begun=False, faster=1.0):
    """Play iteration t: 9 s of sampling and judging, 6 of training, 3 of evaluating, and 2 of nothing by name."""
    with run.iteration(t, begun=begun):
        for part, seconds in (("sampling", 5), ("judging", 4), ("training", 6)):
            with run.doing(part):
                now[0] += seconds * faster
        with run.doing("evaluating"), run.doing("sampling"):
            now[0] += 3 * faster
        now[0] += 2 * faster


def test_seconds_are_written_by_what_was_done_and_by_the_outermost_of_two(tmp_path, now, capsys):
    with Metrics(RunDir(tmp_path)) as shown:
        played(Clock(shown, 1), 1, now)
    [line] = metrics.read(RunDir(tmp_path))
    assert (line["iteration"], line["stage"], line["step"]) == (1, "seconds", 0)
    expected = {"sampling": 5, "judging": 4, "scoring": 0, "training": 6, "exporting": 0, "evaluating": 3}
    assert {part: line[part] for part in (*clock.PARTS, "total")} == expected | {"total": 20}
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1 of 1",
        "iteration 1 of 1 took 20s: sampling 5s, judging 4s, training 6s, evaluating 3s",
    ]


def test_the_time_left_is_that_of_the_last_whole_iteration_and_unknown_before_one(tmp_path, now, capsys):
    with Metrics(RunDir(tmp_path)) as shown:
        run = Clock(shown, 4)
        played(run, 1, now, begun=True)
        played(run, 2, now)
        played(run, 3, now, faster=0.5)
        played(run, 4, now)
    ended = [line for line in capsys.readouterr().out.splitlines() if " took " in line]
    assert [line.partition("; ")[2] for line in ended] == ["", "about 40s left", "about 10s left", ""]


def test_a_resumed_iteration_adds_its_seconds_to_those_of_what_it_does_not_do_again(tmp_path, now):
    run = RunDir(tmp_path)
    with Metrics(run, Config()) as shown, pytest.raises(KeyboardInterrupt):
        clock_ = Clock(shown, 1)
        with clock_.iteration(1, begun=False), clock_.doing("sampling"):
            now[0] += 50
            raise KeyboardInterrupt
    with Metrics(run, Config()) as shown:
        clock_ = Clock(shown, 1)
        with clock_.iteration(1, begun=True), clock_.doing("training"):
            now[0] += 7
    [line] = metrics.read(run)
    assert (line["sampling"], line["training"], line["total"]) == (50, 7, 57)


def test_lines_for_people_have_words_for_the_parts(tmp_path, now, capsys):
    with Metrics(RunDir(tmp_path)) as shown:
        clock_ = Clock(shown, 1)
        with clock_.iteration(1, begun=False), clock_.doing("scoring"):
            now[0] += 7
    assert capsys.readouterr().out.splitlines()[-1] == "iteration 1 of 1 took 7s: reference log-probs 7s"


def test_time_is_counted_where_an_iteration_fails(tmp_path, now):
    with Metrics(RunDir(tmp_path)) as shown:
        run = Clock(shown, 1)
        with pytest.raises(ZeroDivisionError), run.doing("sampling"):
            1 / 0  # noqa: B018
        played(run, 1, now)  # else all of it would lie within the first part
    assert metrics.read(RunDir(tmp_path))[0]["training"] == 6
