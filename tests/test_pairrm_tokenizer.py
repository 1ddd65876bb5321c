"""PairRM's tokenizer: `spm.model` gives the ids of the reference's tokenizer.json, and damaged files are refused."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import tokenizer
from tests.test_pairrm import CONTROL, MODEL, TEXTS, texts
from tests.test_pairrm_files import SPM


@functools.cache
def tokenizers() -> tuple[Any, Any]:
    """Return the reference's tokenizer (tokenizer.json) and ours (spm.model)."""
    return tokenizer.load(MODEL / "tokenizer.json"), tokenizer.load(SPM)


def test_spm_model_gives_the_references_ids_for_every_golden_text() -> None:
    reference, ours = tokenizers()
    assert ours.get_vocab() == reference.get_vocab()
    for text in (*TEXTS["sources"], *(text for row in TEXTS["candidates"] for text in row), *CONTROL):
        assert (
            ours.encode(text, add_special_tokens=False).ids
            == reference.encode(text, add_special_tokens=False).ids
        ), text


def test_spm_model_gives_the_references_ids_for_random_text() -> None:
    reference, ours = tokenizers()
    rng = random.Random(5)
    words = [
        *" ".join(TEXTS["sources"]).split(),
        *CONTROL,
        "<0x41>",
        "▁",
        "  ",
        "\u200b",
        "\xa0",
        "ﬁ",
        "½",
        "\u0338",
    ]

    def one() -> str:
        """Return any character, one of a narrow range, or a word, a control token or text that normalisation changes."""
        match rng.randrange(3):
            case 0:
                return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            case 1:
                return chr(rng.randrange(0x20, 0x17F))
            case _:
                return rng.choice(words) + rng.choice(["", " "])

    drawn = ["".join(one() for _ in range(rng.randrange(60))) for _ in range(5000)]
    wanted, found = (one.encode_batch(drawn, add_special_tokens=False) for one in (reference, ours))
    for text, a, b in zip(drawn, wanted, found, strict=True):
        assert a.ids == b.ids, text


@settings(max_examples=300, deadline=None)
@given(text=texts())
def test_spm_model_gives_the_references_ids_for_awkward_text(text: str) -> None:
    reference, ours = tokenizers()
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert (
        ours.encode(text, add_special_tokens=False).ids
        == reference.encode(text, add_special_tokens=False).ids
    )


def test_a_tokenizer_that_lost_its_normalisation_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    lost = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    lost.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    lost.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="written by transformers 5, which loses DeBERTa's NFKC"):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_json_without_the_prefixes_gets_them_behind_its_vocabulary(tmp_path: Path) -> None:
    stored = json.loads((MODEL / "tokenizer.json").read_text())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < 769]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    found = tokenizer.load(tmp_path / "tokenizer.json")
    assert [found.token_to_id(prefix) for prefix in tokenizer.PREFIXES] == [769, 770, 771, 772]
