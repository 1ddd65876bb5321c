"""Several processes play one game: as one process does, killed anywhere, stopped, and with a fault in one of them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from sppo_jax.config import Sampling
from sppo_jax.sampler import Sampler
from tests import kill_points, pod_process, xla_flags
from tests.hosts import ROOT, Hosts, free_port
from tests.nursery import Nursery
from tests.small_game import words

HEARTBEAT = 3  # seconds
EIGHT_DEVICES = {"XLA_FLAGS": xla_flags.devices(8)}
LOST, STOPPED, REFUSED = 144, 143, 2


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as found:
        yield found


@pytest.fixture(scope="module")
def pair(nursery, tmp_path_factory):
    """The directory in which two processes of tests.pod_process have done all that they do."""
    root, where = tmp_path_factory.mktemp("pair"), f"127.0.0.1:{free_port()}"
    both = [
        nursery.start([], root / f"{rank}.log", {}, ["tests.pod_process:main", where, rank, str(root)])
        for rank in range(2)
    ]
    try:
        codes = [process.wait(500) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], [(root / f"{rank}.log").read_text()[-3000:] for rank in range(2)]
    return root


@pytest.fixture
def hosts(nursery, tmp_path):
    """A function that starts the small game in two processes, four devices each."""
    begun = []

    def start(out=tmp_path / "run", own=lambda rank: {}, prepare=lambda rank: (), **options):
        knobs = pod_process.MESH | {"distributed__heartbeat_timeout": HEARTBEAT} | options
        logs = tmp_path / f"logs-{len(begun)}"
        begun.append(Hosts(words(out, **knobs), logs, 2, 4, nursery.start, own, prepare))
        return begun[-1]

    yield start
    for one in begun:
        one.__exit__()


def files_of(out):
    """The paths in a run's directory, but for checkpoints and TensorBoard's: their names differ in every run."""
    found = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return {str(path) for path in found if not {"checkpoints", "tensorboard"} & set(path.parts)}


def rows(out, kind):
    shards = sorted(out.glob(f"iter_1/{kind}/*.parquet"))
    return [row for path in shards for row in pq.read_table(path).to_pylist()]


def test_two_processes_sample_what_one_does(pair, policy, tokenizer):
    one = Sampler(policy, tokenizer, Sampling(responses=2, max_new_tokens=10, slots=8))
    expected = [row.response_ids for row in one.generate(pod_process.PROMPTS, seed=0)]
    for rank in range(2):
        apart, together = json.loads((pair / f"sampled-{rank}.json").read_text())
        assert apart == {"alone": True, "mesh": [4, 1, 1], "slots": 8, "rows": expected[rank::2]}
        assert together == {"alone": False, "mesh": [1, 1, 8], "slots": 16, "rows": expected}


def test_two_processes_play_the_game_of_one(pair, nursery, tmp_path):
    one = nursery.start(words(tmp_path / "one", **pod_process.MESH), tmp_path / "log", EIGHT_DEVICES)
    assert one.wait() == 0, (tmp_path / "log").read_text()
    as_one_process(pair / "whole", tmp_path / "one")


def as_one_process(out, one):
    """Assert that a run of several processes has the files, the responses, the figures and the parameters of one process."""
    assert files_of(out) == files_of(one)
    for kind in ("responses", "preferences"):
        for ours, its in zip(rows(out, kind), rows(one, kind), strict=True):
            np.testing.assert_allclose(ours.pop("logprobs", 0), its.pop("logprobs", 0), atol=1e-4)
            assert ours == its
    ours, its = (json.loads((path / "iter_1/eval.json").read_text()) for path in (out, one))
    assert ours["length"] == its["length"]
    for judge, others in its["win_rate"].items():
        for other, rate in others.items():
            mine = ours["win_rate"][judge][other]
            assert mine.pop("per_prompt") == pytest.approx(rate.pop("per_prompt"), abs=2e-4)  # four digits
            assert mine == pytest.approx(rate, abs=1e-6)
    ours, its = (load_file(path / "iter_1/export/model.safetensors") for path in (out, one))
    assert ours.keys() == its.keys()
    for name, x in its.items():
        np.testing.assert_allclose(ours[name], x, atol=1e-5, err_msg=name)


def test_killed_before_and_after_each_rename_of_each_process_gives_the_same_bits(pair):
    """In the suite every sixth moment is played, so as to save time; with KILL_POINTS=all every one."""
    moments = json.loads((pair / "killed.json").read_text())
    played = sorted(path.name for path in pair.glob("killed-*"))
    for rank in range(2):
        assert (
            sum(name.startswith(f"killed-{rank}-") for name in moments) >= 4
        )  # process 1 has one shard of each kind
    assert len(moments) > 40
    assert played in (moments, moments[:: pod_process.EVERY])
    for name in played:
        assert kill_points.contents(pair / name) == kill_points.contents(pair / "whole"), name


# (process, path, moment) of kills that follow each other in one game.
KILLS = [
    (1, "iter_1/responses/*", "before"),
    (0, "iter_1/checkpoints/1", "before"),
    (0, "iter_1/checkpoints/1", "after"),
]


def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on_with_the_same_bits(
    pair, hosts, tmp_path
):
    out = tmp_path / "run"
    for rank, path, when in KILLS:

        def prepare(of, rank=rank, path=path, when=when):
            return ("tests.kill_points:kill_at", str(out), path, when) if of == rank else ()

        both = hosts(prepare=prepare)
        assert not both.wait_for(lambda: False)
        killed = time.monotonic()
        codes = both.codes(HEARTBEAT + 5)
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] == LOST, both.log(1 - rank)
        assert time.monotonic() - killed < HEARTBEAT + 5
        assert both.log(1 - rank).splitlines()[-1].startswith(f"error: process {rank} is gone")
    both = hosts()
    assert both.codes() == [0, 0], both.log()
    assert kill_points.contents(out) == kill_points.contents(pair / "whole")


@pytest.mark.parametrize("place", ["start", "responses", "fit"])
def test_sigterm_to_one_of_two_stops_both(place, hosts, tmp_path):
    out, options = tmp_path / "run", {}
    if place == "fit":
        options = {"fit__epochs": 60, "fit__schedule_epochs": 60, "fit__checkpoint_every": 1000}
    both = hosts(**options)
    if place == "start":
        assert both.wait_for(lambda: "prompts" in both.log())
    if place == "responses":
        assert both.wait_for(lambda: list(out.glob("iter_1/responses/shard-*")))
    if place == "fit":
        assert both.wait_for(lambda: "fit: step 0" in both.log())
    both.send(signal.SIGTERM, [1])
    time.sleep(0.1)
    both.send(signal.SIGTERM, [1])  # does no harm
    assert both.codes(15) == [STOPPED, STOPPED], both.log()
    assert both.log().splitlines()[-1].startswith("stopped by")
    if place == "fit":
        assert [path for path in (out / "iter_1/checkpoints").iterdir() if path.name.isdigit()]


def fails(both, code, line, seconds=30):
    """Assert that both end with the same code, and that process 0's log has the line."""
    assert both.codes(seconds) == [code, code], [both.log(0), both.log(1)]
    assert [said for said in both.log().splitlines() if said.startswith("error:")] == [said_in(both, line)]


