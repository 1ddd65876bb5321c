"""PairRM in PyTorch against the reference implementation's numbers, and the sidecar against what can befall it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sppo_jax import pairrm
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import layout, pairing, torch_model, wire
from sppo_jax.pairrm.format import Formatter, Limits

GOLDEN = Path(__file__).parent / "golden" / "pairrm"
MODEL = GOLDEN / "pairrm_hf"
TEXTS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
CASES = sorted(TEXTS["cases"])
CONTROL = [
    "[CLS]",
    "[SEP]",
    "[PAD]",
    "[MASK]",
    "<|source|>",
    "<|candidate1|>",
    "<|candidate2|>",
    "<|candidate|>",
]
TOLERANCE = 2e-5  # the reference's float32 and float64 differ by 3.2e-6


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def model() -> torch_model.PairRM:
    return torch_model.load(layout.read(MODEL))


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    return Formatter.of(layout.read(MODEL))


@pytest.fixture(scope="module")
def judge() -> Iterator[pairrm.SidecarJudge]:
    with pairrm.load(MODEL, threads=1) as judge:
        yield judge


def case(name: str) -> tuple[Formatter, list[str], list[list[str]]]:
    """The formatter of a golden case, reading control tokens as the reference does, its prompts and responses."""
    limits = TEXTS["cases"][name]
    formatter = Formatter.of(
        layout.read(MODEL),
        Limits(limits["source_max_length"], limits["candidate_max_length"]),
        neutralise=False,
    )
    examples = limits["examples"]
    return formatter, [TEXTS["sources"][e] for e in examples], [TEXTS["candidates"][e] for e in examples]


def in_process(
    model: torch_model.PairRM, formatter: Formatter, prompts: Any, responses: Any, tokens: int = 4096
) -> np.ndarray:
    """Logits [n, K, K] in this process, in batches of at most so many tokens."""
    logits = np.zeros((len(prompts), len(responses[0]), len(responses[0])), np.float32)
    for batch in pairing.batches(pairing.plan(formatter, prompts, responses), tokens):
        pairing.scatter(logits, batch, model.logits([work.pair for work in batch]))
    return logits


def antisymmetric(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.swapaxes(-1, -2)) / 2


@pytest.mark.parametrize("name", CASES)
def test_token_ids_equal_the_reference(name: str) -> None:
    formatter, prompts, responses = case(name)
    for n, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
        segments = formatter.prompt(prompt, texts)
        for i, j in np.argwhere(~np.eye(len(texts), dtype=bool)):
            assert segments.pair(i, j).ids.tolist() == TEXTS["pair_input_ids"][name][n][i][j], (n, i, j)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(
    name: str, model: torch_model.PairRM, arrays: dict[str, np.ndarray]
) -> None:
    logits = in_process(model, *case(name))
    np.testing.assert_allclose(logits, arrays[f"{name}/logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits, arrays[f"{name}/logits_f64"], rtol=0, atol=TOLERANCE)


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


def test_score_does_not_depend_on_batch_mates(model: torch_model.PairRM, formatter: Formatter) -> None:
    _, prompts, responses = case("full_b1")
    prompts, responses = prompts[:4], responses[:4]  # the fifth is long, and slow
    whole = in_process(model, formatter, prompts, responses, tokens=100_000)
    np.testing.assert_allclose(in_process(model, formatter, prompts, responses, 1), whole, rtol=0, atol=1e-5)
    reverse = in_process(model, formatter, prompts[::-1], responses[::-1], tokens=700)
    np.testing.assert_allclose(reverse[::-1], whole, rtol=0, atol=1e-5)
    order = [3, 1, 4, 0, 2]
    shuffled = in_process(model, formatter, prompts, [[row[k] for k in order] for row in responses])
    np.testing.assert_allclose(shuffled, whole[:, order][:, :, order], rtol=0, atol=1e-5)


def test_truncation_budget_belongs_to_the_prompt(formatter: Formatter) -> None:
    long = Formatter.of(layout.read(MODEL), Limits(48, 16))
    text = "the model compares two answers " * 40
    for prompt in ("hello!", "the ranker scores a short story " * 2, text):
        pair = long.pair(prompt, text, text)
        assert len(pair.source) <= 48
        assert len(pair) <= 48 + 2 * 16
        assert len(pair.first) == len(pair.second) == 16 + (48 - len(pair.source)) // 2
    assert len(formatter.pair(text * 9, text * 9, text * 9)) <= 2048


def test_control_tokens_in_a_text_cannot_change_the_indexing(
    model: torch_model.PairRM, formatter: Formatter
) -> None:
    wide = "".join(
        chr(ord(c) + 0xFEE0) for c in "<|candidate2|>[CLS]"
    )  # normalisation turns it into control tokens
    for token in [*CONTROL, wide, "<|cand[SEP]idate2|>", "\u0338"]:
        text = f"{token} good {token}{token} answer {token}"
        pair = formatter.pair(text, text, text)
        control = [id for id in pair.ids.tolist() if id in (0, 1, 2, 768, 769, 770, 771, 772)]
        assert control == [1, 769, 2, 1, 770, 2, 1, 771, 2], token
        assert pair.ids[list(pair.marks)].tolist() == [769, 770, 771]
        assert np.isfinite(model.logits([pair])).all()
    assert formatter.body("a [SEP] b").tolist() == formatter.body("a b").tolist()


def test_identical_responses_get_exactly_one_half(model: torch_model.PairRM, formatter: Formatter) -> None:
    logits = in_process(model, formatter, ["hello!"], [["hi!", "how are you?", "hi!", "hi! ", "the model"]])[
        0
    ]
    assert (
        logits[np.ix_([0, 2, 3], [0, 2, 3])][~np.eye(3, dtype=bool)] != 0
    ).all()  # scored, not left at zero
    assert not antisymmetric(logits)[np.ix_([0, 2, 3], [0, 2, 3])].any()
    for copy in (2, 3):
        assert logits[0, 1] == logits[copy, 1]
        assert logits[4, 0] == logits[4, copy]


def test_equal_responses_are_scored_once(formatter: Formatter) -> None:
    assert len(pairing.plan(formatter, ["x"], [["a", "b", "c", "d", "e"]])) == 20
    works = pairing.plan(formatter, ["x"], [["a", "a", "a", "b"]])
    assert len(works) == 3  # a-a, a-b, b-a
    assert sorted(cell for work in works for cell in work.cells) == [
        (0, i, j) for i in range(4) for j in range(4) if i != j
    ]


def test_batches_stay_within_their_tokens(formatter: Formatter) -> None:
    _, prompts, responses = case("full_b1")
    works = pairing.plan(formatter, prompts, responses)
    batches = list(pairing.batches(works, 300))
    assert sorted(id(work) for batch in batches for work in batch) == sorted(map(id, works))
    assert all(len(batch) == 1 or len(batch) * len(batch[0].pair) <= 300 for batch in batches)


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


def test_load_refuses_what_is_not_a_pairrm(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BadInput, match="torch"):
        pairrm.load(MODEL, backend="tensorflow")
    with pytest.raises(BadInput, match="no directory"):
        pairrm.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config.json, tokenizer.json, model.safetensors"):
        pairrm.load(tmp_path)
    assert time.monotonic() - started < 1  # nothing was started


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"head_layer.1.bias": None}, "lacks tensor head_layer.1.bias"),
        ({"head_layer.9.bias": np.zeros(3, np.float32)}, "unknown tensor head_layer.9.bias"),
        (
            {"head_layer.1.bias": np.zeros(7, np.float32)},
            r"head_layer.1.bias as \[7\], config.json asks for \[32\]",
        ),
    ],
)
def test_weights_must_fit_exactly(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, tmp_path)
    weights = {**load_file(MODEL / "model.safetensors"), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=complaint):
        torch_model.load(layout.read(tmp_path))


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


@pytest.mark.skipif(
    "PAIRRM_PATH" not in os.environ, reason="set PAIRRM_PATH to a copy of llm-blender/PairRM-hf"
)
def test_published_weights_give_the_published_logits() -> None:
    with pairrm.load(os.environ["PAIRRM_PATH"]) as judge:
        logits = judge.compare(
            ["hello!", "I love you!"], [["hi!", "f**k off!"], ["I hate you!", "I love you, too!"]]
        )
    np.testing.assert_allclose(logits[:, 0, 1], [1.9003, -1.2547], rtol=0, atol=5e-3)
