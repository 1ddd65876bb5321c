"""The user's own judge: whatever its code raises or returns is one line with its name, or usable."""

import re
import sys
import types
from collections import Counter
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sppo_jax import config, judges
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.records import Responses

NAME = "judge.backend=mine:judge"
LOGITS = [[0, 2, -1], [-2, 0, 3], [1, -3, 0]]
ASKED = ["Who?"], [["I", "you", "they"]]


@pytest.fixture
def own(monkeypatch):
    """Return a function that opens a judge with `compare` as given, a function or what it returns, and these members."""

    def own(given=None, /, **members):
        call = given if callable(given) else lambda *_: given
        kind = type(
            "Mine", (), {"identity": "mine-1", "compare": lambda self, *words: call(*words)} | members
        )
        monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(judge=kind))
        return judges.from_attribute("judge.backend", "mine:judge")

    return own


def refusal(call):
    """Return the one line with which a call is refused."""
    with pytest.raises(BadInput) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(NAME + ": ")
    return str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [x],
        lambda x: ((tuple(x[0]), x[1], x[2]),),
        lambda x: np.array([x], np.float16),
        lambda x: np.array([x], np.int8),
        lambda x: np.array([x], np.longdouble),
        lambda x: np.array([x], ">f4").transpose(0, 2, 1).copy().transpose(0, 2, 1),
        lambda x: np.ma.array([x]),
        lambda x: jnp.array([x], jnp.bfloat16),
        lambda x: torch.tensor([x], dtype=torch.bfloat16),
        lambda x: torch.tensor([x], dtype=torch.float32, requires_grad=True) * 1.0,
        lambda x: [torch.tensor(x)],
        lambda x: [[[torch.tensor(1.0 * v, requires_grad=True) for v in row] for row in x]],
        lambda x: [[[np.float32(v) for v in row] for row in x]],
    ],
)
def test_real_numbers_of_every_type_are_logits(own, make):
    found = own(make(LOGITS)).compare(*ASKED)
    assert found.dtype == np.float64
    assert found.tolist() == [LOGITS]


def test_truths_count_as_0_and_1(own):
    wins = np.array([LOGITS]) > 0
    assert own(wins).compare(*ASKED).tolist() == wins.astype(float).tolist()


async def later():
    return [LOGITS]


def circle():
    row = []
    row.append(row)
    return row


