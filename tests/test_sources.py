"""Rows from every kind of source, and one line for each kind of failure."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sppo_jax.errors import BadInput
from sppo_jax.text import conversations, rows
from sppo_jax.text.source import Source
from tests import dataset_hub
from tests.dataset_hub import COMMIT

CONFIGS = Path(__file__).parent.parent / "configs"
TURNS = [{"content": "Hi?", "role": "user"}, {"content": "Hello.", "role": "assistant"}]


def prompts_of(n, start=0):
    return [{"prompt": f"Question {i}?", "n": i} for i in range(start, start + n)]


def read(name, split="train", column="prompt"):
    return [row.get(column) for row in rows.rows(Source("prompts.source", name, split), [column])]


def refused(name, split="train", column="prompt"):
    with pytest.raises(BadInput) as caught:
        read(name, split, column)
    message = str(caught.value)
    assert message.startswith(f"prompts.source={name}: ")
    assert "\n" not in message
    return message


# tensorflow-datasets


class WithoutTensorFlow:
    """A module finder that behaves as on a machine without TensorFlow."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *more):
        return None if name.split(".")[0] == "tensorflow" else self.finder.find_spec(name, *more)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a directory of ArrayRecord files that tfds itself wrote without TensorFlow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [*map(WithoutTensorFlow, sys.meta_path)])
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()

        class Questions(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                message = tfds.features.FeaturesDict(
                    {"content": tfds.features.Text(), "role": tfds.features.Text()}
                )
                columns = {
                    "prompt": tfds.features.Text(),
                    "n": np.int64,
                    "turns": tfds.features.Sequence(message),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

            def _split_generators(self, dl_manager):
                return {"train_1": self._rows(0, 6), "test_1": self._rows(6, 9), "test_2": self._rows(9, 11)}

            def _generate_examples(self):
                raise NotImplementedError

            def _rows(self, start, end):
                for i in range(start, end):
                    yield i, {"prompt": f"Où est {i} ?", "n": i, "turns": TURNS}

        builder = Questions(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
        builder.download_and_prepare()
        return builder.data_dir


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*map(WithoutTensorFlow, sys.meta_path)])
    yield
    assert "tensorflow" not in sys.modules


def test_a_prepared_directory_is_read_without_tensorflow(prepared, without_tensorflow):
    assert sorted(read(f"tfds:{prepared}", "train_1")) == [f"Où est {i} ?" for i in range(6)]
    assert len(read(f"tfds:{prepared}", "train_1[:2]")) == 2
    both = read(f"tfds:{prepared}", "test_1+test_2")
    assert sorted(both) == sorted(f"Où est {i} ?" for i in range(6, 11))
    assert set(read(f"tfds:{prepared}", "train_1", "n")) == set(range(6))
    assert conversations.turns(read(f"tfds:{prepared}", "train_1", "turns")[0]) == [
        ("user", "Hi?", ""),
        ("assistant", "Hello.", ""),
    ]


def test_a_name_is_found_where_tfds_keeps_its_datasets(prepared, without_tensorflow, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(Path(prepared).parent.parent))
    assert len(read("tfds:questions", "test_1")) == 3
    assert len(read("tfds:questions:1.0.0", "test_1")) == 3


def test_what_tfds_cannot_give_is_reported(prepared, without_tensorflow, tmp_path):
    assert "no column 'text'; there are" in refused(f"tfds:{prepared}", "train_1", "text")
    assert "split 'nope' cannot be read; there are train_1, test_1, test_2" in refused(
        f"tfds:{prepared}", "nope"
    )
    assert "array_record" in refused(f"tfds:{tmp_path}")
    assert "Dataset no_such_thing not found" in refused("tfds:no_such_thing")
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(prepared).iterdir():
        text = file.read_bytes()
        if file.name == "dataset_info.json":
            text = text.replace(b'"array_record"', b'"tfrecord"')
        (other / file.name).write_bytes(text)
    assert "its files are tfrecord" in refused(f"tfds:{other}", "train_1")
    whole = tmp_path / "damaged"
    whole.mkdir()
    for file in Path(prepared).iterdir():
        (whole / file.name).write_bytes(file.read_bytes()[:40] if "train" in file.name else file.read_bytes())
    assert refused(f"tfds:{whole}", "train_1")


# Hugging Face datasets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def directory(tmp_path):
    """Return a dataset in the hub's layout, with a split per iteration."""
    root = tmp_path / "local"
    splits = {"train_1": prompts_of(5), "train_2": prompts_of(4, 5), "test_1": prompts_of(2, 9), "test_2": prompts_of(1, 11)}  # fmt: skip
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for name, split in splits.items():
        (root / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(split), root / name / "0.parquet")
        lines += [f"  - split: {name}", f"    path: {name}/*.parquet"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def test_a_local_directory_of_data_files_is_a_dataset(directory):
    assert read(f"hf:{directory}", "train_1") == [f"Question {i}?" for i in range(5)]
    assert read(f"hf:{directory}", "train_1[:2]+train_2[3:]") == ["Question 0?", "Question 1?", "Question 8?"]
    assert read(f"hf:{directory}", "test_1+test_2", "n") == [9, 10, 11]


def test_what_the_datasets_library_cannot_give_is_reported(directory, tmp_path):
    splits = "there are train_1, train_2, test_1, test_2"
    assert f"split 'train' cannot be read; {splits}" in refused(f"hf:{directory}")
    assert f"split 'train_1[::2]' cannot be read; {splits}" in refused(f"hf:{directory}", "train_1[::2]")
    assert "no column 'text'; there are prompt, n" in refused(f"hf:{directory}", "train_1", "text")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "contain any data files" in refused(f"hf:{empty}")
    (empty / "x.parquet").write_bytes(b"PAR1 but no more")
    assert "is the dataset whole" in refused(f"hf:{empty}")
    assert "unset HF_HUB_OFFLINE" in refused("hf:someone/something")
    for name in (
        "json",
        "a/b/c",
        str(tmp_path / "nowhere"),
    ):  # "json": the library would read every file below here
        assert "OWNER/NAME" in refused(f"hf:{name}")


PROBE = """
import json, sys
from sppo_jax import config_file, prompts
from sppo_jax.errors import BadInput
from sppo_jax.hub.names import path as embedded
from sppo_jax.text import conversations, rows
from sppo_jax.text.chat_template import load_tokenizer
from sppo_jax.text.source import Source
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = len(list(rows.rows(Source("x", name, "train_1+test_1"), ["prompt"])))
    except BadInput as error:
        found[name] = str(error)
for path in sys.argv[2:]:
    sets = prompts.load(config_file.load([path]), load_tokenizer(embedded("policy")))
    found[path] = [[p.text for p in part] for part in (sets.heldout, *sets.train)] + [sets.counts]
print(json.dumps(found))
"""


def probe(hub, home, names, *configs, **more):
    words = [sys.executable, "-c", PROBE, json.dumps(names), *map(str, configs)]
    environment = dataset_hub.environment(hub, home) | more
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return the rows that new processes got from a hub on this machine, and then without it."""
    home = tmp_path_factory.mktemp("hf")
    with dataset_hub.serving() as hub:
        hub.add("some/thing", train_1=prompts_of(5), test_1=prompts_of(3))
        for t in (1, 2, 3):
            rows = [*prompts_of(3, 10 * t), *prompts_of(1, 100 * t)]  # the last row is held out
            hub.add(f"UCLA-AGI/data-mistral-7b-instruct-sppo-iter{t}", train=rows)
        splits = {f"train_iteration_{t}": prompts_of(2, 10 * t) for t in (1, 2, 3)}
        splits |= {f"test_iteration_{t}": prompts_of(2, 100 * t) for t in (1, 2, 3)}
        hub.add("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", **splits)
        hub.refused = {
            "some/secret": (401, "RepoNotFound"),
            "some/gated": (403, "GatedRepo"),
            "some/odd": (403, None),
        }
        names = ["some/thing", "some/thing@main", "some/thing@v9", "some/nothing", *hub.refused]
        shipped = [CONFIGS / "ultrafeedback.yaml", CONFIGS / "snorkel.yaml"]
        online = probe(hub, home, [f"hf:{name}" for name in names], *shipped)
        fetched = list(hub.fetched)
        names = [
            "some/thing",
            f"some/thing@{COMMIT}",
            "some/thing:default",
            "some/thing@main",
            "some/nothing",
        ]
        offline = probe(hub, home, [f"hf:{name}" for name in names], HF_HUB_OFFLINE="1")
        assert hub.fetched == fetched
    return online, offline, fetched


def test_a_dataset_comes_from_the_hub_once(answers):
    online, _, fetched = answers
    assert (online["hf:some/thing"], online["hf:some/thing@main"]) == (8, 8)
    assert len([f for f in fetched if f.startswith("some/thing/data")]) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("thing@v9", "Revision 'v9' doesn't exist"), ("nothing", "doesn't exist on the Hub or cannot be accessed"),
        ("secret", "HF_TOKEN"), ("gated", "gated dataset"), ("odd", "HF_TOKEN"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(answers, name, said):
    message = answers[0][f"hf:some/{name}"]
    assert said in message
    assert "HF_TOKEN" in message
    assert "\n" not in message


def test_offline_the_cache_serves_and_a_revision_is_kept(answers):
    offline = answers[1]
    assert [offline[f"hf:some/thing{end}"] for end in ("", f"@{COMMIT}", ":default")] == [8, 8, 8]
    assert f"holds revision {COMMIT}" in offline["hf:some/thing@main"]
    assert "unset HF_HUB_OFFLINE" in offline["hf:some/nothing"]


@pytest.mark.parametrize(("name", "rows", "kept"), [("ultrafeedback", 4, 3), ("snorkel", 2, 2)])
def test_the_shipped_prompt_sets_are_one_per_iteration_and_apart_from_snorkels_tests(
    answers, name, rows, kept
):
    heldout, *train, counts = answers[0][str(CONFIGS / f"{name}.yaml")]
    assert heldout == [f"Question {100 * t + i}?" for t in (1, 2, 3) for i in (0, 1)]
    assert [sorted(part) for part in train] == [
        [f"Question {10 * t + i}?" for i in range(kept)] for t in (1, 2, 3)
    ]
    assert [counts[f"iteration {t}"]["rows"] for t in (1, 2, 3)] == [rows] * 3


def saved(tmp_path, kind):
    """Return a directory that `save_to_disk` wrote, with splits or without."""
    splits = {"train_1": prompts_of(5), "train_2": prompts_of(4, 5)}
    found = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()})
    (found if kind == "splits" else found["train_1"]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_dataset_that_was_saved_to_disk_is_read_with_its_splits(tmp_path):
    path = saved(tmp_path, "splits")
    assert read(f"hf:{path}", "train_1[1:3]+train_2[3:]", "n") == [1, 2, 8]
    assert "split 'train' cannot be read; there are train_1, train_2" in refused(f"hf:{path}")
    assert "no column 'text'; there are prompt, n" in refused(f"hf:{path}", "train_1", "text")
    assert "give hf:DIR" in refused(f"parquet:{path}")


def test_a_dataset_that_was_saved_without_splits_is_read_whole(tmp_path):
    path = saved(tmp_path, "one")
    assert read(f"hf:{path}", "test", "n") == list(range(5))
    assert "leave out the split 'train_1'" in refused(f"hf:{path}", "train_1")
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert "is the dataset whole?" in refused(f"hf:{path}")


def test_a_file_is_not_taken_for_a_dataset_of_the_hub(tmp_path):
    pq.write_table(pa.Table.from_pylist(prompts_of(2)), tmp_path / "p")
    (tmp_path / "j").write_text("{}")
    assert "give parquet:PATH" in refused(f"hf:{tmp_path}/p")
    assert "give jsonl:PATH" in refused(f"hf:{tmp_path}/j")


# files


def test_parquet_gives_the_wanted_column_piece_by_piece(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    written = [row | {"large": "x" * 100} for row in prompts_of(2500)]
    pq.write_table(pa.Table.from_pylist(written), path, row_group_size=900)
    sizes, asked = [], []
    plain, batches = rows.plain, pq.ParquetFile.iter_batches

    def counted(value):
        sizes.append(len(value)) if isinstance(value, list) else None
        return plain(value)

    @functools.wraps(batches)
    def watched(self, *args, **options):
        asked.append(options["columns"])
        return batches(self, *args, **options)

    monkeypatch.setattr(rows, "plain", counted)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    assert read(f"parquet:{path}") == [row["prompt"] for row in written]
    assert max(sizes) <= 1000
    assert asked == [["prompt"]]


def test_bytes_in_parquet_are_text(tmp_path):
    path = tmp_path / "p.parquet"
    table = pa.table(
        {
            "prompt": pa.array(["où".encode(), b"\xff"], pa.binary()),
            "l": pa.array(["a", "b"], pa.large_string()),
        }
    )
    pq.write_table(table, path)
    good, bad = read(f"parquet:{path}")
    assert good == "où"
    assert not conversations.is_unicode(bad)
    assert read(f"parquet:{path}", "train", "l") == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_that_give_no_rows_are_reported(tmp_path, kind):
    path = tmp_path / "rows"
    assert "no such file" in refused(f"{kind}:{path}")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in prompts_of(3)))
    else:
        pq.write_table(pa.Table.from_pylist(prompts_of(3)), path)
    assert len(read(f"{kind}:{path}", "test")) == 3
    message = refused(f"{kind}:{path}", "train", "instruction")
    assert "no column 'instruction'; there are" in message
    assert "prompt" in message
    assert "n" in message.split("there are")[1]
    assert "leave out the split 'train_1'" in refused(f"{kind}:{path}", "train_1")


def test_a_damaged_parquet_file_is_reported(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(prompts_of(2000)), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "whole parquet file" in refused(f"parquet:{path}")
    path.write_bytes(b"PAR1" + b"\xff" * 400 + whole[404:])
    assert "whole parquet file" in refused(f"parquet:{path}")


@pytest.mark.parametrize("name", ["csv:x", "nowhere", "hf:", ":x", "", "HF:x/y"])
def test_unknown_kinds_of_source_are_reported(name):
    assert "tfds:NAME, hf:NAME, jsonl:PATH or parquet:PATH" in refused(name)
