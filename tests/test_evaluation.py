"""python -m sppo_jax.evaluate: a run's own figures, two commands that share their work, kills, and wrong command lines."""

import json
import re
import shutil
import types

import numpy as np
import pytest

from sppo_jax import config_file
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import command, comparing, flags, tables

CIRCLE = "tests.test_evaluation:Circle"


class Circle:
    """Prefers by the first letter's place on a circle, on which each is a third further than the one that it loses to."""

    identity = "circle"

    def compare(self, prompts, responses, on_progress=None):
        place = np.array([[(ord(text[0]) - ord("a")) % 3 for text in row] for row in responses])
        return np.where((place[:, None, :] - place[:, :, None]) % 3 == 1, 4.0, 0.0) - np.where(
            (place[:, :, None] - place[:, None, :]) % 3 == 1, 4.0, 0.0
        )


@pytest.fixture
def evaluate(tmp_path, capsys, single_device):
    """A function from words of a command line to the figures that it wrote."""

    def run(*given, out=tmp_path / "evaluations"):
        command.run(flags.read([*map(str, given), "--out", str(out)]))
        shown = capsys.readouterr().out
        (line,) = [line for line in shown.splitlines() if line.startswith("figures: ")]
        return json.loads(open(line.removeprefix("figures: ")).read()), shown

    return run


def own(played, t, against):
    return json.loads((played / f"iter_{t}/eval.json").read_text())["win_rate"]["judge"][against]["mean"]


def test_a_runs_iterations_have_the_runs_own_win_rates(played, evaluate):
    for t, other, name in ((1, 0, "base"), (2, 0, "base"), (2, 1, "previous")):
        found, shown = evaluate("--policy", f"{played}@{t}", "--against", f"{played}@{other}")
        assert found["judges"]["judge"]["mean"] == own(played, t, name)
        assert max(map(len, shown.partition("A ")[2].partition("figures")[0].splitlines())) <= tables.WIDTH
    found, _ = evaluate("--policy", f"{played}@0", "--against", f"{played}@0")
    base = json.loads((played / "iter_0/eval.json").read_text())
    assert found["judges"]["judge"]["mean"] == base["win_rate"]["judge"]["base"]["mean"]


def test_a_run_keeps_each_held_out_prompts_win_probability_and_what_its_responses_are_like(played):
    for t in (0, 1, 2):
        found = json.loads((played / f"iter_{t}/eval.json").read_text())
        rate = found["win_rate"]["judge"]["base"]
        assert len(rate["per_prompt"]) == found["prompts"]
        assert sum(rate["per_prompt"]) / found["prompts"] == pytest.approx(rate["mean"], abs=1e-4)
        answers = [found["features"][name] for name in ("right", "wrong", "evasive", "without a statement")]
        assert sum(answers) == pytest.approx(1)
        if t:
            base = json.loads((played / "iter_0/eval.json").read_text())
            for name, changed in found["features_change"].items():
                assert changed["mean"] == pytest.approx(
                    found["features"].get(name, 0) - base["features"].get(name, 0)
                )
                assert 0 <= changed["stderr"] < 0.5
        assert "P(iteration 2 beats the base)" in (played / "report.html").read_text()


def test_policies_are_named_as_directories_too_and_judged_on_prompts_with_categories(
    played, evaluate, tmp_path
):
    rows = [{"prompt": f"What is {n}?", "category": "odd" if n % 2 else "even"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, shown = evaluate(
        "--policy", played / "iter_1/export", "--against", "embedded:policy", "--prompts", f"jsonl:{tmp_path}/rows.jsonl",
        "--judge.backend", CIRCLE, "--sampling.max_new_tokens", 8, "--sampling.slots", 8,
    )  # fmt: skip
    assert found["prompts"] == 6
    assert {k: v["prompts"] for k, v in found["judges"]["judge"]["categories"].items()} == {
        "even": 3,
        "odd": 3,
    }
    assert "even (3)" in shown


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [2, 5])
def test_killed_anywhere_it_ends_with_the_same_figures_and_asks_nothing_twice(
    played, evaluate, tmp_path, monkeypatch, after
):
    asked = ("--round-robin", f"{played}@0", f"{played}@1", f"{played}@2")
    expected, _ = evaluate(*asked, out=tmp_path / "whole")
    done = []
    prefer, stream = comparing.prefer, command.Policy.respond

    def counted(kind, call):
        def wrapped(*args, **kwargs):
            if len(done) == after:
                raise Stopped
            found = call(*args, **kwargs)
            done.append(kind)
            return found

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "prefer", counted("judged", prefer))
        patch.setattr(command.Policy, "respond", counted("sampled", stream))
        with pytest.raises(Stopped):
            evaluate(*asked)
    judged = []
    monkeypatch.setattr(comparing, "prefer", lambda *args: judged.append(1) or prefer(*args))
    found, _ = evaluate(*asked)
    assert found == expected
    assert len(judged) == 3 - done.count("judged")


