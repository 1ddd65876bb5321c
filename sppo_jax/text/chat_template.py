"""Text to token ids and back: the chat template of the policy's tokenizer, in which a text stays a text."""

import functools
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.files import read_json
from sppo_jax.records import Prompt

PROBE, ANSWER = "Is this shown?", "It is shown."  # what a template must render, and what most do
# Llama 3.2's template writes today's date, and a run that goes on tomorrow must see the same ids: for a template
# that asks, it is always the day that Llama's templates fall back to. The line's end is the tag's own.
TODAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') | replace('%y', '24') }}{% endmacro %}\n"
)

Message = dict[str, str]  # role (system, user or assistant) and content


def load_tokenizer(directory: Path) -> Any:
    """The `transformers` tokenizer of a Hugging Face directory. Raises BadInput without one, or without a template."""
    from transformers import AutoTokenizer  # a second of imports that only those who tokenise should pay

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise BadInput(f"{directory}: no usable tokenizer: {_one_line(error)}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"{directory}: needs tokenizer.json (a fast tokenizer)")
    if not tokenizer.chat_template:
        raise BadInput(
            f"{directory}: the tokenizer has no chat template; use an instruction-tuned checkpoint"
        )
    try:
        shown = chat_text(tokenizer, PROBE)
    except Exception as error:  # jinja's, or raised by the template itself
        raise BadInput(f"{directory}: the chat template fails: {_one_line(error)}") from None
    if PROBE not in shown:
        raise BadInput(f"{directory}: the chat template does not show what the user says")
    if loose := _encoder(tokenizer).inseparable():
        raise BadInput(
            f"{directory}: a text that spells {loose[0]!r} would become that control token; "
            "remove it from the tokenizer model's own vocabulary"
        )
    return tokenizer


def eos_ids(directory: Path, tokenizer: Any, vocab: int) -> tuple[int, ...]:
    """Ids that end a response, in this order and without repeats: those of generation_config.json, the
    tokenizer's one, and the control token that the template writes after an assistant's message.

    Raises BadInput unless there is at least one and all lie in [0, vocab).
    """
    file = directory / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.exists() else None
    if named is None and not own_eos_ids(tokenizer):
        raise BadInput(
            f"{directory}: neither generation_config.json nor the tokenizer names an end of sequence"
        )
    found = named if isinstance(named, list) else [] if named is None else [named]
    if named == [] or not _all_ids(found, vocab):
        raise BadInput(f"{directory}: eos_token_id is {named!r}; needed ids from 0 to {vocab - 1}")
    ids = list(dict.fromkeys([*found, *own_eos_ids(tokenizer)]))
    if not _all_ids(ids, vocab):
        raise BadInput(
            f"{directory}: the tokenizer ends a sequence with one of {ids!r}; needed ids from 0 to {vocab - 1}"
        )
    return tuple(ids)


def own_eos_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer alone tells: its own end of sequence, and what its template ends a turn with."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        ends.append(_encoder(tokenizer).ids.get(_turn_end(tokenizer)[1]))
    return list(dict.fromkeys(i for i in ends if i is not None))


def chat_prompt(tokenizer: Any, text: str) -> Prompt:
    """The prompt as the policy reads it: a `conversation` of one message."""
    return Prompt(text, conversation(tokenizer, [{"role": "user", "content": text}]))


def conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Ids of a conversation up to where the policy speaks: template, generation header, one BOS where there is one.

    A message that spells a control token ("</s>") stays text: its pieces are ordinary tokens. Without such
    spellings the ids are those of the tokenizer's own apply_chat_template. Raises BadInput for roles, or an order
    of them, that the template refuses.
    """
    try:
        rendered = _render(tokenizer, messages, header=True)
    except Exception as error:  # jinja's, or raised by the template itself
        raise BadInput(f"the chat template refuses this conversation: {_one_line(error)}") from None
    return _encoder(tokenizer).encode(rendered)


def chat_text(tokenizer: Any, text: str) -> str:
    """The same as a string, for judges that want to see what the official code showed them."""
    return _apply(tokenizer, [{"role": "user", "content": text}], header=True)


def written_ids(tokenizer: Any, text: str, eos: tuple[int, ...]) -> list[int]:
    """Ids of a response that is known as text only, as they follow `conversation`'s, its end included.

    They are what the template's rendering of the finished turn adds to its generation header, control tokens
    that the text spells excepted; the end is the one the template writes, else the first of `eos`. Where a token
    would straddle header and response, the response is tokenised apart: the header's ids are given.
    """
    encoder = _encoder(tokenizer)
    asked = [{"role": "user", "content": PROBE}]
    header = _render(tokenizer, asked, header=True)
    response, (after, end) = encoder.hide(text, "assistant"), _turn_end(tokenizer)
    if after is not None:  # the template shows what an assistant says
        whole = _render(tokenizer, [*asked, {"role": "assistant", "content": text}], header=False)
        if whole.startswith(header) and whole.endswith(after):
            response = whole[len(header) : len(whole) - len(after)]
        response += after[: after.index(end)] + end
    ids = encoder.encode_after(header, response)
    return ids if end else [*ids, eos[0]]


def response_text(tokenizer: Any, ids: list[int]) -> str:
    """Ids of one response as text, without special tokens. Ids that no token has (embedding rows that only fill
    the matrix up) add nothing."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _apply(tokenizer: Any, messages: list[Message], *, header: bool) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = TODAY + template
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=header
        )
    )


def _render(tokenizer: Any, messages: list[Message], *, header: bool) -> str:
    """The template's string, with the control tokens that messages spell hidden from what `encode` looks for."""
    hide = _encoder(tokenizer).hide
    return _apply(
        tokenizer, [m | {"content": hide(m["content"], m["role"])} for m in messages], header=header
    )


