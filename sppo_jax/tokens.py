"""Text to token ids and back: the chat template of the policy's tokenizer."""

import functools
from pathlib import Path
from typing import Any

from sppo_jax.errors import BadInput
from sppo_jax.models.hf import read_json
from sppo_jax.records import Prompt

PROBE = "Is this shown?"  # what a template must render
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
)


def load_tokenizer(directory: Path) -> Any:
    """The `transformers` tokenizer of a Hugging Face directory. Raises BadInput without one, or without a template."""
    from transformers import AutoTokenizer  # a second of imports that only those who tokenise should pay

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise BadInput(f"{directory}: no usable tokenizer: {' '.join(str(error).split())[:300]}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"{directory}: needs tokenizer.json (a fast tokenizer)")
    if not tokenizer.chat_template:
        raise BadInput(
            f"{directory}: the tokenizer has no chat template; use an instruction-tuned checkpoint"
        )
    try:
        shown = chat_text(tokenizer, PROBE)
    except Exception as error:  # jinja's, or raised by the template itself
        raise BadInput(
            f"{directory}: the chat template fails: {' '.join(str(error).split())[:300]}"
        ) from None
    if PROBE not in shown:
        raise BadInput(f"{directory}: the chat template does not show what the user says")
    return tokenizer


def eos_ids(directory: Path, tokenizer: Any, vocab: int) -> tuple[int, ...]:
    """Ids that end a response: those of generation_config.json if it names any, else the tokenizer's one.

    Raises BadInput unless there is at least one and all lie in [0, vocab).
    """
    file = directory / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.exists() else None
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise BadInput(
            f"{directory}: neither generation_config.json nor the tokenizer names an end of sequence"
        )
    ids = tuple(found) if isinstance(found, list) else (found,)
    if not ids or not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise BadInput(f"{directory}: eos_token_id is {found!r}; needed ids from 0 to {vocab - 1}")
    return ids


def chat_prompt(tokenizer: Any, text: str) -> Prompt:
    """The prompt as the policy reads it: template, generation header, one BOS where the family has one.

    Text that spells a control token ("</s>", "[INST]" where that is one) stays text: its pieces are ordinary
    tokens. Such a prompt's ids are template and text tokenised apart, all others' the template's own.
    """
    if _spells_control(tokenizer, text):
        return Prompt(text, _split_ids(tokenizer, text))
    message = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        message, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors=None
    )
    return Prompt(text, [int(i) for i in encoded["input_ids"]])


def chat_text(tokenizer: Any, text: str) -> str:
    """The same as a string, for judges that want to see what the official code showed them."""
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def response_text(tokenizer: Any, ids: list[int]) -> str:
    """Ids of one response as text, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _spells_control(tokenizer: Any, text: str) -> bool:
    return any(token in text for token in _control_tokens(tokenizer))


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special and token.content)


def _split_ids(tokenizer: Any, text: str) -> list[int]:
    marker = "\x00user\x00"  # cannot be part of a template
    before, after = chat_text(tokenizer, marker).split(marker)
    backend = tokenizer.backend_tokenizer
    header, tail = (backend.encode(part, add_special_tokens=False).ids for part in (before, after))
    backend.encode_special_tokens = True
    try:
        body = backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False
    return [*header, *body, *tail]