class Hostile:
    def __array__(self, *_, **__):
        raise OSError("no array today")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: [[[0, 1, 2], [0, 1], [0, 1, 2]]], "rows of different lengths"),
        (lambda: [[[0, 1, 2]], [[0, 1, 2]] * 2], "rows of different lengths"),
        (lambda: None, "gave None"),
        (lambda: "0.5", "gave a str"),
        (lambda: [[["0", "1", "2"]] * 3], "an array of texts"),
        (lambda: object(), "gave an object"),
        (lambda: [[[Fraction(1, 2)] * 3] * 3], "an array of object"),
        (lambda: [[[None] * 3] * 3], "an array of object"),
        (lambda: [[[10**400] * 3] * 3], "an array of object"),
        (lambda: (row for row in LOGITS), "gave a generator"),
        (later, "gave a coroutine"),
        (lambda: {"logits": LOGITS}, "gave a dict"),
        (lambda: np.array([LOGITS]) + 0j, "complex128"),
        (lambda: torch.zeros(1, 3, 3, dtype=torch.complex64), "complex numbers"),
        (lambda: torch.zeros(1, 3, 3, device="meta"), "NotImplementedError"),
        (lambda: torch.zeros(1, 3, 3).to_sparse(), "TypeError"),
        (lambda: np.zeros((1, 3, 3), "datetime64[s]"), "datetime64"),
        (lambda: np.zeros((1, 3, 3), [("a", float)]), "an array of void"),
        (circle, "RecursionError"),
        (Hostile, "OSError: no array today"),
        (lambda: 0.5, r"an array \(\), needed \(1, 3, 3\)"),
        (lambda: [0.1, 0.2, 0.3], r"an array \(3,\), needed \(1, 3, 3\)"),
        (lambda: [[0.1, 0.2, 0.3]], r"\(1, 3\), needed \(1, 3, 3\), .*rewards r"),
        (lambda: LOGITS, r"\(3, 3\), needed \(1, 3, 3\)"),
        (lambda: np.full((1, 3, 3), np.nan), "Who.* not a finite number in float32's range: nan for"),
        (lambda: np.full((1, 3, 3), -np.inf), "-inf for responses 0 and 1"),
        (lambda: np.full((1, 3, 3), 1e308), r"1e\+308 for responses 0 and 1"),
        (lambda: np.full((1, 3, 3), -3.5e38), "float32's range"),
        (lambda: np.full((1, 3, 3), np.longdouble("1e4000")), "float32's range: inf"),
        (lambda: np.ma.masked_array(np.zeros((1, 3, 3)), mask=np.ones((1, 3, 3))), "nan for"),
        (lambda: [[[0, np.ma.masked, 2]] * 3], "nan for"),
        (lambda: [np.ma.masked_array(LOGITS, mask=np.eye(3)[::-1])], "nan for"),
        (lambda: np.ma.masked_array(np.zeros((1, 3, 3), complex)), "complex128"),
        (lambda: torch.full((1, 3, 3), torch.nan, dtype=torch.bfloat16), "nan for"),
    ],
)
def test_what_is_not_finite_real_numbers_of_the_shape_is_one_line(own, value, said):
    assert re.search(said, refusal(lambda: own(lambda *_: value()).compare(*ASKED)))


def test_the_largest_numbers_of_float32_are_logits(own):
    for value in (3.4028234e38, -3.4028234e38, np.float32(np.finfo(np.float32).max)):
        assert (own(np.full((1, 3, 3), value)).compare(*ASKED) == value).all()


def test_nobody_reads_the_diagonal(own):
    logits = np.array([LOGITS], float)
    for value in (np.nan, -np.inf, 1e308):
        logits[0][np.eye(3, dtype=bool)] = value
        assert own(logits).compare(*ASKED).tolist() == [LOGITS]


class Wordless(Exception):
    def __str__(self):
        raise ValueError("no words")


class Root(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionRefusedError(111, "Connection refused"),
            r"compare raised ConnectionRefusedError: .*refused",
        ),
        (BrokenPipeError(32, "Broken pipe"), "BrokenPipeError"),
        (TimeoutError(), r"compare raised TimeoutError( \(|;)"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line second line"),
        (ValueError("x" * 9999), r"ValueError: x{300}( \(|;)"),
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (ExceptionGroup("both", [ValueError(1)]), "ExceptionGroup: both"),
        (Root("bare"), "Root: bare"),
        (Wordless(), "Wordless"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_compare_raises_is_one_line_with_judge_type_and_text(own, error, said):
    def fail(*_):
        raise error

    line = refusal(lambda: own(fail).compare(*ASKED))
    assert re.search(said, line)
    assert "run the same command again" in line


def test_the_line_of_the_users_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "placed.py").write_text(
        "class Judge:\n    identity = 'x'\n    def compare(self, *words):\n        return words[9]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    opened = judges.from_attribute("eval.oracle", "placed:Judge")
    with pytest.raises(BadInput, match=r"eval.oracle=placed:Judge: .*IndexError: .* \(line 4 of placed\)"):
        opened.compare(*ASKED)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated()], ids=lambda error: type(error).__name__)
def test_a_request_to_stop_is_not_the_judges_fault(own, error):
    def stop(*_):
        raise error

    with pytest.raises(type(error)):
        own(stop).compare(*ASKED)


