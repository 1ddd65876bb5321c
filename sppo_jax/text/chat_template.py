"""Text to token ids and back, by the chat template of the policy's tokenizer. No text can become a control token."""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput, one_line
from sppo_jax.files import is_file, read_json
from sppo_jax.records import Prompt
from sppo_jax.text import place, template_options
from sppo_jax.text.messages import Message, messages_of

# A user's message, which every template must render, and a response, which most templates render.
PROBE, ANSWER = "Is this shown?", "It is shown."
# The conversations that end with PROBE, for which a template must write its generation header.
ASKED = {
    "one message": [("user", PROBE)],
    "a longer conversation": [("user", "Is it hot?"), ("assistant", "It is cold."), ("user", PROBE)],
    "a conversation with a system message": [("system", "Be brief."), ("user", PROBE)],
}
SHOWN = 300  # characters of a library's message
# Llama 3.2's template writes today's date, but a run that resumes tomorrow must see the same ids. For a template that
# calls strftime_now, it is always the day that Llama's templates fall back to. transformers passes no function on, hence a
# macro with the text of every code; "%%" waits as NUL. The tag removes its own line's end.
CODES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ"]
DAY = [(code, datetime.datetime(2024, 7, 26).strftime(code)) for code in CODES]
TODAY = "{{% macro strftime_now(format) %}}{{{{ format {} }}}}{{% endmacro %}}\n".format(
    " ".join(
        f"| replace({json.dumps(code)}, {json.dumps(text)})"
        for code, text in [("%%", "\0"), *DAY, ("\0", "%")]
    )
)


class Refused(BadInput):
    """A conversation whose roles, or their order, the chat template refuses."""


def load_tokenizer(directory: Path, options: Mapping[str, Any] | None = None) -> Any:
    """Return the `transformers` tokenizer of a Hugging Face directory, whose template has these options in every rendering.

    Raises BadInput without a fast tokenizer, without a chat template that shows the user's message and writes a generation
    header, for an option that it never reads, and for a tokenizer whose model would turn text into a control token.
    """
    from transformers import AutoTokenizer  # here, because it takes a second to import

    from sppo_jax.models import config_json  # and this imports jax

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **config_json.for_tokenizer(directory)
        )
        # A token's text that is not one is accepted, and found out when its id is looked up.
        tokenizer.convert_tokens_to_ids([PROBE, *tokenizer.all_special_tokens])
    except Exception as error:  # transformers raises many kinds here
        if reason := config_json.why_unread(directory):
            raise BadInput(f"{directory}/config.json: transformers refuses it: {reason[:SHOWN]}") from None
        raise BadInput(
            f"{directory}: no usable tokenizer (of {_tokenizer_files(directory)}): "
            f"{type(error).__name__}: {one_line(error)[:SHOWN]}; restore its files, or download them again"
        ) from None
    if not tokenizer.is_fast:
        raise BadInput(f"{directory}: needs tokenizer.json (a fast tokenizer)")
    _check_named(directory, tokenizer)
    if options:
        template_options.apply(tokenizer, options, str(directory))
    try:
        shown = chat_text(tokenizer, PROBE)
    except Exception as error:  # of jinja, or raised by the template itself
        raise BadInput(f"{directory}: the chat template fails: {one_line(error)[:SHOWN]}") from None
    if PROBE not in shown:
        raise BadInput(f"{directory}: the chat template does not show what the user says")
    for name, asked in ASKED.items():
        if fault := _misplaced(directory, tokenizer, asked):
            raise BadInput(f"{directory}: the chat template ends the prompt of {name} {fault}")
    if loose := _encoder(tokenizer).inseparable():
        raise BadInput(
            f"{directory}: a text that spells {loose[0]!r} would become that control token; "
            "remove it from the tokenizer model's own vocabulary"
        )
    return tokenizer