def test_a_second_question_reuses_what_the_first_has_judged(played, evaluate, monkeypatch):
    evaluate("--policy", f"{played}@1", "--against", f"{played}@0")
    monkeypatch.setattr(comparing, "prefer", lambda *_: pytest.fail("judged again"))
    found, _ = evaluate("--round-robin", f"{played}@0", f"{played}@1")
    assert found["judges"]["judge"]["win_rate"][1][0] == pytest.approx(own(played, 1, "base"))


def test_the_same_policy_twice_is_refused_in_a_round_and_answers_anew_against_itself(
    played, evaluate, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(played / "iter_1/export", copy)
    with pytest.raises(BadInput, match="are the same policy"):
        evaluate(
            "--round-robin", copy, played / "iter_1/export", "--prompts", "embedded:prompts/heldout.jsonl", "--judge.backend", CIRCLE
        )  # fmt: skip
    found, _ = evaluate("--policy", f"{played}@1", "--best-of", 2, "--against", f"{played}@1")
    assert found["curve"][0]["win_rate"]["judge"]["ties"] < 1


def test_thoughts_are_taken_out_by_the_template_of_the_policy_that_wrote_them():
    """A policy whose header opens a thought beside one that does not think: the plain answers reach the judge whole."""
    thinking, plain = (types.SimpleNamespace(thinks=thinks, tokenizer=None) for thinks in (True, False))
    config = config_file.load(overrides=["--judge.backend", CIRCLE])
    for policies in ([thinking, plain], [plain, thinking]):
        read = comparing._reading(config, policies, own=False)
        assert read("Hi?", ["plain", "whole"]) == ("Hi?", ["plain", "whole"])


def test_the_questions_of_a_benchmark_are_read_whatever_splits_the_run_has(played, evaluate, tmp_path):
    config = tmp_path / "run/config.yaml"
    config.parent.mkdir()
    text = (played / "config.yaml").read_text().replace("heldout_split: test", "heldout_split: test_1+test_2")
    config.write_text(text)
    asked = flags.read(["--policy", f"{config.parent}@1", "--best-of", "2", "--prompts", "jsonl:x.jsonl"])
    assert asked.config.prompts.heldout_split == "test"


def test_best_of_is_what_the_judge_prefers(played, evaluate):
    found, _ = evaluate("--policy", f"{played}@1", "--best-of", 5)
    assert [point["n"] for point in found["curve"]] == [1, 2, 4, 5]
    rates = [point["win_rate"]["judge"]["mean"] for point in found["curve"]]
    assert rates[-1] > rates[0]
    against, _ = evaluate("--policy", f"{played}@1", "--best-of", 2, "--against", f"{played}@0")
    assert len(against["policies"]) == 2


def test_a_rule_that_runs_in_a_ring_is_seen_and_mixed(tmp_path, monkeypatch, single_device):
    """Three policies that always answer a, b and c."""

    class Fixed:
        def __init__(self, name, *_):
            self.name, self.tokenizer, self.thinks = name[-1], None, False

        def draws_as(self, other):
            return self is other

        def said(self, row):
            return row

        def respond(self, place, prompts, *_):
            return [
                comparing.Responses(n, text, [1], [[2]], [self.name], ["stop"], [0.0])
                for n, text in enumerate(prompts)
            ]

    monkeypatch.setattr(command, "Policy", Fixed)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    command.run(
        flags.read(
            ["--round-robin", "embedded:a", "embedded:b", "embedded:c", "--prompts", f"jsonl:{tmp_path}/rows.jsonl",
             "--judge.backend", CIRCLE, "--out", str(tmp_path / "e")]
        )
    )  # fmt: skip
    (path,) = (tmp_path / "e").glob("round-robin*.json")
    judged = json.loads(path.read_text())["judges"]["judge"]
    assert sorted(judged["cycle"]) == [0, 1, 2]
    assert judged["mixture"] == pytest.approx([1 / 3] * 3)
    assert judged["gap"] < 1e-9


WRONG = {
    "nothing": ([], "nothing to evaluate"),
    "one policy": (["--policy", "embedded:policy"], "asks nothing"),
    "two questions": (["--round-robin", "a", "b", "--policy", "c"], "different questions"),
    "one in the round": (["--round-robin", "a"], "two or more policies"),
    "twice in the round": (["--round-robin", "a", "b", "a"], "names a twice"),
    "no number": (["--policy", "embedded:policy", "--best-of", "ten"], "whole number from 1 to 1024"),
    "no file": (["--policy", "embedded:policy", "--write", "jsonl"], "a format and a file"),
    "no such run": (["--policy", "nowhere@1", "--against", "embedded:policy"], "no such directory nowhere"),
    "a bucket": (["--policy", "gs://b/run@1", "--against", "embedded:policy"], "sppo_jax.export --run gs://b/run"),
    "an unknown flag": (["--policy", "embedded:policy", "--agains", "b"], "did you mean '--against'?"),
    "too many digits": (["--policy", "embedded:policy", "--best-of", "9" * 5000], "whole number from 1 to 1024"),
    "no questions": (["--policy", "some/where", "--against", "embedded:policy"], "--prompts jsonl:PATH"),
    "a bucket for figures": (["--policy", "embedded:policy", "--best-of", "2", "--out", "gs://b"], "a directory of this"),
    "a judge to name": (["--policy", "some/where", "--against", "embedded:policy", "--prompts", "jsonl:x"], "--judge.path"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_command_line_that_cannot_be_used_is_refused_before_anything_is_loaded(given, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        flags.read(given)


def written(*given):
    """Run a command that writes a file."""
    command.run(flags.read([*map(str, given), "--sampling.max_new_tokens", "8", "--sampling.slots", "8"]))


def test_responses_are_written_without_a_judge(played, tmp_path, single_device):
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ("What is 2 plus 3?", talk)))
    asked = ("--policy", played / "iter_1/export", "--prompts", f"jsonl:{file}", "--out", tmp_path / "e")
    for name in ("one", "two"):
        written(*asked, "--write", "jsonl", tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    assert [line.get("messages", line.get("prompt")) for line in lines] == ["What is 2 plus 3?", talk]
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    file.write_text(json.dumps({"prompt": [{"role": "system", "content": "Be brief."}, *talk[:1]]}))
    with pytest.raises(BadInput, match="prompt 1: the chat template refuses this conversation"):
        written(*asked, "--write", "jsonl", tmp_path / "three")


def test_mt_benchs_second_turn_holds_the_first_answer(played, tmp_path, monkeypatch, single_device):
    rows = [{"question_id": 81, "category": "writing", "turns": ["Name an animal.", "And another."]}]
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]))
    asked = []
    respond = command.Policy.respond

    def seen(self, place, prompts, mesh, sampling, seed):
        asked.append((list(prompts), sampling.temperature))
        return respond(self, place, prompts, mesh, sampling, seed)

    monkeypatch.setattr(command.Policy, "respond", seen)
    command.run(
        flags.read(
            [
                "--policy",
                f"{played}@1",
                "--prompts",
                f"jsonl:{tmp_path}/q.jsonl",
                "--write",
                "mt_bench",
                str(tmp_path / "m.jsonl"),
                "--out",
                str(tmp_path / "e"),
            ]
        )
    )
    first, second = json.loads((tmp_path / "m.jsonl").read_text())["choices"][0]["turns"]
    (one, temperature), (two, _) = asked
    assert (one, temperature) == (["Name an animal."], 0.7)
    assert [m["content"] for m in json.loads(two[0])] == ["Name an animal.", first, "And another."]
    assert second


