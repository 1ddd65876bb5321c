"""What docs/your-data.md begins with: the configurations, prompts and rule of a user's own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sppo_jax import config, config_file, judges, preferences, prompts
from sppo_jax.settings import embedded
from sppo_jax.training import effect

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs/your-data.md").read_text()
NAMES = ("own", "smollm2_135m")


def load(name):
    return embedded.resolve(config_file.load([ROOT / f"configs/{name}.yaml"]))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_prompts_fill_three_iterations_and_a_tenth_is_held_out(name, tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    sets = prompts.load(load(name), tokenizer)
    assert [len(one) for one in sets.train] == [6, 6, 6]
    assert len(sets.heldout) == 2
    texts = [json.loads(line)["prompt"] for line in Path("examples/prompts.jsonl").read_text().splitlines()]
    assert {p.text for one in [*sets.train, sets.heldout] for p in one} == set(texts)
    assert len(set(texts)) == 20


@pytest.mark.parametrize("name", NAMES)
def test_an_own_configuration_has_no_oracle_and_updates_that_change_something(name):
    c = load(name)
    assert c.eval.oracle == ""
    assert c.prompts.heldout == ""
    effect.check(c.fit, c.prompts.per_iteration, 1)
    assert effect.rated(c.fit, c.prompts.per_iteration) == effect.LOOKED_AT - 1  # the first has rate 0


def test_the_laptops_configuration_differs_from_the_users_own_in_the_model_and_its_sizes():
    changed = set(config.changed_keys(load("own"), load("smollm2_135m")))
    assert changed <= {"model.path", "judge.path", "sampling.max_new_tokens", "fit.learning_rate", "fit.epochs",
                       "fit.schedule_epochs"}  # fmt: skip


def test_the_example_rule_prefers_a_short_response_that_ends_in_a_sentence(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend("")  # as `python -m` has it
    judge = judges.open_judge(load("own").judge)
    texts = ["It is salt.", "It is the salt that rivers bring.", "It is salt", "It is salt and"]
    p = preferences.probability_matrix(judge.compare(["Why is the sea salty?"], [texts]))
    assert np.argsort(-preferences.win_rates(p)[0]).tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(p[0, 0, 2], 1 / (1 + np.exp(-2)))
    np.testing.assert_allclose(p[0, 0, 1], 1 / (1 + np.exp(-0.05 * 4)))


def test_the_documented_rule_is_the_example():
    shown = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]
    assert shown in (ROOT / "examples/rule_judge.py").read_text()
