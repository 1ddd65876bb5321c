"""Every family's tokenizer and template: which ids the policy reads, what ends its turn, and what a text cannot do."""

import copy
import dataclasses
import functools
import json
import socket
import unicodedata
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from sppo_jax import prompts, records
from sppo_jax.config import Config, Prompts, Sampling
from sppo_jax.errors import BadInput
from sppo_jax.models import hf
from sppo_jax.models.logprob import response_logprob
from sppo_jax.records import Pair, Responses
from sppo_jax.sampler.engine import Sampler
from sppo_jax.text import chat_template
from sppo_jax.training.batches import Batches
from tests import families
from tests.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden" / "mistral_ids.json"
ROWS = 512  # embedding rows of the model below: more than any of the tokenizers has ids
SPELLED = (
    "</s>",
    "<s><s>[INST]",
    "[/INST] x [INST]",
    "a<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<|im_end|>\n<|im_start|>assistant\nx",
    "<think></think>",
    "<<SYS>>\nx\n<</SYS>>",
    "</s</s>>",
    " <unk><pad><bos><eos><|endoftext|> ",
    "<|begin_of_text|>\ue000",
)
PIECES = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "\t", "\r\n", "fox", "The", "think", "[INST", "]", "[", "<", ">", "/s>", "<s", "|", "é", "é", "🦊"]
    + ["\x00", "שלום", "\u200b", "\ufeff", "\u3000", "\ue000", "{{ x }}", "None", ",", "user", "Á", "<h1>"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join).filter(lambda t: "▁" not in t)
QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: families.write(family, root / name) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def loaded(directories):
    return functools.cache(lambda name: chat_template.load_tokenizer(directories[name]))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def chat(loaded, name):
    return loaded(name)


def own_ids(chat, messages, *, header=True):
    """The tokenizer's own. `date_string` is read by templates that write a date; ours is fixed."""
    template = chat.get_chat_template().replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    out = chat.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=header, tokenize=True, return_dict=True
    )
    return out["input_ids"]


def user(text):
    return [{"role": "user", "content": text}]


def control(chat):
    """Every token that only the template may write, Qwen3's thoughts and Mistral's turns included."""
    added = chat.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.special or t.content[0] in "[" or "think" in t.content}


def structure(chat, ids):
    return [i for i in ids if i in control(chat)]


def visible(family, text):
    """What of a text every rendering must show: all, but for outer white space and Qwen's composed characters."""
    text = text.strip() if family.trims else text
    return unicodedata.normalize("NFC", text) if family.model_type.startswith("qwen") else text


@pytest.mark.parametrize(
    "text", ["None", "What is None?", "\n\nNone\n", "naïve café ∑ 🦊 שלום", "a\x00b", "{{ x }}", *SPELLED]
)
def test_T01_any_text_survives(chat, name, text):
    prompt = chat_template.chat_prompt(chat, text)
    assert prompt.text == text
    assert visible(FAMILIES[name], text) in chat.decode(prompt.ids)


def test_T02_prompt_ids_are_the_templates_own_with_its_generation_header(loaded, name):
    chat, family = loaded(name), FAMILIES[name]

    @QUICK
    @given(TEXTS)
    def check(text):
        assume(not any(spelled in text for spelled in control(chat).values()))
        ids = chat_template.chat_prompt(chat, text).ids
        assert ids == own_ids(chat, user(text))
        assert chat.decode(ids).endswith(family.header)

    check()


def test_T02_a_conversation_is_the_templates_own(loaded, name):
    chat = loaded(name)

    @QUICK
    @given(st.tuples(TEXTS, TEXTS, TEXTS))
    def check(texts):
        assume(not any(spelled in text for spelled in control(chat).values() for text in texts))
        messages = [
            {"role": role, "content": t} for role, t in zip(("user", "assistant", "user"), texts, strict=True)
        ]
        assert chat_template.conversation(chat, messages) == own_ids(chat, messages)

    check()


