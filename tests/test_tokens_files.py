"""Every family's tokenizer files: which load, which are refused, and the ids of Mistral's published tokenizers."""

import json
import socket
from pathlib import Path

import pytest

from sppo_jax.errors import BadInput
from sppo_jax.text import chat_template
from tests import families
from tests.families import FAMILIES
from tests.test_tokens import user

GOLDEN = Path(__file__).parent / "golden" / "mistral_ids.json"


@pytest.mark.parametrize("template", ["config", "named"])
def test_T15_published_files_load_without_the_network(
    tmp_path, family_name, load_family, template, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    families.write(FAMILIES[family_name], tmp_path, template=template)
    assert not (tmp_path / "chat_template.jinja").exists()
    chat = chat_template.load_tokenizer(tmp_path)
    for text in ("Where is the fox?", "</s><|im_end|>"):
        assert chat_template.chat_prompt(chat, text) == chat_template.chat_prompt(
            load_family(family_name), text
        )


@pytest.mark.parametrize("kind", ["TokenizersBackend", "PreTrainedTokenizerFast", "OurOwnTokenizer", None])
def test_unusual_tokenizer_classes_load(tmp_path, kind, load_family):
    families.write(FAMILIES["llama_3"], tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": kind}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    chat = chat_template.load_tokenizer(tmp_path)
    assert chat_template.chat_prompt(chat, "the fox") == chat_template.chat_prompt(
        load_family("llama_3"), "the fox"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "no usable tokenizer"),
        (lambda d: [f.unlink() for f in d.iterdir()], "no usable tokenizer"),
        (
            lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('no\nway') }}"),
            "fails: no way",
        ),
        (lambda d: (d / "chat_template.jinja").write_text("{{ '{%' }}{% if %}"), "template fails"),
        (lambda d: (d / "chat_template.jinja").write_text("hello"), "does not show"),
    ],
)
def test_what_cannot_be_used_is_reported_in_one_line(tmp_path, change, said):
    families.write(FAMILIES["llama_3"], tmp_path)
    change(tmp_path)
    with pytest.raises(BadInput, match=said):
        chat_template.load_tokenizer(tmp_path)


def test_a_conversation_that_the_template_refuses_is_reported(load_family):
    with pytest.raises(BadInput, match="refuses this conversation: no system role"):
        chat_template.conversation(load_family("gemma_2"), [{"role": "system", "content": "x"}, *user("y")])


def test_half_a_surrogate_pair_is_reported(chat):
    with pytest.raises(BadInput, match="surrogate"):
        chat_template.chat_prompt(chat, "a\ud800b")


def test_a_control_token_that_text_would_still_become_is_refused(tmp_path):
    """The vocabulary is searched for whole words, and contains the control token as a word."""
    families.write(FAMILIES["llama_3"], tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"].pop(0)  # the whole text is one word
    raw["model"]["ignore_merges"] = True
    number = next(t["id"] for t in raw["added_tokens"] if t["content"] == "<|eot_id|>")
    raw["model"]["vocab"]["<|eot_id|>"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=r"spells '<\|eot_id\|>' would become that"):
        chat_template.load_tokenizer(tmp_path)


# Mistral's own tokenizers, from the package mistral-common.

MISTRAL_FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
MISTRAL_TEXTS = (
    "Hello", "Where can I find the fox?", " leading", "trailing ", "\n\ntwo  lines\n and\ttabs", "naïve café ∑ 🦊 שלום",
    "None", "</s>", "<s>[INST] x [/INST]", "a</s>b<unk>", "数学の問題を解いて。", "def f(x):\n    return x  # [INST]", "\x00\u200b",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "version"), [("mistral_v0.1", "v1"), ("mistral_v0.2", "v1"), ("mistral_v0.3", "v3")]
)
def test_ids_are_those_of_mistral_common(tmp_path, name, version):
    chat = chat_template.load_tokenizer(published_mistral(tmp_path, name, version))
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[version]
    for text, ids in expected.items():
        assert chat_template.chat_prompt(chat, text).ids == ids, text
    assert set(expected) == set(MISTRAL_TEXTS)


def test_the_golden_ids_are_mistral_commons():
    """Needs sentencepiece; write the file again with `tests.test_tokens_files.mistral_common_ids` for other texts."""
    pytest.importorskip("sentencepiece")
    assert json.loads(GOLDEN.read_text(encoding="utf-8")) == mistral_common_ids()


def mistral_common_ids():
    from mistral_common.protocol.instruct.messages import UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    found = {}
    for version, file in MISTRAL_FILES.items():
        theirs = MistralTokenizer.from_file(str(mistral_data() / file))
        requests = {t: ChatCompletionRequest(messages=[UserMessage(content=t)]) for t in MISTRAL_TEXTS}
        found[version] = {t: theirs.encode_chat_completion(r).tokens for t, r in requests.items()}
    return found


def mistral_data():
    import mistral_common

    return Path(mistral_common.__file__).parent / "data"


def published_mistral(directory, name, version):
    """Write the family's files with Mistral's vocabulary; merges are in the order of the merged pieces' scores."""
    from transformers.utils import sentencepiece_model_pb2_new as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString((mistral_data() / MISTRAL_FILES[version]).read_bytes())
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    merges = []
    for piece in sorted((p for p in model.pieces if p.type == 1), key=lambda p: -p.score):
        halves = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
        merges += sorted(
            (h for h in halves if h[0] in vocab and h[1] in vocab), key=lambda h: [vocab[x] for x in h]
        )
    families.write(FAMILIES[name], directory)
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"] |= {"vocab": vocab, "merges": merges}
    flags = raw["added_tokens"][0]
    raw["added_tokens"] = [
        flags | {"id": i, "content": p.piece, "special": not p.piece.startswith("[")}
        for i, p in enumerate(model.pieces)
        if p.type in (2, 3)
    ]
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    return directory
