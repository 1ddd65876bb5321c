"""log.to: the same curves and texts in TensorBoard's file, wandb and trackio, which cost a run nothing when they fail."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.util import tensor_util

from sppo_jax import config_file
from sppo_jax.errors import BadInput
from sppo_jax.run.curves import ITERATIONS, UPDATES, Curves
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.trackers import Sample
from tests.small_game import words

UPDATE = {
    "loss": 5.0, "grad_norm": 2.0, "learning_rate": 1e-5, "log_ratio_chosen": 3.0, "log_ratio_rejected": -2.0, "margin": 5.0,
    "accuracy": 0.75, "max_log_ratio": 8.0, "logprob_chosen": -30.0, "logprob_rejected": -40.0,
}  # fmt: skip
SAMPLES = [Sample("why?", "because", "since | *x*"), Sample("how?", "so", "thus \ud800")]


def configured(out, to):
    return config_file.load([], words(out, log__to=to, fit__eta=10))


def played(out, to, t=1, updates=2):
    """Write what iteration t of a game writes."""
    with Metrics(RunDir(out), configured(out, to)) as metrics:
        metrics.scalars(t, "judge_shard", 0, entropy=0.5)
        metrics.scalars(t, "respond", 0, mean_tokens=16.5, truncated_share=0.25)
        for step in range(updates):
            metrics.scalars(t, "fit", step, **UPDATE)
        metrics.scalars(t, "evaluate", 0, win_rate_judge_base=0.625)
        metrics.samples(t, SAMPLES)


def tensorboard(out):
    """Return {tag: [(step, value)]}, and the hyperparameters of the first start."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["tensors"]) - {metadata.SESSION_START_INFO_TAG}
    curves = {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)] for tag in tags
    }
    start = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    return curves, metadata.parse_session_start_info_plugin_data(start).hparams


def test_tensorboard_has_curves_over_updates_and_iterations_texts_and_knobs(tmp_path):
    for t in (1, 2):
        played(tmp_path, "tensorboard", t)
    curves, knobs = tensorboard(tmp_path)
    assert curves["train/loss"] == [(0, 5), (1, 5), (2, 5), (3, 5)]
    assert curves["evaluate/win_rate_judge_base"] == [(1, 0.625), (2, 0.625)]
    # The names by iteration, which dashboards may have.
    assert curves["fit/iter_2/loss"] == [(0, 5), (1, 5)]
    assert curves["judge_shard/iter_1/entropy"] == [(0, 0.5)]
    (_, first), _ = curves["samples"]
    assert first.tolist() == [
        [b"prompt", b"base", b"policy"],
        [b"why?", b"because", b"since | *x*"],
        [b"how?", b"so", b"thus ?"],
    ]
    assert knobs["fit.eta"].number_value == 10
    assert knobs["log.to"].string_value == "['tensorboard']"


def test_rewards_are_log_ratios_over_eta_as_in_trl():
    curves = Curves(eta=10.0)
    (points,) = curves.of({"iteration": 1, "stage": "fit", "step": 0, "time": 1.0, **UPDATE})
    assert points.values == pytest.approx(
        {
            "train/loss": 5.0, "train/grad_norm": 2.0, "train/learning_rate": 1e-5,
            "train/rewards/chosen": 0.3, "train/rewards/rejected": -0.2, "train/rewards/margins": 0.5, "train/rewards/accuracies": 0.75,
            "train/logps/chosen": -30.0, "train/logps/rejected": -40.0, "train/log_ratio/chosen": 3.0, "train/log_ratio/rejected": -2.0, "train/log_ratio/margins": 5.0, "train/log_ratio/max": 8.0,
        }
    )  # fmt: skip


def test_updates_are_numbered_through_all_iterations_and_starts():
    lines = [
        {"iteration": t, "stage": "fit", "step": s, "loss": 1.0}
        for t, n in ((1, 3), (2, 2))
        for s in range(n)
    ]
    whole = Curves(1.0)
    steps = [points.step for line in lines for points in whole.of(line)]
    assert steps == [0, 1, 2, 3, 4]
    resumed = Curves(1.0, before=lines[:4])
    assert [points.step for line in lines[3:] for points in resumed.of(line)] == [3, 4]
    respond = {"iteration": 2, "stage": "respond", "step": 0, "mean_tokens": 7.0, "truncated_share": None}
    assert [(p.values, p.step, p.axis) for p in resumed.of(respond)] == [
        ({"respond/mean_tokens": 7.0}, 2, ITERATIONS),
        ({"train/completions/mean_length": 7.0}, 3, UPDATES),
    ]


