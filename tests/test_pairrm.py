"""PairRM in PyTorch against the reference implementation's numbers, and its ids for any text."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sppo_jax import pairrm, preferences
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, files, torch_model
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
def ranker(tmp_path_factory: pytest.TempPathFactory) -> files.Checkpoint:
    """Return the same network in the layout of llm-blender/PairRM, with its backbone's spm.model as tokenizer."""
    directory = tmp_path_factory.mktemp("ranker")
    config = (GOLDEN / "pairrm/config.json").read_text().replace("@BACKBONE@", str(GOLDEN / "backbone"))
    (directory / "config.json").write_text(config)
    shutil.copy(MODEL / "model.safetensors", directory)
    return files.read(directory)


@pytest.fixture(scope="module")
def model() -> torch_model.PairRM:
    return torch_model.load(files.read(MODEL))


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    return Formatter.of(files.read(MODEL))


def case(
    name: str, checkpoint: files.Checkpoint | None = None
) -> tuple[Formatter, list[str], list[list[str]]]:
    """Return a golden case: its formatter, which reads control tokens as the reference does, prompts and responses."""
    limits = TEXTS["cases"][name]
    formatter = Formatter.of(
        checkpoint or files.read(MODEL),
        Limits(limits["source_max_length"], limits["candidate_max_length"]),
        neutralise=False,
    )
    examples = limits["examples"]
    return formatter, [TEXTS["sources"][e] for e in examples], [TEXTS["candidates"][e] for e in examples]


def in_process(
    model: torch_model.PairRM, formatter: Formatter, prompts: Any, responses: Any, tokens: int = 4096
) -> np.ndarray:
    """Return logits [n, K, K], computed in this process in batches of at most `tokens` tokens."""
    logits = np.zeros((len(prompts), len(responses[0]), len(responses[0])), np.float32)
    for batch in comparisons.batches(comparisons.plan(formatter, prompts, responses), tokens):
        comparisons.scatter(logits, batch, model.logits([comparison.pair for comparison in batch]))
    return logits


@pytest.fixture(scope="module")
def brief() -> Formatter:
    """Return a formatter with small limits, so that the network takes little of a test's time."""
    return Formatter.of(files.read(MODEL), Limits(40, 20))


def antisymmetric(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.swapaxes(-1, -2)) / 2


@pytest.mark.parametrize("name", CASES)
def test_token_ids_equal_the_reference_in_both_layouts(name: str, ranker: files.Checkpoint) -> None:
    for checkpoint in (None, ranker):
        formatter, prompts, responses = case(name, checkpoint)
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


