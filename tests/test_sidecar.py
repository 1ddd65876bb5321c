"""The judge's process and its client: what travels between them, and whatever can befall it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sppo_jax import pairrm
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import client, layout, pairing, sidecar, torch_model, wire
from sppo_jax.pairrm.client import Patience, SidecarJudge
from sppo_jax.pairrm.format import Formatter, Limits
from sppo_jax.pairrm.process import Broken
from tests.faulty_sidecar import BROKEN_CELLS, POISON, checksum

GOLDEN = Path(__file__).parent / "golden" / "pairrm"
PROGRAM = Path(__file__).with_name("faulty_sidecar.py")
CHECKPOINT = layout.read(GOLDEN / "pairrm_hf")
TOLERANCE = 2e-5  # the reference's float32 and float64 differ by 3.2e-6
HASTE = Patience(start=120, silence=60, pause=0.01)
SHORT = replace(
    HASTE, silence=2
)  # for a process that is stopped for sure; others may have to wait for their turn
ODD = [
    "",
    "   ",
    "\n\t",
    "\0",
    "nul \0 inside",
    "\ud800 lone",
    "\udc00",
    "שלום עולם مرحبا",
    "\u202eright to left",
    "😀" * 50,
]
PROMPTS = [f"prompt {n}" for n in range(6)]
RESPONSES = [[f"answer {n}.{k}" for k in range(3)] for n in range(6)]


@pytest.fixture(scope="module")
def judge() -> Iterator[SidecarJudge]:
    with pairrm.load(CHECKPOINT.directory, threads=1) as judge:
        assert isinstance(judge, SidecarJudge)
        yield judge


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    return Formatter.of(CHECKPOINT)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Callable[..., SidecarJudge]]:
    """Makes judges whose process the given faults befall; `told` of each are the lines that it said."""
    judges: list[SidecarJudge] = []

    def make(*plan: tuple[str, int], arguments: tuple[str, ...] = ("stand-in",), **options: Any) -> Any:
        file = tmp_path / f"plan{len(judges)}"
        file.write_text(json.dumps(plan))
        told: list[str] = []
        options = {"patience": HASTE, "tell": told.append} | options
        command = [sys.executable, str(PROGRAM), str(file), *arguments]
        judges.append(SidecarJudge(CHECKPOINT, threads=1, command=command, **options))
        judges[-1].told = told  # type: ignore[attr-defined]
        judges[-1].fired = Path(f"{file}.fired")  # type: ignore[attr-defined]
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def golden(count: int = 5) -> tuple[list[str], list[list[str]]]:
    texts = json.loads((GOLDEN / "golden.json").read_text())
    examples = texts["cases"]["full_b1"]["examples"][:count]
    return [texts["sources"][e] for e in examples], [texts["candidates"][e] for e in examples]


def expected(prompts: list[str] = PROMPTS, responses: list[list[str]] = RESPONSES) -> np.ndarray:
    """What the stand-in answers."""
    return np.array(
        [
            [[0.0 if i == j else checksum(p, a, b) for j, b in enumerate(row)] for i, a in enumerate(row)]
            for p, row in zip(prompts, responses, strict=True)
        ],
        np.float32,
    )


def gone(pid: int) -> bool:
    """Whether the process ends within half a minute, for it may still be importing (a zombie has ended)."""
    for _ in range(3000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


# The real sidecar.


def test_sidecar_gives_the_reference_logits(judge: SidecarJudge) -> None:
    prompts, responses = golden()
    seen: list[tuple[int, int]] = []
    logits = judge.compare(prompts, responses, lambda done, total: seen.append((done, total)))
    with np.load(GOLDEN / "golden.npz") as stored:
        np.testing.assert_allclose(logits, stored["full_b1/logits"], rtol=0, atol=TOLERANCE)
    assert logits.dtype == np.float32
    assert seen[-1] == (100, 100)
    assert seen == sorted(set(seen))
    assert len(seen) >= 3  # as they come
    assert judge.identity == CHECKPOINT.identity
    assert judge.cut == Counter()


def test_odd_texts_survive(judge: SidecarJudge) -> None:
    logits = judge.compare(["", "\ud800", "a prompt"], [ODD] * 3)
    assert logits.shape == (3, len(ODD), len(ODD))
    assert np.isfinite(logits).all()
    huge = judge.compare(["x " * 50_000], [["y" * 100_000, "short"]])
    assert huge[0, 0, 1] != 0
    assert np.isfinite(huge).all()
    assert judge.cut == Counter(prompts=1, responses=1)


def test_numbers_of_responses_at_the_edge(judge: SidecarJudge) -> None:
    assert judge.compare([], []).shape == (0, 0, 0)
    assert judge.compare(["x"], [["only one"]]).tolist() == [[[0.0]]]
    with pytest.raises(ValueError, match="equally many"):
        judge.compare(["x", "y"], [["a", "b"], ["a"]])


def test_real_sidecar_survives_what_befalls_it(
    judge: SidecarJudge, faulty: Callable[..., SidecarJudge]
) -> None:
    prompts, responses = golden(4)
    undisturbed = judge.compare(prompts, responses)
    arguments = ("real", "--path", str(CHECKPOINT.directory), "--threads", "1", "--batch-tokens", "3200")
    plan = [("cuda", 0), ("cpu", 0), ("kill", 2), ("memory", 0), ("stop", 1)]
    patience = replace(HASTE, silence=3)
    broken: Any = faulty(*plan, arguments=arguments, patience=patience)
    np.testing.assert_allclose(broken.compare(prompts, responses), undisturbed, rtol=0, atol=TOLERANCE)
    assert [line.split()[0] for line in broken.fired.read_text().splitlines()] == [kind for kind, _ in plan]
    short = [line for line in broken.told if "out of memory" in line]  # which is no reason to start again
    assert len(short) == 3
    assert all(
        re.fullmatch(r"PairRM: out of memory with a batch of \d+ pairs; going on with \d+", s) for s in short
    )
    killed, stopped = (line for line in broken.told if line not in short)
    assert "signal 9; started again (1 of 5)" in killed
    assert "no sign of life for 3 s" in stopped
    assert broken._own_tokens == 3200


def test_what_cannot_be_loaded_is_one_line_and_not_tried_again(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((CHECKPOINT.directory / name).read_bytes())
    weights = load_file(CHECKPOINT.weights)
    del weights["head_layer.1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    told: list[str] = []
    with (
        SidecarJudge(layout.read(tmp_path), threads=1, tell=told.append) as judge,
        pytest.raises(BadInput, match=r"lacks tensor head_layer.1.bias") as caught,
    ):
        judge.compare(["x"], [["a", "b"]])
    assert "\n" not in str(caught.value)
    assert told == []


def test_limits_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"llm: '/no/such/python' cannot be started: No such file"):
        SidecarJudge(CHECKPOINT, command=["/no/such/python"], name="llm")
    monkeypatch.setattr(client, "Child", lambda *_: pytest.fail("started"))
    with pytest.raises(BadInput, match="total of 10 tokens"):
        SidecarJudge(CHECKPOINT, limits=Limits(8, 8, 10))


# Its parts, in this process.


def answered(
    message: dict[str, Any], formatter: Formatter, scorer: sidecar.Scorer, tokens: int = 4096
) -> Any:
    return list(sidecar.answer(message, formatter, scorer, sidecar.Budget(tokens)))


def lengths(batch: list[pairing.Work]) -> np.ndarray:
    return np.array([len(work.pair) for work in batch], np.float64)


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
            sidecar.answer(message, formatter, lambda batch: np.array([np.nan, 2.5]), sidecar.Budget(4096))
        )
    assert caught.value.cells == [(0, 0, 1)]
    assert [(frame["cells"], frame["logits"]) for frame in found] == [([(0, 1, 0)], [2.5])]


def test_both_orders_of_a_pair_share_a_batch(formatter: Formatter) -> None:
    prompts, responses = golden()
    equal_lengths = [["a", "b", "c", "d", "e"]]
    works = pairing.plan(formatter, [*prompts, "x"], responses + equal_lengths)
    for tokens in (50, 300, 777, 4096):
        found = list(pairing.batches(works[::-1], tokens))
        assert sorted(map(id, (work for batch in found for work in batch))) == sorted(map(id, works))
        assert all(len(batch) == 1 or len(batch) * len(batch[0].pair) <= tokens for batch in found)
        where = {work.cells[0]: b for b, batch in enumerate(found) for work in batch}
        for (n, i, j), b in where.items():
            size = 2 * max(len(work.pair) for work in works if work.cells[0] == (n, i, j))
            assert where[n, j, i] == b or size > tokens, (n, i, j)


def test_equal_pairs_are_scored_once_across_prompts(formatter: Formatter) -> None:
    works = pairing.plan(formatter, ["x", "y", "x"], [["a", "b"], ["a", "b"], ["b", "a"]])
    assert [work.cells for work in works] == [
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

    def scorer(batch: list[pairing.Work]) -> np.ndarray:
        sizes.append(len(batch) * len(batch[0].pair))
        if sizes[-1] > 60:
            raise error
        return lengths(batch)

    budget = sidecar.Budget(4096)
    message = {"prompts": ["x"] * 2, "responses": [["a", "b b", "c c c", "d d d d"]] * 2}
    first = list(sidecar.answer(message, formatter, scorer, budget))
    assert sum(len(frame.get("cells", [])) for frame in first) == 24
    assert max(sizes) > 120
    sizes.clear()
    assert len(list(sidecar.answer(message, formatter, scorer, budget))) > 2
    assert max(sizes) <= 60  # remembered
    with pytest.raises(sidecar.Unscored, match=r"a pair of \d+ tokens does not fit") as caught:
        answered({"prompts": ["x " * 60], "responses": [["a", "b"]]}, formatter, scorer)
    assert caught.value.cells == [(0, 0, 1)]
    with pytest.raises(RuntimeError, match="another"):  # and no other error is taken for it
        answered(message, formatter, lambda batch: (_ for _ in ()).throw(RuntimeError("another")))


def test_frames_refuse_what_is_no_frame() -> None:
    frame = wire.encode({"id": 1, "text": "\ud800 é"})
    assert wire.read_frame(io.BytesIO(frame)) == {"id": 1, "text": "\ud800 é"}
    assert wire.read_frame(io.BytesIO(b"")) is None
    received = bytearray()
    taken = []
    for byte in frame * 2:  # as a pipe may deliver them
        received.append(byte)
        taken.append(wire.take_frame(received))
    assert [message for message in taken if message] == [{"id": 1, "text": "\ud800 é"}] * 2
    for broken, complaint in [
        (frame[:-1], "ends after"),
        (frame[:2], "ends after"),
        (b"\x00\x00\x00\x02{]", "not JSON"),
        (b"\x00\x00\x00\x02[]", "holds a list"),
        (b"\xff\xff\xff\xff", "over the limit"),
    ]:
        with pytest.raises(wire.FrameError, match=complaint):
            wire.read_frame(io.BytesIO(broken))
    with pytest.raises(wire.FrameError, match="over the limit"):
        wire.encode({"text": "x" * wire.MAX_FRAME})


def test_numbers_travel_with_every_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)]
    back = wire.read_frame(io.BytesIO(wire.encode({"logits": bits.tolist()})))
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
    assert sidecar.giver_back("cpu")() is None
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

    budget = sidecar.Budget(4096, sidecar.giver_back("cuda"), events.append)
    sidecar.serve(Replies(), Model(), formatter, budget)  # type: ignore[arg-type]
    short = "out of memory with a batch of 6 pairs; going on with 3"
    # Two orders of a pair share a batch, so of three pairs there is one for two.
    assert events == ["given back", short, 2, 2, 2, 0, "given back", "an error", "given back"]


# The client, in this process, and what a process might say.

READY = {"ready": True, "device": "stage"}
ANSWER = {"cells": [[0, 0, 1], [0, 1, 0]], "logits": [1.5, -2.5]}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a judge whose processes say these frames or are Broken, one list for each process. Of it, `sent` are the
    requests, `told` what it said, `pauses` the seconds before restarts, `started` (command, environment) of processes."""

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

        monkeypatch.setattr(client, "Child", Played)
        monkeypatch.setattr(client.time, "sleep", pauses.append)
        judge: Any = SidecarJudge(CHECKPOINT, **({"tell": told.append} | options))
        judge.sent, judge.told, judge.pauses, judge.started = sent, told, pauses, started
        return judge

    return make


