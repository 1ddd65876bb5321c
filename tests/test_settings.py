"""What users write: each value means what a person reads or is refused, and flags are whole."""

import contextlib
import socket
import time

import huggingface_hub.constants
import pytest

from sppo_jax import config, config_file, main
from sppo_jax.errors import BadInput
from sppo_jax.hub import environment, names
from sppo_jax.plan import __main__ as plan
from sppo_jax.settings import checks


def from_text(tmp_path, text, *overrides):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return config.flat(config_file.load([file], overrides))


def refusal(call, *arguments):
    """The one line with which a call refuses its arguments."""
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "line 2: seed is there a second time, after line 1"),
        ("fit:\n  eta: 1\n  epochs: 2\n  eta: 1", "line 4: fit.eta is there a second time, after line 2"),
        ("fit: {eta: 5, eta: 6}", "fit.eta is there a second time"),
        ("fit: {eta: 1}\nseed: 1\nfit: {epochs: 1}", "line 3: fit is there a second time, after line 1"),
        ("fit: {eta: 1, 'eta': 2}", "fit.eta is there a second time"),
        ("fit: {<<: {eta: 1}, eta: 2}", "merging (<<) is not read"),
        ("fit: &a {eta: 1}\neval: {<<: *a}", "merging (<<) is not read"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path, text, said):
    assert said in refusal(from_text, tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed: 010", "seed", 10),
        ("seed: 1_000", "seed", 1000),
        ("seed: '5'", "seed", 5),
        ("seed: +5", "seed", 5),
        ("fit: {eta: 1e3}", "fit.eta", 1000.0),
        ("fit: {learning_rate: 5e-7}", "fit.learning_rate", 5e-7),
        ("fit: {baseline: 0}", "fit.baseline", 0.0),
        ("out: 2024-01-01", "out", "2024-01-01"),
        ("out: 2024-31-12", "out", "2024-31-12"),
        ("out: no", "out", "no"),
        ("out: on", "out", "on"),
        ("out: 007", "out", "007"),
        ("out: 12:30", "out", "12:30"),
        ("out: 1.0", "out", "1.0"),
        ("out: |\n  runs/x\n", "out", "runs/x"),
        ("eval: {prompts: &n 20, probe_prompts: *n}", "eval.probe_prompts", 20),
        ("seed: 7".encode("utf-16"), "seed", 7),
        ("\ufeffseed: 7".encode(), "seed", 7),
        ("seed: 7\r\niterations: 2\r\n", "seed", 7),
        ("log: {to: []}", "log.to", []),
        ("log: {to: ''}", "log.to", []),
        ("log: {to: wandb}", "log.to", ["wandb"]),
        ("log: {to: 'tensorboard,wandb'}", "log.to", ["tensorboard", "wandb"]),
        ("log: {to: [tensorboard, 'wandb', ]}", "log.to", ["tensorboard", "wandb"]),
        ("log:\n  to:\n    - trackio\n    - wandb\n", "log.to", ["trackio", "wandb"]),
    ],
)
def test_a_value_means_what_a_person_reads(tmp_path, text, key, value):
    found = from_text(tmp_path, text)[key]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("seed", "0x10", "needs a whole number, found '0x10'; write it in decimal digits"),
        ("seed", "0o7", "needs a whole number, found '0o7'"),
        ("seed", "0b1", "needs a whole number"),
        ("seed", "0x_", "needs a whole number"),
        ("seed", "1_0", "needs a whole number"),
        ("seed", "12:30", "needs a whole number"),
        ("seed", "2024-01-01", "needs a whole number"),
        ("seed", "1e3", "needs a whole number, found '1e3'; write 1000"),
        ("seed", "1.0", "needs a whole number, found '1.0'; write 1"),
        ("seed", "1.5", "needs a whole number, found '1.5'"),
        ("seed", "yes", "needs a whole number"),
        ("seed", "٣", "needs a whole number"),
        ("seed", "", "needs a whole number, found nothing"),
        ("seed", "9" * 5001, "needs a whole number, found one of 5001 digits"),
        ("seed", "x" * 2000, r"(2000 characters)"),
        ("fit.eta", "", "needs a number, found nothing"),
        ("fit.eta", "1:30", "needs a number"),
        ("fit.eta", "on", "needs a number"),
        ("fit.eta", "9" * 5001, "must be above 0 and below 2147483648"),
        ("fit.baseline", "log_part", "needs a number or log_partition, found 'log_part'; did you mean 'log_partition'?"),
        ("fit.loss", "spo", "needs one of sppo, sppo_single, sppo_hard, dpo, ipo, difference, found 'spo'; did you mean 'sppo'?"),
        ("judge.estimator", "Pairwise", "needs one of pairwise, pairwise_loo, score, found 'Pairwise'; did you mean 'pairwise'?"),
        ("sampling.quantize", "int4", "did you mean 'int8'?"),
        ("log.to", "wandbd", "needs one of tensorboard, wandb, trackio, or several as [a, b], found 'wandbd'; did you mean 'wandb'?"),
        ("log.to", "[wandb, Trackio]", "found 'Trackio'; did you mean 'trackio'?"),
        ("log.to", "wandb,", "found nothing"),
        ("log.to", "wandb, wandb", "has wandb a second time; keep one of them"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused_with_the_type_and_the_nearest_choice(tmp_path, key, text, said):
    section, dot, name = key.partition(".")
    quoted = f'{section}: {{{name}: "{text}"}}' if dot else f'{key}: "{text}"'
    for line in (refusal(config_file.load, [], [f"--{key}", text]), refusal(from_text, tmp_path, quoted)):
        assert said in line
        assert key in line
        assert len(line) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 2000, "nested too deeply"),
        ("seed: " + "{a: " * 2000, "nested too deeply"),
        ("seed: !!int 5", "line 1: the tag !!int is not read"),
        ("seed: !!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd is not read"),
        ("seed: 1\n---\nseed: 2", "line 2: several documents"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "unknown key 'a'"),
        ("out: &a [*a]", "out needs one value, found a list"),
        ("seed: *nobody", "undefined alias"),
        ("log: {to: [[wandb]]}", "line 1: log.to is a list of names, found a list in it"),
        ("log: {to: [~]}", "line 1: log.to is a list of names, found nothing in it"),
        ('out: "\\UFFFFFFFF"', "not YAML"),
        ("out: a\0b", "U+0000"),
        ("out: ü".encode("latin-1"), "not UTF-8 text"),
        ("seed: 5".encode("utf-16-le"), "U+0000"),
        ("x" * 300_000, "more than 262144 bytes"),
        ("\tseed: 1", "line 1: a tab before a key; indent with spaces"),
        ("? [a]\n: 1", "a list cannot be a key"),
        ("fit: ~", "fit is a section of keys, found nothing"),
        ("fit.eta: 5", "in a file it is the key eta of the section fit"),
        ("out: ~", "out needs a text, found nothing"),
        ("eval: {oracle: null}", "the empty text is ''"),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_whatever_the_parser_meets_is_one_line_at_once(tmp_path, text, said):
    began = time.monotonic()
    assert said in refusal(from_text, tmp_path, text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--prompts.heldout", "--out", "x"],
            "--prompts.heldout needs a value, and the next word is the flag --out",
        ),
        (["--config", "--out", "x"], "--config needs a value, and the next word is the flag --out"),
        (["--fit.eta", "--1"], "--fit.eta needs a value"),
        (["--seed"], "--seed needs a value"),
        (["--config="], "--config needs a value"),
        (["--confg", "x.yaml"], "unknown flag --confg; did you mean '--config'?"),
        (["--confg=x.yaml"], "unknown flag --confg; did you mean '--config'?"),
        (["--hlp"], "did you mean '--help'?"),
        (["--learning-rate", "1"], "did you mean '--fit.learning_rate'?"),
        (["--fit-eta", "1"], "did you mean '--fit.eta'?"),
        (["--fit"], "--fit is a section: write --fit.loss VALUE; its keys are loss, eta"),
        (["--fit", "3"], "--fit is a section"),
        (["--fit.eta.x", "3"], "unknown flag --fit.eta.x; did you mean '--fit.eta'?"),
        (["--versoin"], "unknown flag --versoin; did you mean '--version'?"),
        (["-c", "x.yaml"], "unexpected argument '-c': flags are --section.key value, --config"),
        (["x.yaml"], "a file is given as --config x.yaml"),
        (["fit.eta=5"], "did you mean --fit.eta=5?"),
        (["\N{EM DASH}out", "x"], "did you mean --out?"),
        (["--", "x"], "unknown flag --"),
        ([""], "unexpected argument ''"),
        (["--config", "quickstart", "--out="], "out is empty"),
        (["--model.path", ""], "model.path is empty"),
        (["--config", "quickstart", "--out", "a\0b"], "--out has a NUL character in it"),
        (["--prompts.source", "jsonl:\udcff"], "--prompts.source is not UTF-8 text"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused_with_what_to_write(words, said):
    assert said in refusal(main.main, words)


def test_a_value_that_begins_with_dashes_is_given_with_an_equals_sign_and_the_last_of_two_counts(capsys):
    loaded = config_file.load([], ["--prompts.column=--x", "--seed=1", "--mesh.fsdp", "-1", "--seed", "2"])
    assert (loaded.prompts.column, loaded.seed, loaded.mesh.fsdp) == ("--x", 2, -1)
    main.main(["--help"])
    assert "of a flag given twice the last counts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topolgy", "v5e:4x4"], "did you mean '--topology'?"),
        (["--topology", "--json"], "--topology needs a value, and the next word is the flag --json"),
        (["--topology", "v5e:4x5"], "shapes are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        (["--topology", "v5e:-4x-4"], "there is no such slice"),
        (["--topology", "v4:4x4"], "as v4:2x2x4"),
        (["--topology", "V5E:4x4"], "did you mean 'v5e'?"),
        (["--device", "h1000"], "did you mean 'h100'?"),
        (["--device", "h100", "--count", "9999999"], "needs a whole number from 1 to 16384"),
        (["--device", "h100", "--count", "2.5"], "needs a whole number"),
        (["--device", "h100", "--price", "-1"], "--price -1: needs a number above 0"),
        (["--device", "h100:²"], "needs a whole number from 1 to"),
        (["--device", "h100", "--json=1"], "--json takes no value"),
        (["--out", "--device", "h100"], "--out needs a value"),
    ],
)
def test_flags_of_a_plan_are_refused_with_what_to_write(words, said):
    assert said in refusal(plan.parse, words)


