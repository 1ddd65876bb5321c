"""Chat templates: a prompt reaches the place where the template puts an answer, or the template is refused."""

import json
import shutil

import pytest

from sppo_jax.errors import BadInput
from sppo_jax.text import chat_template

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
HEADER = "{{ '<|im_start|>assistant\n' }}"
HEADERLESS = {
    "no header": TURNS,
    "a header for longer conversations only": TURNS
    + "{% if add_generation_prompt and messages | length > 1 %}" + HEADER + "{% endif %}",
    "a header for single messages only": TURNS
    + "{% if add_generation_prompt and messages | length == 1 %}" + HEADER + "{% endif %}",
    "a header without a system message only": TURNS
    + "{% if add_generation_prompt and messages[0].role != 'system' %}" + HEADER + "{% endif %}",
    "a header after an assistant only": TURNS
    + "{% if messages[-1].role == 'assistant' %}" + HEADER + "{% endif %}",
    "half a header": TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
    "another role's header": TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>user\n' }}{% endif %}",
    "headers in plain text": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "a header under another name": TURNS + "{% if add_generation_header %}" + HEADER + "{% endif %}",
}  # fmt: skip
# The turns of published templates, in our own words.
REACHING = {
    "chatml": TURNS + "{% if add_generation_prompt %}" + HEADER + "{% endif %}",
    "always a header": TURNS + HEADER,
    "a header after users": TURNS + "{% if messages[-1].role == 'user' %}" + HEADER + "{% endif %}",
    "zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "tulu": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "phi": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content.strip() }} ASSISTANT:{% else %} "
    "{{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}",
    "openchat": "{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    "a system message within the last question": "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ s if loop.last }}{{ m.content }}[/INST]{% elif m.role != 'system' %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "line ends between messages": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}" + HEADER + "{% endif %}",
    "a prompt that opens a thought": "{% for m in messages %}{{ '<|User|>' + m.content if m.role != 'assistant' else "
    "'<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    "empty thoughts in answers": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' "
    "if m.role == 'assistant' and loop.last else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}" + HEADER + "{% endif %}",
    "an opened thought, and empty ones": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think>\n\n</think>\n\n' "
    "if m.role == 'assistant' else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "thoughts in brackets": "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role != 'assistant' else "
    "'[THINK][/THINK]' + m.content + eos_token }}{% endfor %}",
    "no assistants": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\nAnswer: {% endif %}{% endfor %}",
    "one question alone": "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}"
    "{{ messages[0].content }}",
}  # fmt: skip


@pytest.fixture
def with_template(family_directories, tmp_path):
    """A function from a template to a directory with it and Qwen's tokenizer."""

    def write(template):
        directory = shutil.copytree(family_directories["qwen_2.5"], tmp_path / "model")
        (directory / "chat_template.jinja").write_text(template)
        return directory

    return write


@pytest.mark.parametrize("name", HEADERLESS)
def test_a_template_whose_prompt_ends_before_the_place_of_an_answer_is_refused(with_template, name):
    directory = with_template(HEADERLESS[name])
    advice = "its header .* make the two equal" if name == "another role's header" else "end it with"
    with pytest.raises(BadInput, match=f"before the place where it puts an answer; {advice}") as refused:
        chat_template.load_tokenizer(directory)
    assert "\n" not in str(refused.value)


def test_the_line_about_a_missing_header_mends_the_template(with_template):
    directory = with_template(TURNS)
    with pytest.raises(BadInput) as refused:
        chat_template.load_tokenizer(directory)
    advised = str(refused.value).partition("end it with ")[2]
    (directory / "chat_template.jinja").write_text(TURNS + advised)
    chat = chat_template.load_tokenizer(directory)
    assert chat_template.chat_text(chat, "x").endswith("x<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", REACHING)
def test_published_ways_to_reach_the_place_of_an_answer_are_taken(with_template, name):
    chat = chat_template.load_tokenizer(with_template(REACHING[name]))
    assert chat_template.PROBE in chat_template.chat_text(chat, chat_template.PROBE)


# The end is no word of these templates' prompts: it is written whatever comes before it.
ENDING = {
    "an end whatever comes before": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ eos_token }}",
    "an end in the header": TURNS + "{% if add_generation_prompt %}" + HEADER + "{{ eos_token }}{% endif %}",
    "an end of a turn in the header": TURNS
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<|im_end|>\n' }}{% endif %}",
    "an end after a question, not before an answer": "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    "an end, and no assistants": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    "{{ eos_token }}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDING)
def test_a_template_whose_prompt_ends_the_answer_before_it_begins_is_refused(with_template, name):
    directory = with_template(ENDING[name])
    with pytest.raises(
        BadInput, match=r"ends the prompt of one message with '<\|im_end\|>', which ends a resp"
    ):
        chat_template.load_tokenizer(directory)


def test_a_template_that_ends_every_message_is_taken(with_template):
    directory = with_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert chat_template.chat_text(chat_template.load_tokenizer(directory), "x") == "x<|im_end|>"


@pytest.mark.parametrize("written", ["Assistant", "model", "user"])
def test_a_header_that_differs_from_the_one_before_an_answer_is_named_beside_it(with_template, written):
    header = f"<|im_start|>{written}\n"
    directory = with_template(TURNS + "{% if add_generation_prompt %}{{ '" + header + "' }}{% endif %}")
    with pytest.raises(BadInput) as refused:
        chat_template.load_tokenizer(directory)
    assert f"{header!r} (of add_generation_prompt) differs from {'<|im_start|>assistant' + chr(10)!r}" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("code", "shown"),
    [("%d %b %Y", "26 Jul 2024"), ("%B %m %y", "July 07 24"), ("%A, %H:%M", "Friday, 00:00"), ("%-d %j %a", "26 208 Fri"), ("%%d", "%d")],
)  # fmt: skip
def test_every_code_of_strftime_now_is_of_the_one_fixed_day(with_template, code, shown):
    template = "{{ strftime_now('" + code + "') if strftime_now is defined }}|" + REACHING["chatml"]
    chat = chat_template.load_tokenizer(with_template(template))
    assert chat_template.chat_text(chat, "x").partition("|")[0] == shown


@pytest.mark.parametrize("single", [True, False])
def test_further_templates_without_a_default_are_named_with_where_to_put_it(with_template, single):
    directory = with_template("")
    (directory / "chat_template.jinja").unlink()
    config = directory / "tokenizer_config.json"
    if single:  # in the configuration: hidden by the folder's
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates/rag.jinja").write_text(REACHING["chatml"])
        named = REACHING["chatml"]
    else:
        named = [{"name": "rag", "template": REACHING["chatml"]}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    with pytest.raises(
        BadInput, match=r"\(rag\) and none of them is the default; put .* into chat_template.jinja$"
    ):
        chat_template.load_tokenizer(directory)


def test_a_template_for_processors_alone_is_said_to_be_one(with_template):
    directory = with_template("")
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": REACHING["chatml"]}))
    with pytest.raises(
        BadInput, match=r"no chat template: .*chat_template.json for processors only; .*chat_template.jinja$"
    ):
        chat_template.load_tokenizer(directory)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_names_the_kind_of_error_and_the_files(with_template, name):
    directory = with_template(REACHING["chatml"])
    if name == "tekken.json":
        (directory / "tokenizer.json").unlink()
    (directory / name).write_text("{")
    with pytest.raises(
        BadInput, match=rf"no usable tokenizer \(of .*{name}.*\): \w*(Error|Exception)\w*: .*; restore"
    ):
        chat_template.load_tokenizer(directory)