def eos_ids(directory: Path, tokenizer: Any, vocab: int) -> tuple[int, ...]:
    """Return the ids that end a response, in this order and without repeats.

    They are eos_token_id in generation_config.json, the tokenizer's end of sequence, and the control token that the
    template writes after an assistant's message. Raises BadInput unless there is at least one and all lie in [0, vocab).
    """
    named = _named_eos(directory)
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
    """Return the ends that the tokenizer alone defines: its end of sequence, and its template's end of a turn."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        ends.append(_encoder(tokenizer).ids.get(_turn_end(tokenizer)[1]))
    return list(dict.fromkeys(i for i in ends if i is not None))


def chat_prompt(tokenizer: Any, text: str) -> Prompt:
    """Return the prompt that the policy reads for `text`, a message of the user's or a conversation (text.messages)."""
    return Prompt(text, conversation(tokenizer, messages_of(text)))


def conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the ids of a conversation up to the policy's turn, with the generation header and at most one BOS.

    A message that spells a control token ("</s>") stays text: its pieces are ordinary tokens. Without such spellings the
    ids are those of the tokenizer's own apply_chat_template. Raises Refused for roles, or an order of roles, that the
    template refuses.
    """
    try:
        rendered = _render(tokenizer, messages, header=True)
    except Exception as error:  # of jinja, or raised by the template itself
        raise Refused(f"the chat template refuses this conversation: {one_line(error)[:SHOWN]}") from None
    return _encoder(tokenizer).encode(rendered)


def chat_text(tokenizer: Any, text: str) -> str:
    """Return the rendered prompt as a string, for judges that read the prompts as the official code renders them."""
    return _apply(tokenizer, messages_of(text), header=True)


def written_ids(tokenizer: Any, text: str, eos: tuple[int, ...]) -> list[int]:
    """Return the ids of a response that is known as text only, as they follow `conversation`'s, with its end.

    They are the ids that the finished turn, rendered by the template, adds to the generation header, except that control
    tokens spelled in the text stay text. The end is the one that the template writes, else the first of `eos`. Where a
    token would straddle header and response, the response is tokenised by itself, because the header's ids are fixed.
    """
    encoder = _encoder(tokenizer)
    asked = [{"role": "user", "content": PROBE}]
    header = _render(tokenizer, asked, header=True)
    response, (after, end) = encoder.hide(text, "assistant"), _turn_end(tokenizer)
    if after is not None:  # the template renders assistants' messages
        whole = _render(tokenizer, [*asked, {"role": "assistant", "content": text}], header=False)
        if whole.startswith(header) and whole.endswith(after):
            response = whole[len(header) : len(whole) - len(after)]
        response += after[: after.index(end)] + end
    ids = encoder.encode_after(header, response)
    return ids if end else [*ids, eos[0]]


def response_text(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of a response's ids, without special tokens.

    Ids without a token (embedding rows that only pad the matrix) add nothing.
    """
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _check_named(directory: Path, tokenizer: Any) -> None:
    """Raise BadInput unless the tokenizer has one chat template, or a default one of several."""
    found = tokenizer.chat_template
    if isinstance(found, dict) and "default" not in found:
        raise BadInput(
            f"{directory}: has {len(found)} chat templates ({', '.join(sorted(found))}) and none of them is the default; put "
            "the default one into chat_template.jinja"
        )
    if not found and is_file(directory / "chat_template.json"):
        raise BadInput(
            f"{directory}: the tokenizer has no chat template: transformers reads chat_template.json for processors only; "
            "put its text into chat_template.jinja"
        )
    if not found:
        raise BadInput(
            f"{directory}: the tokenizer has no chat template; use an instruction-tuned checkpoint"
        )


def _tokenizer_files(directory: Path) -> str:
    """Return the names of a directory's files that a tokenizer may be made of, or "no tokenizer file"."""
    names = sorted(
        p.name for p in directory.glob("*") if re.search("token|tekken|vocab|merges|spiece", p.name)
    )
    return one_line(Exception(", ".join(names)))[:SHOWN] or "no tokenizer file"


def _named_eos(directory: Path) -> Any:
    """Return eos_token_id of generation_config.json, whatever it is; None without."""
    file = directory / "generation_config.json"
    return read_json(file).get("eos_token_id") if is_file(file) else None


