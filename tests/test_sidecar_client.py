"""The scoring program and its client, each in this process: batches, frames, and the reaction to each frame."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, launch, process_judge, protocol, sidecar, torch_model
from sppo_jax.pairrm.child import Broken
from sppo_jax.pairrm.format import Formatter, Limits
from sppo_jax.pairrm.process_judge import Patience, SidecarJudge
from tests.faulty_sidecar import BROKEN_CELLS
from tests.test_sidecar import CHECKPOINT, golden

# The parts of the process.


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    return Formatter.of(CHECKPOINT)


def answered(
    message: dict[str, Any], formatter: Formatter, scorer: sidecar.Scorer, tokens: int = 4096
) -> Any:
    return list(sidecar.replies_to(message, formatter, scorer, sidecar.Budget(tokens)))


def lengths(batch: list[comparisons.Comparison]) -> np.ndarray:
    return np.array([len(comparison.pair) for comparison in batch], np.float64)


def test_request_that_is_none_is_refused(formatter: Formatter) -> None:
    for message, complaint in [
        ({"prompts": ["x"], "responses": []}, "a request needs prompts"),
        ({"prompts": ["x", "y"], "responses": [["a"], ["a", "b"]]}, "the same number of responses"),
        ({"prompts": ["x"], "responses": [["a", 3]]}, "must be text"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            answered(message, formatter, lengths)


def test_only_the_cells_that_are_asked_for_are_scored(formatter: Formatter) -> None:
    message = {
        "prompts": ["x", "y"],
        "responses": [["a", "b b", "c c c"]] * 2,
        "cells": [[0, 1, 2], [1, 0, 1]],
    }
    *frames, end = answered(message, formatter, lengths)
    assert sorted(cell for frame in frames for cell in frame["cells"]) == [(0, 1, 2), (1, 0, 1)]
    assert end["end"] is True


def test_a_score_that_is_no_number_fails_alone(formatter: Formatter) -> None:
    message = {"prompts": ["x"], "responses": [["a", "b b"]]}
    found: list[Any] = []
    with pytest.raises(sidecar.Unscored, match=r"responses 0 and 1 to prompt 0 is not a finite") as caught:
        found.extend(
            sidecar.replies_to(
                message, formatter, lambda batch: np.array([np.nan, 2.5]), sidecar.Budget(4096)
            )
        )
    assert caught.value.cells == [(0, 0, 1)]
    assert [(frame["cells"], frame["logits"]) for frame in found] == [([(0, 1, 0)], [2.5])]


def test_both_orders_of_a_pair_share_a_batch(formatter: Formatter) -> None:
    prompts, responses = golden()
    equal_lengths = [["a", "b", "c", "d", "e"]]
    todo = comparisons.plan(formatter, [*prompts, "x"], responses + equal_lengths)
    for tokens in (50, 300, 777, 4096):
        found = list(comparisons.batches(todo[::-1], tokens))
        assert sorted(map(id, (comparison for batch in found for comparison in batch))) == sorted(
            map(id, todo)
        )
        assert all(len(batch) == 1 or len(batch) * len(batch[0].pair) <= tokens for batch in found)
        where = {comparison.cells[0]: b for b, batch in enumerate(found) for comparison in batch}
        for (n, i, j), b in where.items():
            size = 2 * max(len(comparison.pair) for comparison in todo if comparison.cells[0] == (n, i, j))
            assert where[n, j, i] == b or size > tokens, (n, i, j)


def test_equal_pairs_are_scored_once_across_prompts(formatter: Formatter) -> None:
    todo = comparisons.plan(formatter, ["x", "y", "x"], [["a", "b"], ["a", "b"], ["b", "a"]])
    assert [comparison.cells for comparison in todo] == [
        [(0, 0, 1), (2, 1, 0)],
        [(0, 1, 0), (2, 0, 1)],
        [(1, 0, 1)],
        [(1, 1, 0)],
    ]


def test_texts_that_are_cut_are_counted_once(formatter: Formatter) -> None:
    short = Formatter.of(CHECKPOINT, Limits(8, 8, 24))
    prompts, responses = ["hello " * 9, "hello"], [["a", "b " * 30, "c " * 30], ["a", "b", "c"]]
    message = {"prompts": prompts, "responses": responses}
    for tokens in (1, 100, 4096):
        frames = answered(message, short, lengths, tokens)
        cut = sum((Counter(frame["cut"]) for frame in frames), Counter())
        assert cut == Counter(prompts=1, responses=2), tokens


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_halves_the_batches_from_then_on(formatter: Formatter, error: Exception) -> None:
    sizes: list[int] = []

    def scorer(batch: list[comparisons.Comparison]) -> np.ndarray:
        sizes.append(len(batch) * len(batch[0].pair))
        if sizes[-1] > 60:
            raise error
        return lengths(batch)

    budget = sidecar.Budget(4096)
    message = {"prompts": ["x"] * 2, "responses": [["a", "b b", "c c c", "d d d d"]] * 2}
    first = list(sidecar.replies_to(message, formatter, scorer, budget))
    assert sum(len(frame.get("cells", [])) for frame in first) == 24
    assert max(sizes) > 120
    sizes.clear()
    assert len(list(sidecar.replies_to(message, formatter, scorer, budget))) > 2
    assert max(sizes) <= 60  # the smaller budget is kept
    with pytest.raises(sidecar.Unscored, match=r"a pair of \d+ tokens does not fit") as caught:
        answered({"prompts": ["x " * 60], "responses": [["a", "b"]]}, formatter, scorer)
    assert caught.value.cells == [(0, 0, 1)]
    with pytest.raises(RuntimeError, match="another"):  # no other error counts as lack of memory
        answered(message, formatter, lambda batch: (_ for _ in ()).throw(RuntimeError("another")))


def test_frames_refuse_what_is_no_frame() -> None:
    frame = protocol.encode({"id": 1, "text": "\ud800 é"})
    assert protocol.read_frame(io.BytesIO(frame)) == {"id": 1, "text": "\ud800 é"}
    assert protocol.read_frame(io.BytesIO(b"")) is None
    received = bytearray()
    taken = []
    for byte in frame * 2:  # as a pipe may deliver it
        received.append(byte)
        taken.append(protocol.take_frame(received))
    assert [message for message in taken if message] == [{"id": 1, "text": "\ud800 é"}] * 2
    for broken, complaint in [
        (frame[:-1], "ends after"),
        (frame[:2], "ends after"),
        (b"\x00\x00\x00\x02{]", "not JSON"),
        (b"\x00\x00\x00\x02[]", "holds a list"),
        (b"\xff\xff\xff\xff", "over the limit"),
    ]:
        with pytest.raises(protocol.FrameError, match=complaint):
            protocol.read_frame(io.BytesIO(broken))
    with pytest.raises(protocol.FrameError, match="over the limit"):
        protocol.encode({"text": "x" * protocol.MAX_FRAME})


def test_numbers_travel_with_every_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)]
    back = protocol.read_frame(io.BytesIO(protocol.encode({"logits": bits.tolist()})))
    assert back is not None
    assert np.array_equal(np.asarray(back["logits"]).astype(np.float32).view(np.uint32), bits.view(np.uint32))


@pytest.mark.parametrize("gpu", [False, True])
def test_device_and_precision_are_chosen(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch_model, "load", lambda checkpoint, **given: loaded.append(given))
    device = "cuda" if gpu else "cpu"
    for name, dtype in [
        ("auto", torch.bfloat16 if gpu else torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ]:
        options = sidecar.arguments(["--path", str(CHECKPOINT.directory), "--dtype", name])
        assert sidecar.load(options)[2] == device
        assert loaded.pop() == {"device": device, "dtype": dtype}


def test_memory_goes_back_when_it_was_short_and_after_each_request(
    formatter: Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    assert sidecar.memory_freer("cpu")() is None
    events: list[Any] = []

    class Model:
        def logits(self, pairs: list[Any]) -> np.ndarray:
            if len(pairs) > 3:
                raise MemoryError
            return np.ones(len(pairs), np.float32)

    class Replies:
        def requests(self, stream: Any) -> Iterator[dict[str, Any]]:
            yield {"id": 1, "prompts": ["x"], "responses": [["a", "b", "c"]]}
            yield {"id": 2}

        def send(self, frame: dict[str, Any]) -> None:
            events.append("an error" if "error" in frame else len(frame.get("cells", [])))

    budget = sidecar.Budget(4096, sidecar.memory_freer("cuda"), events.append)
    sidecar.serve(Replies(), Model(), formatter, budget)  # type: ignore[arg-type]
    short = "out of memory with a batch of 6 pairs; going on with 3"
    # The two orders of a pair share a batch, so one batch of the three pairs has two.
    assert events == ["given back", short, 2, 2, 2, 0, "given back", "an error", "given back"]


# The client, and the frames that a process might send.

READY = {"ready": True, "device": "stage"}
ANSWER = {"cells": [[0, 0, 1], [0, 1, 0]], "logits": [1.5, -2.5]}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a maker of judges whose processes send these frames or are Broken, one list for each process.

    Of each judge, `sent` are the requests, `told` the lines that it reported, `pauses` the seconds before restarts, and
    `started` the (command, environment) of its processes.
    """

    def make(*lives: list[dict[str, Any] | Broken], **options: Any) -> Any:
        script, sent, told, pauses, started = iter(lives), [], [], [], []  # type: ignore[var-annotated]

        class Played:
            def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
                self._frames = iter(next(script, []))
                started.append((list(command), dict(environment)))

            def send(self, frame: bytes) -> None:
                sent.append(json.loads(frame[4:]))

            def receive(self, seconds: float) -> dict[str, Any]:
                frame = next(self._frames)
                if isinstance(frame, Broken):
                    raise frame
                return (
                    {"id": len(sent)} | frame if frame.keys() & {"cells", "end", "hello", "error"} else frame
                )

            def last_words(self) -> str:
                return ""

            def kill(self) -> None:
                pass

        monkeypatch.setattr(process_judge, "Child", Played)
        monkeypatch.setattr(process_judge.time, "sleep", pauses.append)
        judge: Any = SidecarJudge(CHECKPOINT, **({"tell": told.append} | options))
        judge.sent, judge.told, judge.pauses, judge.started = sent, told, pauses, started
        return judge

    return make


