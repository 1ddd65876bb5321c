"""The benchmark of what a policy has lost: its questions are sound, and a worse policy scores worse."""

import json
import random
import re
import subprocess
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
    assert [row["text"] for row in rows] == [f"The capital of {country} is" for country in cities]
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
    texts = [row["text"] for row in forgetting.reference()]
    assert len(set(texts)) == len(texts) == forgetting.PARAGRAPHS
    assert all(len(text) <= forgetting.PARAGRAPH.stop and "::=" not in text for text in texts)


@pytest.mark.long
def test_a_policy_with_noise_on_its_weights_scores_worse_than_its_base(
    tmp_path, monkeypatch, capsys, forgetting
):
    # The embedded policy knows only its own world's language.
    rng, lines = random.Random(0), names.path("prompts/heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:24]]
    texts = [{"text": f"{prompt} {world.sample_response(prompt, rng)}"} for prompt in prompts]
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


def test_a_policy_that_is_no_export_is_refused(tmp_path, forgetting):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--base", str(tmp_path), "--policies", f"a={tmp_path}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "not NAME=DIR" in done.stderr.splitlines()[-1]
