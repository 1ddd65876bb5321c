"""Exports: of a run's checkpoints from any mesh, whole or not at all, and pushed as the last step."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from sppo_jax import export, sharding
from sppo_jax.errors import BadInput
from sppo_jax.hub import names, repositories
from sppo_jax.models import hf, lora
from sppo_jax.models.transformer import Adapter
from sppo_jax.report import model_card
from sppo_jax.run import manifest
from sppo_jax.text import chat_template
from sppo_jax.training import checkpoint
from sppo_jax.training.checkpoint import TrainState
from tests import hub_stub
from tests.run_directory import begun


@pytest.fixture
def begin(tmp_path):
    return functools.partial(begun, tmp_path)


@pytest.fixture(scope="module")
def trained():
    """A policy over 4 x 2 devices that is not the base any more."""
    model = hf.load(names.path("policy"), mesh=sharding.make_mesh(1, 4, 2))
    for i, (name, param) in enumerate(sorted(model.layers.items())):
        if "norm" not in name:
            param[...] = param[...] * (1 + 1e-3 * (i + 1))
    return model


def save(run, t, step, model):
    """Iteration t's training state after `step` updates, as fit saves it."""
    kind = Adapter if model.architecture.lora_rank else nnx.Param
    _, params, _ = nnx.split(model, kind, ...)
    state = TrainState(jax.numpy.int32(step), params, optax.adamw(1e-3).init(params))
    with checkpoint.Checkpoints(run.checkpoints(t)) as checkpoints:
        checkpoints.save(step, state)