GARBAGE: list[tuple[dict[str, Any], str]] = [
    ({"id": 0, "end": True}, "a reply to '0'"),
    ({"end": True}, "a reply without 2 of its scores"),
    ({"hello": 1}, "a reply without cells, end or error"),
    (ANSWER | {"cut": {"prompts": "many"}}, "a cut that counts nothing"),
    (ANSWER | {"logits": [1, float("inf")]}, "not a finite number"),
    (ANSWER | {"logits": [1, 1e300]}, "not a finite number"),
    ({"error": "no luck\nat all"}, r"could not go on \(no luck at all\)"),
    *(
        ({"cells": cells, "logits": logits}, "wrote garbage")
        for cells, logits in BROKEN_CELLS.values()
        if 1e300 not in logits
    ),
]


@pytest.mark.parametrize(("frame", "complaint"), GARBAGE)
def test_garbage_is_recognised_and_asked_for_again(
    frame: dict[str, Any], complaint: str, played: Callable[..., Any]
) -> None:
    judge = played([READY, frame], [READY, {"alive": True}, ANSWER, {"end": True}])
    assert judge.compare(["x"], [["a", "b"]]).tolist() == [[[0, 1.5], [-2.5, 0]]]
    (told,) = judge.told
    assert re.search(rf"^PairRM: its process .*{complaint}.*; started again \(1 of 5\)$", told)
    assert [request["id"] for request in judge.sent] == [1, 2]


