"""PairRM's process where it cannot start: programs, machines and checkpoints that fail, each as one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import child, files, jax_model, protocol, sidecar, torch_model
from sppo_jax.pairrm.process_judge import Patience, SidecarJudge
from tests.test_sidecar import CHECKPOINT


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/no/such/python", "'/no/such/python' cannot be started: No such file"),
        ("/", "'/' cannot be started: Permission denied"),
        ("{here}/empty", "cannot be started: Exec format error"),
        ("a\0b", "cannot be started: embedded null byte"),
        ("x" * 5000, "cannot be started: File name too long"),
    ],
)
def test_a_program_that_cannot_be_started_is_one_line(tmp_path: Path, program: str, said: str) -> None:
    (tmp_path / "empty").touch(0o755)
    with pytest.raises(BadInput, match=said):
        SidecarJudge(CHECKPOINT, command=[program.format(here=tmp_path)])


def test_files_or_processes_that_have_run_out_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    for owner, name in ((child.selectors, "DefaultSelector"), (child.subprocess, "Popen")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, none_left)
            with pytest.raises(BadInput, match=r"PairRM: .* cannot be started: Too many open files"):
                SidecarJudge(CHECKPOINT, command=["cat"])


def test_without_a_temporary_directory_the_program_starts_and_its_last_words_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(child.tempfile, "TemporaryFile", nowhere)
    command = ["/bin/sh", "-c", "echo no luck >&2; exit 3"]
    patience = Patience(restarts=0)
    with (
        SidecarJudge(CHECKPOINT, command=command, patience=patience) as judge,
        pytest.raises(BadInput, match=r"ended with exit status 3 .* its last words 'no luck'"),
    ):
        judge.compare(["x"], [["a", "b"]])


def test_a_machine_without_pytorch_is_one_line_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    class Replies:
        def __init__(self, _: Any) -> None:
            self.send = sent.append

    def missing(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(protocol, "stay_with_parent", lambda: None)
    monkeypatch.setattr(protocol, "private_stdout", lambda: None)
    monkeypatch.setattr(protocol, "Replies", Replies)
    monkeypatch.setattr(sidecar, "load", missing)
    assert sidecar.main(["--path", "x"]) == 2
    assert sent == [
        {"error": "PyTorch cannot be loaded: No module named 'torch'; install it, or take judge.backend=jax"}
    ]


def test_a_checkpoint_that_has_vanished_is_one_line(tmp_path: Path) -> None:
    for file in CHECKPOINT.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = files.read(tmp_path)
    checkpoint.weights.unlink()
    with pytest.raises(BadInput, match=r"PairRM: .*model\.safetensors' is unreadable: No such file"):
        _ = checkpoint.identity


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_weights_that_are_not_finite_in_the_dtype_they_are_kept_in_are_refused(
    tmp_path: Path, one_device: Any, kind: str, value: float
) -> None:
    for file in CHECKPOINT.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(CHECKPOINT.weights).items()}
    weights["head_layer.1.bias"][3] = value
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = files.read(tmp_path)
    with pytest.raises(BadInput, match=r"numbers in head_layer\.1\.bias that are not finite in b?float"):
        if kind == "torch":
            torch_model.load(checkpoint, dtype=torch.bfloat16)
        else:
            jax_model.load(checkpoint, one_device, "bfloat16")