HOMES = {
    "--out=~/run": "out",
    "--model.path=~/m": "model.path",
    "--judge.path=~/j": "judge.path",
    "--prompts.source=jsonl:~/p.jsonl": "prompts.source",
    "--prompts.heldout=hf:~/d": "prompts.heldout",
    "--pairs.source=parquet:~/{iteration}.parquet": "pairs.source",
}


@pytest.mark.parametrize("flag", HOMES)
def test_the_home_directory_is_expanded_in_every_path_of_a_configuration(tmp_path, monkeypatch, flag):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = {"judge.path": "j", "prompts.source": "jsonl:p", "model.path": "m"}
    others = [f"--{key}={value}" for key, value in named.items() if key != HOMES[flag]]
    found = config.flat(config_file.load([], [*others, flag]))[HOMES[flag]]
    assert found == flag.partition("=")[2].replace("~", str(tmp_path))


def test_a_home_that_is_not_known_is_refused_by_the_knob_and_other_tildes_stay():
    assert refusal(config_file.load, [], ["--out=~nobody-here/x"]).startswith("out=~nobody-here/x: no home")
    assert config_file.load([], ["--out=a~b"]).out == "a~b"
    assert config_file.load([], ["--eval.oracle=~:x"]).eval.oracle == "~:x"


