"""The sidecar and its client: what travels between them, and what can befall it."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sppo_jax import pairrm
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import wire
from tests.test_pairrm import MODEL, TOLERANCE, arrays, case  # noqa: F401  (arrays is a fixture)


@pytest.fixture(scope="module")
def judge() -> Iterator[pairrm.SidecarJudge]:
    with pairrm.load(MODEL, threads=1) as judge:
        yield judge


def test_sidecar_gives_the_reference_logits(
    judge: pairrm.SidecarJudge, arrays: dict[str, np.ndarray]
) -> None:
    _, prompts, responses = case("full_b1")
    seen: list[tuple[int, int]] = []
    logits = judge.compare(prompts, responses, lambda done, total: seen.append((done, total)))
    assert logits.dtype == np.float32
    assert logits.shape == (5, 5, 5)
    np.testing.assert_allclose(logits, arrays["full_b1/logits"], rtol=0, atol=TOLERANCE)
    assert seen[-1] == (100, 100)
    assert seen == sorted(seen)
    assert judge.identity.startswith("sha256:")
    assert len(judge.identity) == 71


def test_many_prompts_travel_in_several_requests(
    judge: pairrm.SidecarJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, prompts, responses = case("full_b1")
    whole = judge.compare(prompts, responses)
    monkeypatch.setattr("sppo_jax.pairrm.client._REQUEST_PROMPTS", 2)
    seen: list[tuple[int, int]] = []
    np.testing.assert_allclose(
        judge.compare(prompts, responses, lambda *step: seen.append(step)), whole, rtol=0, atol=TOLERANCE
    )
    assert seen[-1] == (100, 100)
    assert seen == sorted(seen)
    assert len(seen) >= 3


def test_odd_texts_survive(judge: pairrm.SidecarJudge) -> None:
    logits = judge.compare(["", "\ud800", "a prompt"], [ODD] * 3)
    assert logits.shape == (3, len(ODD), len(ODD))
    assert np.isfinite(logits).all()
    huge = judge.compare(["x " * 50_000], [["y" * 100_000, "short"]])
    assert huge[0, 0, 1] != 0
    assert np.isfinite(huge).all()


def test_numbers_of_responses_at_the_edge(judge: pairrm.SidecarJudge) -> None:
    assert judge.compare([], []).shape == (0, 0, 0)
    assert judge.compare(["x"], [["only one"]]).tolist() == [[[0.0]]]
    with pytest.raises(ValueError, match="equally many"):
        judge.compare(["x", "y"], [["a", "b"], ["a"]])


def test_killed_sidecar_is_one_clear_line() -> None:
    with pairrm.load(MODEL, threads=1) as judge:
        _ = judge.identity
        os.kill(judge._process.pid, signal.SIGKILL)
        with pytest.raises(BadInput, match=r"exit status -9 .*same command again to resume") as caught:
            judge.compare(["x"], [["a", "b"]])
        assert "\n" not in str(caught.value)
        with pytest.raises(BadInput, match="closed"):
            judge.compare(["x"], [["a", "b"]])


def test_sidecar_speaks_frames_and_ends_with_its_input(tmp_path: Path) -> None:
    # Driven by hand: requests that are wrong, weights that yield NaN, and the parent's end of the pipe closing.
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, tmp_path)
    weights = load_file(MODEL / "model.safetensors")
    save_file(
        {**weights, "head_layer.4.weight": weights["head_layer.4.weight"] * np.nan},
        tmp_path / "model.safetensors",
    )
    command = [sys.executable, "-m", "sppo_jax.pairrm.sidecar", "--path", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdin is not None
    assert process.stdout is not None
    hello = wire.read_frame(process.stdout)
    assert hello is not None
    assert hello["identity"].startswith("sha256:")
    for request, complaint in [
        ({"id": 1, "prompts": ["x"], "responses": []}, "a request needs prompts"),
        ({"id": 2, "prompts": ["x"], "responses": [["a", 3]]}, "must be text"),
        ({"id": 3, "prompts": ["x"], "responses": [["a", "b"]]}, "not a finite number"),
    ]:
        wire.write_frame(process.stdin, request)
        answer = wire.read_frame(process.stdout)
        assert answer is not None
        assert answer["id"] == request["id"]
        assert complaint in answer["error"]
    process.stdin.close()
    assert process.wait(10) == 0
    assert process.stdout.read() == b""
    process.stdout.close()


def test_frames_refuse_what_is_no_frame() -> None:
    frame = wire.encode({"id": 1, "text": "\ud800 é"})
    assert wire.read_frame(io.BytesIO(frame)) == {"id": 1, "text": "\ud800 é"}
    assert wire.read_frame(io.BytesIO(b"")) is None
    for broken, complaint in [
        (frame[:-1], "ends after"),
        (frame[:2], "ends inside"),
        (b"\x00\x00\x00\x02{]", "not JSON"),
        (b"\x00\x00\x00\x02[]", "holds a list"),
        (b"\xff\xff\xff\xff", "over the limit"),
    ]:
        with pytest.raises(wire.FrameError, match=complaint):
            wire.read_frame(io.BytesIO(broken))
    with pytest.raises(wire.FrameError, match="over the limit"):
        wire.encode({"text": "x" * wire.MAX_FRAME})
