"""The whole game through the command line's own function, and as a process where processes are the point."""

import json
import re
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from sppo_jax import files, main
from sppo_jax.errors import BadInput
from tests.small_game import digest, words

ORACLE = "sppo_jax.tiny.world:oracle"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """In-process runs see one device unless they ask for eight."""
    import jax

    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: devices[:1])
    return monkeypatch


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One run of two iterations, read by several tests."""
    import jax

    devices, out = jax.devices(), tmp_path_factory.mktemp("runs") / "played"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices[:1])
        main.main(words(out, iterations=2))
    return out


def test_a_run_leaves_the_contracts_files_and_nothing_half_written(played):
    expected = [
        "config.yaml", "manifest.json", "metrics.jsonl", "report.html", "tensorboard",
        *(f"iter_{t}/{stage}/shard-{i:05d}-of-00003.parquet" for t in (1, 2) for stage in ("responses", "preferences") for i in range(3)),
        *(f"iter_{t}/{name}" for t in (1, 2) for name in ("pairs.parquet", "eval.json", "checkpoints", "export/config.json", "export/model.safetensors", "export/tokenizer.json")),
    ]  # fmt: skip
    assert [name for name in expected if not (played / name).exists()] == []
    assert not [*played.rglob("*.part"), *played.rglob("*.partial.jsonl")]


def test_published_pairs_are_trained_on_instead_of_playing(played, tmp_path, capsys):
    """The official code's file of one iteration, here written by us: no response is sampled, no pair is judged."""
    from sppo_jax import interchange

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
    weights = [load_file(out / "iter_1/export/model.safetensors") for out in (played, tmp_path / "run")]
    assert not np.array_equal(
        weights[0]["lm_head.weight"], weights[1]["lm_head.weight"]
    )  # other ends, other ids
    moved = load_file(tmp_path / "run/iter_1/export/model.safetensors")["lm_head.weight"]
    from sppo_jax.hub import names

    assert not np.array_equal(moved, load_file(names.path("policy") / "model.safetensors")["lm_head.weight"])
    main.main(given)
    assert "expected initial loss" not in capsys.readouterr().out  # complete: nothing is done twice


def test_given_pairs_with_ids_beyond_the_vocabulary_are_told_at_once(tmp_path):
    """A tokenizer that was given words after the model was made."""
    import shutil

    from transformers import AutoTokenizer

    from sppo_jax import interchange
    from sppo_jax.hub import names
    from sppo_jax.records import Pair

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


def test_a_card_alone_does_not_make_an_export(played, tmp_path):
    """Somebody deletes a finished iteration's export to save room: it stays deleted."""
    import shutil

    out = shutil.copytree(played, tmp_path / "run")
    shutil.rmtree(out / "iter_1/export")
    main.main(words(out, iterations=2))
    assert not (out / "iter_1/export").exists()


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
    assert page.count("<svg") == 7
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


def test_the_same_run_twice_is_bitwise_the_same_and_a_third_command_only_reports(played, tmp_path, capsys):
    main.main(words(tmp_path / "again", iterations=2))
    assert digest(played, 2) == digest(tmp_path / "again", 2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*.parquet")}
    capsys.readouterr()
    main.main(words(tmp_path / "again", iterations=2))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*.parquet")}
    assert "respond" not in capsys.readouterr().out


def test_a_finished_run_can_be_continued_with_more_iterations(played, tmp_path):
    main.main(words(tmp_path / "run", iterations=1))
    main.main(words(tmp_path / "run", iterations=2))
    assert digest(tmp_path / "run", 2) == digest(played, 2)


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
    from sppo_jax.tiny import world

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
    assert "win rate, oracle" in shown
    assert "\x1b" not in shown  # plain lines where there is no terminal
    predicted = re.search(r"first batch (\S+)", shown).group(1)
    assert re.search(r"step 0 loss (\S+), largest log-ratio 0$", shown, re.M).group(1) == predicted
    found = json.loads((tmp_path / "run/iter_1/eval.json").read_text())
    assert set(found["win_rate"]) == {"judge", "oracle"}


def test_T14_a_missing_shard_is_redone_and_a_foreign_or_torn_one_refused(tmp_path, played):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(played, run)
    for name in ("iter_2/eval.json", "iter_2/pairs.parquet", "iter_2/responses/shard-00001-of-00003.parquet"):
        (run / name).unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(played), str(run)))
    main.main(words(run, iterations=2))
    assert digest(run, 2) == digest(played, 2)

    shard = run / "iter_2/preferences/shard-00001-of-00003.parquet"
    (run / "iter_2/eval.json").unlink()
    shutil.copy(run / "iter_1/preferences/shard-00001-of-00003.parquet", shard)
    with pytest.raises(
        BadInput, match=r"shard-00001-of-00003\.parquet: was made from another policy and prompts"
    ):
        main.main(words(run, iterations=2))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(BadInput, match="damaged"):
        main.main(words(run, iterations=2))