@pytest.mark.parametrize(
    "text", ["fit:\n  # eta: 5\nseed: 3", "seed: 3\neval:\nfit:\n", "judge:   # all defaults\nseed: 3"]
)
def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path, text):
    assert from_text(tmp_path, text) == config.flat(config_file.load([], ["--seed=3"]))


@pytest.mark.parametrize(
    ("flag", "refused"),
    [
        ("--fit.learning_rate=1e-46", True),
        ("--fit.learning_rate=1e-39", True),  # not 0 in float32, but devices take it as 0
        ("--fit.max_grad_norm=1e-46", True),  # would be 0: no clipping
        ("--fit.max_grad_norm=1e39", True),
        ("--fit.eta=1e39", True),
        ("--fit.eta=1e-300", True),
        ("--fit.baseline=1e-46", True),
        ("--judge.sharpness=1e300", True),
        ("--judge.sharpness=1e-300", True),
        ("--sampling.temperature=1e39", True),
        ("--sampling.temperature=1e-46", False),  # these two are clamped by the sampler
        ("--sampling.top_p=1e-45", False),
        ("--fit.learning_rate=1.2e-38", False),
        ("--fit.max_grad_norm=0", False),
    ],
)
def test_a_number_that_is_0_or_infinite_in_float32_is_refused_unless_it_is_clamped(flag, refused):
    with pytest.raises(BadInput, match=flag[2:].split("=")[0]) if refused else contextlib.nullcontext():
        config_file.load([], [flag])


@pytest.mark.parametrize(
    ("lengths", "new", "advice"),
    [
        ([30, 20], 5000, "lower sampling.max_new_tokens to 482"),
        ([500, 20], 64, "lower sampling.max_new_tokens to 12 or prompts.max_length to 448"),
        ([600, 20], 64, "lower prompts.max_length to 448"),
        ([600, 20], 5000, "lower prompts.max_length to 256 and sampling.max_new_tokens to 256"),
        ([18, 17, 16, 6], 500, "lower sampling.max_new_tokens to 494"),
        ([600, 512], 5000, "take a model with more, or shorter prompts"),
    ],
)
def test_numbers_to_lower_are_numbers_that_work(lengths, new, advice):
    assert checks.shorter(lengths, new, 512) == advice


@pytest.fixture(params=["closed", "silent", "unknown", "proxy"])
def nowhere(request, monkeypatch):
    """The address of a hub that does not reply, in the ways in which a network can be absent."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(environment, "offline", lambda: False)
    monkeypatch.setattr(environment, "WAIT", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(1)
        if request.param == "proxy":
            monkeypatch.setenv("ALL_PROXY", "nonsense://x")
        known = f"http://127.0.0.1:{server.getsockname()[1]}"
        address = "http://hub.invalid" if request.param == "unknown" else known
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address


def test_a_name_on_the_hub_without_a_network_is_one_line_within_seconds(nowhere, capfd):
    began = time.monotonic()
    line = refusal(names.fetch, "owner/model")
    assert time.monotonic() - began < 5
    assert f"there is no connection to {nowhere}" in line
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("address", ["nonsense", "http://[::1", "ftp://hub", "http://hub:port"])
def test_an_address_of_the_hub_that_is_none_is_refused_by_its_name(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert refusal(names.fetch, "owner/model").startswith("HF_ENDPOINT is not the address of a hub")
