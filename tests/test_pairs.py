"""Stage 3 and 4: which responses are trained on, with what targets, in which order."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from sppo_jax import pairs, preferences, records
from sppo_jax.records import Pair, Preferences, Responses, prompt_id
from sppo_jax.training.batches import Batches
from sppo_jax.training.packing import Packing


def judged(logits, texts=None, *, prompt="q", reasons=None):
    """(Responses, Preferences) of one prompt from its logits."""
    k = len(logits)
    texts = texts or [f"answer {i}" for i in range(k)]
    p = preferences.probability_matrix(logits)
    row = Responses(
        prompt_id(prompt), prompt, [1, 9, 9], [[10 + i] * (3 + 4 * i) + [2] for i in range(k)], texts,
        reasons or ["stop"] * k, [-1.0] * k,
    )  # fmt: skip
    return row, Preferences(
        row.prompt_id, np.asarray(logits).tolist(), p.tolist(), preferences.win_rates(p).tolist(), "pairwise"
    )


def ladder(*scores):
    s = np.asarray(scores, float)
    return s[:, None] - s


def select(*rows, how="best_worst", eta=10.0, baseline=0.5):
    responses, preferred = zip(*rows, strict=True)
    return pairs.select(responses, preferred, how=how, eta=eta, baseline=baseline)


def test_best_and_worst_are_chosen_with_the_official_codes_columns():
    (pair,), counts = select(judged(ladder(0, 2, -1, 1)))
    assert pair.chosen[1]["content"] == "answer 1"
    assert pair.rejected == [{"content": "q", "role": "user"}, {"content": "answer 2", "role": "assistant"}]
    assert pair.response_ids == [[11] * 7 + [2], [12] * 11 + [2]]
    assert pair.chosen_probs == pytest.approx(1 / (1 + np.exp(-3)))
    assert (pair.chosen_probs_win, pair.chosen_probs_lose) == tuple(pair.win_rate)
    np.testing.assert_allclose(pair.target, 10 * (np.array(pair.win_rate) - 0.5))
    assert counts == {"kept": 1, "responses": 2, "truncated_responses": 0}


def test_all_k_are_kept_best_first():
    (pair,), _ = select(judged(ladder(0, 2, -1, 1)), how="all")
    assert [ids[0] for ids in pair.response_ids] == [11, 13, 10, 12]
    assert pair.win_rate == sorted(pair.win_rate, reverse=True)
    assert sum(pair.target) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_T07_a_response_is_whole_whatever_its_partners_length_and_truncation_is_counted(shared):
    (pair,), counts = select(judged(ladder(1, 0), reasons=["length", "stop"]))
    assert [len(ids) for ids in pair.response_ids] == [4, 8]
    assert counts["truncated_responses"] == 1
    for pack in (True, False):
        batches = Batches(
            [pair], global_batch=1, epochs=1, seed=0, iteration=1, packing=Packing(pack=pack, shared=shared)
        )
        assert sequences(batches, batches[0]) == {
            (0, k): (pair.prompt_ids + ids, len(ids)) for k, ids in enumerate(pair.response_ids)
        }


def sequences(batches, batch):
    """(pair, response) -> (its tokens, how many are scored), from where the batch says that they lie."""
    found = {}
    for part, pair_G in zip(batch.microbatches, batch.pairs, strict=True):
        for g in np.flatnonzero(part.real):
            for k, place in enumerate(part.place[g]):
                row, slot = divmod(place, batches.layout.slots)
                scored = np.flatnonzero(part.slot[row] == part.slots[slot])
                tree_U = part.segment[row][part.before[row]]
                tree = tree_U[scored[0]]
                # A tree's responses have their slots in the order of their branches.
                branch = 1 + part.slots[slot] - part.slot[row][(tree_U == tree) & (part.slot[row] > 0)].min()
                own = np.flatnonzero((part.segment[row] == tree) & np.isin(part.branch[row], (0, branch)))
                assert part.position[row][own].tolist() == list(range(len(own)))
                assert part.before[row][scored].tolist() == own[-len(scored) - 1 : -1].tolist()
                assert part.label[row][scored].tolist() == part.tokens[row][own[-len(scored) :]].tolist()
                found[int(pair_G[g]), k] = part.tokens[row][own].tolist(), len(scored)
    return found


def indices(batch):
    """Each microbatch's pairs, in order."""
    return [pair_G[part.real].tolist() for part, pair_G in zip(batch.microbatches, batch.pairs, strict=True)]


