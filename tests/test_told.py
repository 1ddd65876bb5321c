"""What a user gets wrong in the first hour: one line each, which names the knob and what to write instead."""

import json

import pytest

from sppo_jax import chat, config, config_file, export, main
from sppo_jax.errors import BadInput
from sppo_jax.evaluation import flags as evaluate
from sppo_jax.pairrm import BACKENDS
from sppo_jax.plan import __main__ as plan
from sppo_jax.report import __main__ as report
from sppo_jax.run import early
from sppo_jax.settings import checks, values

pytestmark = pytest.mark.usefixtures("single_device")

RULE = ["--judge.backend", "rule:Rule"]  # written by the fixture, as an own judge
ORACLE = ["--judge.backend", "sppo_jax.tiny.world:oracle"]
NO_ORACLE = "--eval.oracle="
OWN = ["--prompts.source", "jsonl:own.jsonl", "--prompts.per_iteration", "9"]
FILES = {
    "own.jsonl": "".join(json.dumps({"prompt": f"Write a line about river {i}."}) + "\n" for i in range(30)),
    "one.jsonl": json.dumps({"prompt": "Only one?"}),
    "texts.jsonl": json.dumps({"text": "No prompt?"}),
    "empty.jsonl": "",
    "key.yaml": "fit:\n  etta: 5\n",
    "dotted.yaml": "fit.eta: 5\n",
    "number.yaml": "fit: 5\n",
    "trl.yaml": "fit:\n  beta: 0.1\n",
    "tab.yaml": "fit:\n\teta: 5\n",
    "rule.py": "import numpy as np\n\n\nclass Rule:\n    identity = 'rule'\n\n    def compare(self, prompts, responses, "
    "on_progress=None):\n        return np.zeros((len(prompts), len(responses[0]), len(responses[0])))\n",
    "run/config.yaml": "out: run\n",
    "run/iter_1/export/config.json": "{}",
    "run/iter_2/export/config.json": "{}",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with FILES, in which Python finds modules."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


# Command lines of main after --config quickstart.yaml --out out.
OF_MAIN = {
    "a value is forgotten": (["--prompts.heldout", "--out", "x"], "--prompts.heldout needs a value, and the next word is the flag --out"),
    "the last value is forgotten": (["--fit.eta"], "--fit.eta needs a value; the default is 1000.0"),
    "a flag is misspelt": (["--confg", "x.yaml"], "unknown flag --confg; did you mean '--config'?"),
    "a knob is misspelt": (["--fit.learnin_rate", "1"], "did you mean '--fit.learning_rate'?"),
    "a knob without its section": (["--eta", "5"], "unknown flag --eta; did you mean '--fit.eta'?"),
    "a knob in another section": (["--sampling.eta", "5"], "did you mean '--fit.eta'?"),
    "a section": (["--fit", "5"], "--fit is a section: write --fit.loss VALUE; its keys are loss, eta,"),
    "a file without its flag": (["x.yaml"], "a file is given as --config x.yaml"),
    "one dash": (["-seed", "3"], "did you mean --seed?"),
    "a wrong choice": (["--fit.loss", "spo"], "--fit.loss needs one of sppo, sppo_single, sppo_hard, dpo, ipo, difference, found 'spo'; did you mean 'sppo'?"),
    "a choice unlike any": (["--pairs.select", "best"], "found 'best'; the default is best_worst"),
    "a word for a number": (["--fit.eta", "ten"], "--fit.eta needs a number, found 'ten'; the default is 1000.0"),
    "a fraction": (["--iterations", "2.5"], "--iterations needs a whole number, found '2.5'; the default is 3"),
    "below the range": (["--fit.eta", "-5"], "fit.eta=-5.0 must be above 0; the default is 1000.0"),
    "one response": (["--sampling.responses", "1"], "sampling.responses=1 must be at least 2; the default is 5"),
    "above the range": (["--sampling.top_p", "1.5"], "sampling.top_p=1.5 must be above 0 and at most 1; the default is 1.0"),
    "no win rate": (["--fit.baseline", "2"], "it must lie in [0, 1], or be log_partition"),
    "a schedule that is too short": (["--fit.epochs", "9"], "set fit.schedule_epochs to 9"),
    "an unknown key of a file": (["--config", "key.yaml"], "key.yaml, line 2: unknown key 'fit.etta'; did you mean 'fit.eta'?"),
    "a dotted key of a file": (["--config", "dotted.yaml"], "fit: {eta: VALUE}"),
    "a value for a section": (["--config", "number.yaml"], "fit is a section of keys, found '5'; its keys are loss, eta,"),
    "a tab": (["--config", "tab.yaml"], "line 2: a tab before a key; indent with spaces"),
    "an unknown judge": (["--judge.backend", "jaxx"], "judge.backend=jaxx is not known; choose torch, jax, llm_blender, or module:attribute for a judge of your own; did you mean 'jax'?"),
    "no judge there": (["--judge.path", "nowhere"], "judge.path=nowhere: no such directory, and not a name on the hub (owner/repo"),
    "no module of a judge": (["--judge.backend", "ruels:Rule"], "judge.backend=ruels:Rule: there is no module 'ruels' (no ruels.py)"),
    "no attribute of a judge": (["--judge.backend", "rule"], "judge.backend=rule is not known; choose"),
    "an oracle without its attribute": (["--eval.oracle", "rule"], "as rules:judge of rules.py"),
    "a misspelt attribute": (["--judge.backend", "rule:Ruel"], "judge.backend=rule:Ruel: rule.py has no 'Ruel'; did you mean rule:Rule?"),
    "a misspelt module": (["--judge.backend", "ruel:Rule"], "there is no module 'ruel' (no ruel.py); did you mean rule:Rule?; a judge is"),
    "a misspelt file": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:onw.jsonl"], "no such file onw.jsonl; did you mean own.jsonl?"),
    "an example beside no clone": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:examples/prompts.jsonl"], "examples/ comes with the source and is not installed; start in the folder of a clone"),
    "TRL's beta": (["--beta", "0.1"], "unknown flag --beta; here it is --fit.eta, which is 1 / beta: for beta 0.1 set it to 10"),
    "TRL's K": (["--num-generations", "4"], "here it is --sampling.responses"),
    "TRL's batch": (["--per_device_train_batch_size=4"], "here it is --fit.global_batch, the prompts of an update on all devices"),
    "TRL's rate": (["--learning_rate", "1e-6"], "did you mean '--fit.learning_rate'?"),
    "TRL's name in a file": (["--config", "trl.yaml"], "trl.yaml, line 2: unknown key 'fit.beta'; here it is fit.eta, which is 1 / beta"),
    "a model beside embedded parts": (["--model.path", "empty"], "give --judge.path llm-blender/PairRM-hf (embedded:pairrm to take the toy's on purpose) and --prompts.source jsonl:PATH"),
    "no model there": ([*RULE, *OWN, NO_ORACLE, "--model.path", "nowhere"], "model.path=nowhere: no such directory, and not a name on the hub (owner/repo"),
    "no model in it": ([*RULE, *OWN, NO_ORACLE, "--model.path", "empty"], "model.path=empty: no config.json in it; a model is a Hugging Face directory, a name on the hub (owner/repo) or embedded:policy"),
    "a run as model": ([*RULE, *OWN, NO_ORACLE, "--model.path", "run"], "model.path=run: a run directory, not a model; give an export in it: run/iter_2/export"),
    "a misspelt embedded model": (["--model.path", "embedded:polcy"], "model.path=embedded:polcy: not embedded; there are: pairrm, policy, prompts"),
    "devices that are not there": ([*ORACLE, "--mesh.fsdp", "3"], "mesh.fsdp=3, mesh.tensor=1 does not fit 1 devices"),
    "responses beyond the context": ([*ORACLE, "--sampling.max_new_tokens", "5000"], "sampling.max_new_tokens=5000 after a prompt of 24 tokens exceeds the model's 512 positions; lower sampling.max_new_tokens to 488"),
    "prompts that are all too long": ([*ORACLE, "--prompts.max_length", "3"], "raise prompts.max_length=3: a short one has 10 tokens"),
    "a source without its kind": ([*RULE, NO_ORACLE, "--prompts.source", "own.jsonl"], "did you mean jsonl:own.jsonl?"),
    "a source of a misspelt kind": ([*RULE, NO_ORACLE, "--prompts.source", "json:own.jsonl"], "did you mean jsonl:own.jsonl?"),
    "no file there": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:nowhere.jsonl"], "prompts.source=jsonl:nowhere.jsonl: no such file"),
    "an empty file": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:empty.jsonl"], "it has no rows; is it empty?"),
    "one prompt": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:one.jsonl"], "give more, or name other prompts in prompts.heldout (jsonl:PATH)"),
    "another column": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:texts.jsonl"], "set prompts.column to one that holds text (text)"),
    "fewer prompts than iterations need": ([*RULE, NO_ORACLE, "--prompts.source", "jsonl:own.jsonl"], "set prompts.per_iteration to 9"),
    "an oracle of other prompts": ([*RULE, *OWN], "leave eval.oracle empty (eval.oracle: '' in YAML, --eval.oracle '' as a flag)"),
    "a batch of all prompts": ([*ORACLE, "--fit.global_batch", "100", "--prompts.per_iteration", "8", "--fit.epochs", "1", "--fit.schedule_epochs", "1"], "use --fit.global_batch 2 (4 updates)"),
    "a file in the way": (["--out", "own.jsonl"], "--out own.jsonl: a file is in the way; choose another directory"),
}  # fmt: skip
OF_OTHERS = {
    "chat with a run": (chat, ["--policy", "run"], "give an export in it: run/iter_2/export"),
    "chat with an iteration": (chat, ["--policy", "run@2"], "give its policy: run/iter_2/export"),
    "chat with nobody": (chat, [], "give --policy DIR|OWNER/NAME; see python -m sppo_jax.chat --help"),
    "a misspelt flag": (chat, ["--polcy", "x"], "did you mean --policy?"),
    "a flag out of its range": (chat, ["--policy", "x", "--temperature", "-1"], "--temperature -1.0: must be at least 0"),
    "a report of nothing": (report, [], "give --run OUT; see python -m sppo_jax.report --help"),
    "an export of half a name": (export, ["--run", "run", "--to", "x"], "give both, as --run OUT --iteration 3"),
    "a policy against nobody": (evaluate, ["--policy", "run@2"], "add --against B, --best-of 16, or --write FORMAT FILE"),
    "a run without its iteration": (evaluate, ["--policy", "run", "--against", "embedded:policy"], "name an iteration of it, as run@2"),
    "a plan for nothing": (plan, [], "--topology v5e:4x4, or --device h100 --count 8"),
}  # fmt: skip


def refusal(entry, words):
    """The one line with which a command refuses its words."""
    with pytest.raises(BadInput) as caught:
        entry(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OF_MAIN)
def test_a_mistake_in_a_run_names_the_knob_and_what_to_write(name, here, pytestconfig):
    words, said = OF_MAIN[name]
    quickstart = pytestconfig.rootpath / "configs/quickstart.yaml"
    assert said in refusal(main.main, ["--config", str(quickstart), "--out", "out", *words])
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_mistake_in_another_command_names_the_flag_and_what_to_write(name, here):
    command, words, said = OF_OTHERS[name]
    assert said in refusal(command.main, words)


@pytest.mark.parametrize("words", [[], ["--quiet"], ["--out", "x", "--iterations", "1"]])
def test_a_game_without_a_configuration_is_refused_with_the_names_of_the_shipped_ones(words, here):
    line = refusal(main.read, words)
    assert "mistral_7b" in line
    assert "--config quickstart" in line
    assert main.read(["--fit.eta", "5"])[0].fit.eta == 5


def test_chat_says_that_it_loads_and_that_the_embedded_policy_is_a_toy(monkeypatch, capsys):
    class Loaded(Exception):
        pass

    def fetch(_name):
        raise Loaded

    monkeypatch.setattr("sppo_jax.hub.names.fetch", fetch)
    with pytest.raises(Loaded):
        chat.main(["--policy", "embedded:policy"])
    loading, warning = capsys.readouterr().err.splitlines()
    assert loading == "loading embedded:policy ..."
    assert warning.startswith("warning: embedded:policy is a toy")


def test_names_of_other_trainers_stand_for_knobs_that_there_are_and_are_none():
    leaves = {knob.rpartition(".")[2] for knob in config.kinds()}
    for name, (ours, _) in values.OTHERS.items():
        assert ours in config.kinds()
        assert name not in leaves


def test_a_judge_of_the_examples_beside_no_clone_says_where_they_are(here, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"no module 'examples' .*: examples/ comes with the source"):
        early.check(config_file.load([], ["--judge.backend", "examples.rule_judge:judge", "--eval.oracle="]))


def test_a_module_that_may_have_any_name_is_not_refused_by_its_text(here):
    (here / "any_name.py").write_text("from rule import *\n")
    early.check(config_file.load([], ["--judge.backend", "any_name:Rule", "--eval.oracle="]))
    (here / "by_name.py").write_text("if True:\n    import rule as Judge\n")
    early.check(config_file.load([], ["--judge.backend", "by_name:Judge", "--eval.oracle="]))
    with pytest.raises(BadInput, match=r"by_name.py has no 'judge'; did you mean by_name:Judge\?"):
        early.check(config_file.load([], ["--judge.backend", "by_name:judge", "--eval.oracle="]))


def test_the_judges_that_are_checked_for_are_those_that_there_are():
    assert checks.BACKENDS == BACKENDS
