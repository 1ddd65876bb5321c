"""Who is on the devices: how often weights are cast, cache pages allocated and the judge's weights read in a game."""

import contextlib
from collections import Counter

import pytest

from sppo_jax import devices, main, records
from sppo_jax.pairrm.mesh_judge import JaxJudge
from sppo_jax.records import Responses
from sppo_jax.sampler import Sampler, paging
from tests.small_game import digest, words

ITERATIONS, LAYERS = 2, 4  # LAYERS: of the embedded policy, each with pages of its own
JUDGED = 2  # visits of the judge in an iteration: for responses and probe together, and for the win rates
TRIED = 1  # at the start, before the policy is loaded
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
    assert counts == {
        "casts": ITERATIONS + 1,
        # The cache leaves for each scoring; the base and the last policy have one visit of the sampler, others two.
        "pages": 2 * ITERATIONS * LAYERS,
        "judge loads": TRIED + JUDGED * ITERATIONS,
    }


def test_on_devices_with_their_own_memory_a_policy_is_cast_at_most_twice(tmp_path, counts, single_device):
    main.main(words(tmp_path / "shared", **GAME))
    counts.clear()
    single_device.setattr(devices, "own_memory", lambda _: True)
    main.main(words(tmp_path / "run", **GAME))
    # The base and the last policy once; those between for held-out responses, then for responses and probe.
    casts = 2 + 2 * (ITERATIONS - 1)
    assert counts == {
        "casts": casts,
        "pages": casts * LAYERS,
        "judge loads": TRIED + JUDGED * ITERATIONS,
    }
    for t in range(1, ITERATIONS + 1):
        assert digest(tmp_path / "run", t) == digest(tmp_path / "shared", t)


def test_a_turn_on_the_devices_ends_before_the_next_begins():
    owner = devices.Devices.__new__(devices.Devices)
    owner._turn, owner._exclusive, owner._judges = "", False, []
    owner._doing = lambda turn: contextlib.nullcontext()
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


def test_lost_held_out_responses_are_drawn_again_from_their_own_policy(tmp_path, single_device):
    game = words(tmp_path / "run", iterations=ITERATIONS)
    main.main(game)
    base, last = (tmp_path / f"run/iter_{t}" for t in (0, ITERATIONS))
    lost, measured = base / "heldout/responses.parquet", last / "eval.json"
    before = records.read(lost, Responses), measured.read_text()
    lost.unlink()
    measured.unlink()
    main.main(game)
    assert (records.read(lost, Responses), measured.read_text()) == before
