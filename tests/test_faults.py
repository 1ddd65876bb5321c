"""Every kind of write against every kind of refusal: one line, nothing half-written, and the same bytes once there is room."""

import errno
import os
import time

import pytest

from sppo_jax import export, files, main
from sppo_jax.config import Config
from sppo_jax.errors import BadInput, one_line
from sppo_jax.hub import names
from sppo_jax.records import Pair, Preferences, Responses
from sppo_jax.run import directory
from sppo_jax.run.directory import RunDir
from sppo_jax.run.events import Events
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.shards import Shards
from sppo_jax.run.stage import Stage
from tests.faults import ERRORS, files_no_larger_than, mounted, refusing
from tests.small_game import digest, words

RESPONSES = Responses(1, "q", [1], [[3] * 200, [4]], ["a" * 900, "b"], ["length", "stop"], [-1.0, -2.5])
PREFERENCES = Preferences(1, [[0.0, 1.0], [0.5, 0.0]], [[0.5, 0.6], [0.4, 0.5]], [0.55, 0.45], "mean")
SAID = [{"content": "a", "role": "user"}]
PAIR = Pair(SAID, SAID, 0.6, 0.55, 0.45, 1, [1], [[3], [4]], [0.55, 0.45], 0.5, [0.5, -0.5], [-1.0, -2.0])


def stage(run):
    return Stage(run, 1, 0, 1, {"policy": "p"}, Metrics(run))


def shards(run, name, kind):
    return Shards(stage(run), name, kind, 1)


# Each writes one thing of a run in its directory: {kind: (how, a pattern of its path)}.
WRITES = {
    "config": (lambda run: directory.claim(run, Config(out="x")), "*config.yaml*"),
    "manifest": (lambda run: files.write_json(run.manifest, {"seed": 1, "a": "b" * 5000}), "*manifest.json*"),
    "a row of responses": (lambda run: shards(run, "responses", Responses).keep(0, "k", RESPONSES), "*.partial.jsonl"),
    "responses": (lambda run: shards(run, "responses", Responses).write(0, [RESPONSES]), "*/responses/*.parquet*"),
    "a row of preferences": (lambda run: shards(run, "preferences", Preferences).keep(0, "k", PREFERENCES), "*.jsonl"),
    "preferences": (lambda run: shards(run, "preferences", Preferences).write(0, [PREFERENCES]), "*.parquet*"),
    "pairs": (lambda run: stage(run).kept(run.pairs(1), Pair, lambda: [PAIR]), "*pairs.parquet*"),
    "evaluation": (lambda run: files.write_json(run.evaluation(1), {"iteration": 1}), "*eval.json*"),
    "metrics": (lambda run: stage(run).scalars("fit", {"loss": 0.5}), "*metrics.jsonl"),
    "TensorBoard": (lambda run: Events(run.tensorboard).add({"loss": 0.5}, 1, 2.0), "*tfevents*"),
}  # fmt: skip
TINY = {
    "a row of responses": 100,
    "a row of preferences": 50,
    "metrics": 20,
    "TensorBoard": 10,
}  # bytes written before the system refuses the rest


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 7)
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def contents(run):
    """Return {path: bytes} of the files that hold anything."""
    found = {p.relative_to(run.root): p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    return {path: data for path, data in found.items() if data}


def refused(write, run, said):
    """Assert that a write ends in one line with the path and the reason, and leaves nothing."""
    with pytest.raises(BadInput) as error:
        write(run)
    line = str(error.value)
    assert line == one_line(error.value)
    assert line.startswith(f"{run.root}")
    assert said in line
    assert contents(run) == {}


def as_in_a_directory_with_room(write, run):
    """Assert that the same write then gives the same bytes as in a directory that never was full."""
    write(run)
    other = RunDir(run.root.with_name("other"))
    other.root.mkdir()
    write(other)
    assert contents(run) == contents(other)
    assert contents(run)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", WRITES)
def test_a_refused_write_is_one_line_leaves_nothing_and_succeeds_later(kind, error, run):
    write, pattern = WRITES[kind]
    with refusing(pattern, ERRORS[error]) as paths:
        refused(write, run, os.strerror(ERRORS[error]))
    assert paths
    as_in_a_directory_with_room(write, run)


@pytest.mark.parametrize("error", ["no space", "I/O error"])
@pytest.mark.parametrize("kind", TINY)
def test_a_write_refused_in_its_middle_leaves_no_half_line(kind, error, run):
    write, pattern = WRITES[kind]
    with refusing(pattern, ERRORS[error], after=TINY[kind]) as paths:
        refused(write, run, os.strerror(ERRORS[error]))
    assert paths
    as_in_a_directory_with_room(write, run)


@pytest.mark.parametrize("kind", WRITES)
def test_a_limit_on_the_size_of_files_is_one_line(kind, run):
    with files_no_larger_than(10):
        refused(WRITES[kind][0], run, "File too large; raise the limit on file sizes (ulimit -f)")
    as_in_a_directory_with_room(WRITES[kind][0], run)


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize(
    ("options", "said"), [("size=4k", "No space left"), ("nr_inodes=2", "No space left"), ("ro", "Read-only")]
)
def test_a_real_file_system_that_is_full_or_read_only_is_one_line(kind, options, said, run):
    write, _ = WRITES[kind]
    with mounted(run.root, options) as remount:
        if options == "size=4k":
            (run.root / "filler").write_bytes(b"0" * 4096)
        if options == "nr_inodes=2":
            (run.root / "filler").write_bytes(b"")
        with pytest.raises(BadInput, match=said) as error:
            write(run)
        assert str(error.value).startswith(str(run.root))
        assert not [path for path in contents(run) if path.name != "filler"]
        remount("rw,size=10m,nr_inodes=100")
        write(run)
        assert [path for path in contents(run) if path.name != "filler"]


def test_an_export_without_room_is_one_line_and_leaves_nothing(policy, run):
    def write(run):
        export.export(policy, names.path("policy"), run.export(1))

    with files_no_larger_than(100_000):
        refused(write, run, "File too large")
    with refusing("*/.export.part*", errno.EDQUOT):
        refused(write, run, "quota")
    with mounted(run.root, "size=2m"):
        refused(write, run, "make room")


# In the order in which a game writes them: a pattern of the path, and how it is refused.
IN_TURN = {
    "*config.yaml*": "no space",
    "*manifest.json*": "no permission",
    "*iter_0/heldout/*": "I/O error",
    "*iter_1/responses*.jsonl": "read-only",
    "*iter_1/responses/*00001*.parquet*": "no quota",
    "*iter_1/preferences*.jsonl": "no permission",
    "*tfevents*": "no space",
    "*iter_1/preferences/*00002*.parquet*": "read-only",
    "*pairs.parquet*": "too large",
    "*probe.parquet*": "no space",
    "*metrics.jsonl": "read-only",
    "*iter_1/.export*": "no space",
    "*iter_1/heldout/responses*": "I/O error",
    "*eval.json*": "no quota",
    "*report.html*": "no space",
}


@pytest.mark.usefixtures("single_device")
def test_a_game_whose_every_write_is_refused_once_ends_with_the_same_bits(played, tmp_path):
    out = tmp_path / "run"
    for pattern, error in IN_TURN.items():
        with refusing(pattern, ERRORS[error]) as paths, pytest.raises(BadInput) as ended:
            main.main(words(out))
        assert os.strerror(ERRORS[error]) in str(ended.value), pattern
        assert str(out) in str(ended.value)
        assert paths, pattern
        assert not list(out.rglob("*.part"))
    main.main(words(out))
    assert digest(out) == digest(played)
