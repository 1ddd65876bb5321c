"""Small tokenizers of the supported families, in directories laid out as published ones.

The vocabularies are made of a few words, but the properties of each family are kept: its added tokens and their flags, its
treatment of white space and bytes, its beginning of a sequence, its turns, and its files.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = """the quick brown fox can not find where its opposite is hot and cold and what you see is shown
[INST] find [/INST] What [/INST]The user system assistant model think Today Date Answer it. It is shown. Is this
shown? «naïve» café: one, two; (three) {four} </s> <s> <<SYS>> <</SYS>> <|user|> \n\nThe \n\n\nfox ["""

INST = """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant take turns') }}{% endif %}{% if m['role'] == 'user' %}
{{- USER }}{% else %}{{ ASSISTANT }}{% endif %}{% endfor %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}
{%- set content = system + m['content'] if loop.first else m['content'] %}{% if m['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}{% endfor %}"""
LLAMA_3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
DATED = """{{ bos_token }}{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n<|eot_id|>' }}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are the assistant.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Thoughts of earlier turns are dropped; the last turn has some, even if empty.
QWEN_3 = """{% for m in messages %}{% set content = m['content'] %}{% set thought = '' %}{% if m['role'] == 'assistant' %}
{%- if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- if loop.last %}{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """One family's tokenizer. `generation_eos` is for generation_config.json; `ends` are the tokens that end a response."""

    model_type: str
    tokenizer_class: str
    template: str
    backend: Callable[[], Tokenizer]
    generation_eos: list[str]
    ends: list[str]
    bos: str | None
    eos: str
    header: str  # the end of every prompt
    pad: str | None = None
    unk: str | None = None
    trims: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def write(family: Family, directory: Path, *, template: str = "jinja") -> Path:
    """Write a family's files. `template` is the place of the chat template: `jinja` (a file), `config`, `named` or `none`."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = family.backend()
    backend.save(str(directory / "tokenizer.json"))
    special = {f"{k}_token": getattr(family, k) for k in ("bos", "eos", "pad", "unk") if getattr(family, k)}
    config: dict[str, Any] = special | family.config | {"tokenizer_class": family.tokenizer_class}
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": 4096}
    if template == "jinja":
        (directory / "chat_template.jinja").write_text(family.template)
    elif template == "config":
        config["chat_template"] = family.template
    elif template == "named":
        other = {"name": "tool_use", "template": "{{ 'tools' }}"}
        config["chat_template"] = [other, {"name": "default", "template": family.template}]
    ends = [backend.token_to_id(token) for token in family.generation_eos]
    for name, value in {
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "generation_config.json": {"eos_token_id": ends[0] if len(ends) == 1 else ends},
        "config.json": {"model_type": family.model_type, "vocab_size": backend.get_vocab_size() + 7},
    }.items():
        (directory / name).write_text(json.dumps(value))
    return directory


def sentencepiece(
    first: list[str], *, dummy_prefix: str | None, added: list[AddedToken], newlines: bool = False
) -> Tokenizer:
    """Return a tokenizer with spaces in pieces and unknown characters as bytes; `first` begins the vocabulary.

    `dummy_prefix`: "normalizer" puts a space before every stretch between control tokens, "metaspace" before the
    string alone.
    """
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(
        WORDS.splitlines(), trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"])
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = [p for p in learned["vocab"] if p not in first]
    words = [*first, *(f"<0x{i:02X}>" for i in range(256)), *(p for p in pieces if p not in ("\n", "<unk>"))]
    merges = [tuple(m) for m in learned["merges"] if "\n" not in "".join(m)]
    # A converter that makes a merge of every two pieces whose concatenation is a piece also makes control tokens.
    for left, right in (("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")):
        words += [x for x in (left, right, left + right) if x not in words]
        merges += [(left, right)] if (left, right) not in merges else []
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )  # fmt: skip
    if dummy_prefix == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if dummy_prefix == "normalizer" else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add(backend, added)
    return backend


def byte_level(added: list[AddedToken], *, nfc: bool = False) -> Tokenizer:
    """Return a byte-level tokenizer with control tokens after the vocabulary."""
    pattern = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s"
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    _add(backend, added)
    return backend


def _add(backend: Tokenizer, added: list[AddedToken]) -> None:
    backend.add_special_tokens([t for t in added if t.special])
    backend.add_tokens([t for t in added if not t.special])


def _special(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, normalized=False, special=True) for content in contents]


def _plain(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, normalized=False, special=False) for content in contents]


LLAMA_CONTROL = ["<unk>", "<s>", "</s>"]
MISTRAL_CONTROL = ["[INST]", "[/INST]", "[TOOL_CALLS]"]
GEMMA_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_WORDS = ["\n", "\n\n", "▁▁", "▁▁▁", "<h1>"]
LLAMA_3_CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]  # fmt: skip
QWEN_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THOUGHT = ["<think>", "</think>"]


def _inst(user: str, assistant: str) -> str:
    return INST.replace("USER", user).replace("ASSISTANT", assistant)


def _llama(prefix: str) -> Callable[[], Tokenizer]:
    return lambda: sentencepiece(LLAMA_CONTROL, dummy_prefix=prefix, added=_special(*LLAMA_CONTROL))


def _mistral(template: str, prefix: str, config: dict[str, Any]) -> Family:
    return Family(
        "mistral", "LlamaTokenizer", template, _llama(prefix), ["</s>"], ["</s>"], "<s>", "</s>", "[/INST]",
        unk="<unk>", config=config,
    )  # fmt: skip


def _llama_3(template: str, ends: list[str]) -> Family:
    return Family(
        "llama", "PreTrainedTokenizerFast", template, lambda: byte_level(_special(*LLAMA_3_CONTROL)), ends,
        ["<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n", trims=True,
    )  # fmt: skip


def _qwen(model_type: str, template: str, plain: list[str]) -> Family:
    return Family(
        model_type, "Qwen2Tokenizer", template,
        lambda: byte_level(_special(*QWEN_CONTROL) + _plain(*plain), nfc=True), ["<|im_end|>", "<|endoftext|>"],
        ["<|im_end|>", "<|endoftext|>"], None, "<|im_end|>", "<|im_start|>assistant\n", pad="<|endoftext|>",
    )  # fmt: skip


FAMILIES = {
    "mistral_v0.1": _mistral(
        _inst("'[INST] ' + m['content'] + ' [/INST]'", "m['content'] + eos_token + ' '"), "normalizer", {"legacy": True}
    ),
    "mistral_v0.2": _mistral(
        _inst("' [INST] ' + m['content'] + ' [/INST]'", "' ' + m['content'] + eos_token"), "metaspace", {"legacy": False}
    ),
    "mistral_v0.3": Family(
        "mistral", "LlamaTokenizer",
        _inst("'[INST] ' + m['content'] + '[/INST]'", "' ' + m['content'] | trim + eos_token"),
        lambda: sentencepiece(
            LLAMA_CONTROL + MISTRAL_CONTROL, dummy_prefix="metaspace",
            added=_special(*LLAMA_CONTROL) + _plain(*MISTRAL_CONTROL),
        ),
        ["</s>"], ["</s>"], "<s>", "</s>", "[/INST]", unk="<unk>",
    ),
    "llama_2": Family(
        "llama", "LlamaTokenizerFast", LLAMA_2, _llama("normalizer"), ["</s>"], ["</s>"], "<s>", "</s>", "[/INST]",
        pad="</s>", unk="<unk>", trims=True, config={"legacy": True},
    ),
    "llama_3": _llama_3(LLAMA_3, ["<|end_of_text|>", "<|eot_id|>"]),
    "llama_3.2": _llama_3(DATED + LLAMA_3.removeprefix("{{ bos_token }}"), ["<|end_of_text|>", "<|eot_id|>"]),
    "gemma_2": Family(
        "gemma2", "GemmaTokenizer", GEMMA,
        lambda: sentencepiece(
            GEMMA_CONTROL + GEMMA_WORDS, dummy_prefix=None,
            added=_special(*GEMMA_CONTROL) + _plain(*GEMMA_WORDS),
        ),
        ["<eos>"], ["<eos>", "<end_of_turn>"], "<bos>", "<eos>", "<start_of_turn>model\n", pad="<pad>", unk="<unk>",
        trims=True,
    ),
    "qwen_2.5": _qwen("qwen2", CHATML, ["<tool_call>", "</tool_call>"]),
    "qwen_3": _qwen("qwen3", QWEN_3, THOUGHT),
}  # fmt: skip
