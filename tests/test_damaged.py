"""Damaged checkpoints end the whole command in one line with exit code 2, before anything is compiled or written."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sppo_jax import command, main, models
from sppo_jax.hub import names
from sppo_jax.models import hf
from tests.small_game import words

pytestmark = pytest.mark.usefixtures("single_device")

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    """The embedded policy as several files with an index."""
    directory = tmp_path_factory.mktemp("policy") / "several"
    shutil.copytree(names.path("policy"), directory)
    (directory / "model.safetensors").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "SHARD_BYTES", 800_000)
        models.save(models.load(names.path("policy")), directory)
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_nan(directory):
    file = sorted(directory.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name].flat[-1] = np.nan
    save_file(tensors, file)


def twice(directory):
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    one, two = load_file(first), load_file(second)
    name = next(iter(one))
    save_file(two | {name: one[name]}, second)


INDEX = "model.safetensors.index.json"
DAMAGE = {
    "truncated shard": (
        lambda d: (p := sorted(d.glob("*.safetensors"))[1]).write_bytes(p.read_bytes()[:-100]),
        "damaged or not safetensors",
    ),
    "empty shard": (lambda d: sorted(d.glob("*.safetensors"))[1].write_bytes(b""), "damaged or not safetensors"),
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "is missing, though the index names it"),
    "index leads out": (
        lambda d: edited(d / INDEX, lambda c: c["weight_map"].update({"lm_head.weight": "../x"})),
        "names '../x', which is not a safetensors file beside it",
    ),
    "index is no object": (lambda d: (d / INDEX).write_text("[]"), "expected a JSON object"),
    "index maps nothing": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "tensors are missing"),
    "index map of another kind": (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), "weight_map"),
    "wrong vocabulary size": (
        lambda d: edited(d / "config.json", lambda c: c.update(vocab_size=c["vocab_size"] + 8)),
        "config.json makes it",
    ),
    "not a number": (with_nan, "holds NaN or infinite values"),
    "a tensor twice": (twice, "is also in"),
    "config without architecture": (
        lambda d: edited(d / "config.json", lambda c: c.pop("architectures")),
        "architectures is missing",
    ),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json in it"),
    "no tokenizer": (lambda d: [p.unlink() for p in d.glob("*token*")], "no usable tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_line_before_anything_is_compiled(
    name, several_files, tmp_path, monkeypatch, capsys
):
    change, said = DAMAGE[name]
    policy, out = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(several_files, policy)
    change(policy)
    monkeypatch.setattr("sys.argv", ["sppo_jax.main", *words(out, model__path=policy)])
    COMPILED.clear()
    with pytest.raises(SystemExit) as ended:
        command.call(main.main)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not COMPILED
    assert not out.exists()


def test_the_listener_counts_compilations():
    COMPILED.clear()
    jax.jit(lambda x: x + 1)(np.arange(7.0))
    assert COMPILED


def test_control_characters_in_files_do_not_reach_the_terminal(several_files, tmp_path, monkeypatch, capsys):
    shutil.copytree(several_files, tmp_path / "policy")
    edited(tmp_path / "policy/config.json", lambda c: c.update(architectures=["\x1b[2J\x1b[31mowned"]))
    monkeypatch.setattr(
        "sys.argv", ["sppo_jax.main", *words(tmp_path / "run", model__path=tmp_path / "policy")]
    )
    with pytest.raises(SystemExit):
        command.call(main.main)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "\\x1b[2J" in printed
