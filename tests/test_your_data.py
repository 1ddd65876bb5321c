"""What docs/your-data.md begins with: the configurations, prompts and rule of a user's own."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from sppo_jax import config_file, judges, preferences, prompts
from sppo_jax.settings import embedded, resuming
from sppo_jax.training import effect

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs/your-data.md").read_text()
NAMES = ("own", "smollm2_135m")


def load(name):
    return embedded.resolve(config_file.load([ROOT / f"configs/{name}.yaml"]))


@pytest.mark.parametrize("count", [20, 60])
@pytest.mark.parametrize("name", NAMES)
def test_the_example_prompts_fill_three_iterations_and_a_tenth_is_held_out(name, count, tokenizer, tmp_path):
    """Also of a user's own twenty, without a change of a number."""
    lines = (ROOT / "examples/prompts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt"] for line in lines}) == 60
    (tmp_path / "own.jsonl").write_text("\n".join(lines[:count]))
    c = load(name)
    own = dataclasses.replace(c.prompts, source=f"jsonl:{tmp_path / 'own.jsonl'}")
    sets = prompts.load(dataclasses.replace(c, prompts=own), tokenizer)
    assert [len(one) for one in sets.train] == [6, 6, 6]
    assert len(sets.heldout) == count // 10


@pytest.mark.parametrize("name", NAMES)
def test_all_responses_of_an_iteration_have_a_slot_and_few_slots_stay_empty(name):
    c = load(name)
    count = c.prompts.per_iteration * c.sampling.responses
    assert count <= c.sampling.slots < 1.2 * count


@pytest.mark.parametrize("name", NAMES)
def test_an_own_configuration_has_no_oracle_and_updates_that_change_something(name):
    c = load(name)
    assert c.eval.oracle == ""
    assert c.prompts.heldout == ""
    effect.check(c.fit, c.prompts.per_iteration, 1)
    assert effect.rated(c.fit, c.prompts.per_iteration) == effect.LOOKED_AT - 1  # the first has rate 0


def test_the_laptops_configuration_differs_from_the_users_own_in_the_model_and_its_sizes():
    changed = set(resuming.changed_keys(load("own"), load("smollm2_135m")))
    assert changed <= {"model.path", "judge.path", "sampling.max_new_tokens", "fit.learning_rate", "fit.epochs",
                       "fit.schedule_epochs"}  # fmt: skip


def test_the_example_rule_prefers_a_short_response_that_ends_in_a_sentence(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend("")  # as `python -m` has it
    judge = judges.open_judge(load("own").judge)
    texts = [
        "It is salt that rivers bring.",
        "It is salt.",
        "It is salt that many rivers bring, from very far.",
        "Yes",
    ]
    p = preferences.probability_matrix(judge.compare(["Why is the sea salty?"], [texts]))
    assert np.argsort(-preferences.win_rates(p)[0], kind="stable").tolist() == [1, 0, 2, 3]
    np.testing.assert_allclose(
        p[0, 1, 3], 1 / (1 + np.exp(-2))
    )  # fewer than five words are no better than five
    np.testing.assert_allclose(p[0, 0, 2], 1 / (1 + np.exp(-2 * np.log2(10 / 6))))


def test_the_documented_rule_is_the_example():
    shown = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]
    assert shown in (ROOT / "examples/rule_judge.py").read_text()