@pytest.mark.parametrize("error", [Terminated(), BrokenPipeError(), ZeroDivisionError()], ids=repr)
def test_an_error_of_the_runs_own_callback_stays_what_it_is_though_the_judge_wraps_it(own, error):
    def wrapping(prompts, responses, on_progress):
        try:
            on_progress(1, 6)
        except BaseException as found:
            raise RuntimeError("the judge failed") from found

    def ours(*_):
        raise error

    with pytest.raises(type(error)) as caught:
        own(wrapping).compare(*ASKED, ours)
    assert caught.value is error


@pytest.mark.parametrize("done", [-3, 6.0, np.int64(2), torch.tensor(4), 10**400])
def test_progress_is_a_number_of_pairs_whatever_a_judge_reports(own, done):
    seen = []

    def compare(prompts, responses, on_progress):
        on_progress(done=done, total="many")
        return [LOGITS]

    own(compare).compare(*ASKED, lambda *step: seen.append(step))
    assert seen == [(min(max(int(done), 0), 6), 6)]
    assert type(seen[0][0]) is int


def test_progress_that_is_not_a_number_is_the_judges_fault(own):
    line = refusal(lambda: own(lambda p, r, tell: tell("most", 6)).compare(*ASKED, lambda *_: None))
    assert "ValueError" in line


def test_a_judge_that_changes_its_arguments_changes_no_record(own):
    def compare(prompts, responses, on_progress):
        prompts.clear()
        for row in responses:
            row.sort()
            row[0] = "mine"
        return [LOGITS]

    prompts, responses = ["Who?"], [["you", "I", "they"]]
    own(compare).compare(prompts, responses)
    assert (prompts, responses) == (["Who?"], [["you", "I", "they"]])


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"identity": ""}, "identity must be a text .* found ''"),
        ({"identity": " \n"}, "identity must be a text"),
        ({"identity": 3}, "found 3"),
        ({"identity": None}, "found None"),
        ({"identity": 10**5000}, "found an int"),
        ({"identity": ["x"]}, "found a list"),
        ({"identity": b"x"}, "found a bytes"),
        ({"identity": property(lambda self: 1 / 0)}, "identity raised ZeroDivisionError"),
        ({"identity": property(lambda self: sys.exit("bye"))}, "identity raised SystemExit: bye"),
        ({"compare": None}, "a Mine, has no method compare"),
        ({"compare": property(lambda self: 1 / 0)}, "compare raised ZeroDivisionError"),
        ({"on_mesh": "no"}, "on_mesh must be True or False, found 'no'"),
        ({"on_mesh": lambda self: False}, "on_mesh must be True or False, found a method"),
        ({"sources": ["owner/judge"]}, "sources raised ValueError"),
        ({"sources": 3}, "sources raised TypeError"),
        ({"sources": {"owner/judge": None}}, "sources must be texts"),
        ({"cut": 3}, "cut raised TypeError"),
        ({"cut": {"prompts": "two"}}, "cut must count .* found 'two' for 'prompts'"),
        ({"cut": {"prompts": -1}}, "found -1"),
        ({"cut": {1: 1}}, "for 1"),
        ({"features": 3}, "features raised TypeError"),
        ({"features": lambda self, prompt, text: None}, "features raised TypeError"),
        ({"features": lambda self, prompt, text: 1 / 0}, "features raised ZeroDivisionError"),
        (
            {"features": lambda self, prompt, text: {"polite": "yes"}},
            "features must be .* found 'yes' for 'polite'",
        ),
        ({"features": lambda self, prompt, text: {"polite": np.nan}}, "found nan"),
        ({"features": lambda self, prompt, text: {"polite": 1j}}, "found a complex"),
        ({"features": lambda self, prompt, text: {1: 1}}, "for 1"),
        ({"release": 3}, "release raised TypeError"),
        ({"release": lambda self: 1 / 0}, "release raised ZeroDivisionError"),
        ({"__init__": lambda self: 1 / 0}, "ZeroDivisionError"),
        ({"__init__": lambda self, path: None}, "TypeError.*a function without arguments"),
    ],
)
def test_members_of_the_wrong_type_are_refused_when_a_judge_is_tried(own, members, said):
    zeros = lambda prompts, responses, _: np.zeros((len(prompts),) + (len(responses[0]),) * 2)  # noqa: E731
    assert re.search(said, refusal(lambda: judges.try_out(own(zeros, **members), ["Who?", "What?"], 3)))