def _misplaced(directory: Path, tokenizer: Any, asked: list[tuple[str, str]]) -> str:
    """Return what is wrong with the end of the prompt of `asked` (place.fault); "" for roles that the template refuses."""
    messages = [{"role": role, "content": content} for role, content in asked]
    try:
        prompt = _apply(tokenizer, messages, header=True)
    except Exception:  # of jinja, or raised by the template itself
        return ""
    try:
        plain = _apply(tokenizer, messages, header=False)
        whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}], header=False)
    except Exception:
        plain = whole = ""
    # Only what follows the last message: what is before it may depend on the number of messages.
    before, answered, _ = whole.rpartition(ANSWER)
    _, asked_there, needed = before.rpartition(PROBE)
    known = answered and asked_there
    return place.fault(_after(prompt), _after(plain), needed if known else None, _ends(directory, tokenizer))


def _after(prompt: str) -> str:
    """Return what a prompt holds after the last message; all of it where the message is not shown."""
    return prompt.rpartition(PROBE)[2]


def _ends(directory: Path, tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the spellings of all tokens that end a response."""
    named = _named_eos(directory)
    ids = [*(named if isinstance(named, list) else [named]), *own_eos_ids(tokenizer)]
    spelled = {i: content for content, i in _encoder(tokenizer).ids.items()}
    return _any_of(spelled[i] for i in ids if type(i) is int and i in spelled)


def _apply(tokenizer: Any, messages: list[Message], *, header: bool) -> str:
    """Return the template's string, always with the same date; `header`: with the generation header."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = TODAY + template
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=header
        )
    )


def _render(tokenizer: Any, messages: list[Message], *, header: bool) -> str:
    """Return the template's string in which control tokens spelled by messages are hidden from `_Encoder.encode`."""
    hide = _encoder(tokenizer).hide
    return _apply(
        tokenizer, [m | {"content": hide(m["content"], m["role"])} for m in messages], header=header
    )


def _turn_end(tokenizer: Any) -> tuple[str | None, str]:
    return _find_turn_end(tokenizer, tokenizer.get_chat_template())


@functools.lru_cache(maxsize=4)
def _find_turn_end(tokenizer: Any, template: str) -> tuple[str | None, str]:
    """Return the text that the template writes after an assistant's last message, and the control token it begins with.

    White space may precede the token. The text is None for a template that does not render assistants; the token is ""
    if there is none.
    """
    messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": ANSWER}]
    try:
        _, shown, after = _apply(tokenizer, messages, header=False).rpartition(ANSWER)
    except Exception:  # of jinja, or raised by the template itself
        return None, ""
    end = _encoder(tokenizer).control.match(after.lstrip())
    return (after, end.group() if end else "") if shown else (None, "")


def _encoder(tokenizer: Any) -> "_Encoder":
    return _make_encoder(tokenizer, tokenizer.get_chat_template())


