"""The judge's process: its logits, and every fault that can occur."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sppo_jax import pairrm
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import files, process_judge, protocol
from sppo_jax.pairrm.format import Limits
from sppo_jax.pairrm.process_judge import Patience, SidecarJudge
from tests.faulty_sidecar import POISON, checksum

GOLDEN = Path(__file__).parent / "golden" / "pairrm"
PROGRAM = Path(__file__).with_name("faulty_sidecar.py")
CHECKPOINT = files.read(GOLDEN / "pairrm_hf")
TOLERANCE = 2e-5  # the reference's float32 and float64 differ by 3.2e-6
HASTE = Patience(start=120, heartbeat_timeout=60, pause=0.01)
# For a process that is certainly stopped; others may only be waiting for a core.
SHORT = replace(HASTE, heartbeat_timeout=2)
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


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Callable[..., SidecarJudge]]:
    """Return a maker of judges whose process has the given faults; `told` of each are the lines that it reported."""
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
    """Return the stand-in's logits."""
    return np.array(
        [
            [[0.0 if i == j else checksum(p, a, b) for j, b in enumerate(row)] for i, a in enumerate(row)]
            for p, row in zip(prompts, responses, strict=True)
        ],
        np.float32,
    )


def gone(pid: int) -> bool:
    """Return whether the process ends within half a minute, as it may still be importing (a zombie has ended)."""
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
    assert len(seen) >= 3  # as they are computed
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


def test_real_sidecar_survives_faults(judge: SidecarJudge, faulty: Callable[..., SidecarJudge]) -> None:
    prompts, responses = golden(4)
    undisturbed = judge.compare(prompts, responses)
    arguments = ("real", "--path", str(CHECKPOINT.directory), "--threads", "1", "--batch-tokens", "3200")
    plan = [("cuda", 0), ("cpu", 0), ("kill", 2), ("memory", 0), ("stop", 1)]
    patience = replace(HASTE, heartbeat_timeout=3)
    broken: Any = faulty(*plan, arguments=arguments, patience=patience)
    np.testing.assert_allclose(broken.compare(prompts, responses), undisturbed, rtol=0, atol=TOLERANCE)
    assert [line.split()[0] for line in broken.fired.read_text().splitlines()] == [kind for kind, _ in plan]
    short = [line for line in broken.told if "out of memory" in line]  # the process is not restarted for it
    assert len(short) == 3
    assert all(
        re.fullmatch(r"PairRM: out of memory with a batch of \d+ pairs; going on with \d+", s) for s in short
    )
    killed, stopped = (line for line in broken.told if line not in short)
    assert "signal 9; started again (1 of 5)" in killed
    assert "no sign of life for 3 s" in stopped
    assert broken._default_tokens == 3200


def test_what_cannot_be_loaded_is_one_line_and_not_tried_again(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((CHECKPOINT.directory / name).read_bytes())
    weights = load_file(CHECKPOINT.weights)
    del weights["head_layer.1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    told: list[str] = []
    with (
        SidecarJudge(files.read(tmp_path), threads=1, tell=told.append) as judge,
        pytest.raises(BadInput, match=r"lacks tensor head_layer.1.bias") as caught,
    ):
        judge.compare(["x"], [["a", "b"]])
    assert "\n" not in str(caught.value)
    assert told == []


def test_limits_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"llm: '/no/such/python' cannot be started: No such file"):
        SidecarJudge(CHECKPOINT, command=["/no/such/python"], name="llm")
    monkeypatch.setattr(process_judge, "Child", lambda *_: pytest.fail("started"))
    with pytest.raises(BadInput, match="total of 10 tokens"):
        SidecarJudge(CHECKPOINT, limits=Limits(8, 8, 10))


# A stand-in for the sidecar, which starts quickly.

FAULTS = {
    "kill": "ended by signal 9",
    "torn": "ended by signal 9",
    "exit": "ended with exit status 3",
    "stop": "no sign of life for 2 s",
    "mute": "got nowhere for 40 s",
    "announced": "did not end the frame that it began for 2 s",
    "closed": "ended with exit status 0|closed its output",
    "length": "over the limit",
    "early": "a reply without ",
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
    # 16 of 36 scores had arrived: they are not requested again.
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
    monkeypatch.setattr(process_judge, "_REQUEST_BYTES", 1)  # each prompt by itself
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
    # Without that prompt the same judge continues.
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
    # Less than the pipe holds.
    judge._child.send(protocol.encode({"id": 0, "prompts": [], "responses": [], "pad": "x" * 5000}))
    judge._child._write()
    prompts = [f"{n} {'x' * 10_000}" for n in range(100)]  # a megabyte, and a pipe holds 64 KiB
    responses = [["a", "b"]] * 100
    assert np.array_equal(judge.compare(prompts, responses), expected(prompts, responses))
    assert "no sign of life" in judge.told[0]


def test_command_that_is_no_sidecar_is_one_line() -> None:
    for code, complaint in [
        (
            "print('hello world' * 9)",
            r"wrote garbage \(a frame announces .* before it was ready.*; repair '.*python.*'",
        ),
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


def test_closed_judge_raises_and_leaves_no_process_behind(faulty: Callable[..., Any]) -> None:
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
    assert judge.cut == Counter(responses=2)  # the stand-in reports one in each reply that it ends
