"""Bad input ends a run in one line with exit code 2, before anything is computed or written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from sppo_jax import config, interchange, main
from sppo_jax.errors import BadInput
from sppo_jax.hub import names
from sppo_jax.records import Pair
from sppo_jax.tiny import world
from tests.small_game import ORACLE, words

pytestmark = pytest.mark.usefixtures("single_device")


@pytest.mark.parametrize(
    ("words_", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--fit.learning_rat", "1"], "did you mean '--fit.learning_rate'?"),
        (["--judge.backend", "borda"], "judge.backend=borda is not known"),
        (["--judge.path", "nowhere"], "nowhere"),
        (["--eval.oracle", "sppo_jax.nothing:x"], "sppo_jax.nothing"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_directory(tmp_path, words_, said):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "sppo_jax.main", "--out", str(out), *words_],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model__path": "nowhere"}, "nowhere: no such directory"),
        ({"mesh__tensor": 3}, "does not fit 1 devices"),
        ({"prompts__source": "jsonl:nowhere.jsonl"}, "no such file"),
        (
            {"sampling__max_new_tokens": 500},
            r"exceeds the model's 512 positions; lower sampling.max_new_tokens to 494$",
        ),
        ({"prompts__column": "nope"}, "no column .nope.; there are prompt"),
        (
            {"eval__oracle": "sppo_jax.tiny.world:HELD_OUT"},
            "eval.oracle=sppo_jax.tiny.world:HELD_OUT: TypeError",
        ),
    ],
)
def test_inputs_are_checked_before_anything_is_computed(tmp_path, options, said, single_device):
    if "mesh__fsdp" in options:
        single_device.undo()
    with pytest.raises(BadInput, match=said):
        main.main(words(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_an_oracle_without_these_prompts_is_refused_at_once(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": f"own {i}"}) + "\n" for i in range(9)))
    own = {"prompts__heldout": f"jsonl:{tmp_path}/own.jsonl", "eval__oracle": ORACLE}
    with pytest.raises(BadInput, match=r"does not know the prompt 'own \d': .* leave eval\.oracle empty"):
        main.main(words(tmp_path / "run", **own))
    assert not (tmp_path / "run").exists()


def test_given_pairs_with_ids_beyond_the_vocabulary_are_refused_at_once(tmp_path):
    """The tokenizer got a word after the model was made."""

    policy = shutil.copytree(names.path("policy"), tmp_path / "policy")
    grown = AutoTokenizer.from_pretrained(policy)
    grown.add_tokens(["foxtrotting"])
    grown.save_pretrained(policy)
    turns = [
        [{"content": "Q?", "role": "user"}, {"content": answer, "role": "assistant"}]
        for answer in ("foxtrotting", "no")
    ]
    pair = Pair(*turns, 0.8, 0.7, 0.3, 1, [], [], [0.7, 0.3], 0.5, [], [])
    interchange.write([pair], tmp_path / "given.parquet")
    given = words(tmp_path / "run", model__path=policy, pairs__source=f"parquet:{tmp_path}/given.parquet")
    with pytest.raises(BadInput, match="the tokenizer gives id 768, the model has 768 tokens"):
        main.main(given)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_returns_no_finite_scores_or_another_shape_is_refused(tmp_path, monkeypatch):
    class Nonsense:
        identity = "nonsense"

        def __init__(self):
            self.value = np.nan

        def compare(self, prompts, responses, on_progress=None):
            k = len(responses[0])
            return np.full((len(prompts), k, k), np.nan) if k == 3 else np.zeros((len(prompts), 9))

    monkeypatch.setattr(world, "oracle", Nonsense)
    with pytest.raises(BadInput, match=r"judge\.backend=.*: a score of prompt .* is not a finite number"):
        main.main(words(tmp_path / "run"))
    with pytest.raises(BadInput, match=r"judge\.backend=.* gave an array \(1, 9\), needed \(1, 2, 2\)"):
        main.main(words(tmp_path / "other", sampling__responses=2))
    assert not list(tmp_path.iterdir())  # found by the trial, before the run began


@pytest.fixture
def model(tmp_path):
    """Return a copy of the embedded policy to damage."""
    return shutil.copytree(names.path("policy"), tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("generation_config.json", "{", "not JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": []}', r"eos_token_id is \[\]"),
        ("generation_config.json", '{"eos_token_id": 99999}', "needed ids from 0 to 767"),
        ("tokenizer_config.json", {"chat_template": "{{ bad"}, "chat template fails"),
        ("tokenizer_config.json", {"chat_template": "hi"}, "does not show what the user says"),
        ("tokenizer_config.json", {"chat_template": None}, "no chat template"),
        ("tokenizer.json", "{}", "no usable tokenizer"),
        (
            "special_tokens_map.json",
            '{"unk_token": {"unk_token": "<unk>"}}',
            "no usable tokenizer .*: RecursionError",
        ),
        ("config.json", {"head_dim": 2**63}, "config.json"),
        ("config.json", {"num_attention_heads": 0, "head_dim": None}, "config.json"),
        ("config.json", {"rope_parameters": "x"}, "rope_parameters is 'x', needed an object"),
        ("config.json", {"architectures": [["a"]]}, "architectures"),
        ("config.json", {"num_hidden_layers": float("inf")}, "config.json"),
        ("config.json", {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ("config.json", {"vocab_size": None}, "config.json"),
    ],
)
def test_a_damaged_model_directory_is_one_line_before_anything_is_computed(
    tmp_path, model, file, change, said
):
    if isinstance(change, dict):
        change = json.dumps(json.loads((model / file).read_text()) | change)
    (model / file).write_text(change)
    with pytest.raises(BadInput, match=said) as caught:
        main.main(words(tmp_path / "run", model__path=model))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_help_lists_every_knob(capsys):
    main.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{key} " in shown for key, *_ in config.knobs())
