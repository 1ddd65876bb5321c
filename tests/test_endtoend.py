"""Whole games through the command's own function: the files that they leave, and other choices of settings."""

import json
import re
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from sppo_jax import interchange, main
from sppo_jax.hub import names
from sppo_jax.tiny import world
from tests.small_game import ORACLE, words

pytestmark = pytest.mark.usefixtures("single_device")


def test_a_run_leaves_the_contracts_files_and_nothing_half_written(played):
    expected = [
        "config.yaml", "manifest.json", "metrics.jsonl", "report.html", "tensorboard",
        *(f"iter_{t}/{stage}/shard-{i:05d}-of-00003.parquet" for t in (1, 2) for stage in ("responses", "preferences") for i in range(3)),
        *(f"iter_{t}/{name}" for t in (1, 2) for name in ("pairs.parquet", "eval.json", "checkpoints", "export/config.json", "export/model.safetensors", "export/tokenizer.json")),
    ]  # fmt: skip
    assert [name for name in expected if not (played / name).exists()] == []
    assert not [*played.rglob("*.part"), *played.rglob("*.partial.jsonl")]


def test_each_export_has_a_model_card_with_its_win_rates(played):
    rates = json.loads((played / "iter_2/eval.json").read_text())["win_rate"]["judge"]["base"]
    card = (played / "iter_2/export/README.md").read_text()
    assert card.startswith("---\n")
    assert f"{rates['mean']:.3f}" in card
    assert str(played.parent) not in card


