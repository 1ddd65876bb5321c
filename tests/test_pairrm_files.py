"""PairRM's files: both published layouts, from a directory and from the hub, and the files that are refused."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import files, tokenizer
from sppo_jax.pairrm.format import Formatter
from tests import hub_stub
from tests.test_pairrm import GOLDEN, MODEL

BACKBONE = GOLDEN / "backbone"
SPM = BACKBONE / "spm.model"


@pytest.fixture
def ranker(tmp_path: Path) -> Path:
    """Return a ranker's directory with its backbone inside."""
    directory = tmp_path / "ranker"
    shutil.copytree(BACKBONE, directory / "deberta")
    config = (GOLDEN / "pairrm/config.json").read_text().replace("@BACKBONE@", "deberta")
    (directory / "config.json").write_text(config)
    shutil.copy(MODEL / files.WEIGHTS, directory)
    return directory


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "hf"))


def edit(directory: Path, **changes: Any) -> None:
    """Change options of a config.json; None removes one."""
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- both layouts -----------------------------------------------------------------------------------------------------


def test_a_ranker_takes_options_and_tokenizer_from_its_backbone_and_the_vocabulary_from_its_weights(
    ranker: Path,
) -> None:
    found, complete = files.read(ranker), files.read(MODEL)
    assert json.loads((BACKBONE / "config.json").read_text())["vocab_size"] == 800
    assert found.config["vocab_size"] == 773
    assert (found.backbone, complete.backbone) == (ranker / "deberta", None)
    assert found.tokenizer == ranker / "deberta" / "spm.model"
    assert (found.config["source_maxlength"], found.config["candidate_maxlength"]) == (1224, 412)
    for key in ("hidden_size", "position_buckets", "layer_norm_eps", "pos_att_type", "n_tasks", "drop_out"):
        assert found.config[key] == complete.config[key], key
    again = files.read(found.directory, found.backbone)
    assert again == found
    assert again.identity == found.identity


def test_a_rankers_own_tokenizer_comes_before_its_backbones(ranker: Path) -> None:
    shutil.copy(SPM, ranker)
    assert files.read(ranker).tokenizer == ranker / "spm.model"
    shutil.copy(MODEL / "tokenizer.json", ranker)
    assert files.read(ranker).tokenizer == ranker / "tokenizer.json"


def test_a_backbone_is_looked_for_beside_the_ranker_then_here(ranker: Path, monkeypatch: Any) -> None:
    edit(ranker, model_name="elsewhere/base")
    with pytest.raises(BadInput, match="needs its backbone 'elsewhere/base'"):
        files.read(ranker)
    monkeypatch.chdir(ranker.parent)
    shutil.copytree(BACKBONE, "elsewhere/base")
    assert files.read("ranker").backbone == ranker.parent / "elsewhere/base"
    shutil.copytree(BACKBONE, ranker / "elsewhere/base")
    assert files.read("ranker").backbone == ranker / "elsewhere/base"


def test_spm_model_serves_where_there_is_no_tokenizer_json(hf: Path) -> None:
    (hf / "tokenizer.json").unlink()
    shutil.copy(SPM, hf)
    assert files.read(hf).tokenizer == hf / "spm.model"
    assert Formatter.of(files.read(hf)).pair("a", "b", "c").ids.tolist()[:2] == [1, 769]


def test_identity_is_of_what_scores_and_not_of_where_it_lies(ranker: Path, hf: Path) -> None:
    for directory in (ranker, hf):
        before = files.read(directory).identity
        moved = directory.rename(directory.with_name("moved"))
        edit(moved, cache_dir="/somewhere", transformers_version="9")
        assert files.read(moved).identity == before
        changed = {before}
        for file in (files.read(moved).tokenizer, moved / files.WEIGHTS):
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            changed.add(files.read(moved).identity)
            file.write_bytes(data)
        base = files.read(moved).backbone or moved
        edit(base, position_buckets=32)
        changed.add(files.read(moved).identity)
        edit(base, position_buckets=16)
        edit(moved, source_maxlength=1000)
        changed.add(files.read(moved).identity)
        assert len(changed) == 5
        moved.rename(directory)


