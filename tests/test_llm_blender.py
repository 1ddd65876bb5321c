"""The original package behind the sidecar's pipe: always a stand-in, and llm-blender itself with LLM_BLENDER_PYTHON."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from transformers import DebertaV2Config, DebertaV2Model

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import Limits, SidecarJudge, files, llm_blender, protocol

GOLDEN = Path(__file__).parent / "golden" / "pairrm"
TEXTS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
TOLERANCE = 2e-5
PYTHON = os.environ.get("LLM_BLENDER_PYTHON", "")

# What llm_blender.py uses of llm-blender, torch and transformers. The "logit" of i against j depends on lengths.
STAND_INS = {
    "torch.py": """
        class cuda:
            is_available = staticmethod(lambda: False)
        def set_num_threads(n): print("threads", n)
        def no_grad(): return lambda function: function
        """,
    "llm_blender/__init__.py": """
        import sys
        class Matrix(list):
            def tolist(self): return list(self)
            def to(self, device): return self
        class Ranker:
            def _full_predict(self, texts):
                prompt, responses = texts
                if "<|source|>" in prompt: raise RuntimeError("sizes differ")
                if prompt == "nan": return {"logits": [Matrix([[0.0, float("nan")], [0.0, 0.0]])]}
                return {"logits": [Matrix([[len(a) - 2 * len(b) for b in responses] for a in responses])]}
        class Blender:
            def loadranker(self, path, device=None, **options):
                print("this goes to standard output", path, options)
                if "broken" in path: raise ValueError("no such ranker")
                self.ranker = Ranker()
                self.ranker_collator = lambda batch: {"texts": Matrix(batch[0]), "scores": None}
        """,
    "llm_blender/blender/__init__.py": "",
    "llm_blender/blender/blender_utils.py": """
        def RankerDataset(prompts, responses): return [(prompts[0], responses[0])]
        class Texts(dict):
            def to(self, device): return self
        def tokenize_pair(tokenizer, prompts, first, second, **limits):
            return Texts(prompt=prompts[0], first=first[0], second=second[0])
        """,
    "llm_blender/pair_ranker/__init__.py": "",
    "llm_blender/pair_ranker/pairrm.py": """
        class Logits:
            def __init__(self, value): self.logits, self.item = self, lambda: value
        class DebertaV2PairRM:
            @classmethod
            def from_pretrained(cls, path): return cls()
            def to(self, device): return self
            def eval(self): return self
            def __call__(self, prompt, first, second):
                if first == "bad": raise RuntimeError("sizes differ")
                return Logits(len(first) - 2 * len(second))
        """,
    "transformers.py": """
        class AutoTokenizer:
            from_pretrained = staticmethod(lambda path: None)
        """,
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a folder of stand-ins, which the child processes of a test import instead of the real packages."""
    folder = tmp_path / "packages"
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()[1:]
        (folder / name).write_text("\n".join(line[8:] for line in lines))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def ranker(to: Path) -> files.Checkpoint:
    """Return the golden model in the ranker's layout, with a backbone of random weights, which PairRM's replace."""
    shutil.copytree(GOLDEN / "backbone", to / "backbone", dirs_exist_ok=True)
    config = DebertaV2Config(**json.loads((to / "backbone" / "config.json").read_text()))
    weights = DebertaV2Model(config).state_dict()
    save_file(weights, to / "backbone" / "model.safetensors", metadata={"format": "pt"})
    (to / "pairrm").mkdir()
    shutil.copy(GOLDEN / "pairrm" / "config.json", to / "pairrm")
    shutil.copy(GOLDEN / "pairrm_hf" / "model.safetensors", to / "pairrm")
    return files.read(to / "pairrm", to / "backbone")


def test_the_programs_answers_are_the_originals_matrices(tmp_path: Path, stand_in: Path) -> None:
    checkpoint = ranker(tmp_path)
    command = llm_blender.command(sys.executable, checkpoint, threads=1)
    prompts, responses = ["a", "b"], [["x", "yy", "zzz"], ["", "y", "four"]]
    seen: list[tuple[int, int]] = []
    with SidecarJudge(checkpoint, command=command) as judge:
        for _ in range(2):
            found = judge.compare(prompts, responses, lambda *step: seen.append(step))
            lengths = np.array([[len(text) for text in row] for row in responses])
            wanted = (lengths[:, :, None] - 2 * lengths[:, None]) * (1 - np.eye(3))
            np.testing.assert_array_equal(found, wanted)
    assert seen == [(6, 12), (12, 12)] * 2


