"""Options of a chat template: every rendering has them, unknown ones are refused, and the tokenizer's files stay as they are."""

import shutil

import pytest

from sppo_jax import config_file
from sppo_jax.errors import BadInput
from sppo_jax.report import model_card
from sppo_jax.run import manifest
from sppo_jax.settings import mapping, resuming
from sppo_jax.text import chat_template, thoughts
from tests import families
from tests.families import FAMILIES
from tests.run_directory import begun
from tests.test_tokens_turns import TALKS

THINKING = {"enable_thinking": False}
USER = [{"role": "user", "content": "Hi?"}]


@pytest.mark.parametrize("place", ["jinja", "config", "named"])
def test_ids_are_those_of_transformers_with_the_same_options(tmp_path, place):
    directory = families.write(FAMILIES["qwen_3"], tmp_path / "m", template=place)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    plain = chat_template.load_tokenizer(directory)
    chat = chat_template.load_tokenizer(directory, THINKING)
    for talk in TALKS:
        theirs = plain.apply_chat_template(talk, add_generation_prompt=True, **THINKING)["input_ids"]
        assert chat_template.conversation(chat, talk) == theirs
    assert chat_template.conversation(chat, USER) != chat_template.conversation(plain, USER)
    assert thoughts.of_header(chat) == ("<think>\n\n</think>\n\n", False)
    assert chat_template.eos_ids(directory, chat, 999) == chat_template.eos_ids(directory, plain, 999)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


READS = (
    "{%- if not day is defined %}{% set day = 'Monday' %}{% endif %}\n  {{- bos_token }}{{ day }}|{{ n | default(0) + 1 }}|"
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}[/INST]{% endfor %}"
)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "Monday|1|"),
        ({"day": '</s> "it\'s" \\n 🦊 %} {{ x }}\n'}, '</s> "it\'s" \\n 🦊 %} {{ x }}\n|1|'),
        ({"day": True, "n": -3}, "True|-2|"),
        ({"n": 1.5}, "Monday|2.5|"),
        ({"day": ""}, "|1|"),
    ],
)
def test_a_template_reads_the_values_that_were_given(family_directories, tmp_path, options, shown):
    directory = shutil.copytree(family_directories["mistral_v0.3"], tmp_path / "m")
    (directory / "chat_template.jinja").write_text(READS)
    chat = chat_template.load_tokenizer(directory, options)
    assert chat_template.chat_text(chat, "Hi?") == f"<s>{shown}Hi?[/INST]"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("enable_thinkin", "reads no option 'enable_thinkin'; did you mean 'enable_thinking'?"),
        ("tools", "reads no option 'tools'; it reads enable_thinking"),
        ("messages", "reads no option 'messages'"),
        ("add_generation_prompt", "reads no option"),
        ("content", "reads no option 'content'"),  # which it sets itself
        ("a b", "reads no option 'a b'"),
    ],
)
def test_an_option_that_the_template_never_reads_is_refused(family_directories, name, said):
    with pytest.raises(BadInput) as refused:
        chat_template.load_tokenizer(family_directories["qwen_3"], {name: True})
    assert said in str(refused.value)
    with pytest.raises(BadInput, match="reads no option 'enable_thinking'; it reads none"):
        chat_template.load_tokenizer(family_directories["qwen_2.5"], THINKING)
    with pytest.raises(BadInput, match="truths, numbers and texts"):
        chat_template.load_tokenizer(family_directories["qwen_3"], {"enable_thinking": [1]})


MAPPINGS = [
    ("{enable_thinking: false}", {"enable_thinking": False}),
    ("{a: TRUE, b: 010, c: 1.5e1, d: -3}", {"a": True, "b": 10, "c": 15.0, "d": -3}),
    ("{a: 'false', b: \"1\", c: 26 Jul 2024, d: 12:30}", {"a": "false", "b": "1", "c": "26 Jul 2024", "d": "12:30"}),
    ("a: ''\nb: 2024-01-01\n", {"a": "", "b": "2024-01-01"}),
    ("{}", {}),
    ("", {}),
    ("{a: '狐 🦊'}", {"a": "狐 🦊"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MAPPINGS)
def test_a_mapping_means_the_same_on_the_command_line_and_in_a_file(tmp_path, text, expected):
    flag = config_file.load([], [f"--model.template={text}"])
    assert repr(flag.model.template) == repr(expected)
    indented = text.replace("\n", "\n    ")
    (tmp_path / "a.yaml").write_text(f"model:\n  template:\n    {indented}\n")
    (tmp_path / "b.yaml").write_text(config_file.dump(flag))
    assert config_file.load([tmp_path / "a.yaml"]) == config_file.load([tmp_path / "b.yaml"]) == flag
    assert mapping.read(mapping.written(expected), "x") == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("false", "--model.template needs a mapping, found 'false'"),
        ("[1]", "needs a mapping"),
        ("{a: no}", "--model.template: a: no is not clear; write true or false, or 'no' in quotes"),
        ("{a: }", "a needs a value"),
        ("{a: null}", "a needs a value"),
        ("{a: [1]}", "no lists or mappings"),
        ("{a: 1, a: 2}", "a is there a second time"),
        ("{a: !!str 1}", "the tag !!str is not read"),
        ("{a: 1", "is not a mapping"),
        ("{[1]: 1}", "no lists or mappings"),
        ("[" * 3000, "is not a mapping"),
    ],
)
def test_what_is_not_a_mapping_is_one_line(text, said):
    with pytest.raises(BadInput) as refused:
        config_file.load([], [f"--model.template={text}"])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_of_a_mapping_given_as_a_flag_names_the_notation():
    with pytest.raises(BadInput, match=r"write --model\.template '\{enable_thinking: VALUE\}'"):
        config_file.load([], ["--model.template.enable_thinking", "false"])


def test_options_are_part_of_what_a_run_is_made_from(tmp_path):
    def digest(*words):
        settings = config_file.load([], words)
        run = manifest.RunDir(tmp_path)
        inputs = {"base_weights": "b", "judge": "j", "prompts_1": "p"}
        return manifest.Provenance(run, settings, {}, inputs).made_from(0, "prompts_1")["configuration"]

    plain, other = ((), ("--model.template={enable_thinking: false}",))
    assert digest() == digest("--model.template={}") != digest(*other)
    before, after = (config_file.load([], words) for words in (plain, other))
    assert resuming.changed_keys(before, after) == ["model.template"]


def test_the_card_says_how_to_give_the_options(tmp_path):
    run = begun(tmp_path, "--model.template", "{enable_thinking: false, day: 'a b'}")
    text = model_card.text(run, 1)
    assert "add_generation_prompt=True, **{'enable_thinking': False, 'day': 'a b'}," in text
    assert '{"chat_template_kwargs": {"enable_thinking": false, "day": "a b"}}' in text
    assert "--model.template '{enable_thinking: false, day: a b}'" in text
    assert "{enable_thinking: false, day: a b} |" in text.replace("\\", "")
    (tmp_path / "plain").mkdir()
    plain = model_card.text(begun(tmp_path / "plain"), 1)
    assert "chat_template_kwargs" not in plain
    assert "options" not in plain