class Stub:
    """Stands for the module wandb or trackio, and keeps what it is told."""

    def __init__(self, fails=()):
        self.fails, self.runs = fails, []

    def login(self, **_):
        self._fail("login")

    def init(self, **options):
        self._fail("init")
        run = SimpleNamespace(options=options, logged=[], knobs={}, axes={}, code=None)
        run.config = SimpleNamespace(update=lambda values, allow_val_change: run.knobs.update(values))
        run.define_metric = lambda name, step_metric=None: run.axes.update({name: step_metric})
        run.log = lambda values, step=None: self._fail("log") or run.logged.append((values, step))
        run.finish = lambda exit_code=None: self._fail("finish") or setattr(run, "code", exit_code)
        self.runs.append(run)
        return run

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def _fail(self, what):
        if what in self.fails:
            raise RuntimeError(f"no {what}\nat all")


@pytest.fixture
def stub(request, monkeypatch):
    def made(name, *fails):
        module = Stub(fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(tmp_path, stub, name):
    module = stub(name)
    for t in (1, 2):
        played(tmp_path, name, t)
    first, second = module.runs
    same = "id" if name == "wandb" else "name"
    assert first.options[same] == second.options[same]
    assert first.options["resume"] == "allow"
    assert first.options["project"] == "sppo_jax"
    knobs = first.knobs if name == "wandb" else first.options["config"]
    assert knobs["fit.eta"] == 10
    losses = [
        (values["train/loss"], values[UPDATES]) for values, _ in second.logged if "train/loss" in values
    ]
    assert losses == [(5, 2), (5, 3)]
    assert [values for values, _ in second.logged][-2:] == [
        {"evaluate/win_rate_judge_base": 0.625, ITERATIONS: 2},
        {
            "samples": [SAMPLES[0]._asdict(), {"prompt": "how?", "base": "so", "policy": "thus ?"}],
            ITERATIONS: 2,
        },
    ]
    assert not (tmp_path / "tensorboard").exists()
    other = tmp_path / "other"
    other.mkdir()
    played(other, name)
    assert module.runs[2].options[same] != first.options[same]


def test_wandb_knows_the_axis_of_every_curve_and_how_the_run_ended(tmp_path, stub):
    module = stub("wandb")
    played(tmp_path, "wandb")
    assert module.runs[0].axes == {ITERATIONS: None, "*": ITERATIONS, UPDATES: None, "train/*": UPDATES}
    assert module.runs[0].options["dir"] == str(tmp_path)
    assert module.runs[0].code == 0
    with pytest.raises(ValueError), Metrics(RunDir(tmp_path), configured(tmp_path, "wandb")) as metrics:
        metrics.scalars(1, "fit", 0, **UPDATE)
        raise ValueError
    assert module.runs[1].code == 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_one_line_and_nothing_else(tmp_path, stub, capsys, name, fails):
    module = stub(name, fails)
    played(tmp_path, f"[tensorboard, {name}]")
    said = [line for line in capsys.readouterr().out.splitlines() if "log.to" in line]
    assert said == [
        f"warning: log.to: {name} has failed (RuntimeError: no {fails} at all) and gets nothing more in this start; the run goes on"
    ]
    assert len(tensorboard(tmp_path)[0]["train/loss"]) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert len(module.runs) <= 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BadInput, match=rf"log.to={name}: the package {name} .*pip install 'sppo_jax\[{name}\]'"
    ):
        Metrics(RunDir(tmp_path), configured(tmp_path, name))
    assert not list(tmp_path.iterdir())


def test_tensorboard_that_is_missing_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install tensorboard, or take it out of log.to \(--log.to"):
        Metrics(RunDir(tmp_path), configured(tmp_path, "tensorboard"))
    assert not list(tmp_path.iterdir())
    Metrics(RunDir(tmp_path), configured(tmp_path, "[]")).close()


def test_wandb_without_an_account_is_refused_at_the_start_unless_it_is_offline(tmp_path, stub, monkeypatch):
    stub("wandb", "login")
    with pytest.raises(
        BadInput, match=r"log\.to=wandb: no login at all; run `wandb login` once, or set WANDB_MODE=offline"
    ):
        Metrics(RunDir(tmp_path), configured(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    played(tmp_path, "wandb")


def test_trackers_are_imported_only_when_named_and_by_process_0(tmp_path, stub, monkeypatch):
    modules = [stub("wandb"), stub("trackio")]
    played(tmp_path, "tensorboard")
    (tmp_path / "none").mkdir()
    played(tmp_path / "none", "[]")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr("sppo_jax.run.pod.first", lambda: False)
    played(tmp_path, "wandb,trackio", 2)
    assert [module.runs for module in modules] == [[], []]
    assert "wandb" not in json.dumps(config_file.load([], words(tmp_path)).log.to)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_takes_everything_offline(tmp_path, monkeypatch, capsys, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'sppo_jax[{name}]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    out: Path = tmp_path / "run"
    out.mkdir()
    for t in (1, 2):
        played(out, name, t)
    assert "log.to" not in capsys.readouterr().out
    if name == "wandb":
        runs = {path.name.rsplit("-", 1)[1] for path in (out / "wandb").glob("offline-run-*")}
        assert runs == {json.loads((out / "tracked.json").read_text())["id"]}
    else:
        assert (tmp_path / "trackio" / "sppo_jax.db").stat().st_size > 0