def test_one_prompt_and_one_response_are_enough(played, evaluate, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "What is 2 plus 3?"}')
    few = (
        "--prompts",
        f"jsonl:{tmp_path}/one.jsonl",
        "--sampling.max_new_tokens",
        8,
        "--sampling.slots",
        8,
        "--eval.oracle=",
    )
    found, shown = evaluate("--policy", f"{played}@1", "--against", f"{played}@0", *few)
    low, high = found["judges"]["judge"]["interval"]
    assert high - low > 0.9
    assert "Of fewer than 20 prompts an interval is exact and wide" in shown
    assert found["judges"]["judge"]["length_controlled_own_fit"]["interval"] == [None, None]
    assert "NaN" not in shown + json.dumps(found)
    assert len(evaluate("--policy", f"{played}@1", "--best-of", 1, *few)[0]["curve"]) == 1


def test_a_preset_sets_the_sampling_and_flags_count_more(played):
    asked = flags.read(
        ["--policy", f"{played}@1", "--best-of", "2", "--preset", "paper-llama3", "--sampling.top_p", "0.5"]
    )
    found = command._sampling(asked)
    assert (found.temperature, found.top_p, found.max_new_tokens) == (0.9, 0.5, 4096)


def test_missing_iterations_and_runs_directories_are_named(played, evaluate):
    with pytest.raises(BadInput, match=r"has no policy of iteration 9; there are 0, 1, 2$"):
        evaluate("--policy", f"{played}@9", "--against", f"{played}@0")
    with pytest.raises(BadInput, match="is a run directory"):
        evaluate("--policy", f"{played}@1", "--against", f"{played}@0", out=played)
    shutil.copytree(played, played.with_name("copy"))
    (played.with_name("copy") / "config.yaml").unlink()
    with pytest.raises(BadInput, match="is not a run directory"):
        evaluate("--policy", f"{played.with_name('copy')}@1", "--against", f"{played}@0")