def test_T14_a_copied_shard_is_refused_and_judgements_of_other_responses_too(tmp_path, played):
    import shutil

    run = shutil.copytree(played, tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(played), str(run)))
    (run / "iter_2/eval.json").unlink()
    shards = run / "iter_2/responses"
    kept = (shards / "shard-00001-of-00003.parquet").read_bytes()
    shutil.copy(shards / "shard-00000-of-00003.parquet", shards / "shard-00001-of-00003.parquet")
    with pytest.raises(BadInput, match="answers other prompts than asked"):
        main.main(words(run, iterations=2))
    (shards / "shard-00001-of-00003.parquet").write_bytes(kept)

    from pathlib import Path

    from sppo_jax import records
    from sppo_jax.records import Responses

    path = Path(shards / "shard-00002-of-00003.parquet")
    made_from = json.loads(pq.read_schema(path).metadata[b"made_from"])
    rows = records.read(path, Responses)
    rows[0].responses[0] += " indeed"
    records.write(path, Responses, rows, made_from)
    with pytest.raises(BadInput, match="was made from another responses"):
        main.main(words(run, iterations=2))


def test_a_report_that_a_crash_left_out_is_written_by_the_next_command(tmp_path, played):
    import shutil

    run = shutil.copytree(played, tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(played), str(run)))
    (run / "report.html").unlink()
    main.main(words(run, iterations=2))
    assert (run / "report.html").exists()


def test_T16_another_mesh_before_the_first_checkpoint_is_no_obstacle(tmp_path, one_device):
    """The reference of another mesh differs in its last bits, and the log-ratio must start at exactly 0."""
    import shutil

    main.main(words(tmp_path / "run"))
    for name in ("checkpoints", "export"):
        shutil.rmtree(tmp_path / "run/iter_1" / name)
    for name in ("eval.json", "heldout/responses.parquet"):
        (tmp_path / "run/iter_1" / name).unlink()
    before = digest_pairs(tmp_path / "run")
    one_device.undo()
    main.main(words(tmp_path / "run", mesh__fsdp=4, mesh__tensor=2))
    after = digest_pairs(tmp_path / "run")
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert after != before


def digest_pairs(out):
    return [row["ref_logprob"] for row in pq.read_table(out / "iter_1/pairs.parquet").to_pylist()]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words_", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--fit.learning_rat", "1"], "did you mean 'fit.learning_rate'?"),
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
        ({"sampling__max_new_tokens": 500}, "exceeds the model's 512 positions"),
        ({"prompts__column": "nope"}, "no column .nope.; there are prompt"),
        (
            {"eval__oracle": "sppo_jax.tiny.world:HELD_OUT"},
            "eval.oracle=sppo_jax.tiny.world:HELD_OUT: TypeError",
        ),
    ],
)
def test_inputs_are_checked_before_anything_is_computed(tmp_path, options, said, one_device):
    if "mesh__fsdp" in options:
        one_device.undo()
    with pytest.raises(BadInput, match=said):
        main.main(words(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_an_oracle_that_does_not_know_the_prompts_is_told_at_once(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"prompt": f"own {i}"}) + "\n" for i in range(9)))
    own = {"prompts__heldout": f"jsonl:{tmp_path}/own.jsonl", "eval__oracle": ORACLE}
    with pytest.raises(BadInput, match="does not know the prompt"):
        main.main(words(tmp_path / "run", **own))
    assert not (tmp_path / "run").exists()


def test_a_judge_that_answers_nonsense_is_told(tmp_path, monkeypatch):
    from sppo_jax.tiny import world

    class Nonsense:
        identity = "nonsense"

        def __init__(self):
            self.value = np.nan

        def compare(self, prompts, responses, on_progress=None):
            k = len(responses[0])
            return np.full((len(prompts), k, k), np.nan) if k == 3 else np.zeros((len(prompts), 9))

    monkeypatch.setattr(world, "oracle", Nonsense)
    with pytest.raises(BadInput, match=r"judge\.backend: a score of prompt .* is not a finite number"):
        main.main(words(tmp_path / "run"))
    with pytest.raises(BadInput, match=r"judge\.backend: compare gave an array \(1, 9\), needed \(1, 2, 2\)"):
        main.main(words(tmp_path / "other", sampling__responses=2))


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded policy to damage."""
    import shutil

    from sppo_jax.hub import names

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
        ("config.json", {"num_attention_heads": 0, "head_dim": None}, "config.json"),
        ("config.json", {"rope_parameters": "x"}, "rope parameters are 'x'"),
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


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"sha256": 3}'])
def test_a_damaged_manifest_is_one_line(tmp_path, played, text):
    import shutil

    run = shutil.copytree(played, tmp_path / "run")
    (run / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        main.main(words(run, iterations=2))


def test_log_partition_at_a_large_eta_is_warned_of(tmp_path, capsys):
    main.main(words(tmp_path / "run", fit__baseline="log_partition", fit__eta=1000, fit__learning_rate=1e-7))
    assert "warning: fit.baseline=log_partition with fit.eta=1000" in capsys.readouterr().out


def test_another_configuration_or_other_weights_in_the_same_directory_are_refused(tmp_path, played):
    with pytest.raises(BadInput, match=r"fit\.eta"):
        main.main(words(played, iterations=2, fit__eta=5))
    manifest = json.loads((played / "manifest.json").read_text())
    changed = manifest | {"sha256": manifest["sha256"] | {"base_weights": "0" * 64}}
    files.write_json(played / "manifest.json", changed)
    with pytest.raises(BadInput, match="base_weights differ"):
        main.main(words(played, iterations=2))
    files.write_json(played / "manifest.json", manifest)


def test_help_lists_every_knob(capsys):
    main.main(["--help"])
    shown = capsys.readouterr().out
    from sppo_jax import config

    assert all(f"--{key} " in shown for key, *_ in config.knobs())
