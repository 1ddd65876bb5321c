"""Model cards: what made a policy and how it was measured, without paths of the machine and with names kept as text."""

import functools
import re
import shlex

import pytest
import yaml

from sppo_jax import config_file, files
from sppo_jax.errors import BadInput
from sppo_jax.report import model_card
from sppo_jax.run import manifest
from sppo_jax.settings import resuming
from tests.run_directory import RATE, begun, evaluated


@pytest.fixture
def begin(tmp_path):
    return functools.partial(begun, tmp_path)


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_shows_what_made_the_policy_and_how_it_was_measured(begin):
    run = begin(
        "--model.path", "owner/base@v1", "--prompts.source", "hf:owner/prompts", "--iterations", "2",
        "--sampling.temperature", "0.7", "--judge.path", "owner/PairRM", "--fit.eta", "1000",
        model={"name": "owner/base", "revision": "f" * 40},
    )  # fmt: skip
    files.write_json(run.evaluation(0), evaluated(0, base=RATE))
    files.write_json(run.evaluation(1), evaluated(1, base=RATE, previous=RATE))
    text = model_card.text(run, 1)
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "datasets": ["owner/prompts"],
        "tags": ["sppo", "self-play", "preference-optimization", "jax"],
    }
    assert manifest.pinned_model(run) == "f" * 40
    plain = text.replace("\\", "")
    for words in (
        f"owner/base at revision {'f' * 40}", "c0ffee", "hf:owner/prompts (heldout 6, iteration 1 128)",
        "temperature 0.7, at most", "PairRM (owner/PairRM, torch), estimator pairwise", "sppo, eta 1000, baseline 0.5",
        "learning rate 5e-07", "jax 0.10.2, sppo_jax 0.1.0", "2 of cpu", "nobody has evaluated its\nsafety", "2405.00675",
        "| iteration | judge, against base | judge, against previous | mean tokens |",
        "| 0 | 0.625 ± 0.012 |  | 20.2 |", "| 1 | 0.625 ± 0.012 | 0.625 ± 0.012 | 20.2 |",
    ):  # fmt: skip
        assert words in plain, words
    assert "not measured yet" not in text


def test_the_card_says_what_the_loss_regresses_on_where_it_is_not_the_papers(begin):
    text = model_card.text(begin("--judge.target=score", "--fit.anchor=0.25", "--fit.eta=5"), 1)
    assert "sppo, eta 5, on scores, 0.25 of the base in the reference" in text


def test_the_card_does_without_evaluations_and_is_replaced_when_they_come(begin):
    run = begin()
    run.export(1).mkdir(parents=True)
    model_card.write(run, 1)
    assert "Iteration 1 is not measured yet." in (run.export(1) / "README.md").read_text()
    files.write_json(run.evaluation(0), evaluated(0, base=RATE))
    model_card.write(run, 1)
    assert "Iteration 1 is not measured yet." in (run.export(1) / "README.md").read_text()
    files.write_json(run.evaluation(1), evaluated(1, base=RATE, previous=RATE))
    model_card.write(run, 1)
    assert "not measured yet" not in (run.export(1) / "README.md").read_text()
    assert [p.name for p in run.export(1).iterdir()] == ["README.md"]


def test_no_path_of_the_users_machine_is_in_the_card(begin, tmp_path):
    (home := tmp_path / "home/jane/secret").mkdir(parents=True)
    run = begin(
        "--model.path", f"{home}/my-model", "--judge.path", f"{home}/judge", "--prompts.source", f"jsonl:{home}/p.jsonl",
        "--prompts.heldout", f"jsonl:{home}/h.jsonl",
    )  # fmt: skip
    text = model_card.text(run, 1)
    for word in ("jane", "secret", str(tmp_path), str(run.root)):
        assert word not in text
    assert "base_model" not in front(text)
    for word in (
        "# my-model, SPPO iteration 1",
        "jsonl:p.jsonl",
        "--prompts.heldout jsonl:h.jsonl",
        "PairRM (judge,",
    ):
        assert word in text


@pytest.mark.parametrize("more", [(), ("--model.path=owner/policy", "--prompts.column=--x")])
def test_the_cards_command_gives_the_runs_configuration(begin, more):
    run = begin(
        "--fit.eta", "3.5", "--seed", "9", "--prompts.column", "it's $(x)", "--eval.oracle", "a:b", *more
    )
    words = re.search(r"python -m sppo_jax\.main (.*?)\n```", model_card.text(run, 1), re.DOTALL)[1]
    again = config_file.load([], shlex.split(words.replace("\\\n", "")))
    assert resuming.changed_keys(config_file.load([run.config]), again) == []
    assert ("embedded:pairrm" in words) == bool(more)  # the default beside the embedded policy only


def test_a_source_that_is_empty_is_empty_in_the_cards_command(begin):
    run = begin("--prompts.source", "jsonl:own.jsonl")
    assert "--prompts.heldout" not in model_card.text(run, 1)


@pytest.mark.parametrize("name", ["a`b|c<script>[x](y)", "a\nb", "a: [b", "\x1b[2J", "--- {% x %}"])
def test_names_from_outside_stay_text(begin, name):
    run = begin(f"--model.path={name}", "--prompts.source", f"hf:{name}", versions={name: name})
    text = model_card.text(run, 1)
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.search(r"<script>|[^\\][`]|[^\\]\]\(|\x1b|^b", prose, re.MULTILINE)
    (row,) = [line for line in prose.splitlines() if line.startswith("| Versions")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"versions": 3}'])
def test_a_damaged_manifest_is_named(begin, text):
    run = begin()
    run.manifest.write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        model_card.text(run, 1)


def test_the_card_of_given_pairs_describes_no_game(begin):
    run = begin(
        "--pairs.source", "hf:owner/pairs:config@main", "--iterations", "1",
        prompts={"given pairs 1": {"kept": 99, "rows": 120}, "heldout": {"kept": 6}},
    )  # fmt: skip
    text = model_card.text(run, 1)
    assert front(text)["datasets"] == ["owner/pairs"]
    assert "given pairs 1 99" in text
    for word in ("plays against itself", "Sampling", "Responses per prompt", "embedded:prompts/train"):
        assert word not in text


def test_a_damaged_evaluation_is_named(begin):
    run = begin()
    files.write_json(run.evaluation(1), {"iteration": 1})
    with pytest.raises(BadInput, match=r"eval\.json: damaged"):
        model_card.text(run, 1)