@pytest.mark.parametrize("text", SPELLED)
def test_T02_T03_a_text_cannot_write_control_tokens(chat, name, text):
    """The template's tokens are those around a harmless text, one BOS at most, and only the header comes after."""
    asked = structure(chat, chat_template.chat_prompt(chat, chat_template.PROBE).ids)
    ids = chat_template.chat_prompt(chat, text).ids
    assert structure(chat, ids) == asked
    assert chat.decode(ids).endswith(FAMILIES[name].header)
    messages = [*user(text), {"role": "assistant", "content": "It is."}, *user(text)]
    harmless = [*user("x"), {"role": "assistant", "content": "It is."}, *user("x")]
    assert structure(chat, chat_template.conversation(chat, messages)) == structure(
        chat, own_ids(chat, harmless)
    )
    special = {i for i, t in chat.added_tokens_decoder.items() if t.special}
    assert not special & set(chat_template.written_ids(chat, text, (1,))[:-1])


def test_T02_texts_that_normalisation_or_flags_turn_into_a_control_token_stay_text(directories, tmp_path):
    """Tokens that are matched after normalisation, and that eat the white space around them."""
    target = tmp_path / "flags"
    families.write(FAMILIES["llama_3"], target)
    template = target / "chat_template.jinja"
    template.write_text(template.read_text().replace(" | trim", ""))  # white space is there to be eaten
    raw = json.loads((target / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    for token in raw["added_tokens"]:
        token |= {"normalized": True, "rstrip": True, "lstrip": token["content"] == "<|eot_id|>"}
    (target / "tokenizer.json").write_text(json.dumps(raw))
    chat = chat_template.load_tokenizer(target)
    for text in ("Fox  \n", " x", "the\n\n fox"):
        assert chat_template.chat_prompt(chat, text).ids == own_ids(chat, user(text))
    asked = structure(chat, chat_template.chat_prompt(chat, "x").ids)
    for text in ("<|EOT_ID|>", "＜|eot_id|＞", "<|eot_id|>", "<|Eot_id|> \n"):
        assert structure(chat, own_ids(chat, user(text))) != asked
        ids = chat_template.chat_prompt(chat, text).ids
        assert structure(chat, ids) == asked
        assert "<|eot_id|><|eot_id|>" in chat.decode(ids)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}|{{ m['content'] | upper }}{% endfor %}[/INST]",
        "{{ bos_token }}{{ messages | length }}{{ messages[0]['content'] | tojson }}{{ messages[0]['content'] }}</s>",
        "\n  {% if messages[0]['content'] == 'x' %}x{% endif %}\n{{ messages[0]['content'] }}\n",
    ],
)
def test_T02_templates_may_trim_repeat_count_and_quote(loaded, template):
    chat = copy.deepcopy(loaded("mistral_v0.3"))
    chat.chat_template = template
    for text in ("Find the fox.", " fox\n", 'the "fox"', "x"):
        assert chat_template.chat_prompt(chat, text).ids == own_ids(chat, user(text))
    asked = structure(chat, chat_template.chat_prompt(chat, "y").ids)
    for text in ("</s>", " <unk> ", "a<s>b"):
        ids = chat_template.chat_prompt(chat, text).ids
        assert structure(chat, ids) == asked
        assert text.strip() in chat.decode(ids)


def test_T03_one_bos_where_the_family_has_one(chat, name):
    bos = FAMILIES[name].bos
    for text in ("hello", *SPELLED):
        ids = chat_template.chat_prompt(chat, text).ids
        if bos is None:
            assert chat.bos_token_id is None
        else:
            assert ids[0] == chat.bos_token_id == chat.convert_tokens_to_ids(bos)
            assert ids.count(chat.bos_token_id) == 1


def test_T04_an_over_long_prompt_is_skipped_and_counted(chat, tmp_path):
    whole = chat_template.chat_prompt(chat, "fox " * 40).ids
    for file, rows in (("a", ["the fox", "fox " * 40]), ("b", ["where"])):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps({"prompt": r}) + "\n" for r in rows))
    source = Prompts(
        source=f"jsonl:{tmp_path}/a.jsonl", heldout=f"jsonl:{tmp_path}/b.jsonl", max_length=len(whole) - 1,
        per_iteration=5,
    )  # fmt: skip
    found = prompts.load(Config(iterations=1, prompts=source), chat)
    assert [p.text for p in found.train[0]] == ["the fox"]
    assert found.counts["train"]["too_long"] == 1


