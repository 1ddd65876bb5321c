"""The benchmark of what a policy has lost: its questions are sound, and a worse policy scores worse."""

import json
import random
import re
import sys
from pathlib import Path

import jax
import pytest

from sppo_jax import export, models
from sppo_jax.hub import names
from sppo_jax.tiny import world

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "forgetting.py"


@pytest.fixture(scope="module")
def forgetting():
    pytest.importorskip("lm_eval")
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import forgetting

        return forgetting
    finally:
        sys.path.remove(str(SCRIPT.parent))


def test_each_capital_is_asked_for_once_among_four_different_cities(forgetting):
    rows = forgetting.capitals()
    cities = json.loads(forgetting.CAPITALS.read_text())
    assert [row["prompt"] for row in rows] == [f"The capital of {country} is" for country in cities]
    assert [row["answers"][row["gold"]] for row in rows] == list(cities.values())
    assert all(len(set(row["answers"])) == 4 for row in rows)
    counts = [sum(row["gold"] == place for row in rows) for place in range(4)]
    assert min(counts) > len(rows) / 8  # always the first answer would be no knowledge


def test_the_gold_verb_agrees_with_the_subject_and_not_with_the_nearest_noun(forgetting):
    rows = forgetting.agreement()
    assert len({tuple(row["answers"]) for row in rows}) == len(rows) == forgetting.SENTENCES
    for row in rows:
        singular, plural = row["answers"]
        found = re.fullmatch(r"The (\w+?)(s?) \w+ the (\w+?)(s?) (\w+)( .*)?\.", singular)
        subject, ends, other, other_ends, verb, _ = found.groups()
        assert {subject, other} <= set(forgetting.PEOPLE)
        assert bool(ends) != bool(other_ends)
        assert row["gold"] == bool(ends)
        assert verb.endswith("s")  # the third person's singular, or "is", "was", "has"
        assert plural != singular


def test_paragraphs_of_the_reference_are_prose_of_the_length_that_is_asked_for(forgetting):
    texts = [row["prompt"] for row in forgetting.reference()]
    assert len(set(texts)) == len(texts) == forgetting.PARAGRAPHS
    assert all(len(text) <= forgetting.PARAGRAPH.stop and "::=" not in text for text in texts)


@pytest.mark.long
def test_a_policy_with_noise_on_its_weights_scores_worse_than_its_base(
    tmp_path, monkeypatch, capsys, forgetting
):
    # The embedded policy knows only its own world's language.
    rng, lines = random.Random(0), names.path("prompts/heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:24]]
    texts = [{"prompt": f"{prompt} {world.sample_response(prompt, rng)}"} for prompt in prompts]
    monkeypatch.setitem(forgetting.TASKS, "reference", (lambda: texts, forgetting.TASKS["reference"][1]))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    base = names.path("policy")
    model = models.load(base)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    noisy = jax.tree.map(lambda x: x + 0.3 * x.std() * jax.random.normal(next(keys), x.shape, x.dtype), model)
    export.export(noisy, base, tmp_path / "noisy")
    words = [
        "--base",
        str(base),
        "--limit",
        "24",
        "--json",
        "--policies",
        f"same={base}",
        f"noisy={tmp_path / 'noisy'}",
    ]
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *words])
    forgetting.main()
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert all(score["change"] == 0 and score["questions"] == 24 for score in table["same"].values())
    lost = table["noisy"]["reference"]
    assert lost["change"] > lost["interval"] > 0
    assert lost["change"] == pytest.approx(lost["mean"] - table["base"]["reference"]["mean"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "{empty}", "--policies", "a={base}"], "base={empty}: not NAME=DIR"),
        (["--base", "{base}", "--policies", "a={empty}"], "a={empty}: not NAME=DIR"),
        (["--base", "{base}", "--policies", "base={base}"], "base={base}: not NAME=DIR with a new name"),
        (["--base", "{base}", "--policies", "a={base}", "--limit", "1"], "--limit must be at least 2"),
    ],
)
def test_what_is_no_model_and_what_has_no_interval_are_refused(
    tmp_path, monkeypatch, capsys, forgetting, words, said
):
    places = {"empty": tmp_path, "base": names.path("policy")}
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as ended:
        forgetting.main()
    assert ended.value.code == 2
    assert said.format(**places) in capsys.readouterr().err.splitlines()[-1]