# --- refused files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size 3; this network has 0 only"),
        ({"relative_attention": None}, "relative_attention False; this network has True only"),
        ({"position_biased_input": True}, "position_biased_input True"),
        ({"position_biased_input": None}, "position_biased_input True"),
        ({"type_vocab_size": 2}, "type_vocab_size 2"),
        ({"pos_att_type": ["c2p"]}, r"pos_att_type \['c2p'\]"),
        ({"pos_att_type": "p2c|c2p|p2p"}, "pos_att_type"),
        ({"pos_att_type": None}, "pos_att_type"),
        ({"share_att_key": None}, "share_att_key False"),
        ({"norm_rel_ebd": None}, "norm_rel_ebd 'none'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"embedding_size": 16}, "embedding_size 16"),
        ({"attention_head_size": 16}, "attention_head_size 16"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible"),
        ({"hidden_size": None}, "hidden_size None; a whole number of at least 1"),
        ({"num_hidden_layers": 2**64}, "at most 10000 are computed here"),
        ({"position_buckets": -1}, "position_buckets -1"),
        ({"position_buckets": 1}, "position_buckets 1; with distances up to 64 it must be from 2 to 125"),
        ({"position_buckets": 126}, "position_buckets 126; .* from 2 to 125"),
        ({"max_relative_positions": 9}, "position_buckets 16; with distances up to 9 it must be from 2 to 15"),
        ({"pad_token_id": "none"}, "pad_token_id 'none'; a token of the "),
        ({"pad_token_id": 800}, "pad_token_id 800; a token of the "),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps 'tiny'"),
        ({"model_type": "roberta"}, "model_type 'roberta'; not 'deberta-v2'"),
    ],
)  # fmt: skip
def test_what_the_network_does_not_have_is_refused_by_name(
    ranker: Path, hf: Path, change: dict[str, Any], said: str
) -> None:
    for directory, described in ((hf, hf), (ranker, ranker / "deberta")):
        edit(described, **change)
        with pytest.raises(BadInput, match=said) as caught:
            files.read(directory)
        assert str(described / "config.json") in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranker_type": "summareranker"}, "ranker_type 'summareranker'; only 'pairranker' is a PairRM"),
        ({"n_tasks": 3}, "n_tasks 3"),
        ({"reduce_type": "max"}, "reduce_type 'max'"),
        ({"model_name": 7}, "model_name 7, which names no backbone"),
        ({"source_maxlength": "long"}, "source_maxlength 'long'"),
    ],
)
def test_other_rankers_are_refused_by_name(ranker: Path, change: dict[str, Any], said: str) -> None:
    edit(ranker, **change)
    with pytest.raises(BadInput, match=said):
        files.read(ranker)


def test_options_as_deberta_v3_publishes_them_are_read(hf: Path) -> None:
    before = files.read(hf)
    edit(hf, pos_att_type="p2c|c2p", n_tasks=None)
    assert files.read(hf).config["pos_att_type"] == ["c2p", "p2c"]
    assert files.read(hf).identity == before.identity


def test_files_that_do_not_belong_together_are_refused(hf: Path) -> None:
    edit(hf, vocab_size=800)
    with pytest.raises(BadInput, match=r"773 tokens of 32 numbers, config.json asks for 800 of 32"):
        files.read(hf)
    weights = load_file(hf / files.WEIGHTS)
    weights[files.EMBEDDING] = weights[files.EMBEDDING][:772]
    save_file(weights, hf / files.WEIGHTS)
    edit(hf, vocab_size=772)
    with pytest.raises(BadInput, match="ids up to 772, but the network only 772 tokens"):
        Formatter.of(files.read(hf))
    edit(hf, cand1_prefix_id=771)
    with pytest.raises(BadInput, match=r"cand1_prefix_id 771, but the tokenizer gives '<\|candidate1\|>'"):
        Formatter.of(files.read(hf))