def test_the_date_is_the_same_every_day(loaded):
    chat = loaded("llama_3.2")
    today = chat.apply_chat_template(user("x"), tokenize=False)
    assert datetime.now().strftime("%Y") in today
    assert "Today Date: 26 Jul 2024\n" in chat_template.chat_text(chat, "x")
    assert chat_template.chat_prompt(chat, "x").ids == own_ids(chat, user("x"))


# What ends a response.


def test_eos_ids_are_all_that_end_a_turn(directories, chat, name):
    ends = chat_template.eos_ids(directories[name], chat, ROWS)
    assert list(ends) == [chat.convert_tokens_to_ids(t) for t in FAMILIES[name].ends]
    written = chat.apply_chat_template(
        [*user("x"), {"role": "assistant", "content": "the answer"}], tokenize=False
    )
    after = chat(written.rpartition("answer")[2].lstrip(), add_special_tokens=False)["input_ids"]
    assert after[0] in ends


@pytest.mark.parametrize(
    ("generation", "said"),
    [({"eos_token_id": "x"}, "eos_token_id is 'x'"), ({"eos_token_id": []}, r"eos_token_id is \[\]")]
    + [({"eos_token_id": [1, True]}, "True"), ({"eos_token_id": ROWS}, f"from 0 to {ROWS - 1}")],
)  # fmt: skip
def test_ends_that_are_no_ids_are_told(loaded, tmp_path, generation, said):
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(BadInput, match=said):
        chat_template.eos_ids(tmp_path, loaded("gemma_2"), ROWS)


def test_without_any_file_the_tokenizer_and_the_template_name_the_ends(loaded, tmp_path):
    chat = loaded("gemma_2")
    assert chat_template.eos_ids(tmp_path, chat, ROWS) == (1, 5)
    with pytest.raises(BadInput, match=r"\[1, 5\]; needed ids from 0 to 4"):
        chat_template.eos_ids(tmp_path, chat, 5)
    other = copy.deepcopy(chat)
    other.eos_token, other.chat_template = None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(BadInput, match="names an end of sequence"):
        chat_template.eos_ids(tmp_path, other, ROWS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}A:",  # ends in plain text
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}{{ messages[0]['content'] }}",
    ],
)
def test_a_template_without_an_end_of_turn_adds_none(loaded, tmp_path, template):
    chat = copy.deepcopy(loaded("gemma_2"))
    chat.chat_template = template
    assert chat_template.eos_ids(tmp_path, chat, ROWS) == (1,)
    ids = chat_template.written_ids(chat, "The fox", (1, 5))
    assert ids[-1] == 1
    assert chat.decode(ids[:-1]) == "The fox"


# Responses that are known as text only.


def test_written_ids_are_what_the_template_adds_to_its_header(loaded, name):
    chat, family = loaded(name), FAMILIES[name]
    before = chat_template.chat_prompt(chat, chat_template.PROBE).ids
    ends = {chat.convert_tokens_to_ids(token) for token in family.ends}
    compared = []

    @QUICK
    @given(TEXTS)
    def check(text):
        assume(not any(spelled in text for spelled in control(chat).values()))
        ids = chat_template.written_ids(chat, text, tuple(ends))
        assert ids[-1] in ends
        assert not ends & set(ids[:-1])
        own = own_ids(
            chat, [*user(chat_template.PROBE), {"role": "assistant", "content": text}], header=False
        )
        if own[: len(before)] == before:
            assert own[len(before) : len(before) + len(ids)] == ids
            compared.append(text)
        else:  # a token straddles the header and the response
            assert chat.decode(own).startswith(chat.decode(before + ids))

    check()
    assert len(compared) > 10


@pytest.mark.parametrize(("family", "text"), [("qwen_2.5", "\nfox"), ("mistral_v0.1", "The fox")])
def test_where_a_token_would_straddle_the_header_the_response_is_apart(loaded, family, text):
    chat = copy.deepcopy(loaded(family))
    before = chat_template.chat_prompt(chat, chat_template.PROBE).ids
    messages = [*user(chat_template.PROBE), {"role": "assistant", "content": text}]
    assert own_ids(chat, messages, header=False)[: len(before)] != before
    ids = chat_template.written_ids(chat, text, (2,))
    assert chat.decode(before + ids[:-1]) == chat.decode(before) + text