def conversation(command: list[str], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the frames that the program sends for `requests`, without heartbeats."""
    said = subprocess.run(
        command, input=b"".join(map(protocol.encode, requests)), capture_output=True, timeout=60, check=False
    )
    received, frames = bytearray(said.stdout), []
    while received:
        frame = protocol.take_frame(received)
        assert frame is not None, received
        frames.append(frame)
    return [frame for frame in frames if "alive" not in frame]


def test_the_program_speaks_the_protocol_and_survives_what_the_original_raises(
    tmp_path: Path, stand_in: Path
) -> None:
    command = llm_blender.command(sys.executable, ranker(tmp_path), 1)
    two = [["x", "yy"]]
    frames = conversation(
        command,
        {"id": 1, "prompts": ["a", "b"], "responses": two * 2, "cells": [[1, 0, 1]]},
        {"id": 2, "prompts": ["a <|source|>", "b"], "responses": two * 2},
        {"id": 3, "prompts": ["nan"], "responses": two},
        {"id": 4, "prompts": ["a"], "responses": two},
    )
    both = [[0, 0, 1], [0, 1, 0]]
    assert frames[:3] == [
        {"ready": True, "device": "cpu"},
        {"id": 1, "cells": [[1, 0, 1]], "logits": [-3]},
        {"id": 1, "end": True},
    ]
    assert frames[3] == {"id": 2, "error": "RuntimeError: sizes differ", "cells": both}
    assert frames[4]["id"] == 3
    assert frames[4]["cells"] == both
    assert "ValueError" in frames[4]["error"]
    assert frames[5:] == [{"id": 4, "cells": both, "logits": [-3, 0]}, {"id": 4, "end": True}]


def test_the_hf_layout_is_answered_pair_by_pair(stand_in: Path) -> None:
    command = llm_blender.command(sys.executable, files.read(GOLDEN / "pairrm_hf"), 1)
    frames = conversation(
        command,
        {"id": 1, "prompts": ["a"], "responses": [["x", "yy"]]},
        {"id": 2, "prompts": ["a"], "responses": [["x", "bad"]]},
        {"id": 3, "prompts": ["a", "b"], "responses": [["x", "yy", "z"]] * 2, "cells": [[1, 2, 0]]},
    )
    assert frames[1:] == [
        {"id": 1, "cells": [[0, 0, 1]], "logits": [-3]},
        {"id": 1, "cells": [[0, 1, 0]], "logits": [0]},
        {"id": 1, "end": True},
        {"id": 2, "cells": [[0, 0, 1]], "logits": [-5]},
        {"id": 2, "error": "RuntimeError: sizes differ", "cells": [[0, 1, 0]]},
        {"id": 3, "cells": [[1, 2, 0]], "logits": [-1]},
        {"id": 3, "end": True},
    ]


def test_a_ranker_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "broken").mkdir()
    checkpoint = ranker(tmp_path / "broken")
    command = llm_blender.command(sys.executable, checkpoint, 1)
    with (
        SidecarJudge(checkpoint, command=command) as judge,
        pytest.raises(BadInput, match=r"cannot load this PairRM: ValueError: no such ranker"),
    ):
        judge.compare(["a"], [["x", "y"]])


def test_what_is_missing_is_said_and_how_to_get_it(tmp_path: Path, stand_in: Path) -> None:
    checkpoint = ranker(tmp_path)
    for python in ("", str(tmp_path / "nowhere"), str(GOLDEN)):
        with pytest.raises(BadInput, match=r"judge\.python=.*requirements-llm-blender\.txt"):
            llm_blender.command(python, checkpoint, 1)
    shutil.rmtree(stand_in / "llm_blender")
    with (
        SidecarJudge(checkpoint, command=llm_blender.command(sys.executable, checkpoint, 1)) as judge,
        pytest.raises(BadInput, match=r"no llm-blender that works.*requirements-llm-blender\.txt") as caught,
    ):
        judge.compare(["a"], [["x", "y"]])
    assert "\n" not in str(caught.value)


def test_limits_are_passed_on_or_refused(tmp_path: Path, stand_in: Path) -> None:
    checkpoint = ranker(tmp_path)
    command = llm_blender.command(sys.executable, checkpoint, 1, Limits(source=100))
    assert command[-4:] == ["--source", "100", "--candidate", "412"]
    with pytest.raises(BadInput, match=r"set the judge's total limit to 0 or 924, not 2000"):
        llm_blender.command(sys.executable, checkpoint, 1, Limits(source=100, total=2000))


def test_backbone_without_weights_is_left_to_the_original(tmp_path: Path) -> None:
    checkpoint = ranker(tmp_path)
    command = llm_blender.command(sys.executable, checkpoint)
    assert command[command.index("--backbone") + 1] == str(checkpoint.backbone)
    assert checkpoint.backbone is not None
    (checkpoint.backbone / "model.safetensors").unlink()
    assert "--backbone" not in llm_blender.command(sys.executable, checkpoint)
    assert "--backbone" not in llm_blender.command(sys.executable, replace(checkpoint, backbone=None))


def test_backbone_whose_path_misleads_the_original_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dolphin").mkdir()
    with pytest.raises(BadInput, match=r"'phi' is in its name; move it elsewhere"):
        llm_blender.command(sys.executable, ranker(tmp_path / "dolphin"))


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize(
    ("key", "name"),
    [("model_name", "microsoft/phi-2"), ("model_name", "Llama-2"), ("model_type", "starling-rm")],
)
def test_ranker_that_is_another_models_is_refused(
    key: str, name: str, with_weights: bool, tmp_path: Path
) -> None:
    checkpoint = ranker(tmp_path)
    file = checkpoint.directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: name}))
    if not with_weights:  # like a backbone on the hub, which llm-blender downloads by that name
        checkpoint = replace(checkpoint, backbone=None)
    with pytest.raises(BadInput, match=rf"is in its {key} '{name}'; only a DeBERTa"):
        llm_blender.command(sys.executable, checkpoint)


def test_weights_that_were_not_hashed_are_refused(tmp_path: Path) -> None:
    checkpoint = ranker(tmp_path)
    (checkpoint.directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"would load .*pytorch_model\.bin', not model\.safetensors"):
        llm_blender.command(sys.executable, checkpoint)


def test_our_own_packages_are_hidden_from_the_other_interpreter(tmp_path: Path) -> None:
    # The package as installed, beside an llm_blender that the other interpreter must not find.
    site, theirs = tmp_path / "site-packages", tmp_path / "theirs"
    (site / "sppo_jax" / "pairrm").mkdir(parents=True)
    for name in ("llm_blender.py", "protocol.py"):
        shutil.copy(Path(llm_blender.__file__).with_name(name), site / "sppo_jax" / "pairrm")
    (site / "llm_blender").mkdir()
    (site / "llm_blender" / "__init__.py").write_text("raise RuntimeError('ours')")
    theirs.mkdir()
    (theirs / "torch.py").write_text("class cuda: is_available = staticmethod(lambda: False)")
    (theirs / "config.json").write_text('{"ranker_type": "pairranker"}')
    run = subprocess.run(
        [sys.executable, str(site / "sppo_jax" / "pairrm" / "llm_blender.py"), "--path", str(theirs)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(theirs)])},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert b"no llm-blender that works" in run.stdout


# --- the original itself ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PYTHON, reason="set LLM_BLENDER_PYTHON to an interpreter with llm-blender")
@pytest.mark.parametrize("which", ["ranker", "hf"])
def test_the_original_gives_the_golden_logits(which: str, tmp_path: Path) -> None:
    if which == "ranker":
        checkpoint = ranker(tmp_path)
    else:
        hf = tmp_path / "hf"
        shutil.copytree(GOLDEN / "pairrm_hf", hf)
        names = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
        tokens = {f"{key}_token": token for key, token in names.items()}
        (hf / "tokenizer_config.json").write_text(
            json.dumps(tokens | {"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"})
        )
        checkpoint = files.read(hf)
    with np.load(GOLDEN / "golden.npz") as stored:
        golden = dict(stored)
    for name in ("full_b1", "special_b1", "short_b1"):
        case = TEXTS["cases"][name]
        limits = Limits(case["source_max_length"], case["candidate_max_length"])
        command = llm_blender.command(PYTHON, checkpoint, 1, limits)
        prompts = [TEXTS["sources"][e] for e in case["examples"]]
        responses = [TEXTS["candidates"][e] for e in case["examples"]]
        if which == "hf":  # this layout does not replace "[SEP]", as the ranker does
            responses = [[text.replace("[SEP]", " ") for text in row] for row in responses]
            prompts = [text.replace("[SEP]", " ") for text in prompts]
        with SidecarJudge(checkpoint, command=command) as judge:
            found = judge.compare(prompts, responses)
        np.testing.assert_allclose(found, golden[f"{name}/logits"], rtol=0, atol=TOLERANCE, err_msg=name)
