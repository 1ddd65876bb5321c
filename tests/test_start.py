"""The first seconds of a command: what it prints, and when."""

import os
import subprocess
import sys

import pytest

import sppo_jax
from sppo_jax import command, config, main
from sppo_jax.settings import console

QUICKSTART = ["--config", "configs/quickstart.yaml"]


def first_line(module, words):
    """Return the first line that a command prints to either stream, and the processor's seconds until then.

    On an idle machine these are the seconds that pass; beside other tests more of them do.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", f"sppo_jax.{module}", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process.stdout:
        line = process.stdout.readline()
        process.kill()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return line, used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("words", "said", "limit"),
    [
        (QUICKSTART, "loading embedded:policy: iterations 3, out {out} ...", 1.1),
        ([*QUICKSTART, "--fit.eta", "-5"], "error: fit.eta=-5.0 must be above 0", 1.1),
        ([*QUICKSTART, "--judge.backend", "borda"], "error: judge.backend=borda is not known", 1.1),
        ([*QUICKSTART, "--judge.backend", "ruels:judge"], "error: judge.backend=ruels:judge: there is no", 1.1),
        ([*QUICKSTART, "--prompts.source", "jsonl:no.jsonl"], "error: prompts.source=jsonl:no.jsonl: no such", 1.1),
        ([*QUICKSTART, "--judge.path", "no"], "error: judge.path=no: no such directory", 1.1),
        (["--help"], "python -m sppo_jax.main --config FILE", 1.1),
        (["--version"], f"sppo_jax {sppo_jax.__version__}", 0.2),
    ],
)  # fmt: skip
def test_the_first_line_comes_before_jax_is_imported(words, said, limit, tmp_path):
    """Seen: 0.28 to 0.36 s of the processor, and 0.06 s for --version. The limits are three times that."""
    line, seconds = first_line("main", words if words[0] != "--config" else [*words, "--out", str(tmp_path)])
    assert line.startswith(said.format(out=tmp_path))
    assert seconds < limit


def test_a_quiet_run_and_a_process_that_is_not_the_first_print_no_loading_line(monkeypatch, capsys):
    class Loaded(Exception):
        pass

    def joined(_settings):
        raise Loaded

    monkeypatch.setattr("sppo_jax.run.cluster.joined", joined)
    second = [*QUICKSTART, "--distributed.coordinator", "127.0.0.1:1", "--distributed.num_processes", "2"]
    for words, shown in (
        (QUICKSTART, True),
        ([*QUICKSTART, "--quiet"], False),
        ([*second, "--distributed.process_id", "0"], True),
        ([*second, "--distributed.process_id", "1"], False),
    ):
        with pytest.raises(Loaded):
            main.main(words)
        assert capsys.readouterr().out.startswith("loading ") == shown
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(Loaded):
        main.main(QUICKSTART)
    assert capsys.readouterr().out == ""


def test_inputs_are_not_looked_up_early_where_other_processes_would_wait(monkeypatch):
    def check(_config):
        raise AssertionError

    monkeypatch.setattr("sppo_jax.run.early.check", check)
    monkeypatch.setattr("sppo_jax.run.cluster.joined", lambda _: pytest.fail("joined"))
    with pytest.raises(AssertionError):
        main.main(QUICKSTART)
    with pytest.raises(pytest.fail.Exception, match="joined"):
        main.main([*QUICKSTART, "--distributed.coordinator", "127.0.0.1:1"])


def test_help_has_a_heading_for_every_section_and_an_example():
    shown = main.usage().splitlines()
    assert set(main.HEADINGS) == {knob.key.rpartition(".")[0] for knob in config.knobs()}
    for section, heading in main.HEADINGS.items():
        assert f"{section} - {heading}".removeprefix(" - ") in shown
    assert "  python -m sppo_jax.main --config quickstart --out runs/quickstart" in shown
    assert max(map(len, shown)) <= 120


def test_every_command_has_a_version_before_its_imports(capsys):
    for name in command.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command.check_module(["python", "-m", f"sppo_jax.{name}", "--policy", "x", "--version"])
        assert not ended.value.code
        assert capsys.readouterr().out == f"sppo_jax {sppo_jax.__version__}\n"


@pytest.fixture
def script(monkeypatch, capsys):
    """A function that runs the console script, and returns the module that it runs, its words, and what is printed."""

    def script(*words):
        ran = []
        monkeypatch.setattr("sys.argv", ["/usr/bin/sppo_jax", *words])
        monkeypatch.setattr("sys.path", ["/usr/bin", *sys.path[1:]])
        monkeypatch.setattr("runpy.run_module", lambda name, **how: ran.append((name, how["run_name"])))
        code = 0
        try:
            console.script()
        except SystemExit as ended:
            code = ended.code
        return ran, sys.argv[1:], code, "".join(capsys.readouterr())

    return script


@pytest.mark.parametrize("name", ["train", *command.COMMANDS])
def test_the_script_runs_the_command_as_python_does(name, script):
    ran, words, code, _ = script(name, "--config", "x", "--help")
    module = "main" if name == "train" else name
    assert (ran, words, code) == ([(f"sppo_jax.{module}", "__main__")], ["--config", "x", "--help"], 0)
    assert sys.path[0] == ""  # a judge in the working directory is found, as by python -m


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "sppo_jax COMMAND [FLAGS]"),
        (["--help"], 0, "  evaluate     compare policies"),
        (["--version"], 0, f"sppo_jax {sppo_jax.__version__}\n"),
        (["chat", "--version"], 0, f"sppo_jax {sppo_jax.__version__}\n"),
        (["trian"], 2, "error: trian is not a command; did you mean sppo_jax train? commands are train, plan, evaluate"),
        (["--config", "x"], 2, "error: --config comes after a command, as sppo_jax train --config; commands are"),
    ],
)  # fmt: skip
def test_the_script_lists_its_commands_and_refuses_others_in_one_line(words, code, said, script):
    ran, _, found, shown = script(*words)
    assert (ran, found) == ([], code)
    assert said in shown
    assert code == 0 or len(shown.splitlines()) == 1


def test_texts_name_the_command_as_it_was_called(monkeypatch):
    assert main.usage().startswith("python -m sppo_jax.main --config FILE")
    assert command.Flags("sppo_jax.chat", "Talk.").prog == "python -m sppo_jax.chat"
    monkeypatch.setattr("sys.orig_argv", ["python", "/usr/bin/sppo_jax", "train", "--help"])
    assert main.usage().startswith("sppo_jax train --config FILE")
    assert "python -m" not in main.usage()
    assert command.Flags("sppo_jax.chat", "Talk.").prog == "sppo_jax chat"


def test_the_scripts_list_has_train_and_not_main_which_works_all_the_same(script):
    shown = script("--help")[3]
    assert "\n  train " in shown
    assert "main" not in shown
    assert "main" not in script("tarin")[3]


def test_the_script_prints_what_a_command_prints():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from sppo_jax.settings.console import script; script()", "config"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == config.markdown()
