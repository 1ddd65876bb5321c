"""The sampler's books: every response is spoken to its end once, and no page ever has two owners."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_jax.sampler.schedule import Replica, pages_needed

PAGE, AHEAD, STEPS = 8, 8, 4


def check(replica, total):
    """Pages are free, or a live response's own, or a prompt's: each exactly once."""
    prefixes = {id(r.prefix): r.prefix for r in [*replica.live.values(), *replica.ready]}
    owned = [p for prefix in prefixes.values() for p in prefix.pages]
    owned += [p for response in replica.live.values() for p in response.pages]
    assert sorted(owned + replica.free_pages) == list(range(total))
    assert sorted([*replica.live, *replica.free_slots]) == list(range(replica.slots))


def play(prompts, lengths, slots, pages):
    """Decode `lengths[i][k]` tokens for prompts of `prompts[i]` tokens; (responses in order of their end, thrown out)."""
    replica = Replica(slots, pages, PAGE, AHEAD)
    waiting = deque((i, dict(enumerate(row))) for i, row in enumerate(lengths))
    ended, thrown_out, rounds = [], 0, 0
    while waiting or replica.ready or replica.live:
        rounds += 1
        assert rounds < 10_000, "no progress"
        evicted, again = replica.grow()
        thrown_out += len(evicted)
        check(replica, pages)
        for response in again:
            waiting.appendleft((response.prefix.prompt, {response.k: response.limit}))
        while waiting and replica.short_of() > 0:
            i, limits = waiting[0]
            prefix = replica.take_prefix(i, prompts[i])
            if prefix is None:
                break
            waiting.popleft()
            replica.wait(prefix, limits)
        started = replica.start()
        check(replica, pages)
        for response in started:
            source, target = replica.copied(response)
            assert (source >= 0) == (prompts[response.prefix.prompt] % PAGE > 0) == (target >= 0)
        for response in list(replica.live.values()):
            said = min(STEPS, response.limit - len(response.tokens))
            held = replica.row(response)
            assert len(held) * PAGE >= response.prefix.length + len(response.tokens) + said
            assert len(set(held)) == len(held)
            response.tokens += [0] * said
            if len(response.tokens) == response.limit:
                replica.end(response)
                ended.append((response.prefix.prompt, response.k))
                check(replica, pages)
    assert len(replica.free_pages) == pages
    return ended, thrown_out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_response_ends_once_however_few_pages_there_are(data):
    count = data.draw(st.integers(1, 12))
    prompts = data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    lengths = [data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)) for _ in range(count)]
    slots = data.draw(st.integers(1, 7))
    least, enough = pages_needed(1, 70, PAGE), pages_needed(slots, 70, PAGE)
    pages = data.draw(st.integers(least, enough))
    ended, thrown_out = play(prompts, lengths, slots, pages)
    assert sorted(ended) == [(i, k) for i in range(count) for k in range(3)]
    assert pages < enough or thrown_out == 0


@pytest.mark.parametrize(("pages", "thrown_out"), [(pages_needed(6, 64, PAGE), False), (14, True)])
def test_responses_make_room_for_each_other_only_where_pages_are_short(pages, thrown_out):
    ended, count = play([13] * 8, [[40] * 3] * 8, 6, pages)
    assert len(ended) == 24
    assert (count > 0) == thrown_out


def test_whole_pages_of_a_prompt_are_shared_and_the_last_one_is_copied():
    replica = Replica(4, 20, PAGE, AHEAD)
    prefix = replica.take_prefix(0, 2 * PAGE + 3)
    replica.wait(prefix, {0: 5, 1: 5})
    first, second = replica.start()
    assert replica.row(first)[:2] == replica.row(second)[:2] == prefix.pages[:2]
    assert replica.copied(first) == (prefix.pages[2], first.pages[0])
    assert not set(first.pages) & set(second.pages)
    replica.end(first)
    assert prefix.pages[0] not in replica.free_pages  # the second still reads it
    replica.end(second)
    assert len(replica.free_pages) == 20


def test_the_work_thrown_out_is_the_youngest():
    replica = Replica(2, 6, PAGE, AHEAD)
    for i in range(2):
        replica.wait(replica.take_prefix(i, 0), {0: 40})
    old, young = replica.start()
    old.tokens += [0] * 17
    young.tokens += [0] * 9
    evicted, _ = replica.grow()
    assert evicted == [young]
    assert replica.ready[0].tokens == []
