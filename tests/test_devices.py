"""Who is on the devices: how often weights are cast, cache pages allocated and the judge's weights read in a game."""

from collections import Counter

import pytest

from sppo_jax import devices, main
from sppo_jax.pairrm.mesh_judge import JaxJudge
from sppo_jax.sampler import Sampler, paging
from tests.small_game import digest, words

ITERATIONS, LAYERS = 2, 4  # LAYERS: of the embedded policy, each with pages of its own
GAME = {"iterations": ITERATIONS, "judge__backend": "jax"}


@pytest.fixture
def counts(monkeypatch):
    """How often each of these happened since the test began."""
    found = Counter()

    def counted(owner, name, label, when=lambda *_: True):
        original = getattr(owner, name)

        def wrapper(*args, **options):
            found[label] += when(*args)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, wrapper)

    counted(Sampler, "set_weights", "casts")
    counted(paging, "empty", "pages")
    counted(JaxJudge, "_load", "judge loads", lambda judge, *_: judge._weights is None)
    return found


def test_in_a_hosts_memory_a_policy_is_cast_once(tmp_path, counts, single_device):
    main.main(words(tmp_path / "run", **GAME))
    policies = ITERATIONS + 1
    assert counts == {
        "casts": policies,
        "pages": policies * LAYERS,
        # once for iteration 1, and after each training
        "judge loads": 1 + ITERATIONS,
    }


def test_on_devices_with_their_own_memory_a_policy_is_cast_at_most_twice(tmp_path, counts, single_device):
    main.main(words(tmp_path / "shared", **GAME))
    counts.clear()
    single_device.setattr(devices.sharding, "memory_limit", lambda _: 2**40)
    main.main(words(tmp_path / "run", **GAME))
    # The base and the last policy once; those between for held-out responses, then for responses and probe.
    casts = 2 + 2 * (ITERATIONS - 1)
    assert counts == {
        "casts": casts,
        "pages": casts * LAYERS,
        # for responses and probe together, and for the win rates
        "judge loads": 2 * ITERATIONS,
    }
    for t in range(1, ITERATIONS + 1):
        assert digest(tmp_path / "run", t) == digest(tmp_path / "shared", t)


def test_a_turn_on_the_devices_ends_before_the_next_begins():
    owner = devices.Devices.__new__(devices.Devices)
    owner._turn, owner._exclusive = "", False
    with owner.sampling(0), pytest.raises(RuntimeError, match="the devices are sampling"), owner.judging():
        pass
    with pytest.raises(ZeroDivisionError), owner.sampling(0):
        1 / 0  # noqa: B018
    with owner.judging():
        pass


def test_a_finished_game_casts_nothing_again(tmp_path, counts, single_device):
    game = words(tmp_path / "run", **GAME)
    main.main(game)
    counts.clear()
    main.main(game)
    assert not +counts