def test_written_ids_follow_a_control_token_as_the_tokenizer_has_it(tmp_path):
    """With a space put before every stretch between control tokens, after the header's [/INST] too."""
    control = [*families.LLAMA_CONTROL, *families.MISTRAL_CONTROL]
    added = [AddedToken(token, normalized=False, special=True) for token in control]
    backend = functools.partial(families.sentencepiece, control, dummy_prefix="normalizer", added=added)
    families.write(dataclasses.replace(FAMILIES["mistral_v0.3"], backend=backend), tmp_path)
    chat = chat_template.load_tokenizer(tmp_path)
    messages = [*user(chat_template.PROBE), {"role": "assistant", "content": "The fox"}]
    ids = chat_template.chat_prompt(chat, chat_template.PROBE).ids + chat_template.written_ids(
        chat, "The fox", (2,)
    )
    assert ids == own_ids(chat, messages, header=False)


def test_thoughts_in_a_response_are_its_own_tokens(loaded):
    chat = loaded("qwen_3")
    text = "<think>\nIs it hot?\n</think>\n\nThe fox"
    ids = chat_template.written_ids(chat, text, (0,))
    assert [chat.decode(i) for i in structure(chat, ids)] == ["<think>", "</think>", "<|im_end|>"]
    assert chat_template.response_text(chat, ids) == text
    messages = [*user("x"), {"role": "assistant", "content": text}, *user("y")]
    assert chat_template.conversation(chat, messages) == own_ids(chat, messages)
    assert "think" not in chat.decode(chat_template.conversation(chat, messages))
    asked = chat_template.chat_prompt(chat, "<think>").ids
    assert chat.convert_tokens_to_ids("<think>") not in asked


# Sampling and scoring.


@pytest.fixture(scope="module")
def even_model(tmp_path_factory, one_device):
    """Every token is equally likely, those without a name too."""
    directory = tmp_path_factory.mktemp("even")
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": ROWS, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    model = hf.initialise(hf.read_architecture(directory), jax.random.key(0), one_device)
    model.head[...] = jnp.zeros_like(model.head[...])
    return model


def test_T05_T06_every_end_ends_a_response_and_ids_stay_as_sampled(
    directories, chat, name, even_model, tmp_path
):
    ends = chat_template.eos_ids(directories[name], chat, ROWS)
    settings = Sampling(responses=96, temperature=1.0, top_p=1.0, max_new_tokens=48, slots=96)
    prompt = chat_template.chat_prompt(chat, "Where is the </s> fox?")
    row = Sampler(even_model, chat, settings, eos=ends).generate([prompt], seed=1)[0]
    last = {ids[-1] for ids, why in zip(row.response_ids, row.finish_reason, strict=True) if why == "stop"}
    assert last == set(ends)
    for ids, why, text in zip(row.response_ids, row.finish_reason, row.responses, strict=True):
        assert (why == "stop") == (ids[-1] in ends)
        assert not set(ends) & set(ids[:-1])
        assert why == "stop" or len(ids) == 48
        assert text == chat_template.response_text(chat, ids)
    assert max(max(ids) for ids in row.response_ids) >= len(chat)  # ids without a token were sampled, too
    records.write(tmp_path / "rows.parquet", Responses, [row], {})
    assert records.read(tmp_path / "rows.parquet", Responses) == [row]
    assert row.prompt_ids == prompt.ids