def test_T11_prompts_without_signal_are_dropped_and_counted():
    bias = np.full((3, 3), 1.5)
    cycle = np.zeros((3, 3))
    cycle[0, 1] = cycle[1, 2] = cycle[2, 0] = 2
    kept, counts = select(judged(bias), judged(cycle - cycle.T), judged(ladder(1, 0, 0)))
    assert len(kept) == 1
    assert counts["no_signal"] == 2


def test_T11_an_empty_response_may_lose_but_is_never_chosen():
    kept, counts = select(judged(ladder(1, 0), ["", "b"]), judged(ladder(1, 0), ["a", " "]))
    assert [pair.rejected[1]["content"] for pair in kept] == [" "]
    assert counts["empty_chosen"] == 1


def test_the_samplers_gap_is_per_token_of_the_responses_kept():
    first, second = judged(ladder(0, 2, -1, 1)), judged(ladder(1, 0), prompt="other")
    first[0].logprobs[:] = [-9.0, -2.0, -3.0, -9.0]  # 8 and 12 tokens of the two that are kept
    second[0].logprobs[:] = [-1.0, -1.0]  # 4 and 8 tokens
    kept, _ = select(second, first)
    reference = np.array([[-1.0, -1.8], [-2.4, -1.8]])
    gap = pairs.sampler_gap(pairs.with_reference(kept, reference), [first[0], second[0]])
    assert gap == pytest.approx({"mean": 0.0625, "rms": np.sqrt(0.0225 / 4), "max": 0.1})


def test_T25_other_prompts_never_change_a_prompts_targets():
    rng = np.random.default_rng(0)
    rows = [judged(rng.normal(size=(4, 4)), prompt=f"p{i}") for i in range(6)]
    for baseline in (0.5, "log_partition"):
        together, _ = select(*rows, baseline=baseline, how="all")
        shuffled, _ = select(*rows[::-1], baseline=baseline, how="all")
        alone = [select(row, baseline=baseline, how="all")[0][0] for row in rows]
        assert [p.target for p in together] == [p.target for p in alone] == [p.target for p in shuffled][::-1]


def test_log_partition_makes_the_new_policys_mass_on_the_sample_one():
    """With baseline log Z / eta, mean exp(target) over the K responses is 1: the regression asks for a distribution."""
    (pair,), _ = select(judged(ladder(0, 2, -1, 1)), how="all", baseline="log_partition")
    assert np.mean(np.exp(pair.target)) == pytest.approx(1.0)
    (plain,), _ = select(judged(ladder(0, 2, -1, 1)), how="all")
    assert plain.baseline == 0.5
    assert pair.baseline != 0.5


def many(n):
    return select(*(judged(ladder(1, 0, 0.5), prompt=f"p{i}") for i in range(n)))[0]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (8, 4), (5, 8), (1, 1)])