def test_pauses_double_up_to_the_longest(played: Callable[..., Any]) -> None:
    lives = [[READY, Broken("ended")] for _ in range(7)]
    judge = played(*lives, patience=Patience(pause=0.1, longest_pause=1, restarts=6))
    with pytest.raises(BadInput, match="6 restarts did not help"):
        judge.compare(["x"], [["a", "b"]])
    assert judge.pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1, 1])


def test_batches_shrink_from_what_the_program_said(played: Callable[..., Any]) -> None:
    killed = Broken("ended by signal 9", died=True)
    for said, asked in [({"tokens": 1024}, [None, 512, 256, 256]), ({}, [None, 2048, 1024, 512])]:
        lives = [[READY | said, killed] for _ in asked]
        judge = played(*lives, [READY | said, ANSWER, {"end": True}], patience=Patience(restarts=3))
        with pytest.raises(BadInput, match="3 restarts did not help"):
            judge.compare(["x"], [["a", "b"]])
        judge.compare(["x"], [["a", "b"]])
        assert [request.get("tokens") for request in judge.sent] == [*asked, None]
    for odd in (0, -1, "many", True):
        judge = played([READY | {"tokens": odd}], [READY, ANSWER, {"end": True}])
        judge.compare(["x"], [["a", "b"]])
        assert "no frame that it is ready" in judge.told[0]


def test_lines_of_the_program_go_to_the_current_listener(played: Callable[..., Any]) -> None:
    life = [{"told": "loading"}, READY, {"told": "less\nmemory"}, Broken("ended")]
    judge = played(life, [READY, ANSWER, {"end": True}], name="judge")
    heard: list[str] = []
    judge.tell = heard.append  # as when the run's log is opened after the judge
    judge.compare(["x"], [["a", "b"]])
    assert heard == [
        "judge: loading",
        "judge: less memory",
        "judge: its process ended; started again (1 of 5)",
    ]
    assert judge.told == []


def test_telling_without_a_score_is_a_stall(played: Callable[..., Any]) -> None:
    judge = played([READY, *[{"told": "wait"}] * 3], patience=Patience(stall=2, restarts=0))
    with pytest.raises(BadInput, match="got nowhere for 2 s"):
        judge.compare(["x"], [["a", "b"]])


def test_process_gets_the_processors_that_there_are(
    played: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available_cpus", lambda: 3)
    ((command, environment),) = played(dtype="bfloat16").started
    assert command[command.index("--threads") + 1] == "3"
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert environment["OMP_NUM_THREADS"] == "3"
    ((command, _),) = played(threads=5).started
    assert command[command.index("--threads") + 1] == "5"


def test_a_containers_share_of_processors_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert launch.available_cpus() == 8
    for text, cpus in [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("1000 100000", 1),
        ("", 8),
    ]:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert launch.available_cpus() == cpus, text
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cpus in [("-1", 8), ("150000", 2), ("1600000", 8)]:
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert launch.available_cpus() == cpus, quota


def test_request_counts_the_cells_that_it_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_judge, "_REQUEST_BYTES", 2**17)
    prompts, responses = ["x"] * 100, [[""] * 30] * 100
    asked = process_judge._request(range(100), prompts, responses)
    assert 1 < len(asked) < 100
    cells = process_judge._Scores(100, 30).cells(asked)
    assert len(protocol.encode({"cells": cells})) < 2**17