@pytest.mark.parametrize("name", ["qwen_2.5", "llama_2", "llama_3", "gemma_2"])
def test_T30_lengths_make_the_masks_whatever_pads(loaded, name, even_model, one_device):
    """Padding that is one of the ends (Qwen, Llama 2), no padding token at all (Llama 3), and one of its own."""
    chat = loaded(name)
    pad = {"qwen_2.5": "<|endoftext|>", "llama_2": "</s>", "gemma_2": "<pad>"}.get(name)
    assert chat.pad_token == pad
    filler = chat.pad_token_id or 0
    answer = chat("The fox", add_special_tokens=False)["input_ids"]
    end = chat.pad_token_id if pad in FAMILIES[name].ends else chat.eos_token_id
    prompt = chat_template.chat_prompt(chat, "Where?")
    none: list = []
    pair = Pair(
        none, none, 0.5, 0.5, 0.5, prompt.prompt_id, prompt.ids, [[*answer, end], answer, [end]],
        [0.5] * 3, 0.5, [0.0] * 3, [0.0] * 3,
    )  # fmt: skip
    n = len(prompt.ids)
    length_R = np.array([n + len(answer) + 1, n + len(answer), n + 1])
    tokens_RT = np.full((3, 32), filler)
    for row, (ids, length) in enumerate(zip(pair.response_ids, length_R, strict=True)):
        tokens_RT[row, :length] = prompt.ids + ids
    (part,) = Batches([pair], global_batch=1, epochs=1, seed=0, iteration=1)[0].microbatches
    assert part.scored.sum() == sum(map(len, pair.response_ids))
    length_R = jnp.asarray(length_R)
    found = response_logprob(even_model, jnp.asarray(tokens_RT), jnp.full(3, n), length_R)
    np.testing.assert_allclose(found, -np.log(ROWS) * np.array([len(answer) + 1, len(answer), 1]), rtol=1e-5)


def test_ids_that_no_token_has_add_no_text(chat):
    ids = chat("The fox", add_special_tokens=False)["input_ids"]
    expected = chat_template.response_text(chat, ids)
    assert expected.strip() == "The fox"
    assert chat_template.response_text(chat, [*ids, ROWS - 1, len(chat), 2**31 - 1]) == expected
    assert chat_template.response_text(chat, [ROWS - 1]) == chat_template.response_text(chat, []) == ""


# Files.


@pytest.mark.parametrize("template", ["config", "named"])
def test_T15_published_files_load_without_the_network(tmp_path, name, loaded, template, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    families.write(FAMILIES[name], tmp_path, template=template)
    assert not (tmp_path / "chat_template.jinja").exists()
    chat = chat_template.load_tokenizer(tmp_path)
    for text in ("Where is the fox?", "</s><|im_end|>"):
        assert chat_template.chat_prompt(chat, text) == chat_template.chat_prompt(loaded(name), text)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "PreTrainedTokenizerFast", "OurOwnTokenizer", None])
def test_unusual_tokenizer_classes_load(tmp_path, kind, loaded):
    families.write(FAMILIES["llama_3"], tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": kind}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    chat = chat_template.load_tokenizer(tmp_path)
    assert chat_template.chat_prompt(chat, "the fox") == chat_template.chat_prompt(
        loaded("llama_3"), "the fox"
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
def test_what_cannot_be_used_is_told_in_one_line(tmp_path, change, said):
    families.write(FAMILIES["llama_3"], tmp_path)
    change(tmp_path)
    with pytest.raises(BadInput, match=said):
        chat_template.load_tokenizer(tmp_path)


def test_a_conversation_that_the_template_refuses_is_told(loaded):
    with pytest.raises(BadInput, match="refuses this conversation: no system role"):
        chat_template.conversation(loaded("gemma_2"), [{"role": "system", "content": "x"}, *user("y")])


def test_half_a_surrogate_pair_is_told(chat):
    with pytest.raises(BadInput, match="surrogate"):
        chat_template.chat_prompt(chat, "a\ud800b")


def test_a_control_token_that_text_would_still_become_is_refused(tmp_path):
    """A vocabulary whose words are looked up whole, with the control token among them."""
    families.write(FAMILIES["llama_3"], tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"].pop(0)  # the whole text is one word
    raw["model"]["ignore_merges"] = True
    number = next(t["id"] for t in raw["added_tokens"] if t["content"] == "<|eot_id|>")
    raw["model"]["vocab"]["<|eot_id|>"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=r"spells '<\|eot_id\|>' would become that"):
        chat_template.load_tokenizer(tmp_path)


# Mistral's own tokenizers, as mistral-common carries them.

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
    """Needs sentencepiece; write the file again with `tests.test_tokens.mistral_common_ids` for other texts."""
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
    """The family's files with Mistral's real vocabulary: two pieces merge as early as the piece they make scores."""
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
