"""The official code's parquet, read and written: its columns arrive, and rows that cannot be used are counted or refused."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax import config_file, interchange, records
from sppo_jax.errors import BadInput
from sppo_jax.interchange import COLUMNS
from sppo_jax.records import Pair, prompt_id
from sppo_jax.text import chat_template

EOS = (2,)
ROWS = [
    ("What is 4 plus 3?", "It is 7.", "It is 9.", 0.75, 0.64, 0.3),
    ("Where is the fox?\n", "In the  forest </s> there.", "", 0.9, 0.8, 0.1),
    ("naïve ∑?", "é", "e", 1.0, 1.0, 0.0),
]


def turns(prompt, response):
    return [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]


def row(prompt="Q?", better="yes", worse="no", won=0.8, win=0.7, lose=0.3, **other):
    values = (turns(prompt, better), turns(prompt, worse), won, win, lose)
    return dict(zip(COLUMNS, values, strict=True)) | other


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def official(tmp_path):
    """What the official code publishes: its five columns, and beside them what they were computed from."""
    message = [{"content": datasets.Value("string"), "role": datasets.Value("string")}]
    doubles = datasets.List(datasets.Value("float64"))
    features = datasets.Features(
        {
            **{f"generate_{k}": message for k in range(5)},
            "probability": datasets.List(doubles),
            "rm_scores": doubles,
            **dict.fromkeys(COLUMNS[:2], message),
            **{name: datasets.Value("float64") for name in COLUMNS[2:]},
        }
    )
    more = {f"generate_{k}": turns("Q?", str(k)) for k in range(5)}
    more |= {"probability": [[0.5] * 5] * 5, "rm_scores": [0.1] * 5}
    path = tmp_path / "official.parquet"
    datasets.Dataset.from_list([row(*values, **more) for values in ROWS], features=features).to_parquet(path)
    return path


def read(tokenizer, source, *words, heldout=(), positions=128, t=1):
    settings = config_file.load([], [f"--pairs.source={source}", "--iterations=1", "--fit.eta=10", *words])
    return interchange.read(settings, t, tokenizer, eos=EOS, positions=positions, heldout=heldout)


def from_rows(tmp_path, tokenizer, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return read(tokenizer, f"jsonl:{path}", **options)


def test_the_official_codes_pairs_are_ours(official, tokenizer):
    pairs, counts = read(tokenizer, f"parquet:{official}")
    assert counts == {"rows": 3, "kept": 3}
    for pair, (prompt, better, worse, won, win, lose) in zip(pairs, ROWS, strict=True):
        assert (pair.chosen, pair.rejected) == (turns(prompt, better), turns(prompt, worse))
        assert (pair.chosen_probs, pair.chosen_probs_win, pair.chosen_probs_lose) == (won, win, lose)
        assert pair.prompt_id == prompt_id(prompt)
        assert pair.prompt_ids == chat_template.chat_prompt(tokenizer, prompt).ids
        assert pair.response_ids == [
            chat_template.written_ids(tokenizer, text, EOS) for text in (better, worse)
        ]
        assert all(
            ids.index(2) == len(ids) - 1 for ids in pair.response_ids
        )  # </s> ends it and is nowhere else
        assert pair.win_rate == [win, lose]
        assert pair.target == pytest.approx([10 * (win - 0.5), 10 * (lose - 0.5)])
        assert (pair.baseline, len(pair.ref_logprob)) == (0.5, 2)
        assert all(map(math.isnan, pair.ref_logprob))


def test_the_baseline_is_the_losss(official, tokenizer):
    (pair, *_), _ = read(tokenizer, f"parquet:{official}", "--fit.baseline=0.25")
    assert pair.baseline == 0.25
    assert pair.target == pytest.approx([10 * (0.64 - 0.25), 10 * (0.3 - 0.25)])


def test_what_is_written_has_the_official_types_and_reads_back_the_same(official, tokenizer, tmp_path):
    pairs, _ = read(tokenizer, f"parquet:{official}")
    path = tmp_path / "ours" / "train.parquet"
    interchange.write(pairs, path)
    theirs, ours = (
        datasets.load_dataset("parquet", data_files=str(p), split="train") for p in (official, path)
    )
    assert tuple(ours.column_names) == COLUMNS
    assert ours.features == datasets.Features({name: theirs.features[name] for name in COLUMNS})
    assert ours.to_list() == theirs.select_columns(list(COLUMNS)).to_list()
    assert pq.read_schema(path).remove_metadata() == interchange.SCHEMA
    again, _ = read(tokenizer, f"parquet:{path}")
    assert repr(again) == repr(pairs)  # NaN equals nothing else
    assert repr(read(tokenizer, f"hf:{path.parent}")[0]) == repr(pairs)
    assert list(path.parent.iterdir()) == [path]


def test_the_written_types_do_not_depend_on_the_rows(official, tokenizer, tmp_path):
    pair, *_ = read(tokenizer, f"parquet:{official}")[0]
    other = dataclasses.replace(
        pair, chosen=[dict(reversed(m.items())) for m in pair.chosen], chosen_probs_win=1
    )
    for name, pairs in (("other", [other]), ("none", [])):
        interchange.write(pairs, tmp_path / name)
        assert pq.read_schema(tmp_path / name).remove_metadata() == interchange.SCHEMA


STRUCT = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
VARIANTS = {
    "large_string and another order of fields": pa.large_list(STRUCT),
    "struct of lists": pa.struct([("content", pa.list_(pa.string())), ("role", pa.list_(pa.string()))]),
    "fixed_size_list": pa.list_(STRUCT, 2),
    "a field more": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int32())])),
}  # fmt: skip


@pytest.mark.parametrize("kind", VARIANTS.values(), ids=VARIANTS.keys())
def test_other_spellings_of_the_same_columns_are_taken(official, tokenizer, tmp_path, kind):
    rows = [row(*values) for values in ROWS]
    if pa.types.is_struct(kind):
        for r in rows:
            for name in COLUMNS[:2]:
                r[name] = {key: [m[key] for m in r[name]] for key in ("content", "role")}
    columns = {name: pa.array([r[name] for r in rows], kind) for name in reversed(COLUMNS[:2])}
    columns |= {name: pa.array([r[name] for r in rows], pa.float32()) for name in COLUMNS[2:]}
    pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    expected, _ = read(tokenizer, f"parquet:{official}")
    for pair, same in zip(read(tokenizer, f"parquet:{tmp_path}/other.parquet")[0], expected, strict=True):
        assert (pair.chosen, pair.rejected) == (same.chosen, same.rejected)
        assert pair.win_rate == pytest.approx(same.win_rate, abs=1e-7)


SYSTEM = {"content": "Be brief.", "role": "system"}
SKIPPED = [
    ("not_json", "{not json"),
    ("no_text", row(chosen="yes")),
    ("no_text", {k: v for k, v in row().items() if k != "rejected"}),
    ("no_text", row(chosen=[{"content": None, "role": "user"}])),
    ("other_prompt", row(chosen=[*turns("Q?", "yes"), *turns("more?", "yes")])),
    ("other_prompt", row(chosen=[SYSTEM, *turns("Q?", "yes")])),
    ("other_turns", row(chosen=[*turns("Q?", "yes"), turns("more?", "yes")[0]])),
    ("refused", row(chosen=[SYSTEM, *turns("Q?", "yes")], rejected=[SYSTEM, *turns("Q?", "no")])),
    ("other_turns", row(rejected=[])),
    ("other_prompt", row(rejected=turns("Another?", "no"))),
    ("empty", row(" \n")),
    ("empty_chosen", row(better=" ")),
    ("identical", row(worse="yes")),
    ("not_unicode", row(worse="\ud800")),
    ("bad_probability", row(won=None)),
    ("bad_probability", row(win=1.01)),
    ("bad_probability", row(lose=-0.01)),
    ("bad_probability", row(lose=float("nan"))),
    ("bad_probability", row(win="0.5")),
    ("bad_probability", row(win=True)),
    ("bad_probability", {k: v for k, v in row().items() if k != "chosen_probs_win"}),
    ("in_heldout", row(" held out ")),
    ("repeated", row(" Good? ", "again")),
    ("too_long", row("fox " * 600)),
    ("too_long", row(worse="fox " * 200)),
]


@pytest.mark.parametrize(("reason", "bad"), SKIPPED)
def test_rows_that_are_no_pair_are_skipped_and_counted(tmp_path, tokenizer, reason, bad):
    rows = [row("Good?"), bad, row("Also good?")]
    pairs, counts = from_rows(tmp_path, tokenizer, rows, heldout={prompt_id("held out")})
    assert [pair.chosen[0]["content"] for pair in pairs] == ["Good?", "Also good?"]
    assert counts == {"rows": 3, reason: 1, "kept": 2}


def test_a_pair_may_fill_the_models_positions_and_no_more(tmp_path, tokenizer):
    (pair,), _ = from_rows(tmp_path, tokenizer, [row()])
    length = len(pair.prompt_ids) + max(map(len, pair.response_ids))
    assert from_rows(tmp_path, tokenizer, [row()], positions=length)[1]["kept"] == 1
    with pytest.raises(
        BadInput, match=r"leaves no pairs for iteration 1: of 1 row 1 is too long .*positions"
    ):
        from_rows(tmp_path, tokenizer, [row()], positions=length - 1)


def test_a_prompt_may_have_max_length_tokens_and_no_more(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()))
    length = len(chat_template.chat_prompt(tokenizer, "Q?").ids)
    assert read(tokenizer, f"jsonl:{tmp_path}/rows.jsonl", f"--prompts.max_length={length}")[1]["kept"] == 1
    with pytest.raises(BadInput, match=r"too long \(too_long\); raise prompts.max_length"):
        read(tokenizer, f"jsonl:{tmp_path}/rows.jsonl", f"--prompts.max_length={length - 1}")


def test_each_iteration_may_have_pairs_of_its_own(tmp_path, tokenizer):
    for t in (1, 2):
        (tmp_path / f"{t}.jsonl").write_text(json.dumps(row(f"Number {t}?")))
    (pair,), _ = read(tokenizer, f"jsonl:{tmp_path}/{{iteration}}.jsonl", "--iterations=2", t=2)
    assert pair.chosen[0]["content"] == "Number 2?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs.select=all"], "pairs.select=all"), (["--fit.baseline=log_partition"], "log_partition"),
        (["--iterations=2"], "{iteration}"),
    ],
)  # fmt: skip
def test_settings_that_need_more_than_two_responses_or_files_are_refused(words, message):
    with pytest.raises(BadInput) as caught:
        config_file.load([], ["--pairs.source=parquet:x", "--iterations=1", *words])
    assert message in str(caught.value)
    assert "pairs.source=parquet:x" in str(caught.value)


def test_files_that_hold_no_pairs_are_named(official, tokenizer, tmp_path):
    table = pq.read_table(official).drop_columns(["chosen_probs_win"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(
        BadInput, match=r"^pairs.source=parquet:.*: no column 'chosen_probs_win'; there are .*rejected"
    ):
        read(tokenizer, f"parquet:{tmp_path}/p.parquet")
    (tmp_path / "p.parquet").write_bytes(official.read_bytes()[:-20])
    with pytest.raises(BadInput, match="whole parquet file"):
        read(tokenizer, f"parquet:{tmp_path}/p.parquet")
    with pytest.raises(BadInput, match="no such file"):
        read(tokenizer, f"parquet:{tmp_path}/none.parquet")


def own(tokenizer, official, out):
    """A run's own pairs file, with all its columns."""
    pairs, _ = read(tokenizer, f"parquet:{official}")
    kept = [dataclasses.replace(pair, ref_logprob=[-1.0, -2.0]) for pair in pairs]
    (out / "iter_2").mkdir(parents=True)
    records.write(out / "iter_2" / "pairs.parquet", Pair, kept, {"policy": "x"})
    return pairs