@pytest.mark.parametrize("name", ["short_b1", "special_b1"])
def test_logits_of_the_ranker_layout_equal_the_reference(
    name: str, ranker: files.Checkpoint, arrays: dict[str, np.ndarray]
) -> None:
    logits = in_process(torch_model.load(ranker), *case(name, ranker))
    np.testing.assert_allclose(logits, arrays[f"{name}/logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_score_does_not_depend_on_batch_mates(
    name: str, model: torch_model.PairRM, arrays: dict[str, np.ndarray]
) -> None:
    formatter, prompts, responses = case(name)
    prompts, responses = prompts[:4], responses[:4]  # the fifth of full_b1 is long, and slow
    wanted = arrays[f"{name}/logits"][: len(prompts)]
    for tokens in (1, 100_000):  # each pair alone; all in one batch
        found = in_process(model, formatter, prompts, responses, tokens)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    reverse = in_process(model, formatter, prompts[::-1], responses[::-1], tokens=700)
    np.testing.assert_allclose(reverse[::-1], wanted, rtol=0, atol=TOLERANCE)
    order = [3, 1, 4, 0, 2]
    shuffled = in_process(model, formatter, prompts, [[row[k] for k in order] for row in responses])
    np.testing.assert_allclose(shuffled, wanted[:, order][:, :, order], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("total", [0, 95])
def test_truncation_budget_belongs_to_the_prompt(total: int) -> None:
    formatter = Formatter.of(files.read(MODEL), Limits(48, 16, total))
    total = total or 48 + 2 * 16
    assert formatter.limits == Limits(48, 16, total)
    text = "the model compares two answers " * 40
    for prompt in ("hello!", "the ranker scores a short story " * 2, text):
        pair = formatter.pair(prompt, text, text)
        assert len(pair.source) <= 48
        assert len(pair.first) == len(pair.second) == (total - len(pair.source)) // 2 >= 16
        assert len(pair) <= total


def test_limits_come_from_the_argument_then_the_checkpoint_then_the_original(
    ranker: files.Checkpoint,
) -> None:
    assert Formatter.of(files.read(MODEL)).limits == Limits(1224, 412, 2048)
    own = replace(ranker, config={**ranker.config, "source_maxlength": 100, "candidate_maxlength": 50})
    assert Formatter.of(own).limits == Limits(100, 50, 200)
    assert Formatter.of(own, Limits(candidate=60)).limits == Limits(100, 60, 220)
    assert Formatter.of(own, Limits(total=500)).limits == Limits(100, 50, 500)
    for limits, said in (
        (Limits(total=199), "a total of 199 tokens is less .* make it at least 200"),
        (Limits(3), "limits of 3 tokens for the prompt and 50 for a response leave no room"),
        (Limits(-5), "limits of -5 tokens"),
        (Limits(candidate=3), "and 3 for a response leave no room"),
    ):
        with pytest.raises(BadInput, match=said):
            Formatter.of(own, limits)


def test_texts_of_which_only_a_part_is_read_are_marked() -> None:
    formatter = Formatter.of(files.read(MODEL), Limits(20, 20))
    word = "model "
    room = 20 - 3  # [CLS], prefix, [SEP]
    assert len(formatter.body(word * room)) == room
    exact = formatter.prompt(word * room, [word * room, word * (room + 1), "", word * 99])
    assert (exact.cut_prompt, exact.cut_responses) == (False, [False, True, False, True])
    over = formatter.prompt(word * (room + 1), ["", word])
    assert (over.cut_prompt, over.cut_responses) == (True, [False, False])
    assert over.source.tolist() == exact.source.tolist()
    # A short prompt leaves more tokens to the responses.
    assert formatter.prompt("", [word * room, word * (room + 1)]).cut_responses == [False, False]


def test_control_tokens_in_a_text_cannot_change_the_indexing(
    model: torch_model.PairRM, formatter: Formatter
) -> None:
    # Normalisation turns this text into control tokens.
    wide = "".join(chr(ord(c) + 0xFEE0) for c in "<|candidate2|>[CLS]")
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


def texts() -> st.SearchStrategy[str]:
    """Any text, with control tokens (half and whole), surrogates, combining marks, NUL, spaces and long texts."""
    awkward = [
        *CONTROL,
        "<|candidate2",
        "|>",
        "［ＣＬＳ］",
        "\0",
        "\ud83d",
        "\ude00",
        "\U0001f600",
        "\u0338",
        "\u202e",
        "\u00a0",
        "\u200b",
        "\ufdfa",
        "▁",
        "½",
        "\r\n",
        "  ",
    ]
    anything = st.text(st.characters(exclude_categories=()), max_size=30)
    mixed = st.lists(st.sampled_from(awkward) | anything, max_size=8).map("".join)
    long = st.tuples(st.sampled_from(awkward) | st.characters(), st.integers(100, 400)).map(
        lambda x: x[0] * x[1]
    )
    return mixed | anything | long


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=texts(), responses=st.lists(texts(), min_size=3, max_size=3), copied=st.integers(0, 2))
def test_any_text_gets_finite_scores_and_antisymmetric_preferences(
    model: torch_model.PairRM, brief: Formatter, prompt: str, responses: list[str], copied: int
) -> None:
    logits = in_process(model, brief, [prompt], [[*responses, responses[copied]]])
    assert np.isfinite(logits).all()
    for estimator in preferences.ESTIMATORS:
        probability = preferences.probability_matrix(logits, estimator)[0]
        assert ((probability > 0) & (probability < 1)).all()
        assert (probability + probability.T == 1).all()
        assert probability[copied, 3] == 0.5
        np.testing.assert_allclose(probability[3], probability[copied], rtol=0, atol=1e-12)


def test_equal_responses_are_scored_once(formatter: Formatter) -> None:
    assert len(comparisons.plan(formatter, ["x"], [["a", "b", "c", "d", "e"]])) == 20
    todo = comparisons.plan(formatter, ["x"], [["a", "a", "a", "b"]])
    assert len(todo) == 3  # a-a, a-b, b-a
    assert sorted(cell for comparison in todo for cell in comparison.cells) == [
        (0, i, j) for i in range(4) for j in range(4) if i != j
    ]


def test_batches_stay_within_their_tokens(formatter: Formatter) -> None:
    _, prompts, responses = case("full_b1")
    todo = comparisons.plan(formatter, prompts, responses)
    batches = list(comparisons.batches(todo, 300))
    assert sorted(id(comparison) for batch in batches for comparison in batch) == sorted(map(id, todo))
    assert all(len(batch) == 1 or len(batch) * len(batch[0].pair) <= 300 for batch in batches)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BadInput, match="torch"):
        pairrm.load(MODEL, backend="tensorflow")


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
        torch_model.load(files.read(tmp_path))


@pytest.mark.skipif(
    "PAIRRM_PATH" not in os.environ, reason="set PAIRRM_PATH to a copy of llm-blender/PairRM-hf"
)
def test_published_weights_give_the_published_logits() -> None:
    with pairrm.load(os.environ["PAIRRM_PATH"]) as judge:
        logits = judge.compare(
            ["hello!", "I love you!"], [["hi!", "f**k off!"], ["I hate you!", "I love you, too!"]]
        )
    np.testing.assert_allclose(logits[:, 0, 1], [1.9003, -1.2547], rtol=0, atol=5e-3)
