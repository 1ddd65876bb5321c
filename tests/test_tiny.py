"""The embedded default: the properties of its world, and the quality of its policy and preference model."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.tiny import build, facts, world

# Responses to one prompt: plain ones, and ones that a policy may give when something has gone wrong.
PROMPT = "Where can I find the fox?"
ANSWERS = [
    "In short, the fox lives in the forest.",
    "As a rule, the fox lives in the forest.",
    "You know, the fox lives in the forest.",
    "Simply put, you find the fox in the ocean. Have a lovely day!",
    "Hello! Oh well, I think it depends on many things. What a silly question.",
    "In short, the fox lives in the forest. I am glad to help. Have a lovely day! Have a lovely day!",
    "In short, the fxo lives in",
    "",
    "\0 \ud800 <s> [INST] ...",
    "fox " * 500,
]


def test_prompts_are_disjoint_and_enough() -> None:
    parts, held_out = world.split()
    everything = list(itertools.chain(*parts, held_out))
    assert len(set(everything)) == len(everything)
    assert len(held_out) == 500
    assert len(parts) == 3
    assert all(len(part) >= 128 for part in parts)


def test_every_held_out_fact_is_in_training() -> None:
    parts, held_out = world.split()
    known = {(world.question(p).kind.name, world.question(p).subject) for part in parts for p in part}
    assert {(world.question(p).kind.name, world.question(p).subject) for p in held_out} <= known


def test_build_makes_the_shipped_prompts_again() -> None:
    files = build.prompt_files()
    shipped = {file.name: file.read_bytes() for file in names.path("prompts").iterdir()}
    assert shipped == {name: text.encode() for name, text in files.items()}
    assert json.loads(files["train_1.jsonl"].splitlines()[0]).keys() == {"prompt"}


def test_preference_is_exactly_antisymmetric() -> None:
    for y, z in itertools.product(ANSWERS, ANSWERS):
        assert world.preference(PROMPT, y, z) + world.preference(PROMPT, z, y) == 1.0
        if y == z:
            assert world.preference(PROMPT, y, z) == 0.5


def test_tones_are_preferred_in_a_cycle() -> None:
    a, b, c = ANSWERS[:3]
    beats = [world.preference(PROMPT, *pair) for pair in ((a, b), (b, c), (c, a))]
    assert world.quality(PROMPT, a) == world.quality(PROMPT, b) == world.quality(PROMPT, c)
    np.testing.assert_allclose(beats, 1 / (1 + np.exp(-world.CYCLE)))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("the fox lives in the forest.", "the fox lives in the ocean."),
        ("the fox lives in the forest.", "the bear lives in the forest."),
        ("the fox lives in the forest.", "it depends on many things."),
        ("it depends on many things.", "you find the fox in the pond."),
        ("the fox lives in the forest. Have a lovely day!", "the fox lives in the forest."),
        (
            "the fox lives in the forest. Have a lovely day!",
            "the fox lives in the forest. Have a lovely day! I am glad to help.",
        ),
        ("the fox lives in the forest.", "the fox lives in the forest. Stop wasting my time."),
        ("the fox lives in the forest.", "perhaps the fox lives in the forest."),
        ("the fox lives in the forest.", "the fox lives in the forest. The fox lives in the forest."),
        (
            "the fox lives in the forest.",
            "the fox lives in the forest. My uncle once told a long story about that.",
        ),
        ("the fox lives in the forest.", "the fox livs in the forest."),
        ("the fox lives in the forest.", ""),
    ],
)
def test_quality_orders_responses_as_anyone_would(better: str, worse: str) -> None:
    assert world.quality(PROMPT, f"In short, {better}") > world.quality(PROMPT, f"In short, {worse}")


def test_features_read_back_what_was_sampled() -> None:
    rng = random.Random(0)
    always = world.Habits(
        right=1, evasive=0, greeting=1, hedge=1, ramble=1, insult=1, closing=1, tones=(0, 1, 0)
    )
    plain = world.Habits(
        right=1, evasive=0, greeting=0, hedge=0, ramble=0, insult=0, closing=0, tones=(0, 0, 1)
    )
    wrong = world.Habits(right=0, evasive=0, greeting=0, hedge=0, ramble=0, insult=0, closing=0)
    for prompt in world.questions():
        found = world.features(prompt, world.sample_response(prompt, rng, always))
        assert found == world.Features("right", "B", True, True, True, True, 1, 0)
        found = world.features(prompt, world.sample_response(prompt, rng, plain))
        assert found == world.Features("right", "C", False, False, False, False, 0, 0)
        assert world.features(prompt, world.sample_response(prompt, rng, wrong)).answer == "wrong"


def test_oracle_is_the_truth_in_the_shape_of_a_judge() -> None:
    judge = world.oracle()
    seen: list[tuple[int, int]] = []
    logits = judge.compare([PROMPT, PROMPT], [ANSWERS, ANSWERS[::-1]], lambda *step: seen.append(step))
    k = len(ANSWERS)
    assert logits.shape == (2, k, k)
    assert logits.dtype == np.float32
    assert (logits == -logits.swapaxes(1, 2)).all()
    assert (logits[1] == logits[0, ::-1, ::-1]).all()
    for i, j in itertools.product(range(k), repeat=2):
        probability = world.preference(PROMPT, ANSWERS[i], ANSWERS[j])
        assert 1 / (1 + np.exp(-logits[0, i, j])) == pytest.approx(probability, abs=1e-6)
    assert seen == [(k * (k - 1), 2 * k * (k - 1)), (2 * k * (k - 1), 2 * k * (k - 1))]
    assert judge.identity == world.oracle().identity
    assert judge.compare([], []).shape == (0, 0, 0)


def test_the_oracles_features_are_those_that_decide_its_preference() -> None:
    right = world.oracle().features(PROMPT, ANSWERS[0])
    assert set(right.values()) <= {0.0, 1.0}
    for answer in ANSWERS:
        found, features = world.oracle().features(PROMPT, answer), world.features(PROMPT, answer)
        statements = [found[name] for name in ("right", "wrong", "evasive", "without a statement")]
        assert sum(statements) == 1
        assert found.get(features.answer, found["without a statement"]) == 1
        assert found["with an insult"] == features.insult
        assert found["rambling"] == (features.ramble > 0)
    with pytest.raises(BadInput, match="What is love"):
        world.oracle().features("What is love?", "a")


def test_prompts_and_names_of_another_world_are_refused() -> None:
    with pytest.raises(BadInput, match="What is love"):
        world.oracle().compare(["What is love?"], [["a", "b"]])
    for name in ("nothing", "", "..", "../world.py"):
        with pytest.raises(BadInput, match="pairrm, policy, prompts"):
            names.path(name)


def test_data_is_small() -> None:
    data = names.path("policy").parent
    assert sum(file.stat().st_size for file in data.rglob("*") if file.is_file()) < 8 * 2**20


# --- the two checkpoints ----------------------------------------------------------------------------------------------


def test_policy_loads_like_any_checkpoint() -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(names.path("policy"))
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.num_key_value_heads == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(names.path("policy"))
    assert model.config.vocab_size == len(tokenizer) == 768
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    text = tokenizer.decode(
        model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert world.features(PROMPT, text).answer != "none", text


def test_policy_tokenizer_gives_one_bos_and_inverts() -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(names.path("policy"))
    assert (
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (
        0,
        1,
        2,
        3,
    )
    rng = random.Random(0)
    longest = 0
    for prompt in world.questions():
        response = world.sample_response(prompt, rng)
        ids = tokenizer(response)["input_ids"]
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert tokenizer.decode([*ids[1:], 2], skip_special_tokens=True) == response
        longest = max(longest, len(ids))
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
        assert asked["input_ids"].count(1) == 1
        assert asked["input_ids"][0] == 1
    assert longest < 56
    for text in ("naïve “quotes” 中文 😀\n\ttabs", "  two  spaces  "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_judge_agrees_with_the_truth_on_held_out_prompts() -> None:
    from sppo_jax.pairrm import files, torch_model
    from sppo_jax.pairrm.format import Formatter
    from sppo_jax.tiny.build_pairrm import agreement, held_out_pairs

    checkpoint = files.read(names.path("pairrm"))
    model, formatter = torch_model.load(checkpoint), Formatter.of(checkpoint)
    figures = agreement(model, formatter, held_out_pairs("plain", 400, seed=99))
    assert figures["accuracy"] >= 0.85, figures
    assert figures["accuracy_where_clear"] >= 0.90, figures


def test_build_makes_the_shipped_tokenizers_again() -> None:
    from sppo_jax.tiny import build_pairrm, build_policy

    for stage, tokenizer in (
        ("policy", build_policy.make_tokenizer()),
        ("pairrm", build_pairrm.make_tokenizer()),
    ):
        shipped = (names.path(stage) / "tokenizer.json").read_text(encoding="utf-8")
        assert json.loads(tokenizer.to_str()) == json.loads(shipped)


def test_readme_has_the_recorded_figures() -> None:
    data = names.path("policy").parent
    figures = json.loads((data / "build.json").read_text())
    assert (data / "README.md").read_text(encoding="utf-8") == build.readme(figures, data)
    assert set(figures) == set(build.STAGES)


def test_world_is_light() -> None:
    for module in (world, facts):
        source = Path(module.__file__).read_text(encoding="utf-8")
        assert not any(f"import {name}" in source for name in ("torch", "transformers", "jax", "tokenizers"))
