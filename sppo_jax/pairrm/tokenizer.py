"""PairRM's tokenizer from its file: `tokenizer.json`, or `spm.model`, the SentencePiece model published with DeBERTa-v3.

It is read with `tokenizers` alone, never with transformers' AutoTokenizer: version 5 of transformers silently drops DeBERTa's
NFKC normalisation, which moves scores by 0.6.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from sppo_jax.errors import BadInput

FILES = ("tokenizer.json", "spm.model")  # the first that exists is read
PREFIXES = {
    "<|source|>": "source_prefix_id",
    "<|candidate1|>": "cand1_prefix_id",
    "<|candidate2|>": "cand2_prefix_id",
    "<|candidate|>": "cand_prefix_id",
}
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")  # DeBERTa's first ids, in this order
_UNIGRAM = 1
_PROBE = "［ＣＬＳ］ Ａ１ ½ ﬁ ① ｶﾞ ㍿ e\u0301 \u00a0\u200b\ufdfa \U0001f600"  # text that normalisation changes


def load(file: Path) -> Tokenizer:
    """Return the tokenizer, with PairRM's prefixes after the vocabulary if the file has none. Raises BadInput."""
    try:
        tokenizer = _from_spm(file) if file.suffix == ".model" else _from_json(file)
        tokenizer.encode(_PROBE)  # a damaged normalisation table shows only in use
    except (BadInput, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the Rust side are not Exceptions
        raise BadInput(f"PairRM: {str(file)!r} is damaged: its tokenizer fails with: {error}") from None
    if all(tokenizer.token_to_id(prefix) is None for prefix in PREFIXES):
        tokenizer.add_tokens([AddedToken(prefix, normalized=True) for prefix in PREFIXES])
    return tokenizer


def _from_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise BadInput(f"PairRM: {str(file)!r} is unreadable: {error}") from None
    if tokenizer.normalizer is not None and '{"type":"NFC"}' in tokenizer.normalizer.__getstate__().decode():
        raise BadInput(
            f"PairRM: {str(file)!r} was written by transformers 5, which loses DeBERTa's NFKC normalisation; "
            "put the published tokenizer.json or spm.model in its place"
        )
    return tokenizer


def _from_spm(file: Path) -> Tokenizer:
    """Return the tokenizer that transformers 4 makes of DeBERTa's spm.model. Raises BadInput."""
    _refuse_options(file.with_name("tokenizer_config.json"))
    try:
        pieces, kind, unknown, charsmap = _proto(file.read_bytes())
        if kind != _UNIGRAM or tuple(piece for piece, _ in pieces[:4]) != SPECIALS or unknown != 3:
            raise ValueError(
                f"its pieces do not begin with {', '.join(SPECIALS)}, or are not a unigram model's"
            )
        # Byte fallback stays off though the model has byte pieces: the original's fast tokenizer ignores them too.
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
        precompiled = [normalizers.Precompiled(charsmap)] if charsmap else []
    except Exception as error:  # of the Rust side, and ValueError
        raise BadInput(f"PairRM: {str(file)!r} is not DeBERTa's SentencePiece model: {error}") from None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), *precompiled, normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=text == "[UNK]", special=True) for text in (*SPECIALS, "[MASK]")]
    )
    return tokenizer


def _refuse_options(file: Path) -> None:
    """Raise BadInput for options beside spm.model that change the ids; published DeBERTa-v3 has none of them."""
    if not file.is_file():
        return
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"PairRM: {str(file)!r} is unreadable: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"PairRM: {str(file)!r} is not JSON: {error}") from None
    for key in ("do_lower_case", "split_by_punct"):
        if isinstance(options, dict) and options.get(key):
            raise BadInput(f"PairRM: {str(file)!r} has {key}, which this tokenizer does not support")


# --- SentencePiece's ModelProto: the six fields that are needed ----------------------------------------------------------


def _proto(data: bytes) -> tuple[list[tuple[str, float]], int, int, bytes]:
    """Return (pieces with their scores, kind of model, id of [UNK], normalisation table). Raises ValueError."""
    pieces: list[tuple[str, float]] = []
    kind, unknown, charsmap = _UNIGRAM, 0, b""
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece.get(1, b"").decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        elif field == 2:
            trained = dict(_fields(value))
            kind, unknown = trained.get(3, _UNIGRAM), trained.get(40, 0)
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, kind, unknown, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message's fields: an int for a varint, else bytes. Raises ValueError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case other:
                raise ValueError(f"wire type {other} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends inside the field at byte {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that begins at byte `at`, and the byte after it. Raises ValueError where there is none."""
    number = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
    raise ValueError(f"no number at byte {at}")