def test_every_pair_is_seen_once_an_epoch_and_the_last_batch_is_filled_up(n, size):
    for most in (None, 64):
        batches = Batches(many(n), global_batch=size, epochs=3, seed=0, iteration=1, packing=Packing(2, most))
        steps, at = batches.steps_per_epoch, batches.layout
        assert len(batches) == 3 * steps == 3 * -(-n // size)
        shapes = {(at.rows, at.width), at.smaller or (at.rows, at.width)}
        assert all(rows % 2 == 0 and width % 32 == 0 for rows, width in shapes)
        for epoch in range(3):
            seen = [batches[epoch * steps + i] for i in range(steps)]
            assert all(part.tokens.shape in shapes for b in seen for part in b.microbatches)
            assert max(len(b.microbatches) for b in seen) <= at.microbatches
            assert all(b.prompts <= size for b in seen)
            assert all(sum(part.share for part in b.microbatches) == pytest.approx(1) for b in seen)
            assert sorted(i for b in seen for part in indices(b) for i in part) == list(range(n))


def test_order_is_a_function_of_seed_iteration_and_step():
    def order(seed=0, iteration=1):
        batches = Batches(many(16), global_batch=4, epochs=2, seed=seed, iteration=iteration)
        return [indices(batches[step]) for step in range(8)]

    assert order() == order()
    assert order()[:4] != order()[4:]  # epochs differ
    assert order(seed=1) != order() != order(iteration=2)


def test_a_resumed_stream_continues_where_it_stopped():
    batches = Batches(many(16), global_batch=4, epochs=2, seed=0, iteration=1)
    for start in (0, 3, 7):
        rows = [indices(batch) for batch in batches.from_step(start)]
        assert rows == [indices(batches[step]) for step in range(start, 8)]


def uneven(n, seed=0):
    """n pairs of responses between 1 and 90 tokens."""
    rng = np.random.default_rng(seed)
    rows = many(n)
    sizes = rng.integers(1, 90, (n, 2))
    return [
        dataclasses.replace(row, response_ids=[rng.integers(5, 90, size).tolist() for size in two])
        for row, two in zip(rows, sizes, strict=True)
    ]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("most", [None, 800, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_rows_hold_every_sequence_whole_once_and_as_many_as_fit(pack, most, shared):
    rows = uneven(30)
    batches = Batches(
        rows, global_batch=10, epochs=1, seed=0, iteration=1, packing=Packing(2, most, pack, shared=shared)
    )
    at, found = batches.layout, {}
    for step in range(3):
        batch = batches[step]
        found |= sequences(batches, batch)
        used = [np.unique(row[row > 0]) for part in batch.microbatches for row in part.segment]
        assert all(ids.tolist() == list(range(1, len(ids) + 1)) for ids in used)
    assert found == {
        (i, k): (row.prompt_ids + ids, len(ids))
        for i, row in enumerate(rows)
        for k, ids in enumerate(row.response_ids)
    }
    tokens = sum(len(ids) for ids, _ in found.values()) - shared * sum(len(row.prompt_ids) for row in rows)
    computed = sum(part.tokens.size for step in range(3) for part in batches[step].microbatches)
    assert at.real_token_share == pytest.approx(tokens / computed)
    if most is None:
        assert at.microbatches == 1
        assert (at.real_token_share > 0.65) == pack
        assert (at.slots > 1 + shared) == pack
    else:
        assert at.microbatches > 1
        assert at.rows * at.width <= max(
            most, 2 * 96 * (1 + shared)
        )  # or one row a shard, as wide as the longest tree


def test_scores_take_the_place_of_win_rates_in_order_and_targets_with_a_baseline_of_zero(tmp_path):
    """The first beats both others narrowly, the second beats the third by far: best by win rate, and best by score."""
    row, preferred = judged([[0, 1.0, 1.0], [-1.0, 0, 6.0], [-1.0, -6.0, 0]])
    options = {"how": "all", "eta": 10.0, "baseline": 0.5}
    (by_rate,), _ = pairs.select([row], [preferred], **options)
    (by_score,), _ = pairs.select([row], [preferred], score=preferences.mean_scores, **options)
    assert [ids[0] for ids in by_rate.response_ids] == [10, 11, 12]
    assert (by_rate.score, by_rate.payoff) == (None, by_rate.win_rate)
    assert [ids[0] for ids in by_score.response_ids] == [11, 10, 12]
    assert by_score.payoff == by_score.score == pytest.approx([5 / 3, 2 / 3, -7 / 3])
    assert by_score.target == pytest.approx([50 / 3, 20 / 3, -70 / 3])
    assert by_score.baseline == 0
    assert by_score.win_rate == [by_rate.win_rate[k] for k in (1, 0, 2)]
    assert (by_score.chosen_probs_win, by_score.chosen_probs) == (
        by_rate.win_rate[1],
        preferred.probability[1][2],
    )
    batches = Batches([by_score], global_batch=1, epochs=1, seed=0, iteration=1)
    np.testing.assert_allclose(batches[0].microbatches[0].payoff, [by_score.score], rtol=1e-6)


def test_columns_of_scores_and_of_the_base_are_there_only_where_they_hold_something(tmp_path):
    """Runs without judge.target=score and fit.anchor write the files that they wrote before there were these knobs."""
    rows = many(3)
    based = pairs.with_base(rows, np.zeros((3, 2)))
    columns = {name for name in records.SCHEMAS[Pair].names if name not in ("score", "base_logprob")}
    for name, kept, more in (("plain", rows, set()), ("based", based, {"base_logprob"})):
        path = tmp_path / name
        records.write(path, Pair, kept, {})
        assert set(pq.read_schema(path).names) == columns | more
        again = records.read(path, Pair)
        assert [pair.base_logprob for pair in again] == [pair.base_logprob for pair in kept]
        assert records.digest(again) == records.digest(kept)
    assert records.digest(rows) != records.digest(based)
