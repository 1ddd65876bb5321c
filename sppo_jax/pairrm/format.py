"""Stage 2, first half: a prompt and two responses → the token ids that PairRM reads.

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]

*Control tokens in the text.* A policy may write "[SEP]" or "<|candidate1|>". The original replaces "[SEP]" by a space,
reads "[CLS]", "[MASK]" and "[PAD]" as control tokens, and fails on the four prefixes. Here all of them become a space, and
because normalisation can still produce one ("［ＣＬＳ］" becomes "[CLS]"), control ids are dropped from the tokenizer's
output. `neutralise=False` keeps the original's reading ("[SEP]" only), to compare with its numbers; even then the three rows
that the head reads are found by construction, never by searching for an id.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import files
from sppo_jax.pairrm.tokenizer import PREFIXES, load

SOURCE_MAXLENGTH = 1224  # tokens of the prompt's segment, [CLS], prefix and [SEP] included
CANDIDATE_MAXLENGTH = 412  # tokens of a candidate's segment; it gets more where the prompt is short
_SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")

Ids = np.ndarray  # int32 [tokens]


@dataclass(frozen=True)
class TextPair:
    """The model's input for one ordered pair: three segments, each `[CLS] <prefix> text [SEP]`, int32 [tokens]."""

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
        """Positions in `ids` of the three prefix tokens: the rows of the hidden states that the head reads."""
        return 1, len(self.source) + 1, len(self.source) + len(self.first) + 1


@dataclass(frozen=True)
class Limits:
    """The most tokens that PairRM reads of each segment, [CLS], prefix and [SEP] included. 0 means the checkpoint's limit.

    The budget belongs to a prompt, not to a batch as in the original: of `total`, the prompt's segment takes L tokens (at
    most `source`), and each response gets (total - L) // 2, which is at least `candidate`. A longer text loses its right
    end and keeps its [SEP].
    """

    source: int = 0
    candidate: int = 0
    total: int = 0  # 0: source + 2 candidate

    def of(self, config: Mapping[str, Any]) -> "Limits":
        """Return the limits with every 0 filled in from config.json, else with 1224 and 412.

        Raises BadInput for limits that leave no room for text.
        """
        source = self.source or int(config.get("source_maxlength") or SOURCE_MAXLENGTH)
        candidate = self.candidate or int(config.get("candidate_maxlength") or CANDIDATE_MAXLENGTH)
        total = self.total or source + 2 * candidate
        if min(source, candidate) < 4:
            raise BadInput(
                f"PairRM: limits of {source} tokens for the prompt and {candidate} for a response leave no room for "
                "text; each must be at least 4"
            )
        if total < source + 2 * candidate:
            raise BadInput(
                f"PairRM: a total of {total} tokens is less than a prompt of {source} and two responses of {candidate} "
                f"take; make it at least {source + 2 * candidate}, or the others smaller"
            )
        return Limits(source, candidate, total)


class Formatter:
    """Turns texts into PairRM's ids. Each prompt and response is tokenised once for all of its pairs."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        limits: Limits = Limits(),
        *,
        neutralise: bool = True,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._prefix = {text: _token_id(tokenizer, text) for text in PREFIXES}
        for text, key in PREFIXES.items():
            if config.get(key, self._prefix[text]) != self._prefix[text]:
                raise BadInput(
                    f"PairRM: config.json has {key} {config[key]}, but the tokenizer gives {text!r} the id "
                    f"{self._prefix[text]}: the two files do not belong together"
                )
        top = max(tokenizer.get_vocab().values())
        if top >= config.get("vocab_size", top + 1):
            raise BadInput(
                f"PairRM: the tokenizer has ids up to {top}, but the network only {config['vocab_size']} tokens: the "
                "two files do not belong together"
            )
        self._cls, self._sep = _token_id(tokenizer, "[CLS]"), _token_id(tokenizer, "[SEP]")
        self.pad_id = int(config.get("pad_token_id") or 0)
        self.limits = limits.of(config)

        added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        # [UNK] is not structure, and ordinary text yields it too.
        control: dict[str, int | None] = {text: id for text, id in added.items() if text != "[UNK]"}
        control.update(self._prefix)
        control.update((text, tokenizer.token_to_id(text)) for text in _SPECIALS)
        written = sorted(control, key=len, reverse=True) if neutralise else ["[SEP]"]
        self._written = re.compile("|".join(map(re.escape, written)))
        self._dropped = {id for id in control.values() if id is not None} if neutralise else set()

    @classmethod
    def of(
        cls,
        checkpoint: files.Checkpoint,
        limits: Limits = Limits(),
        *,
        neutralise: bool = True,
    ) -> "Formatter":
        """Return the formatter of a checkpoint. Raises BadInput for an unreadable tokenizer or impossible limits."""
        return cls(load(checkpoint.tokenizer), checkpoint.config, limits, neutralise=neutralise)

    def body(self, text: str) -> Ids:
        """Return the ids of a text by itself, int32 [tokens]: no prefix, no [CLS] or [SEP], nothing cut off."""
        # Through UTF-16 a surrogate pair becomes its character, and a lone surrogate U+FFFD, which tokenizers accepts.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Unlike in the original, the prefix is not tokenised with the text: a combining mark at the start of the text would
        # fuse with the ">" of the prefix in normalisation, and the prefix would be lost.
        ids = self._tokenizer.encode(self._written.sub(" ", text), add_special_tokens=False).ids
        return np.asarray([id for id in ids if id not in self._dropped], np.int32)

    def _segment(self, prefix: str, body: Ids, limit: int) -> Ids:
        """Return `[CLS] <prefix> body [SEP]`, int32, with the body's right end cut off beyond `limit` tokens."""
        return np.concatenate(
            [
                np.asarray([self._cls, self._prefix[prefix]], np.int32),
                body[: limit - 3],
                np.asarray([self._sep], np.int32),
            ]
        )

    def prompt(self, prompt: str, responses: list[str]) -> "PromptPairs":
        """Tokenise a prompt and its K responses; the result gives the ids of every ordered pair."""
        asked = self.body(prompt)
        source = self._segment("<|source|>", asked, self.limits.source)
        limit = (self.limits.total - len(source)) // 2
        bodies = [self.body(text) for text in responses]
        return PromptPairs(
            source,
            [self._segment("<|candidate1|>", body, limit) for body in bodies],
            [self._segment("<|candidate2|>", body, limit) for body in bodies],
            cut_prompt=len(asked) > self.limits.source - 3,
            cut_responses=[len(body) > limit - 3 for body in bodies],
        )

    def pair(self, prompt: str, first: str, second: str) -> TextPair:
        """Return the input for one ordered pair, `first` shown first."""
        return self.prompt(prompt, [first, second]).pair(0, 1)


@dataclass(frozen=True)
class PromptPairs:
    """A prompt's segment, and for each of its K responses the segment when shown first and the one when shown second."""

    source: Ids
    as_first: list[Ids]
    as_second: list[Ids]
    cut_prompt: bool  # whether the model reads only the beginning of the prompt
    cut_responses: list[bool]  # [K], whether it reads only the beginning of each response

    def pair(self, i: int, j: int) -> TextPair:
        """Return the input with response i shown first and j second. i == j is allowed: two equal responses."""
        return TextPair(self.source, self.as_first[i], self.as_second[j])


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    """Return the id of a token. Raises BadInput where the tokenizer does not have it."""
    id = tokenizer.token_to_id(text)
    if id is None:
        raise BadInput(f"PairRM: the tokenizer has no token {text!r}; it is not a PairRM's tokenizer")
    return int(id)
