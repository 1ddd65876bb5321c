"""Stage 2, first half: a prompt and two responses → the token ids that PairRM reads.

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]

The tokenizer is read with `tokenizers`, never with transformers' AutoTokenizer: version 5 of that drops DeBERTa's NFKC
normalisation without a word, which moves scores by 0.6.

*Control tokens in the text.* A policy may emit "[SEP]" or "<|candidate1|>". The original replaces the first by a space,
takes "[CLS]", "[MASK]" and "[PAD]" for control tokens, and fails on the four prefixes. Here all of them become a space,
and because normalisation can still produce one ("［ＣＬＳ］" becomes "[CLS]"), control ids are dropped from what the
tokenizer returns. `neutralise=False` keeps the original's reading ("[SEP]" only), to compare with its numbers; even then
the three rows that the head reads are found by construction, never by searching for an id.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import layout

SOURCE_MAXLENGTH = 1224  # tokens of the prompt's segment, [CLS], prefix and [SEP] included
CANDIDATE_MAXLENGTH = 412  # tokens of a candidate's segment, before what the prompt leaves over
PREFIXES = {
    "<|source|>": "source_prefix_id",
    "<|candidate1|>": "cand1_prefix_id",
    "<|candidate2|>": "cand2_prefix_id",
    "<|candidate|>": "cand_prefix_id",
}
_SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")

Ids = np.ndarray  # int32 [tokens]


@dataclass(frozen=True)
class Pair:
    """What the model reads for one ordered pair: three segments, each `[CLS] <prefix> text [SEP]`, int32 [tokens]."""

    source: Ids
    first: Ids
    second: Ids

    def __len__(self) -> int:
        return len(self.source) + len(self.first) + len(self.second)

    @property
    def ids(self) -> Ids:
        """The whole input, int32 [len(self)], unpadded."""
        return np.concatenate([self.source, self.first, self.second])

    @property
    def marks(self) -> tuple[int, int, int]:
        """Positions in `ids` of the three prefix tokens: the rows of the hidden state that the head reads."""
        return 1, len(self.source) + 1, len(self.source) + len(self.first) + 1


class Formatter:
    """Turns texts into PairRM's ids. A prompt or response is tokenised once and reused for all of its pairs.

    The length budget belongs to the prompt, not to the batch as in the original: a prompt's segment of L tokens (at most
    `source_maxlength`) leaves each candidate `candidate_maxlength + (source_maxlength - L) // 2`; what is longer loses
    its right end and keeps its [SEP]. The limits come from the arguments, else from config.json, else 1224 and 412.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        *,
        source_maxlength: int | None = None,
        candidate_maxlength: int | None = None,
        neutralise: bool = True,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._prefix = {text: _token_id(tokenizer, text) for text in PREFIXES}
        for text, key in PREFIXES.items():
            if config.get(key, self._prefix[text]) != self._prefix[text]:
                raise BadInput(
                    f"PairRM: config.json has {key} {config[key]}, but tokenizer.json gives {text!r} the id "
                    f"{self._prefix[text]}: the two files do not belong together"
                )
        self._cls, self._sep = _token_id(tokenizer, "[CLS]"), _token_id(tokenizer, "[SEP]")
        self.pad_id = int(config.get("pad_token_id") or 0)
        self.source_maxlength = int(source_maxlength or config.get("source_maxlength") or SOURCE_MAXLENGTH)
        self.candidate_maxlength = int(
            candidate_maxlength or config.get("candidate_maxlength") or CANDIDATE_MAXLENGTH
        )
        if min(self.source_maxlength, self.candidate_maxlength) < 4:
            raise BadInput("PairRM: source_maxlength and candidate_maxlength must be at least 4 tokens")

        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        # [UNK] says nothing about structure, and ordinary text yields it too.
        control: dict[str, int | None] = {text: id for text, id in added.items() if text != "[UNK]"}
        control.update(self._prefix)
        control.update((text, tokenizer.token_to_id(text)) for text in _SPECIALS)
        written = sorted(control, key=len, reverse=True) if neutralise else ["[SEP]"]
        self._written = re.compile("|".join(map(re.escape, written)))
        self._dropped = {id for id in control.values() if id is not None} if neutralise else set()

    @classmethod
    def of(cls, checkpoint: layout.Checkpoint, **options: Any) -> "Formatter":
        """The formatter of a PairRM; `options` as for the class. Raises BadInput for an unreadable tokenizer."""
        try:
            tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
        except Exception as error:  # the Rust side raises plain Exception
            raise BadInput(f"PairRM: {str(checkpoint.tokenizer)!r} is unreadable: {error}") from None
        return cls(tokenizer, checkpoint.config, **options)

    def body(self, text: str) -> Ids:
        """Ids of a text by itself, int32 [tokens], any length: no prefix, no [CLS] or [SEP], nothing cut off."""
        # Through UTF-16 a surrogate pair becomes its character and a lone surrogate U+FFFD, which tokenizers accepts.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # The prefix is not part of this text as it is in the original: a combining mark at its start would fuse with
        # the ">" of the prefix in normalisation, and the prefix would be gone.
        ids = self._tokenizer.encode(self._written.sub(" ", text), add_special_tokens=False).ids
        return np.asarray([id for id in ids if id not in self._dropped], np.int32)

    def _segment(self, prefix: str, body: Ids, limit: int) -> Ids:
        return np.concatenate(
            [
                np.asarray([self._cls, self._prefix[prefix]], np.int32),
                body[: limit - 3],
                np.asarray([self._sep], np.int32),
            ]
        )

    def prompt(self, prompt: str, responses: list[str]) -> "PromptPairs":
        """Tokenise a prompt and its K responses; the result yields the ids of any ordered pair of them."""
        source = self._segment("<|source|>", self.body(prompt), self.source_maxlength)
        limit = self.candidate_maxlength + (self.source_maxlength - len(source)) // 2
        bodies = [self.body(text)[: limit - 3] for text in responses]
        return PromptPairs(
            source,
            [self._segment("<|candidate1|>", body, limit) for body in bodies],
            [self._segment("<|candidate2|>", body, limit) for body in bodies],
        )

    def pair(self, prompt: str, first: str, second: str) -> Pair:
        """The ids for one ordered pair: `first` is shown first."""
        return self.prompt(prompt, [first, second]).pair(0, 1)


@dataclass(frozen=True)
class PromptPairs:
    """A prompt's segment and, for each of its K responses, the segment it has when shown first and when second."""

    source: Ids
    as_first: list[Ids]
    as_second: list[Ids]

    def pair(self, i: int, j: int) -> Pair:
        """Response i shown first, j second. i == j is allowed: the model's reading of two equal responses."""
        return Pair(self.source, self.as_first[i], self.as_second[j])


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    id = tokenizer.token_to_id(text)
    if id is None:
        raise BadInput(
            f"PairRM: tokenizer.json does not know the token {text!r}; it is not a PairRM's tokenizer"
        )
    return int(id)