GARBAGE: list[tuple[dict[str, Any], str]] = [
    ({"id": 0, "end": True}, "an answer to '0'"),
    ({"end": True}, "an answer without 2 of its scores"),
    ({"hello": 1}, "an answer that is none"),
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
        assert "no word that it is ready" in judge.told[0]


def test_what_the_program_tells_goes_to_whoever_listens_now(played: Callable[..., Any]) -> None:
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
    monkeypatch.setattr(client, "_available_cpus", lambda: 3)
    ((command, environment),) = played(dtype="bfloat16").started
    assert command[command.index("--threads") + 1] == "3"
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert environment["OMP_NUM_THREADS"] == "3"
    ((command, _),) = played(threads=5).started
    assert command[command.index("--threads") + 1] == "5"


def test_a_containers_share_of_processors_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert client._available_cpus() == 8
    for text, cpus in [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("1000 100000", 1),
        ("", 8),
    ]:
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert client._available_cpus() == cpus, text
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cpus in [("-1", 8), ("150000", 2), ("1600000", 8)]:
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert client._available_cpus() == cpus, quota


def test_request_counts_the_cells_that_it_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_REQUEST_BYTES", 2**17)
    prompts, responses = ["x"] * 100, [[""] * 30] * 100
    asked = client._request(range(100), prompts, responses)
    assert 1 < len(asked) < 100
    cells = client._Scores(100, 30).cells(asked)
    assert len(wire.encode({"cells": cells})) < 2**17


# A stand-in for it, which starts in a moment.

FAULTS = {
    "kill": "ended by signal 9",
    "torn": "ended by signal 9",
    "exit": "ended with exit status 3",
    "stop": "no sign of life for 2 s",
    "mute": "got nowhere for 40 s",
    "announced": "did not end the frame that it began for 2 s",
    "closed": "ended with exit status 0|closed its output",
    "length": "over the limit",
    "early": "an answer without ",
    "NaN": "not a finite number",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_process_is_started_again_and_asked_for_what_is_missing(
    kind: str, faulty: Callable[..., Any]
) -> None:
    patience = (
        SHORT if kind in ("stop", "announced") else replace(HASTE, stall=40) if kind == "mute" else HASTE
    )
    judge = faulty((kind, 4), patience=patience)
    seen: list[int] = []
    logits = judge.compare(PROMPTS, RESPONSES, lambda done, total: seen.append(done))
    assert np.array_equal(logits, expected())
    assert re.search(FAULTS[kind], judge.told[0])
    assert len(judge.told) == 1
    assert judge.fired.read_text().startswith(kind)
    # 16 of 36 scores were there: they are not asked for again.
    assert judge._child.last_words() == "20 None"
    assert seen == sorted(set(seen))
    assert seen[-1] == 36


def test_wrapper_that_does_not_give_way_is_named(faulty: Callable[..., Any]) -> None:
    judge = faulty()
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", *judge._command]
    with (
        SidecarJudge(CHECKPOINT, command=command, patience=replace(HASTE, restarts=0)) as wrapped,
        pytest.raises(
            BadInput, match=r"exit status 2 .*parent is another process: name the interpreter itself"
        ),
    ):
        wrapped.compare(["x"], [["a", "b"]])


def test_many_faults_in_a_row_and_many_requests(
    faulty: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_REQUEST_BYTES", 1)  # each prompt by itself
    judge = faulty(("kill", 1), ("json", 1), ("kill", 0), ("exit", 0), ("id", 0), ("kill", 3), ("NaN", 1))
    assert np.array_equal(judge.compare(PROMPTS, RESPONSES), expected())
    assert len(judge.told) == 7
    assert [line[-len("1 of 5)")] for line in judge.told] == list("1123411")
    assert np.array_equal(judge.compare(PROMPTS[:2], RESPONSES[:2]), expected(PROMPTS[:2], RESPONSES[:2]))


def test_poisonous_prompt_is_found_and_named(faulty: Callable[..., Any]) -> None:
    prompts = [f"prompt {n}" for n in range(700)]
    prompts[333] = f"{POISON}\n{'long ' * 40}"
    responses = [["a", "b"]] * 700
    judge = faulty()
    with pytest.raises(BadInput) as caught:
        judge.compare(prompts, responses)
    told = str(caught.value)
    assert told.startswith(f"PairRM: the prompt '{POISON} long long")
    assert len(told.split("'")[1]) == 80
    assert (
        "cannot be judged: its process ended by signal 9, its last words 'poisoned', and 5 restarts" in told
    )
    assert told.endswith("run the same command again to resume")
    assert "\n" not in told
    assert len(judge.told) < 25
    # Without it the same judge goes on.
    assert np.array_equal(judge.compare(PROMPTS, RESPONSES), expected())


def test_failure_names_the_prompts_and_how_many_more(faulty: Callable[..., Any]) -> None:
    judge = faulty(*[("exit", 0)] * 9, patience=replace(HASTE, restarts=0))
    with pytest.raises(
        BadInput, match=r"'prompt 0' and 5 more cannot .* status 3, its last words 'out of luck'"
    ):
        judge.compare(PROMPTS, RESPONSES)


def test_judge_that_failed_can_be_asked_again(faulty: Callable[..., Any]) -> None:
    judge = faulty(*[("exit", 0)] * 3, patience=replace(HASTE, restarts=1))
    with pytest.raises(BadInput, match="1 restarts did not help"):
        judge.compare(PROMPTS, RESPONSES)
    assert np.array_equal(judge.compare(PROMPTS, RESPONSES), expected())
    assert [line[-len("1 of 1)") :] for line in judge.told] == ["1 of 1)"] * 2


def test_death_without_a_score_makes_batches_smaller(faulty: Callable[..., Any]) -> None:
    judge = faulty(("kill", 0), ("kill", 0))
    assert np.array_equal(judge.compare(PROMPTS[:1], RESPONSES[:1]), expected(PROMPTS[:1], RESPONSES[:1]))
    assert judge._child.last_words() == "6 1024"


def test_process_killed_between_comparisons_is_started_again(faulty: Callable[..., Any]) -> None:
    judge = faulty(patience=SHORT)
    judge.compare(PROMPTS, RESPONSES)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        os.kill(judge._child.pid, number)
        assert np.array_equal(judge.compare(PROMPTS, RESPONSES), expected())
    assert len(judge.told) == 2


def test_writing_to_a_stopped_process_does_not_block(faulty: Callable[..., Any]) -> None:
    judge = faulty(patience=SHORT)
    judge.compare(PROMPTS, RESPONSES)
    os.kill(judge._child.pid, signal.SIGSTOP)
    judge._child.send(
        wire.encode({"id": 0, "prompts": [], "responses": [], "pad": "x" * 5000})
    )  # not a whole pipe
    judge._child._write()
    prompts = [f"{n} {'x' * 10_000}" for n in range(100)]  # a megabyte, and a pipe holds 64 KiB
    responses = [["a", "b"]] * 100
    assert np.array_equal(judge.compare(prompts, responses), expected(prompts, responses))
    assert "no sign of life" in judge.told[0]


def test_command_that_is_no_sidecar_is_one_line() -> None:
    for code, complaint in [
        ("print('hello world' * 9)", r"wrote garbage \(a frame announces .* before it was ready"),
        (
            "import sys; sys.exit('no module llm')",
            r"exit status 1 before it was ready, its last words 'no module",
        ),
    ]:
        patience = replace(HASTE, restarts=1)
        told: list[str] = []
        judge = SidecarJudge(
            CHECKPOINT, command=[sys.executable, "-c", code], name="llm", patience=patience, tell=told.append
        )
        with pytest.raises(BadInput, match=rf"llm: the prompt 'x' cannot be judged: .*{complaint}"):
            judge.compare(["x"], [["a", "b"]])
        assert len(told) == 1
        judge.close()


def test_interrupted_comparison_leaves_a_judge_that_works(faulty: Callable[..., Any]) -> None:
    judge = faulty()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    judge.compare(PROMPTS, RESPONSES)
    process = judge._child.pid
    with pytest.raises(KeyboardInterrupt):
        judge.compare(PROMPTS, RESPONSES, interrupt)
    assert gone(process)
    assert np.array_equal(judge.compare(PROMPTS[1:], RESPONSES[1:]), expected(PROMPTS[1:], RESPONSES[1:]))
    assert judge.told == []


def test_closed_judge_says_so_and_leaves_nothing_behind(faulty: Callable[..., Any]) -> None:
    judge = faulty()
    process = judge._child.pid
    os.kill(process, signal.SIGSTOP)  # it will not end by itself
    judge.close()
    judge.close()
    assert gone(process)
    with pytest.raises(BadInput, match="this judge is closed"):
        judge.compare(PROMPTS, RESPONSES)
    dropped = faulty()
    process = dropped._child.pid
    dropped._child = None
    assert gone(process)


def test_cut_texts_are_summed(faulty: Callable[..., Any]) -> None:
    judge = faulty(("kill", 4))
    judge.compare(PROMPTS, RESPONSES)
    judge.compare(PROMPTS, RESPONSES)
    assert judge.cut == Counter(responses=2)  # the stand-in tells of one in each answer that it ends


ORPHAN = """
import sys, threading, time
from sppo_jax.pairrm import layout
from sppo_jax.pairrm.client import SidecarJudge
judge = []
def play():
    command = [sys.executable, *sys.argv[3:]] if len(sys.argv) > 3 else None
    judge.append(SidecarJudge(layout.read(sys.argv[2]), threads=1, command=command))
    print(judge[0]._child.pid, flush=True)
    judge[0].compare(["x"], [["a", "b"]])
if sys.argv[1] == "main":
    play()
else:
    threading.Thread(target=play).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("program", ["stand-in", "real"])
def test_process_dies_with_its_parent_in_the_middle_of_a_batch(
    program: str, thread: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    plan.write_text('[["mute", 0]]')
    command = [sys.executable, "-c", ORPHAN, thread, str(CHECKPOINT.directory)]
    if program == "stand-in":
        command += [str(PROGRAM), str(plan), "stand-in"]
        # Two reasons to end: the kernel's notice, which only a main thread can order, and signs of life that nobody reads.
        command += ["60"] if thread == "main" else []
    root = Path(__file__).parents[1]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if program == "stand-in":
        while not Path(f"{plan}.fired").exists():
            assert parent.poll() is None
            time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(child)