def _turn_end(tokenizer: Any) -> tuple[str | None, str]:
    return _find_turn_end(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=4)
def _find_turn_end(tokenizer: Any, template: str) -> tuple[str | None, str]:
    """What the template writes after an assistant's last message, and the control token that this begins with.

    White space may come before the token. None for a template that shows no assistant; "" for no token.
    """
    messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}]
    try:
        _, shown, after = _apply(tokenizer, messages, header=False).rpartition(ANSWER)
    except Exception:  # jinja's, or raised by the template itself
        return None, ""
    end = _encoder(tokenizer).control.match(after.lstrip())
    return (after, end.group() if end else "") if shown else (None, "")


def _encoder(tokenizer: Any) -> "_Encoder":
    return _make_encoder(tokenizer, tokenizer.get_chat_template())


class _Encoder:
    """A copy of a tokenizer in which the template's control tokens go by names that no text can spell.

    Text is neutral to it: the control tokens' own spellings are not looked for. What the tokenizer does between
    two control tokens is left as it is, so that all other ids are the same.
    """

    def __init__(self, tokenizer: Any, template: str):
        """Raises whatever the template raises on one message."""
        from tokenizers import Tokenizer

        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content}
        written = _literals(template)
        # Tokens that are not "special" are control tokens where the template writes them. White space is not:
        # Gemma has tokens for runs of newlines.
        structure = {
            i: token
            for i, token in added.items()
            if token.special or (token.content in written and token.content.strip(" \t\r\n▁"))
        }
        self.ids = {token.content: i for i, token in structure.items()}
        self.unknown = tokenizer.unk_token_id
        nonce = secrets.token_hex(8)  # changes no id; keeps texts from naming the names
        self._hidden = {content: f"\ue000{nonce}.{i}\ue001" for content, i in self.ids.items()}
        self._shown = {hidden: content for content, hidden in self._hidden.items()}
        self._alias = {content: f"\ue002{nonce}.{i}\ue003" for content, i in self.ids.items()}
        self.control = _any_of(self.ids)
        self._hidden_pattern = _any_of(self._shown)
        self.backend = Tokenizer.from_str(_neutral(tokenizer.backend_tokenizer.to_str(), self.ids))
        self.backend.encode_special_tokens = True
        self.backend.add_tokens([_renamed(t, self._alias[t.content]) for t in structure.values()])
        self._real = {self.backend.token_to_id(alias): self.ids[c] for c, alias in self._alias.items()}
        # An assistant's "<think>" is its own word, and only the user's is not; turns are nobody's.
        turns = _apply(tokenizer, [{"role": "user", "content": PROBE}], header=True)
        self._not_the_assistants = _any_of(
            t.content for t in structure.values() if t.special or t.content in turns
        )

    def hide(self, text: str, role: str) -> str:
        """The text with every control token that it spells replaced by a stand-in."""
        pattern = self._not_the_assistants if role == "assistant" else self.control
        return pattern.sub(lambda match: self._hidden[match.group()], text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a string in which the control tokens that are meant are spelled, and all others hidden."""
        meant = self.control.sub(lambda match: self._alias[match.group()], rendered)
        shown = self._hidden_pattern.sub(lambda match: self._shown[match.group()], meant)
        try:
            ids = self.backend.encode(shown, add_special_tokens=False).ids
        except TypeError:  # no UTF-8 can be made of it
            raise BadInput(
                "a text holds half of a surrogate pair, which is no character; remove it"
            ) from None
        return [self._real.get(i, i) for i in ids]

    def encode_after(self, header: str, rendered: str) -> list[int]:
        """Ids of `rendered` as it follows `header`, whose own ids stay what they are without it."""
        # SentencePiece puts a space before a string. After a newline, which no merge crosses there, it does not.
        alone = "" if "".join(self.backend.encode("x", add_special_tokens=False).tokens) == "x" else "\n"
        for before in (header, alone):
            first, ids = self.encode(before), self.encode(before + rendered)
            if ids[: len(first)] == first:
                return ids[len(first) :]
        return self.encode(rendered)

    def inseparable(self) -> list[str]:
        """Control tokens that the model behind the added tokens makes out of their spelling."""
        ids = set(self.ids.values()) - {self.unknown}
        return [c for c in self.ids if ids & set(self.backend.encode(c, add_special_tokens=False).ids)]


@functools.lru_cache(maxsize=4)
def _make_encoder(tokenizer: Any, template: str) -> _Encoder:
    return _Encoder(tokenizer, template)


def _neutral(serialised: str, control: Iterable[str]) -> str:
    """tokenizer.json in which `control` are special, so that they can be switched off, and no merge makes them."""
    raw = json.loads(serialised)
    raw["truncation"] = raw["padding"] = None  # published files may carry settings of some training
    names = set(control)
    for token in raw["added_tokens"]:
        token["special"] = token["content"] in names
    if "merges" in raw["model"]:
        raw["model"]["merges"] = [m for m in raw["model"]["merges"] if "".join(m) not in names]
    return json.dumps(raw, ensure_ascii=False)


def _renamed(token: Any, content: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(
        content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=False,
    )  # fmt: skip


def _literals(template: str) -> str:
    """What a Jinja template can write of its own: text outside of tags and strings inside."""
    import jinja2

    tokens = jinja2.Environment().lex(template)
    return "\n".join(value for _, kind, value in tokens if kind in ("data", "string"))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the words that begins at a place, as the tokenizer itself does; none for no words."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _all_ids(ids: list[Any], vocab: int) -> bool:
    return all(type(i) is int and 0 <= i < vocab for i in ids)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
