"""benchmarks/tiny_judges.py: the true preference with noise, a liking for length, and a strong cycle."""

import random

import numpy as np
import pytest

from benchmarks import tiny_judges
from sppo_jax.tiny import world

PROMPTS = world.split()[1][:40]
CHANCE = random.Random(0)
RESPONSES = [[world.sample_response(prompt, CHANCE) for _ in range(5)] for prompt in PROMPTS]
TRUE = tiny_judges.truth().compare(PROMPTS, RESPONSES)


@pytest.mark.parametrize(("name", "share"), [("noisy", 1 / 5), ("very_noisy", 1 / 3)])
def test_a_share_of_the_comparisons_is_turned_round(name, share):
    found = getattr(tiny_judges, name)().compare(PROMPTS, RESPONSES)
    np.testing.assert_array_equal(found, -found.transpose(0, 2, 1))
    np.testing.assert_array_equal(np.abs(found), np.abs(TRUE))
    assert abs(np.mean((found != TRUE)[TRUE != 0]) - share) < 0.08


def test_longer_responses_gain_by_the_word():
    gain = tiny_judges.length().compare(PROMPTS, RESPONSES) - TRUE
    words = np.array([[len(text.split()) for text in row] for row in RESPONSES])
    np.testing.assert_allclose(gain, tiny_judges.A_WORD * (words[:, :, None] - words[:, None, :]), atol=1e-5)


def test_the_cycle_of_tones_is_as_strong_as_it_says():
    gain = tiny_judges.cyclic().compare(PROMPTS, RESPONSES) - TRUE
    strength = tiny_judges.CYCLIC - world.CYCLE
    assert set(np.unique(np.round(gain / strength, 4))) == {-1, 0, 1}
    made = (tiny_judges.truth, tiny_judges.noisy, tiny_judges.length, tiny_judges.cyclic)
    assert len({judge().identity for judge in made}) == len(made)
