"""Thoughts are taken out of what judges read, where the template knows them, and out of nothing else."""

import copy

import pytest

from sppo_jax import config, config_file, judges
from sppo_jax.run import manifest
from sppo_jax.run.directory import RunDir
from sppo_jax.settings import resuming
from sppo_jax.text import thoughts
from sppo_jax.text.messages import messages_of, written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Seven.", "Seven."),
        (" Seven.\n", " Seven.\n"),
        ("<think>\n4 + 3\n</think>\n\nSeven.", "Seven."),
        ("<think></think>Seven.", "Seven."),
        ("Well: <think>4 + 3</think>seven.", "Well: seven."),
        ("<think>a</think>Six. <think>b</think>Seven.", "Six. Seven."),
        ("<think>a<think>b</think>c</think>Seven.", "Seven."),
        ("4 + 3\n</think>\n\nSeven.", "Seven."),
        ("<think>4 + 3", ""),
        ("Seven.<think>or", "Seven."),
        ("<thinking>Seven.", "<thinking>Seven."),
    ],
)
def test_what_is_said_is_what_is_not_thought(text, said):
    assert thoughts.taken_out(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4 + 3</think>Seven.", "Seven."),
        ("4 + 3", ""),
        ("<think>4 + 3</think>Seven.", "Seven."),
        ("a</think>Six. <think>b</think>Seven.", "Six. Seven."),
        ("", ""),
    ],
)
def test_a_response_that_begins_inside_a_thought_is_one_until_it_closes(text, said):
    assert thoughts.taken_out(text, opened=True) == said


OPENED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: <think>\n' }}"
)
TALK = [
    {"role": "user", "content": "One? <think>x</think>"},
    {"role": "assistant", "content": "<think>y</think>\n\n1"},
    {"role": "user", "content": "Two?"},
]
SAID = [TALK[0], {"role": "assistant", "content": "1"}, TALK[2]]
RESPONSES = ["<think>2</think>zwei", "deux", "<think>never"]


def of(tokenizer, template):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    return chat


def test_a_template_that_knows_thoughts_is_seen(load_family, tokenizer):
    known = {
        name: thoughts.strips("auto", load_family(name)) for name in ("qwen_2.5", "qwen_3", "mistral_v0.3")
    }
    assert known == {"qwen_2.5": "none", "qwen_3": "think", "mistral_v0.3": "none"}
    assert thoughts.strips("think", tokenizer) == "think"
    assert thoughts.strips("none", load_family("qwen_3")) == "none"
    assert thoughts.of_header(load_family("qwen_3")) == ("", False)
    assert thoughts.of_header(of(tokenizer, OPENED)) == ("<think>\n", True)
    closed = of(tokenizer, OPENED.replace("<think>\n", "<think>\n\n</think>\n\n"))
    assert thoughts.of_header(closed) == ("<think>\n\n</think>\n\n", False)


@pytest.mark.parametrize("backend", ["jax", "mine:judge"])
def test_judges_read_neither_the_thoughts_of_responses_nor_of_earlier_turns(load_family, backend):
    knobs, chat = config.Judge(backend=backend), load_family("qwen_3")
    plain = judges.reading_of(config.Judge(backend=backend, strip="none"), chat)
    read = judges.reading_of(knobs, chat)
    assert read(written(TALK), RESPONSES) == plain(written(SAID), ["zwei", "deux", ""])
    assert plain(written(TALK), RESPONSES) != read(written(TALK), RESPONSES)
    assert read("<think>Hi?", ["a"]) == ("<think>Hi?", ["a"])  # the user's text is the user's
    assert judges.reading_of(knobs, load_family("qwen_2.5"))("x", RESPONSES)[1] == RESPONSES


def test_the_oracle_reads_answers_alone_and_the_prompt_as_it_is(load_family):
    read = judges.reading_of(config.Judge(prompt="chat"), load_family("qwen_3"), own=True)
    text, responses = read(written(TALK), RESPONSES)
    assert messages_of(text) == SAID
    assert responses == ["zwei", "deux", ""]


def test_a_thought_that_the_header_opens_is_neither_in_the_prompt_nor_in_the_responses(tokenizer):
    chat = of(tokenizer, OPENED)
    read = judges.reading_of(config.Judge(prompt="chat"), chat)
    assert read("Hi? <think>\n", ["x</think>a", "b"]) == ("user: Hi? <think>\n\nassistant: ", ["a", ""])
    kept = judges.reading_of(config.Judge(prompt="chat", strip="none"), chat)
    assert kept("Hi?", ["x</think>a"]) == ("user: Hi?\nassistant: <think>\n", ["x</think>a"])


# Of the default configuration at float32, before there were prompts.turns and judge.strip.
OLD = "a601758012f77d318307cff1f5f6791c718e539286e464edf75869fe4c97302a"


def test_files_of_runs_that_were_begun_before_the_knob_are_still_the_runs_own(tmp_path):
    def digest(*words, **resolved):
        inputs = {"base_weights": "b", "judge": "j", "prompts_1": "p"}
        settings = config_file.load([], words)
        provenance = manifest.Provenance(
            RunDir(tmp_path), settings, {"model.compute_dtype": "float32"} | resolved, inputs
        )
        return provenance.made_from(0, "prompts_1")["configuration"]

    assert digest(**{"judge.strip": "none"}) == digest("--prompts.turns=first") == OLD
    assert digest(**{"judge.strip": "think"}) != OLD
    before, after = config_file.load(), config_file.load([], ["--judge.strip=none", "--prompts.turns=first"])
    assert resuming.changed_keys(before, after) == []