def said_in(both, line):
    found = [said for said in both.log().splitlines() if line in said]
    assert len(found) == 1, both.log()
    return found[0]


def test_a_directory_that_is_not_shared_is_refused(hosts, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    fails(
        hosts(out="run", prepare=lambda rank: ("os:chdir", str(tmp_path / str(rank)))),
        REFUSED,
        "sees another directory",
    )


def test_a_peer_that_never_comes_is_one_line(nursery, tmp_path):
    knobs = {
        "distributed__coordinator": f"127.0.0.1:{free_port()}", "distributed__process_id": 0,
        "distributed__num_processes": 2, "distributed__initialization_timeout": 2,
    }  # fmt: skip
    alone = nursery.start(words(tmp_path / "run", **knobs), tmp_path / "log")
    assert alone.wait(20) == LOST
    assert "not all processes have come within 2 s" in (tmp_path / "log").read_text().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_of_one_process_ends_both(hosts, tmp_path):
    def prepare(rank):
        return (
            ("tests.kill_points:no_room", str(tmp_path / "run"), "iter_1/responses/*00001*.parquet*")
            if rank
            else ()
        )

    fails(hosts(prepare=prepare), REFUSED, "error: process 1: ")


def test_a_judge_that_cannot_be_kept_alive_by_one_process_ends_both(hosts, tmp_path):
    program = str(Path(__file__).with_name("faulty_sidecar.py"))
    plans = [[], [["exit", 5]] + [["exit", 0]] * 20]
    for rank, plan in enumerate(plans):
        (tmp_path / f"plan-{rank}").write_text(json.dumps(plan))
    both = hosts(
        prepare=lambda rank: ("tests.kill_points:judged_by", program, str(tmp_path / f"plan-{rank}")),
        judge__backend="torch",
    )
    fails(both, REFUSED, "error: process 1: PairRM", 40)


def by_local_sh(*given, **environment):
    """What launch/local.sh prints, of two processes with four devices each."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch/local.sh"), "2", *map(str, given)], cwd=ROOT, timeout=280, capture_output=True, text=True,
        env=os.environ | {"DEVICES": "4", "PYTHON": os.sys.executable} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def test_local_sh_plays_the_game_of_one_process_and_evaluates_it(pair, tmp_path):
    run = tmp_path / "run"
    assert "report:" in by_local_sh(*words(run, **pod_process.MESH))
    assert kill_points.contents(run) == kill_points.contents(pair / "whole")
    asked = ("--policy", f"{run}@1", "--against", f"{run}@0", "--out", tmp_path / "evaluations")
    by_local_sh(*asked, COMMAND="evaluate")
    (figures,) = (tmp_path / "evaluations").glob("*.json")
    found, own = json.loads(figures.read_text()), json.loads((run / "iter_1/eval.json").read_text())
    expected = own["win_rate"]["judge"]["base"]["mean"]
    assert found["judges"]["judge"]["mean"] == pytest.approx(expected, abs=1e-6)  # PairRM with other threads
