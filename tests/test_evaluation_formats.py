"""The public benchmarks' files, field by field, and what is refused or told before a benchmark's reader stumbles over it."""

import json
import re
import types

import pytest
import yaml

from sppo_jax.config import Sampling
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import alpaca_eval, arena_hard, formats, mt_bench, presets
from sppo_jax.evaluation.questions import Question
from sppo_jax.text.messages import messages_of, written

SHORT_ID = re.compile(r"[2-9A-HJ-NP-Za-km-z]{22}")
TALK = written(
    [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
)


def own(prompt, category="", **row):
    return Question(prompt, category, row)


def bench(number, category="math", turns=("One?", "Two?")):
    return Question(turns[0], category, {"question_id": number, "category": category, "turns": list(turns)})


def arena(uid="u1", prompt="Hard?"):
    return Question(prompt, "hard_prompt", {"uid": uid, "category": "hard_prompt", "prompt": prompt})


def write(name, path, questions, outputs, **more):
    return formats.write(name, path, questions, outputs, **({"model": "runs/quick@3"} | more))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- AlpacaEval 2 -------------------------------------------------------------------------------------------------------


def test_alpaca_evals_file_is_an_array_of_four_fields(tmp_path):
    path = tmp_path / "model_outputs.json"
    said = write("alpaca_eval", path, [own("Why? ", "koala"), own("é\n", "vicuna")], [" Because. ", ""])
    assert json.loads(path.read_text()) == [
        {"dataset": "koala", "instruction": "Why? ", "output": "Because.", "generator": "quick-iter3"},
        {"dataset": "vicuna", "instruction": "é\n", "output": "", "generator": "quick-iter3"},
    ]
    assert "1 of 2 outputs are empty" in said[0]
    assert "2 of the 805 instructions" in said[1]


def test_alpaca_evals_entry_has_the_presets_settings(tmp_path):
    path = tmp_path / "model_outputs.json"
    more = {"model": "UCLA/quick", "preset": "paper-llama3"}
    write("alpaca_eval", path, [own("Why?")], ["x"], **more)
    folder = tmp_path / "models_configs" / "quick"
    (name, entry), *others = yaml.safe_load((folder / "configs.yaml").read_text()).items()
    assert (name, others) == ("quick", [])
    settings = entry["completions_kwargs"]
    assert entry == {
        "prompt_template": "quick/prompt.txt", "fn_completions": "vllm_local_completions", "completions_kwargs": settings,
        "pretty_name": "quick", "link": "https://huggingface.co/UCLA/quick",
    }  # fmt: skip
    assert settings == {
        "model_name": "UCLA/quick", "max_new_tokens": 4096, "temperature": 0.9, "top_p": 1.0, "batch_size": 900,
        "model_kwargs": {"dtype": "bfloat16", "tokenizer_mode": "auto", "trust_remote_code": False},
        "stop_token_ids": [128001, 128009], "is_chatml_prompt": False,
    }  # fmt: skip
    assert (folder / "prompt.txt").read_text().count("{instruction}") == 1


@pytest.mark.parametrize(
    ("name", "questions", "outputs", "line"),
    [
        ("model_outputs.json", [own("a"), own("a")], ["x", "y"], "'a' is there 2 times"),
        ("model_outputs.json", [own("a"), own("b")], ["7", " 1e3 "], "all outputs are numbers, such as 7"),
        ("model_outputs.json", [own(TALK)], ["x"], "single messages"),
        ("model_outputs.jsonl", [own("a")], ["x"], "end in .json"),
        ("model_outputs.json", [], [], "no questions"),
    ],
    ids=["a repetition", "numbers alone", "a conversation", "another ending", "nothing"],
)
def test_what_alpaca_evals_reader_stumbles_over_is_refused(tmp_path, name, questions, outputs, line):
    with pytest.raises(BadInput, match=line):
        write("alpaca_eval", tmp_path / name, questions, outputs)
    assert not list(tmp_path.iterdir())


def test_the_sets_sizes_are_alpaca_evals():
    assert sum(alpaca_eval.SIZES.values()) == 805
    assert list(alpaca_eval.SIZES) == ["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]


# --- MT-Bench -----------------------------------------------------------------------------------------------------------


def test_the_second_turn_holds_the_first_answer_at_the_categorys_temperature():
    calls = []

    def respond(prompts, temperature):
        calls.append((temperature, prompts))
        return [f" {messages_of(prompt)[-1]['content']}! " for prompt in prompts]

    found = mt_bench.answers([bench(81, "writing"), bench(82), bench(83, "new"), bench(84, "stem")], respond)
    assert found == [["One?!", "Two?!"]] * 4
    assert [(temperature, len(prompts)) for temperature, prompts in calls] == [(0, 1), (0.1, 1), (0.7, 2)] * 2
    assert calls[0][1] == ["One?"]
    assert messages_of(calls[3][1][0]) == [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "One?!"},
        {"role": "user", "content": "Two?"},
    ]  # fmt: skip


def test_mt_benchs_line_has_five_fields_and_the_files_order_is_the_ids(tmp_path):
    path = tmp_path / "own-policy.jsonl"
    given = ([bench(90), bench(85)], [["a ", "b"], ["c", ""]])
    said = write("mt_bench", path, *given, tstamp=7.5)
    found = lines_of(path)
    assert [line["question_id"] for line in found] == [85, 90]
    line = found[1]
    assert line == {
        "question_id": 90, "answer_id": line["answer_id"], "model_id": "own-policy",
        "choices": [{"index": 0, "turns": ["a", "b"]}], "tstamp": 7.5,
    }  # fmt: skip
    assert SHORT_ID.fullmatch(line["answer_id"])
    assert line["answer_id"] != found[0]["answer_id"]
    assert "78 of MT-Bench's 80 questions are missing (81, 82, 83, 84, 86, …)" in said[0]
    assert "1 answers are empty" in said[1]
    before = path.read_bytes()
    write("mt_bench", path, *given, tstamp=7.5)
    assert path.read_bytes() == before


def test_all_of_mt_bench_says_nothing(tmp_path):
    questions = [bench(n) for n in range(81, 161)]
    assert write("mt_bench", tmp_path / "m.jsonl", questions, [["a", "b"]] * 80) == []


@pytest.mark.parametrize(
    ("questions", "line"),
    [
        ([own("a")], "needs question_id, an integer, found None"),
        ([bench("81")], "found '81'"),
        ([bench(81, turns=("One?",))], "a list of 2 texts"),
        ([bench(81), bench(81)], "there twice"),
    ],
    ids=["no id", "an id of text", "one turn", "an id twice"],
)
def test_questions_that_are_not_mt_benchs_are_refused(tmp_path, questions, line):
    with pytest.raises(BadInput, match=line):
        formats.check("mt_bench", tmp_path / "m.jsonl", questions)


# --- Arena-Hard ---------------------------------------------------------------------------------------------------------

ANSWER = """# Title
Text with **bold**, __bold too__ and ***.
## Part
1. one
  2. two
- a
* b
+ c
-no item
```python
# no header
- no item
```
#no header
####### none"""
COUNTS = {
    "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
    "list_count": {"ordered": 2, "unordered": 3},
    "bold_count": {"**": 1, "__": 1},
}


@pytest.fixture
def tiktoken(monkeypatch):
    """A token for each word in the place of tiktoken, whose tables are on the network; returns the models asked for."""
    asked = []

    def encoding_for_model(name):
        asked.append(name)
        return types.SimpleNamespace(encode=lambda text, disallowed_special: text.split())

    monkeypatch.setitem(
        __import__("sys").modules, "tiktoken", types.SimpleNamespace(encoding_for_model=encoding_for_model)
    )
    return asked


def test_markdown_is_counted_outside_of_code():
    assert arena_hard.markdown(ANSWER) == COUNTS


def test_arena_hards_current_line(tmp_path, tiktoken):
    path = tmp_path / "own-policy.jsonl"
    assert write("arena_hard", path, [arena()], [ANSWER + "\n"], tstamp=7.5) == []
    (line,) = lines_of(path)
    assert line == {
        "uid": "u1", "ans_id": line["ans_id"], "model": "own-policy",
        "messages": [{"role": "user", "content": "Hard?"}, {"role": "assistant", "content": {"answer": ANSWER}}],
        "tstamp": 7.5, "metadata": {"token_len": len(ANSWER.split())} | COUNTS,
    }  # fmt: skip
    # The reader takes the numbers by their places: the length first.
    assert list(line["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    assert SHORT_ID.fullmatch(line["ans_id"])
    assert tiktoken == ["gpt-4o"]


def test_arena_hards_line_of_2024(tmp_path, tiktoken):
    path = tmp_path / "own-policy.jsonl"
    question = Question("Old?", "", {"question_id": "q1", "turns": [{"content": "Old?"}]})
    write("arena_hard", path, [question], ["Yes."], arena_format="2024", tstamp=7.5)
    (line,) = lines_of(path)
    assert line == {
        "question_id": "q1", "answer_id": line["answer_id"], "model_id": "own-policy",
        "choices": [{"index": 0, "turns": [{"content": "Yes."}]}],
        "tstamp": 7.5, "conv_metadata": {"token_len": 1} | arena_hard.markdown(""),
    }  # fmt: skip
    assert tiktoken == ["gpt-3.5-turbo"]


def test_without_token_counts_there_is_no_metadata_at_all(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    path = tmp_path / "own-policy.jsonl"
    said = write("arena_hard", path, [arena()], [""])
    (line,) = lines_of(path)
    assert "metadata" not in line
    assert "no metadata" in said[0]
    assert "add_markdown_info.py" in said[0]
    assert "1 answers are empty" in said[1]


@pytest.mark.parametrize(
    ("questions", "arena_format", "line"),
    [
        ([own("a")], "current", "needs uid"),
        ([bench(81)], "current", "needs uid"),
        ([arena(), arena()], "current", "u1 is there twice"),
        ([arena(prompt=TALK)], "current", "single messages"),
        ([arena()], "2023", "must be one of current, 2024"),
    ],
    ids=["no id", "MT-Bench's", "an id twice", "a conversation", "an unknown format"],
)
def test_questions_that_are_not_arena_hards_are_refused(tmp_path, questions, arena_format, line):
    with pytest.raises(BadInput, match=line):
        formats.check("arena_hard", tmp_path / "m.jsonl", questions, arena_format=arena_format)


# --- all of them --------------------------------------------------------------------------------------------------------


def test_jsonl_has_the_response_as_it_is(tmp_path):
    path = tmp_path / "responses.jsonl"
    assert write("jsonl", path, [own("a", "math"), own(TALK)], [" x ", ""]) == []
    one, two = lines_of(path)
    assert one == {
        "prompt": "a", "response": " x ", "category": "math", "prompt_id": one["prompt_id"], "policy": "runs/quick@3",
    }  # fmt: skip
    assert [message["content"] for message in two["messages"]] == ["a", "b", "c"]
    assert "prompt" not in two


@pytest.mark.parametrize("name", ["mt_bench", "arena_hard"])
def test_a_file_that_cannot_name_the_model_is_refused(tmp_path, name):
    with pytest.raises(BadInput, match=r"name it MODEL\.jsonl"):
        formats.check(name, tmp_path / "m.json", [bench(81), arena()])


def test_an_unknown_format_and_preset_are_refused_by_name(tmp_path):
    with pytest.raises(BadInput, match="one of alpaca_eval, mt_bench, arena_hard, jsonl"):
        formats.check("alpaca", tmp_path / "m.json", [own("a")])
    with pytest.raises(BadInput, match="one of paper-mistral, paper-llama3, paper-gemma2"):
        presets.named("mistral")


def test_only_mt_bench_draws_its_own_outputs():
    assert formats.turns("alpaca_eval", [own("a")], None) is None
    assert formats.turns("mt_bench", [bench(81)], lambda prompts, _: ["x"]) == [["x", "x"]]


def test_presets_are_the_published_ones():
    found = {
        name: (p.temperature, p.top_p, p.max_new_tokens, p.stop_ids) for name, p in presets.PRESETS.items()
    }
    assert found == {
        "paper-mistral": (0.7, 0.9, 2048, ()),
        "paper-llama3": (0.9, 1.0, 4096, (128001, 128009)),
        "paper-gemma2": (0.7, 0.9, 2048, ()),
    }
    assert presets.decoding("alpaca_eval", "paper-llama3") == presets.PRESETS["paper-llama3"]
    assert presets.decoding("mt_bench", "paper-llama3").max_new_tokens == 1024
    assert presets.decoding("arena_hard", "paper-llama3").temperature == 0
    assert presets.decoding("jsonl", "") is None


def test_a_preset_replaces_the_settings_of_decoding_alone():
    mine = Sampling(responses=3, temperature=0.2, top_p=0.5, top_k=9, max_new_tokens=7, slots=11)
    found = presets.applied(mine, "alpaca_eval", "paper-mistral")
    assert found == Sampling(responses=3, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=2048, slots=11)
    assert presets.applied(mine, "alpaca_eval", "") == mine


@pytest.mark.parametrize(
    ("policy", "name"),
    [("runs/quick@3", "quick-iter3"), ("UCLA-AGI/Gemma-2", "Gemma-2"), ("embedded:policy", "policy"), ("a/b c/", "b-c"), ("..", "policy")],
)  # fmt: skip
def test_a_policys_name_is_the_end_of_its_path(policy, name):
    assert formats.model_name(policy) == name