def weights(directory):
    return load_file(directory / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def command(run, to, *words, t=1):
    return ["--run", str(run.root), "--iteration", str(t), "--to", str(to), *words]


def test_a_checkpoint_becomes_what_the_policy_was_on_another_mesh(begin, trained, tmp_path, capsys):
    run, to = begin(), tmp_path / "new/exported"
    save(run, 1, 3, trained)
    before = sorted(p.relative_to(run.root) for p in run.root.rglob("*"))
    export.main(command(run, to))
    shown = capsys.readouterr()
    assert shown.out == f"{to}\n"
    assert shown.err == "iteration 1 is unfinished: this is its policy after update 3\n"
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    hf.save(trained, wanted)
    assert same(weights(to), weights(wanted))
    assert not same(weights(to), weights(names.path("policy")))
    assert sorted(p.relative_to(run.root) for p in run.root.rglob("*")) == before
    assert sorted(p.name for p in to.parent.iterdir()) == ["exported"]


def test_a_finished_iteration_is_its_last_checkpoint_and_transformers_reads_it(
    begin, trained, tmp_path, capsys
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, to = begin(), tmp_path / "exported"
    save(run, 1, 2, trained)
    export.export(trained, names.path("policy"), run.export(1))
    export.main(command(run, to))
    assert capsys.readouterr().err == ""
    assert same(weights(to), weights(run.export(1)))
    ids = AutoTokenizer.from_pretrained(to)("Where can I find the fox?")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(to)(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(trained(jax.numpy.array([ids])), logits, atol=1e-4)
    assert (to / "README.md").read_text() == model_card.text(run, 1)


def test_without_checkpoints_the_runs_own_export_is_what_there_is(begin, trained, tmp_path):
    run, to = begin(), tmp_path / "exported"
    export.export(trained, names.path("policy"), run.export(1))
    export.main(command(run, to))
    assert same(weights(to), weights(run.export(1)))


def test_adapters_are_merged_from_a_checkpoint_and_from_a_finished_iterations_export(
    begin, trained, tmp_path
):
    run, mesh = begin("--model.lora_rank", "2"), sharding.make_mesh(1, 4, 2)
    adapted = lora.attach(hf.load(names.path("policy"), mesh=mesh), 2, jax.random.key(1), mesh)
    adapted.layers["q_lora_b"][...] = adapted.layers["q_lora_b"][...] + 0.01
    save(run, 1, 3, adapted)
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    hf.save(adapted, wanted)
    export.main(command(run, tmp_path / "early"))
    assert not same(weights(wanted), weights(names.path("policy")))
    assert same(weights(tmp_path / "early"), weights(wanted))
    export.export(trained, names.path("policy"), run.export(1))
    export.main(command(run, tmp_path / "late"))
    assert same(weights(tmp_path / "late"), weights(run.export(1)))


def test_iteration_0_is_the_base_itself(begin, tmp_path):
    run, to = begin(), tmp_path / "exported"
    export.main(command(run, to, t=0))
    assert same(weights(to), weights(names.path("policy")))
    assert not (to / "README.md").exists()


@pytest.fixture
def brain(tmp_path):
    """The embedded policy as checkpoints are published: bfloat16, as torch_dtype names it, with files of all kinds."""
    base = shutil.copytree(names.path("policy"), tmp_path / "brain")
    found = {name: x.astype(jax.numpy.bfloat16) for name, x in weights(base).items()}
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    for name in (
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.model",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "LICENSE.txt",
    ):
        (base / name).write_text(f"of {name}")
    for name in ("pytorch_model.bin", "README.md", "optimizer.pt"):
        (base / name).write_text("not part of an export")
    return base


def test_the_dtype_is_the_bases_own_unless_asked_and_config_json_names_it(begin, brain, tmp_path):
    run = begin("--model.path", str(brain))
    export.main(command(run, tmp_path / "own", t=0))
    export.main(command(run, tmp_path / "wide", "--dtype", "float32", t=0))
    assert same(weights(tmp_path / "own"), weights(brain))
    wide = weights(tmp_path / "wide")
    assert {x.dtype.name for x in wide.values()} == {"float32"}
    assert all((x == weights(brain)[name].astype(np.float32)).all() for name, x in wide.items())
    for directory, dtype in (("own", "bfloat16"), ("wide", "float32")):
        config = json.loads((tmp_path / directory / "config.json").read_text())
        before = json.loads((brain / "config.json").read_text())
        assert config == before | {"dtype": dtype, "torch_dtype": dtype}
    del before["torch_dtype"]
    config = before
    (brain / "config.json").write_text(json.dumps(config))
    assert export.own_dtype(brain) == "bfloat16"  # of its tensors, where config.json does not say
    assert export.own_dtype(tmp_path / "wide") == "float32"


@pytest.mark.parametrize("spelling", ["auto", "torch.bfloat16", "bfloat16", None])
def test_the_bases_dtype_is_read_in_every_spelling(brain, spelling):
    config = json.loads((brain / "config.json").read_text()) | {"torch_dtype": spelling}
    config.pop("dtype", None)
    (brain / "config.json").write_text(json.dumps(config))
    assert export.own_dtype(brain) == "bfloat16"


def test_every_file_that_a_tokenizer_needs_goes_along_and_nothing_else(begin, brain, policy, tmp_path):
    for folder in (repositories.TEMPLATES, "original"):
        (brain / folder).mkdir()
        (brain / folder / "tool_use.jinja").write_text("of a folder")
    export.export(policy, brain, tmp_path / "to", card="described")
    found = [p for p in (tmp_path / "to").rglob("*") if p.is_file()]
    there = {str(p.relative_to(tmp_path / "to")): p.read_text(errors="replace") for p in found}
    kept = {p.name for p in brain.iterdir() if p.is_file()} - {
        "pytorch_model.bin",
        "README.md",
        "optimizer.pt",
    }
    kept.add(f"{repositories.TEMPLATES}/tool_use.jinja")
    assert there.keys() == kept | {"README.md"}
    assert there["README.md"] == "described"
    assert there["merges.txt"] == "of merges.txt"


@pytest.mark.parametrize("template", ["config", "jinja"])
def test_every_chat_template_of_a_tokenizer_is_in_its_export(policy, tmp_path, template):
    from transformers import AutoTokenizer

    base = shutil.copytree(names.path("policy"), tmp_path / "base")
    default = AutoTokenizer.from_pretrained(base).chat_template
    named = {"default": default, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if template == "config":
        config["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
    else:
        (base / "chat_template.jinja").write_text(default)
        (base / repositories.TEMPLATES).mkdir()
        for name in ("tool_use", "rag"):
            (base / repositories.TEMPLATES / f"{name}.jinja").write_text(named[name])
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    export.export(policy, base, tmp_path / "to")
    assert AutoTokenizer.from_pretrained(tmp_path / "to").chat_template == named
    chat_template.load_tokenizer(tmp_path / "to")


def test_only_a_folders_default_template_counts_among_a_runs_inputs(tmp_path):
    """Digests of runs begun without the folder stay the same."""
    base = shutil.copytree(names.path("policy"), tmp_path / "base")
    before = manifest.digests(base, "j", [], [], [])
    (base / repositories.TEMPLATES).mkdir()
    (base / repositories.TEMPLATES / "tool_use.jinja").write_text("x")
    assert manifest.digests(base, "j", [], [], []) == before
    (base / repositories.TEMPLATES / "default.jinja").write_text("x")
    assert manifest.digests(base, "j", [], [], [])["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--run": "nowhere"}, "--run nowhere: no such directory; give the OUT of a run"),
        ({"--run": "full"}, "--run full: not a run directory"),
        ({"--run": "full/file"}, "--run full/file: not a run directory"),
        ({"--run": "x" * 300}, "--run x+: File name too long"),
        ({"--run": "out\0"}, "--run .*not a possible name of a file"),
        ({"--to": "to\0"}, "--to .*not a possible name of a file"),
        ({"--to": "to\ud800"}, "--to .*not a possible name of a file"),
        ({"--to": "y" * 300}, "--to y+: File name too long"),
        ({"--to": "new/" + "y" * 300}, "--to new/y+: a part of the name is too long"),
        ({"--to": "~nobody-here/x"}, "--to ~nobody-here/x: no home directory is known"),
        (
            {"--run": None, "--iteration": None, "--push": "a/b", "--dtype": "float16"},
            "--dtype float16: to is uploaded",
        ),
        ({"--private": None, "--iteration": "x"}, "--iteration: invalid int value: 'x'"),
        ({"--iteration": "7"}, r"--iteration 7: .* has no policy of it; there are 0, 1 \(0: the base\)"),
        ({"--iteration": "-1"}, "--iteration -1: .* there are 0, 1"),
        ({"--to": "full"}, "--to full: not empty; choose another directory"),
        ({"--to": "full/file"}, "--to full/file: a file is in the way"),
        ({"--to": "full/file/below"}, "--to full/file/below: .*full/file is a file"),
        ({"--dtype": "int8"}, "invalid choice: 'int8'"),
        ({"--run": None}, "--run and --iteration go together"),
        ({"--run": None, "--iteration": None}, "nothing to do"),
        ({"--to": None}, "give --to DIR; see"),
        ({"--push": "one"}, r"one: no such directory, and not a name on the hub"),
        ({"--push": "a/b@c"}, "--push a/b@c: no revision here"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(begin, policy, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    run = begin()
    export.export(policy, names.path("policy"), run.export(1))
    run.iteration(2).mkdir()  # begun, and nothing to export yet
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    words = {"--run": "out", "--iteration": "1", "--to": "to"} | change
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=message):
        export.main([word for pair in words.items() if pair[1] is not None for word in pair])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(policy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 3_000_000))
    monkeypatch.setattr(hf, "save", None)
    with pytest.raises(BadInput, match=r"to: 0\.00374 GB to write, 0\.003 GB free; make room"):
        export.export(policy, names.path("policy"), tmp_path / "a/to")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_what_was_there(policy, tmp_path, monkeypatch):
    def full(model, directory, dtype):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    export.export(policy, names.path("policy"), tmp_path / "to")
    monkeypatch.setattr(hf, "save", full)
    with pytest.raises(BadInput, match="to: cannot be written: No space left on device"):
        export.export(policy, names.path("policy"), tmp_path / "to", card="new")
    assert [p.name for p in tmp_path.iterdir()] == ["to"]
    assert same(weights(tmp_path / "to"), weights(names.path("policy")))
    assert not (tmp_path / "to/README.md").exists()


def test_a_base_that_changed_its_shape_is_refused(begin, brain, trained, tmp_path):
    run = begin("--model.path", str(brain))
    save(run, 1, 1, trained)
    config = json.loads((brain / "config.json").read_text()) | {"num_hidden_layers": 3}
    (brain / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="damaged, or not a checkpoint of this model"):
        export.main(command(run, tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def push(hub, tmp_path, *words, **env):
    """In a process of its own, since huggingface_hub reads the environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "sppo_jax.export", *words],
        env=hub_stub.environment(hub, tmp_path / "home", HF_TOKEN="hf_secret", PYTHONWARNINGS="", **env),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_a_push_that_fails_loses_nothing_and_its_own_words_push_again(begin, policy, tmp_path):
    to = tmp_path / "to dir"
    export.export(policy, names.path("policy"), to, card="# Card")
    files = {p.name: p.read_bytes() for p in to.iterdir()}
    with hub_stub.serving() as hub:
        hub.push_status = 401
        failed = push(hub, tmp_path, "--to", str(to), "--push", "me/mine", "--private")
        assert failed.returncode == 2, failed.stderr
        line = failed.stderr.splitlines()[-1]
        assert line.startswith("error: me/mine: the hub wants to know who writes (401)")
        assert f"the checkpoint is safe in {to}" in line
        assert "hf_secret" not in failed.stderr
        assert {p.name: p.read_bytes() for p in to.iterdir()} == files
        hub.push_status = 200
        again = shlex.split(line.partition("to push it again: python -m sppo_jax.export ")[2])
        done = push(hub, tmp_path, *again)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{hub.url}/me/mine"
        assert hub.pushed == {"me/mine": files | {"private": True}}
        tokens = {
            k.lower(): v for _, path, h in hub.seen if path.startswith("/api/repos") for k, v in h.items()
        }
        assert tokens["authorization"] == "Bearer hf_secret"


def test_what_is_no_whole_checkpoint_is_not_pushed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        export.main(["--to", str(tmp_path), "--push", "me/mine"])


def test_a_link_is_not_written_through(begin, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BadInput, match="a link; give a directory's own name"):
        export.main(["--run", str(begin().root), "--iteration", "0", "--to", str(tmp_path / "link")])


def test_a_relative_directory_is_below_this_one(begin, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = begin()
    export.main(["--run", str(run.root), "--iteration", "0", "--to", "."])
    assert (tmp_path / "here" / "model.safetensors").exists()