def test_what_is_missing_or_broken_is_named(hf: Path, ranker: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no directory"):
        files.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"lacks config.json"):
        files.read(tmp_path / "empty")
    (hf / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"lacks tokenizer.json or spm.model"):
        files.read(hf)
    (ranker / "deberta/spm.model").write_bytes(b"\x0a\xff\x01no model")
    with pytest.raises(BadInput, match="is not DeBERTa's SentencePiece model"):
        Formatter.of(files.read(ranker))
    (ranker / "deberta/tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(BadInput, match="has do_lower_case, which this tokenizer does not support"):
        Formatter.of(files.read(ranker))
    (ranker / files.WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match=r"model.safetensors' is unreadable"):
        files.read(ranker)
    save_file({"other": np.zeros(1)}, ranker / files.WEIGHTS)
    with pytest.raises(BadInput, match=f"lacks tensor {files.EMBEDDING}"):
        files.read(ranker)
    nested = '{"model_name": ' + 20 * "[" + 20 * "]" + "}"
    for text, said in (
        ("{", "is not JSON"),
        (100_000 * "[", "is not JSON"),
        ("[]", "holds no options"),
        (nested, "holds no options"),
        (
            '{"ranker_type": "pairranker", "model_name": "~nobody-of-this-name/x"}',
            "there is no directory '~nobody-",
        ),
        ('{"ranker_type": "pairranker", "model_name": "' + 5000 * "x" + '"}', "needs its backbone"),
    ):
        (ranker / "config.json").write_text(text)
        with pytest.raises(BadInput, match=said):
            files.read(ranker)
    with pytest.raises(BadInput, match="there is no directory '~nobody-of-this-name'"):
        files.read("~nobody-of-this-name")


def test_files_that_may_not_be_read_are_reported(ranker: Path, monkeypatch: Any) -> None:
    def refuse(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    found = files.read(ranker)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BadInput, match=r"config.json' is unreadable: .*Permission denied"):
        files.read(ranker)
    (ranker / "deberta/tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer_config.json' is unreadable: .*Permission denied"):
        Formatter.of(found)


def test_a_damaged_table_of_normalisation_is_refused(ranker: Path) -> None:
    spm, options = ranker / "deberta/spm.model", ranker / "deberta/tokenizer_config.json"
    found, data = files.read(ranker), spm.read_bytes()
    charsmap = tokenizer._proto(data)[3]
    trie = 4 + int.from_bytes(charsmap[:4], "little")
    # Its index is intact, so that plain text is read; the characters that it points to begin elsewhere.
    whole, rest = divmod(len(charsmap) - trie, 4)
    spm.write_bytes(data.replace(charsmap, charsmap[:trie] + b"x" * rest + "\U0001f600".encode() * whole))
    with pytest.raises(BadInput, match=r"spm.model' is damaged: its tokenizer fails with: "):
        Formatter.of(found)
    options.write_text(100_000 * "[")
    with pytest.raises(BadInput, match=r"tokenizer_config.json' is not JSON"):
        tokenizer.load(spm)


def test_a_pickled_checkpoint_comes_with_the_line_that_converts_it(hf: Path, monkeypatch: Any) -> None:
    weights = {name: torch.from_numpy(value) for name, value in load_file(hf / files.WEIGHTS).items()}
    identity = load_file(hf / files.WEIGHTS)
    (hf / files.WEIGHTS).unlink()
    with pytest.raises(
        BadInput, match=r"PairRM is laid out as .* only a pytorch_model.bin, download it"
    ) as caught:
        files.read(hf)
    assert str(caught.value).endswith(f"once: {files.CONVERT}")
    torch.save(weights, hf / "pytorch_model.bin")
    with pytest.raises(
        BadInput, match=r"lacks model.safetensors; pytorch_model.bin is converted once"
    ) as caught:
        files.read(hf)
    python, flag, program = shlex.split(str(caught.value).partition("by: ")[2])
    assert (python, flag) == ("python", "-c")
    monkeypatch.chdir(hf)
    exec(program, {})
    files.read(hf)
    converted = load_file(hf / files.WEIGHTS)
    assert converted.keys() == identity.keys()
    assert all(np.array_equal(converted[name], identity[name]) for name in identity)


# --- the hub ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from sppo_jax import command
from sppo_jax.pairrm import files
def entry(words):
    found = files.fetch(words[0], pinned=json.loads(words[1]))
    again = files.read(found.directory, found.backbone)
    assert again.identity == found.identity and again.config == found.config
    print(json.dumps([found.sources, found.identity, str(found.tokenizer), str(found.backbone)]))
command.call(entry)
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_a_ranker_from_the_hub_brings_its_backbone_without_weights_and_stays_pinned(tmp_path: Path) -> None:
    with hub_stub.serving() as hub:

        def ask(name: str, pinned: dict[str, str], code: int = 0, **env: str) -> Any:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, name, json.dumps(pinned)],
                env=hub_stub.environment(hub, tmp_path / "home", **env),
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            return json.loads(done.stdout) if code == 0 else done.stderr.splitlines()[-1]

        unread = {"pytorch_model.bin": b"pickle", "modeling.py": b"code"}
        own = {
            "config.json": (GOLDEN / "pairrm/config.json").read_bytes().replace(b"@BACKBONE@", b"owner/deberta"),
            files.WEIGHTS: (MODEL / files.WEIGHTS).read_bytes(),
        }  # fmt: skip
        base = contents(BACKBONE)
        ranker = hub.add("owner/ranker", own | unread)
        line = ask("owner/ranker", {}, code=2)
        assert (
            "owner/ranker needs its backbone: owner/deberta: neither a directory here nor a repository"
            in line
        )
        hub.seen.clear()
        backbone = hub.add("owner/deberta", base | unread | {files.WEIGHTS: b"not needed"})
        sources, identity, tokens, where = ask("owner/ranker", {})
        assert sources == {"owner/ranker": ranker, "owner/deberta": backbone}
        assert sorted(hub.fetched()) == sorted(base)  # the ranker's own files were fetched before
        assert tokens == f"{where}/spm.model"

        hub.add("owner/ranker", own | {"config.json": own["config.json"] + b"\n"})
        hub.add("owner/deberta", base | {"tokenizer_config.json": b"{}"})
        hub.seen.clear()
        assert ask("owner/ranker@main", sources)[:2] == [sources, identity]
        assert hub.fetched() == []
        assert ask("owner/ranker", sources, HF_HUB_OFFLINE="1")[:2] == [sources, identity]
        assert ask(str(MODEL), sources)[0] == {}


def test_a_directory_asks_nobody(ranker: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sppo_jax.hub.repositories._download", lambda *_: pytest.fail("the hub was asked"))
    for directory in (ranker, MODEL):
        found = files.fetch(str(directory), tell=lambda text: pytest.fail(text))
        assert found == files.read(directory)
        assert found.sources == {}
