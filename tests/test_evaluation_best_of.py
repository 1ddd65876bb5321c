"""Best of n: the response that the judge takes for the best of the first m."""

import numpy as np
import pytest

from sppo_jax.evaluation.best_of import chosen, sizes
from sppo_jax.preferences import probability_matrix, win_rates


def test_sizes_double_and_end_with_n():
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(12) == [1, 2, 4, 8, 12]
    assert sizes(1) == [1]
    with pytest.raises(ValueError, match="n >= 1"):
        sizes(0)


def test_the_best_of_the_first_m_is_what_m_responses_alone_would_give():
    logits = np.random.default_rng(0).normal(size=(50, 12, 12))
    found = chosen(logits)
    assert list(found) == [1, 2, 4, 8, 12]
    assert not found[1].any()
    for m in (2, 4, 8):
        np.testing.assert_array_equal(found[m], chosen(logits[:, :m, :m])[m])
        assert (found[m] < m).all()
    for row, best in zip(logits, found[12], strict=True):
        means = [np.mean([(row[i, j] - row[j, i]) / 2 for j in range(12) if j != i]) for i in range(12)]
        assert best == np.argmax(means)


def test_scores_choose_and_win_rates_do_not():
    logits = np.zeros((1, 5, 5))
    logits[0, 0, 1], logits[0, 0, 2:] = 8, -0.75  # one large victory against three small defeats
    logits = logits - np.swapaxes(logits, 1, 2)
    assert chosen(logits)[5] == [0]
    assert win_rates(probability_matrix(logits))[0].argmax() == 2
    assert win_rates(probability_matrix(logits, "score"))[0].argmax() == 0


def test_the_preference_for_the_first_place_cancels():
    scores = np.array([0.1, 0.3, 0.2])
    logits = (scores[:, None] - scores)[None]
    biased = logits + 5  # the response that is shown first gains 5
    biased[0, 0, 2] += 0.01
    assert [best.tolist() for best in chosen(biased).values()] == [[0], [1], [1]]


def test_of_equal_responses_the_first_is_chosen_and_the_diagonal_is_not_read():
    logits = np.zeros((2, 4, 4))
    logits[1, 2:, :2], logits[1, :2, 2:] = 1, -1  # the last two are equal, and better
    logits[:, range(4), range(4)] = np.nan
    found = chosen(logits)
    assert {m: best.tolist() for m, best in found.items()} == {1: [0, 0], 2: [0, 0], 4: [0, 2]}


def test_one_response_is_the_best_of_one_and_no_prompts_have_none():
    assert chosen(np.zeros((3, 1, 1)))[1].tolist() == [0, 0, 0]
    assert chosen(np.zeros((0, 4, 4)))[4].shape == (0,)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((3, 3)), "prompts, n, n"),
        (np.zeros((1, 2, 3)), "prompts, n, n"),
        (np.array([[[0, np.nan], [1, 0]]]), "finite"),
        (np.array([[[0, np.inf], [1, 0]]]), "finite"),
    ],
)
def test_logits_that_judge_nothing_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        chosen(logits)