def test_a_runs_own_pairs_are_read_as_well(official, tokenizer, tmp_path):
    pairs = own(tokenizer, official, tmp_path / "run")
    again, _ = read(tokenizer, f"parquet:{tmp_path}/run/iter_2/pairs.parquet")
    assert repr(again) == repr(pairs)


def test_the_command_writes_an_iterations_pairs(official, tokenizer, tmp_path, capsys):
    pairs = own(tokenizer, official, tmp_path / "run")
    to = tmp_path / "given" / "away.parquet"
    interchange.main(["--run", str(tmp_path / "run"), "--iteration", "2", "--to", str(to)])
    assert "3 pairs" in capsys.readouterr().out
    assert repr(read(tokenizer, f"parquet:{to}")[0]) == repr(pairs)
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(BadInput, match="iteration 3 has no pairs"):
        interchange.main(["--run", str(tmp_path / "run"), "--iteration", "3", "--to", str(to)])
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        interchange.main(
            ["--run", str(tmp_path / "run"), "--iteration", "2", "--to", str(tmp_path / "file" / "x")]
        )


def test_the_command_exits_as_the_others_do(tmp_path):
    command = [sys.executable, "-m", "sppo_jax.interchange"]
    helped, refused = (
        subprocess.run([*command, *words], capture_output=True, text=True)
        for words in (["--help"], ["--run", str(tmp_path), "--iteration", "1", "--to", "x"])
    )
    assert (helped.returncode, refused.returncode) == (0, 2)
    assert "--iteration" in helped.stdout
    assert refused.stderr.startswith("error: --run ")
    assert refused.stderr.count("\n") == 1


