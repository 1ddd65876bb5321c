"""Damaged input of every kind ends with one line and exit code 2, or is accepted; benchmarks/fuzz.py tries thousands of cases."""

import types

import pytest

from benchmarks import fuzz
from sppo_jax import main
from sppo_jax.errors import BadInput
from sppo_jax.report import pictures
from tests import fuzz_cases, fuzz_run
from tests.fuzz_cases import Case

pytestmark = pytest.mark.usefixtures("single_device")
SEED, CASES = 20, 24  # of each kind


@pytest.fixture(autouse=True)
def before_the_game(monkeypatch):
    monkeypatch.setattr(pictures, "PANELS", [])  # they take a second a page
    with fuzz_run.before_the_game():
        yield


@pytest.mark.parametrize("kind", fuzz_cases.KINDS)
def test_damaged_input_is_accepted_or_refused_in_one_line_and_leaves_nothing_half_written(kind, tmp_path):
    ends = []
    for number in range(CASES):
        work = tmp_path / str(number)
        work.mkdir()
        case = fuzz_cases.make(kind, SEED, number, work)
        found = fuzz_run.attempt(case, work)
        assert found.faults == [], f"{kind} {number}: {ascii(case.about)[:500]}: {ascii(found.said)[:500]}"
        ends.append(found.code)
    assert 2 in ends  # the cases are damaged indeed


def test_the_same_seed_and_number_make_the_same_case(tmp_path):
    for kind in fuzz_cases.KINDS:
        made = []
        for name in ("a", "b"):
            (work := tmp_path / kind / name).mkdir(parents=True)
            case = fuzz_cases.make(kind, 7, 3, work)
            files = {
                str(p.relative_to(work)): p.is_dir() or p.is_symlink() or p.stat().st_size
                for p in work.rglob("*")
            }
            words = [word.replace(str(work), "") for word in case.words]
            made.append((case.about.replace(str(work), ""), words, set(files)))
        assert made[0] == made[1]


def two_lines(_words):
    print("a note", file=__import__("sys").stderr)
    raise BadInput("something is wrong here; do something else")


def long_line(_words):
    raise BadInput("x " * 2900)


def half_written(words):
    open(".run.part", "w").close()
    raise BadInput("something is wrong here; do something else")


def out_is_made(words):
    open("run", "w").close()
    raise BadInput("something is wrong here; do something else")


def endless(_words):
    while True:
        pass


def raises(_words):
    raise ValueError("deep inside")


def warns(_words):
    import warnings

    warnings.warn("deprecated", stacklevel=1)


def fine(_words):
    raise BadInput("something is wrong here; do something else")


@pytest.mark.parametrize(
    ("entry", "said"),
    [(two_lines, "2 lines"), (long_line, "a line of 58"), (half_written, "left behind"), (out_is_made, "OUT exists"),
     (endless, "Hang"), (raises, "ValueError: 'deep inside'"), (warns, "warning: UserWarning: deprecated"), (fine, None)],
)  # fmt: skip
def test_a_command_that_ends_otherwise_is_a_fault(tmp_path, monkeypatch, entry, said):
    monkeypatch.setattr(fuzz_run, "SECONDS", 0.2)
    monkeypatch.setattr(main, "main", entry)
    case = Case("flags", "", "sppo_jax.main", ["--out", "run"], tmp_path / "run")
    faults = fuzz_run.attempt(case, tmp_path).faults
    assert bool(faults) == bool(said)
    assert said is None or said in faults[0]


def test_the_script_counts_how_cases_end_by_kind():
    results = [*fuzz.work("configuration", SEED, range(4), 0), *fuzz.work("flags", SEED, range(3), 0)]
    results[0]["faults"] = ["a fault"]
    found = fuzz._summary(results, 1.0, SEED)
    assert (found["cases"], found["failed"]) == (7, 1)
    assert found["kinds"]["configuration"]["cases"] == 4
    assert sum(found["kinds"]["flags"].get(end, 0) for end in ("refused", "accepted")) == 3
    assert found["slowest"]["seconds"] < fuzz_run.SECONDS


def test_every_kind_of_case_is_of_its_own_name():
    assert all(
        isinstance(make, types.FunctionType) and make.__name__ == kind
        for kind, make in fuzz_cases.KINDS.items()
    )