def test_the_manifest_names_what_the_run_was_made_from(played):
    manifest = json.loads((played / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {
        "base_weights",
        "tokenizer",
        "judge",
        "prompts_heldout",
        "prompts_1",
        "prompts_2",
    }
    assert manifest["versions"]["jax"]
    assert manifest["prompts"]["iteration 1"]["kept"] == 7


def test_the_export_is_what_the_policy_is_and_transformers_reads_it(played, tokenizer):
    import jax.numpy as jnp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sppo_jax import models

    directory = played / "iter_2/export"
    ids = AutoTokenizer.from_pretrained(directory)("Where can I find the fox?")["input_ids"]
    assert ids == tokenizer("Where can I find the fox?")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(models.load(directory)(jnp.array([ids])), logits, atol=1e-4)
    first, second = (load_file(played / f"iter_{t}/export/model.safetensors") for t in (1, 2))
    assert any((first[name] != second[name]).any() for name in first)


def test_the_report_is_one_self_contained_file_with_its_pictures(played):
    page = (played / "report.html").read_text()
    assert page.count("<svg") == 11
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    for word in ("Win rate", "Log-ratio", "Divergence", "Cycles", "before", "iteration"):
        assert word in page


def test_metrics_are_json_lines_with_their_place(played):
    lines = [json.loads(line) for line in (played / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {
        "respond",
        "sampler_gap",
        "judge_shard",
        "judge",
        "pairs",
        "fit",
        "evaluate",
        "seconds",
    }
    assert all({"iteration", "stage", "step", "time"} <= set(line) for line in lines)
    assert {"cycle_share", "tie_share", "position_bias", "entropy"} <= set(
        next(x for x in lines if x["stage"] == "judge")
    )


def test_T06_T14_the_ids_trained_on_are_the_ids_sampled(played):
    rows = [
        r
        for i in range(3)
        for r in pq.read_table(played / f"iter_1/responses/shard-{i:05d}-of-00003.parquet").to_pylist()
    ]
    sampled = {row["prompt_id"]: row for row in rows}
    assert len(sampled) == 7
    for pair in pq.read_table(played / "iter_1/pairs.parquet").to_pylist():
        row = sampled[pair["prompt_id"]]
        assert pair["prompt_ids"] == row["prompt_ids"]
        assert all(ids in row["response_ids"] for ids in pair["response_ids"])
        assert pair["chosen"][0]["content"] == row["prompt"]
        assert pair["chosen"][1]["content"] in row["responses"]


def test_published_pairs_are_trained_on_instead_of_playing(played, tmp_path, capsys):
    """From the official code's file of one iteration, here written by us, without sampling or judging."""
    interchange.main(["--run", str(played), "--iteration", "1", "--to", str(tmp_path / "official.parquet")])
    given = words(tmp_path / "run", pairs__source=f"parquet:{tmp_path}/official.parquet")
    main.main(given)
    assert "expected initial loss" in capsys.readouterr().out
    ours, theirs = (
        pq.read_table(out / "iter_1/pairs.parquet").to_pylist() for out in (played, tmp_path / "run")
    )
    assert not (tmp_path / "run/iter_1/responses").exists()
    for a, b in zip(ours, theirs, strict=True):
        assert (a["chosen"], a["rejected"], a["target"]) == (b["chosen"], b["rejected"], b["target"])
        assert a["prompt_ids"] == b["prompt_ids"]
        assert all(np.isfinite(b["ref_logprob"]))
    directories = (played / "iter_1/export", tmp_path / "run/iter_1/export", names.path("policy"))
    sampled, moved, base = (load_file(path / "model.safetensors")["lm_head.weight"] for path in directories)
    assert not np.array_equal(sampled, moved)  # the given responses end otherwise, so their ids differ
    assert not np.array_equal(moved, base)
    main.main(given)
    assert "expected initial loss" not in capsys.readouterr().out  # complete: nothing is done twice


@pytest.mark.parametrize("k", [2, 5, 8])
def test_T12_any_number_of_responses_and_sizes_that_divide_nothing(tmp_path, k):
    main.main(
        words(tmp_path / "run", sampling__responses=k, sampling__slots=2 * k + 1, prompts__per_iteration=5)
    )
    rows = pq.read_table(tmp_path / "run/iter_1/preferences/shard-00000-of-00002.parquet").to_pylist()
    assert np.shape(rows[0]["probability"]) == (k, k)
    assert (tmp_path / "run/iter_1/eval.json").exists()


@pytest.mark.parametrize("options", [
    {"pairs__select": "all", "fit__baseline": "log_partition"},
    {"judge__estimator": "score", "fit__loss": "dpo", "model__compute_dtype": "bfloat16"},
])  # fmt: skip
def test_other_choices_run_to_the_end(tmp_path, options):
    main.main(words(tmp_path / "run", **options))
    pair = pq.read_table(tmp_path / "run/iter_1/pairs.parquet").to_pylist()[0]
    assert len(pair["response_ids"]) == (3 if "pairs__select" in options else 2)


def test_T08_the_judge_gets_the_raw_instruction_or_the_template_when_asked(tmp_path, monkeypatch):
    seen = []
    real = world.oracle()

    class Spy:
        identity = "spy"

        def compare(self, prompts, responses, on_progress=None):
            seen.extend(prompts)
            plain = [
                p.replace("<s>", "").replace("[INST]", "").replace("[/INST]", "").strip() for p in prompts
            ]
            return real.compare(plain, responses)

    monkeypatch.setattr(world, "oracle", Spy)
    main.main(words(tmp_path / "raw"))
    assert not any("[INST]" in prompt for prompt in seen)
    seen.clear()
    main.main(words(tmp_path / "chat", judge__prompt="chat"))
    assert any(prompt.startswith("<s>") and prompt.endswith("[/INST]") for prompt in seen)


def test_T15_a_whole_run_with_the_network_blocked_and_the_real_judge(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_options):
        raise AssertionError("the network was asked for")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    main.main(words(tmp_path / "run", judge__backend="torch", eval__oracle=ORACLE))
    shown = capsys.readouterr().out
    assert "win, oracle" in shown
    assert "\x1b" not in shown  # plain lines where there is no terminal
    predicted = re.search(r"first batch (\S+)", shown).group(1)
    found = re.search(r"step 0 loss (\S+), largest log-ratio 0$", shown, re.M).group(1)
    assert float(found) == pytest.approx(float(predicted), rel=1e-5)  # two programs; printed to six digits
    found = json.loads((tmp_path / "run/iter_1/eval.json").read_text())
    assert set(found["win_rate"]) == {"judge", "oracle"}


def test_log_partition_at_a_large_eta_is_warned_of(tmp_path, capsys):
    main.main(words(tmp_path / "run", fit__baseline="log_partition", fit__eta=1000, fit__learning_rate=1e-7))
    assert "warning: fit.baseline=log_partition with fit.eta=1000" in capsys.readouterr().out
