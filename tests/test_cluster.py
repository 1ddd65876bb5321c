"""Agreements between processes, played by threads, and settings with which no processes can find each other."""

import pytest

from sppo_jax.config import Distributed
from sppo_jax.errors import BadInput
from sppo_jax.records import Responses
from sppo_jax.run import cluster, pod
from sppo_jax.run.shards import Shards
from sppo_jax.run.stage import Stage
from tests.stand_ins import Pod


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (Distributed(coordinator="here"), "must be HOST:PORT"),
        (Distributed(coordinator="here:0"), "port from 1 to 65535"),
        (Distributed(coordinator=":80"), "must be HOST:PORT"),
        (Distributed(process_id=0), "need distributed.coordinator"),
        (Distributed(num_processes=2), "need distributed.coordinator"),
        (Distributed("here:80", process_id=2, num_processes=2), "must be below distributed.num_processes=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, line):
    with pytest.raises(BadInput, match=line), cluster.joined(settings):
        pass


@pytest.mark.parametrize("settings", [Distributed(), Distributed("here:80", process_id=0, num_processes=1)])
def test_one_process_needs_none_of_it(settings):
    with cluster.joined(settings):
        assert cluster.member() is None
        assert (pod.index(), pod.count(), pod.first()) == (0, 1, True)
        assert pod.dealt("abc") == ["a", "b", "c"]
        assert pod.agreed("a", lambda: (1, 2)) == (1, 2)
        assert pod.gathered("a", 3) == [3]
        pod.meet("a")


def test_two_processes_agree_collect_and_differ(monkeypatch):
    def process(i):
        own = pod.dealt(range(5))
        found = {
            "own": own,
            "agreed": [pod.agreed("value", lambda n=n: i + n) for n in range(3)],
            "collected": pod.collected("rows", [10 * n for n in own]),
            "least": (
                pod.least("memory", [None, 7][i]),
                pod.least("memory", None),
                pod.least("memory", 3 - i),
            ),
        }
        pod.same("equal", {"key": 1}, "{key}")
        with pytest.raises(BadInput) as refused:
            pod.same("knobs", {"fit.eta": 1, "seed": i}, "{key} =")
        pod.meet("end")
        return found | {"refused": str(refused.value)}

    first, second = Pod(monkeypatch).run(process)
    assert (first.pop("own"), second.pop("own")) == ([0, 2, 4], [1, 3])
    assert first == second
    assert first["agreed"] == [0, 1, 2]
    assert first["collected"] == [0, 10, 20, 30, 40]
    assert first["least"] == (7, None, 2)
    assert first["refused"].startswith("process 1 has seed = 1, process 0 0")


def test_the_preferences_of_new_responses_belong_to_the_process_that_samples_them(tmp_path, monkeypatch):
    """Of six shards of responses two are there, of which one is judged: what is left is dealt evenly."""
    from sppo_jax.run.directory import RunDir

    run = RunDir(tmp_path)
    for folder, there in (("responses", (0, 3)), ("preferences", (0,))):
        for i in there:
            path = run.shard(1, folder, i, 6)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    stage = Stage(run, 1, seed=0, shard_prompts=1, made_from={}, metrics=None)

    def process(i):
        return [
            Shards(stage, "preferences", Responses, 6, source="responses").own,
            Shards(stage, "responses", Responses, 6).own,
        ]

    first, second = Pod(monkeypatch).run(process)
    assert first[1] == {1, 4}
    assert first[1] <= first[0]
    assert second[1] == {2, 5}
    assert first[0] | second[0] == {1, 2, 3, 4, 5}
    assert second[1] <= second[0]
    assert not first[0] & second[0]