def test_a_directory_is_not_replaced_by_a_file(official, tokenizer, tmp_path):
    own(tokenizer, official, tmp_path / "run")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("data")
    with pytest.raises(BadInput, match="precious: a directory; name a file in it"):
        interchange.main(
            ["--run", str(tmp_path / "run"), "--iteration", "2", "--to", str(tmp_path / "precious")]
        )
    assert (tmp_path / "precious" / "file").read_text() == "data"


def test_a_bad_flag_is_one_line():
    with pytest.raises(BadInput, match="--run"):
        interchange.main(["--iteration", "1"])


LOSSES = {
    "the configuration": ("run/config.yaml", "inside the run directory"),
    "pairs": ("run/iter_2/pairs.parquet", "inside the run directory"),
    "a new file of the run": ("run/iter_2/../new.parquet", "inside the run directory"),
    "by a link": ("link/new.parquet", "inside the run directory"),
    "a link to nothing": ("dangling", "exists, and is not replaced"),
    "another run": ("other/iter_1/new.parquet", "inside the run directory"),
    "an existing file": ("notes.txt", "exists, and is not replaced; choose another name"),
    "an existing parquet file": ("old.parquet", "exists, and is not replaced; choose another name"),
    "a name of another kind": ("a.jsonl", "written as parquet, not .jsonl; give a.parquet"),
    "a name of a third kind": ("a.CSV", "written as parquet, not .CSV"),
}