def test_members_that_are_absent_or_none_have_defaults(own):
    for members in (
        {},
        dict.fromkeys(("features", "on_mesh", "sources", "cut", "tell", "release", "close")),
    ):
        opened = own([LOGITS], **members)
        opened.report_to(print)
        opened.release()
        opened.close()
        assert (opened.on_mesh, opened.sources, opened.cut) == (False, {}, Counter())
        assert opened.features("Who?", "I") == {}
    assert own(cut=Counter(prompts=np.int64(2))).cut == {"prompts": 2}


def test_features_are_numbers_of_one_response(own):
    opened = own(features=lambda self, prompt, text: {prompt: True, "length": np.int32(len(text))})
    assert opened.features("Who?", "they") == {"Who?": 1.0, "length": 4.0}


def test_an_identity_is_read_once(own):
    told = []
    opened = own(identity=property(lambda self: told.append(0) or f"mine-{len(told)}"))
    assert opened.identity == opened.identity == "mine-1"


@pytest.mark.parametrize("error", [OSError("gone"), SystemExit(1)], ids=repr)
def test_a_judge_that_cannot_be_closed_ends_no_run(own, capsys, error):
    def close(self):
        raise error

    own(close=close).close()
    printed = capsys.readouterr().err
    assert printed.startswith(f"warning: {NAME}: close raised {type(error).__name__}: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "made", "AttributeError"),
        ("made = 3", "made", "TypeError"),
        ("def made(): raise KeyError('REWARD_MODEL')", "made", "KeyError: 'REWARD_MODEL'"),
        ("def made(): return None", "made", "what it makes, None, has no method compare"),
        ("import sys; sys.exit(4)", "made", r"SystemExit: 4 \(line 1 of broken_\d+\)"),
        ("class E(BaseException): pass\nraise E('no')", "made", r"E: no \(line 2 of broken_\d+\)"),
        ("def made(:", "made", "SyntaxError"),
        ("\0", "made", "SyntaxError|ValueError"),
        ("import no_such_package", "made", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("made = 1", "", "AttributeError"),
    ],
)
def test_a_module_or_factory_that_fails_is_one_line(tmp_path, monkeypatch, request, text, name, said):
    module = f"broken_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=said) as caught:
        judges.from_attribute("judge.backend", f"{module}:{name}")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"judge.backend={module}:{name}: ")


@pytest.mark.parametrize("name", ["no_such_module:judge", ":judge", "..up:judge", "a b:c:d"])
def test_a_judge_that_cannot_be_imported_is_one_line_that_says_how_to_name_it(name):
    with pytest.raises(BadInput, match=r"a judge is module:attribute, a function without arguments"):
        judges.open_judge(config.Judge(backend=name))


def test_a_judge_that_makes_numpy_strict_makes_only_itself_strict(own):
    def compare(*_):
        np.seterr(all="raise")
        return [[[0, 3e38], [-3e38, 0]]]

    row = Responses(1, "Who?", [1], [[2], [2]], ["a", "b"], ["stop"] * 2, [-1.0] * 2)
    [found] = judges.prefer([row], own(compare), config.Judge(), lambda prompt, texts: (prompt, texts))
    assert found.win_rate == [0.75, 0.25]


def test_a_path_beside_a_judge_of_ones_own_is_told_not_to_be_read(own, capsys):
    own([LOGITS])
    judges.open_judge(config.Judge(backend="mine:judge", path="owner/PairRM"))
    assert "judge.path=owner/PairRM is not read" in capsys.readouterr().err
    judges.open_judge(config.Judge(backend="mine:judge", path="embedded:pairrm"))
    assert capsys.readouterr().err == ""