class _Encoder:
    """A copy of a tokenizer in which the template's control tokens have names that no text can spell.

    The control tokens' own spellings are ordinary text to it. The tokenisation between two control tokens is unchanged,
    so all other ids are the same.
    """

    def __init__(self, tokenizer: Any, template: str):
        """Build the copy. Raises what the template raises for one message."""
        from tokenizers import Tokenizer

        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content}
        written = _literals(template)
        # A token that is not "special" is a control token if the template writes it, unless it is white space: Gemma has
        # tokens for runs of newlines.
        structure = {
            i: token
            for i, token in added.items()
            if token.special or (token.content in written and token.content.strip(" \t\r\n▁"))
        }
        self.ids = {token.content: i for i, token in structure.items()}
        self.unknown = tokenizer.unk_token_id
        nonce = secrets.token_hex(8)  # keeps texts from spelling the names; does not change ids
        self._hidden = {content: f"\ue000{nonce}.{i}\ue001" for content, i in self.ids.items()}
        self._shown = {hidden: content for content, hidden in self._hidden.items()}
        self._alias = {content: f"\ue002{nonce}.{i}\ue003" for content, i in self.ids.items()}
        self.control = _any_of(self.ids)
        self._hidden_pattern = _any_of(self._shown)
        self.backend = Tokenizer.from_str(_neutral(tokenizer.backend_tokenizer.to_str(), self.ids))
        self.backend.encode_special_tokens = True
        self.backend.add_tokens([_renamed(t, self._alias[t.content]) for t in structure.values()])
        self._real = {self.backend.token_to_id(alias): self.ids[c] for c, alias in self._alias.items()}
        # An assistant may write content tokens such as <think>, a user may not; neither may write turn markers.
        turns = _apply(tokenizer, [{"role": "user", "content": PROBE}], header=True)
        self._not_the_assistants = _any_of(
            t.content for t in structure.values() if t.special or t.content in turns
        )

    def hide(self, text: str, role: str) -> str:
        """Return the text with every control token that `role` may not write replaced by a stand-in."""
        pattern = self._not_the_assistants if role == "assistant" else self.control
        return pattern.sub(lambda match: self._hidden[match.group()], text)

    def encode(self, rendered: str) -> list[int]:
        """Return the ids of a string in which intended control tokens are spelled and all others hidden.

        Raises BadInput for half of a surrogate pair.
        """
        meant = self.control.sub(lambda match: self._alias[match.group()], rendered)
        shown = self._hidden_pattern.sub(lambda match: self._shown[match.group()], meant)
        try:
            ids = self.backend.encode(shown, add_special_tokens=False).ids
        except TypeError:  # not encodable as UTF-8
            raise BadInput(
                "a text holds half of a surrogate pair, which is no character; remove it"
            ) from None
        return [self._real.get(i, i) for i in ids]

    def encode_after(self, header: str, rendered: str) -> list[int]:
        """Return the ids of `rendered` after `header`, whose ids must stay the same as without `rendered`."""
        # SentencePiece puts a space before a string, but not after a newline, which no merge crosses.
        alone = "" if "".join(self.backend.encode("x", add_special_tokens=False).tokens) == "x" else "\n"
        for before in (header, alone):
            first, ids = self.encode(before), self.encode(before + rendered)
            if ids[: len(first)] == first:
                return ids[len(first) :]
        return self.encode(rendered)

    def inseparable(self) -> list[str]:
        """Return the control tokens that the tokenizer's model itself makes of their spelling."""
        ids = set(self.ids.values()) - {self.unknown}
        return [c for c in self.ids if ids & set(self.backend.encode(c, add_special_tokens=False).ids)]


@functools.lru_cache(maxsize=4)
def _make_encoder(tokenizer: Any, template: str) -> _Encoder:
    return _Encoder(tokenizer, template)


def _neutral(serialised: str, control: Iterable[str]) -> str:
    """Return tokenizer.json with `control` as special tokens, which can be switched off, and without merges to them."""
    raw = json.loads(serialised)
    raw["truncation"] = raw["padding"] = None  # published files may contain settings of a training run
    names = set(control)
    for token in raw["added_tokens"]:
        token["special"] = token["content"] in names
    if "merges" in raw["model"]:
        raw["model"]["merges"] = [m for m in raw["model"]["merges"] if "".join(m) not in names]
    return json.dumps(raw, ensure_ascii=False)


def _renamed(token: Any, content: str) -> Any:
    """Return a copy of an added token with other content."""
    from tokenizers import AddedToken

    return AddedToken(
        content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=False,
    )  # fmt: skip


def _literals(template: str) -> str:
    """Return all text that a Jinja template itself contains: outside of tags, and strings inside."""
    import jinja2

    tokens = jinja2.Environment().lex(template)
    return "\n".join(value for _, kind, value in tokens if kind in ("data", "string"))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of the words at a position, as tokenizers do; nothing if no words."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _all_ids(ids: list[Any], vocab: int) -> bool:
    """Return whether all of `ids` are integers in [0, vocab)."""
    return all(type(i) is int and 0 <= i < vocab for i in ids)