@pytest.mark.parametrize(("to", "said"), LOSSES.values(), ids=LOSSES.keys())
def test_the_command_replaces_no_file_and_writes_into_no_run(official, tokenizer, tmp_path, to, said):
    own(tokenizer, official, tmp_path / "run")
    (tmp_path / "other").mkdir()
    for name in ("run/config.yaml", "other/config.yaml", "other/manifest.json", "notes.txt", "old.parquet"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")

    def there():
        return {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = there()
    with pytest.raises(BadInput, match=f"^--to .*{said}"):
        interchange.main(["--run", str(tmp_path / "run"), "--iteration", "2", "--to", str(tmp_path / to)])
    assert there() == before


@pytest.mark.parametrize(
    ("run", "said"),
    [("nope", "no such directory"), (".", "not a run directory"), ("run/iter_2", "not a run directory; did you mean --run .*run[?]")],
)  # fmt: skip
def test_what_is_not_a_run_directory_is_said(official, tokenizer, tmp_path, run, said):
    own(tokenizer, official, tmp_path / "run")
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(BadInput, match=f"^--run .*{said}"):
        interchange.main(
            ["--run", str(tmp_path / run), "--iteration", "1", "--to", str(tmp_path / "x.parquet")]
        )


PATHS = {
    "--to a pipe": (["--to", "RUN/pipe"], "pipe: neither a file nor a directory"),
    "--to with NUL": (["--to", "a\0b"], "not a possible name of a file"),
    "--to too long": (["--to", "a" * 300], "File name too long"),
    "--to below a file": (["--to", "RUN/../file/x"], "cannot be written"),
    "--to a directory": (["--to", "RUN"], "a directory; name a file in it"),
    "--to the run's own file": (["--to", "RUN/iter_2/../iter_2/pairs.parquet"], "inside the run directory"),
    "--run with NUL": (["--to", "RUN/x", "--run", "a\0b"], "not a possible name of a file"),
    "--run too long": (["--to", "RUN/x", "--run", "a" * 300], "File name too long"),
    "--run a loop of links": (["--to", "RUN/x", "--run", "RUN/loop"], "symbolic links"),
    "--run without a home": (
        ["--to", "RUN/x", "--run", "~nobody-has-this-name/run"],
        "no home directory is known",
    ),
}


@pytest.mark.parametrize(("words", "said"), PATHS.values(), ids=PATHS.keys())
def test_odd_paths_of_the_command_are_one_line_and_nothing_is_lost(
    official, tokenizer, tmp_path, words, said
):
    run = tmp_path / "run"
    own(tokenizer, official, run)
    (run / "loop").symlink_to(run / "loop")
    (tmp_path / "file").write_text("")
    os.mkfifo(run / "pipe")  # stands for devices, which no test may risk
    before = (run / "iter_2" / "pairs.parquet").read_bytes()
    words = [word.replace("RUN", str(run)) for word in words]
    with pytest.raises(BadInput, match=said) as caught:
        interchange.main(["--run", str(run), "--iteration", "2", *words])
    assert "\n" not in str(caught.value)
    assert (run / "iter_2" / "pairs.parquet").read_bytes() == before
    assert sorted(p.name for p in run.rglob("*")) == ["iter_2", "loop", "pairs.parquet", "pipe"]
    assert (run / "pipe").is_fifo()


def test_pairs_that_leave_nothing_say_why_in_words(tmp_path, tokenizer):
    rows = [row(chosen="yes"), row(chosen="no"), row(won=2.0)]
    said = (
        r"of 3 rows 2 have no text in 'chosen' or 'rejected' \(no_text\), 1 has a probability that is missing or outside "
        r"\[0, 1\] \(bad_probability\); both columns hold lists of messages$"
    )
    with pytest.raises(BadInput, match=said):
        from_rows(tmp_path, tokenizer, rows)
