"""Scheduling: every response is decoded to its end once, and no page ever has two owners."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_jax.sampler.schedule import Replica, pages_needed

PAGE, AHEAD, STEPS = 8, 8, 4


def check(replica, total):
    """Pages are free, or a live response's own, or a prompt's: each exactly once."""
    prefixes = {id(r.prefix): r.prefix for r in [*replica.running.values(), *replica.ready]}
    owned = [p for prefix in prefixes.values() for p in prefix.pages]
    owned += [p for response in replica.running.values() for p in response.pages]
    assert sorted(owned + replica.free_pages) == list(range(total))
    assert sorted([*replica.running, *replica.free_slots]) == list(range(replica.slots))


def play(prompts, lengths, slots, pages):
    """Decode `lengths[i][k]` tokens for prompts of `prompts[i]` tokens; (responses in order of their end, thrown out)."""
    replica = Replica(slots, pages, PAGE, AHEAD)
    waiting = deque((i, dict(enumerate(row))) for i, row in enumerate(lengths))
    ended, preemptions, rounds = [], 0, 0
    while waiting or replica.ready or replica.running:
        rounds += 1
        assert rounds < 10_000, "no progress"
        preempted, unprefilled = replica.grow()
        preemptions += len(preempted)
        check(replica, pages)
        for response in unprefilled:
            waiting.appendleft((response.prefix.prompt, {response.k: response.limit}))
        while waiting and replica.shortfall() > 0:
            i, limits = waiting[0]
            prefix = replica.allocate(i, prompts[i])
            if prefix is None:
                break
            waiting.popleft()
            replica.enqueue(prefix, limits)
        started = replica.start()
        check(replica, pages)
        for response in started:
            source, target = replica.page_copy(response)
            assert (source >= 0) == (prompts[response.prefix.prompt] % PAGE > 0) == (target >= 0)
        for response in list(replica.running.values()):
            generated = min(STEPS, response.limit - len(response.tokens))
            held = replica.page_table(response)
            assert len(held) * PAGE >= response.prefix.length + len(response.tokens) + generated
            assert len(set(held)) == len(held)
            response.tokens += [0] * generated
            if len(response.tokens) == response.limit:
                replica.finish(response)
                ended.append((response.prefix.prompt, response.k))
                check(replica, pages)
    assert len(replica.free_pages) == pages
    return ended, preemptions


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_response_ends_once_however_few_pages_there_are(data):
    count = data.draw(st.integers(1, 12))
    prompts = data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    lengths = [data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)) for _ in range(count)]
    slots = data.draw(st.integers(1, 7))
    least, enough = pages_needed(1, 70, PAGE), pages_needed(slots, 70, PAGE)
    pages = data.draw(st.integers(least, enough))
    ended, preemptions = play(prompts, lengths, slots, pages)
    assert sorted(ended) == [(i, k) for i in range(count) for k in range(3)]
    assert pages < enough or preemptions == 0


@pytest.mark.parametrize(("pages", "preemptions"), [(pages_needed(6, 64, PAGE), False), (14, True)])
def test_responses_make_room_for_each_other_only_where_pages_are_short(pages, preemptions):
    ended, count = play([13] * 8, [[40] * 3] * 8, 6, pages)
    assert len(ended) == 24
    assert (count > 0) == preemptions


def test_whole_pages_of_a_prompt_are_shared_and_the_last_one_is_copied():
    replica = Replica(4, 20, PAGE, AHEAD)
    prefix = replica.allocate(0, 2 * PAGE + 3)
    replica.enqueue(prefix, {0: 5, 1: 5})
    first, second = replica.start()
    assert replica.page_table(first)[:2] == replica.page_table(second)[:2] == prefix.pages[:2]
    assert replica.page_copy(first) == (prefix.pages[2], first.pages[0])
    assert not set(first.pages) & set(second.pages)
    replica.finish(first)
    assert prefix.pages[0] not in replica.free_pages  # the second still reads it
    replica.finish(second)
    assert len(replica.free_pages) == 20


def test_the_youngest_response_is_preempted():
    replica = Replica(2, 6, PAGE, AHEAD)
    for i in range(2):
        replica.enqueue(replica.allocate(i, 0), {0: 40})
    old, young = replica.start()
    old.tokens += [0] * 17
    young.tokens += [0] * 9
    preempted, _ = replica.grow()
    assert preempted == [young]
    assert replica.ready[0].tokens == []
