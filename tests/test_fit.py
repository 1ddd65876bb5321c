"""Stage 5: the log-ratio starts at exactly zero, the loss where it was predicted, and training resumes and stops as it should."""

import dataclasses
import functools
import itertools
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sppo_jax import fit, models, pairs, preferences, sharding
from sppo_jax.config import Config, Fit, Log
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.hub import names
from sppo_jax.losses import LOSSES
from sppo_jax.models import hf
from sppo_jax.records import Preferences, Responses
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.run.stage import Stage
from sppo_jax.training import trainer, update
from sppo_jax.training.batches import Batch, Batches, steps_per_epoch
from sppo_jax.training.checkpoint import Checkpoints
from sppo_jax.training.packing import Packing
from sppo_jax.training.profiling import Profiler
from sppo_jax.training.update import Programs, split
from tests.conftest import ODD

# Tests of equal shapes share their programs, as the iterations of a run do.
make_programs = functools.lru_cache(maxsize=8)(update.make_programs)

SETTINGS = Fit(eta=10.0, learning_rate=2e-5, epochs=2, schedule_epochs=2, global_batch=4, max_grad_norm=1.0)


def pairs_of(n, how="best_worst", k=3, seed=0, eta=10.0, longest=14):
    """n judged prompts of random tokens, K responses of up to `longest`."""
    rng = np.random.default_rng(seed)
    responses, preferred = [], []
    for i in range(n):
        ids = [rng.integers(10, 760, rng.integers(3, longest)).tolist() + [2] for _ in range(k)]
        prompt = [1, *rng.integers(10, 760, rng.integers(3, 9)).tolist()]
        p = preferences.probability_matrix(rng.normal(size=(k, k)) * 2)
        responses.append(
            Responses(i, f"p{i}", prompt, ids, [f"r{j}" for j in range(k)], ["stop"] * k, [0.0] * k)
        )
        preferred.append(
            Preferences(i, p.tolist(), p.tolist(), preferences.win_rates(p).tolist(), "pairwise")
        )
    return pairs.select(responses, preferred, how=how, eta=eta, baseline=0.5)[0]


def prepare(rows, settings, mesh, dtype=jnp.float32, most_tokens=None, pack=True):
    """(model, pairs with reference, batches, programs) on a mesh."""
    model = models.load(names.path("policy"), mesh=mesh, dtype=dtype)
    steps = steps_per_epoch(rows, settings.global_batch)
    programs = make_programs(model.architecture, model.compute_dtype, mesh, settings, steps)
    of = {"global_batch": settings.global_batch, "seed": 0, "iteration": 1, "epochs": settings.epochs}
    of["packing"] = Packing(sharding.batch_shards(mesh), most_tokens, pack)
    ref = trainer.logprobs(model, Batches(rows, **of), len(rows), programs, mesh)
    filled = pairs.with_reference(rows, ref)
    return model, filled, Batches(filled, **of), programs


def steps_of(batches, model, programs, mesh, count=None):
    """Metrics of plain steps without files, and the last state."""
    _, params, frozen = split(model)
    state = programs.first_state(params)
    found = []
    for step in range(count or len(batches)):
        state, metrics = programs.train_step(state, frozen, batches[step].placed(mesh))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state


class Stopped(Metrics):
    """Metrics of a run that a signal has asked to stop, once `asked` is set."""

    asked = False

    @property
    def stop_requested(self):
        return self.asked


def train(tmp_path, rows, settings, mesh, *, stop_at=None, stream_log=None):
    """The real loop with its checkpoints and metrics; `stop_at`: a request to stop arrives during that step."""
    model, _, batches, programs = prepare(rows, settings, mesh)
    tmp_path.mkdir(exist_ok=True)
    with Stopped(RunDir(tmp_path)) as metrics, Checkpoints(tmp_path / "checkpoints") as checkpoints:
        from_step = batches.from_step

        def stream(start):
            for step, batch in enumerate(from_step(start), start):
                if stream_log is not None:
                    stream_log.append(step)
                metrics.asked = metrics.asked or step == stop_at
                yield batch

        batches.from_step = stream
        return fit.train(
            model, batches, config=Config(fit=settings, log=Log(every=1)), programs=programs, mesh=mesh,
            checkpoints=checkpoints, stage=Stage(RunDir(tmp_path), 1, 0, 1, {}, metrics),
        )  # fmt: skip


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.split(model)[1])]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
def test_T39_log_ratio_is_exactly_zero_at_step_zero_and_the_loss_is_the_predicted_one(dtype, mesh, request):
    """At a size where XLA would compile the forward otherwise if it stood in one program with its gradient."""
    mesh = request.getfixturevalue(mesh)
    settings = dataclasses.replace(SETTINGS, global_batch=32, warmup=0.5)
    model, filled, batches, programs = prepare(pairs_of(75, longest=45), settings, mesh, dtype)
    whole, first = fit.expected_initial_loss(batches, settings)
    found, _ = steps_of(batches, model, programs, mesh, 2)
    # The schedule's rate is 0 at step 0, so the policy is its reference at step 1 too, on another batch.
    assert [metrics["max_log_ratio"] for metrics in found] == [0.0, 0.0]
    assert found[0]["loss"] == pytest.approx(first, rel=1e-6)
    reference = np.concatenate([part.ref_logprob[part.real] for part in batches[0].microbatches]).mean(0)
    assert found[0]["logprob_chosen"] == pytest.approx(reference[0], rel=1e-6)
    assert found[0]["logprob_rejected"] == pytest.approx(reference[-1], rel=1e-6)
    assert whole == pytest.approx(np.mean(np.square([pair.target for pair in filled])), rel=1e-6)


@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
def test_T24_an_update_takes_global_batch_prompts_however_many_devices_share_them(mesh, request):
    mesh, rows = request.getfixturevalue(mesh), pairs_of(18)
    settings, pieces = dataclasses.replace(SETTINGS, global_batch=9), sharding.batch_shards(mesh)
    for most in (None, 64 * pieces):
        _, _, batches, _ = prepare(rows, settings, mesh, most_tokens=most)
        assert batches.steps_per_epoch == 2
        assert batches[0].prompts == batches[1].prompts == 9
        parts = list(batches[0].placed(mesh))
        assert (len(parts) > 1) == (most is not None)
        tokens = parts[0].tokens
        assert tokens.sharding.shard_shape(tokens.shape)[0] * pieces == tokens.shape[0] == batches.layout.rows


def test_every_reference_is_finite_negative_and_belongs_to_its_pair(one_device):
    _, filled, *_ = prepare(pairs_of(7), SETTINGS, one_device)
    again = prepare(pairs_of(7)[::-1], SETTINGS, one_device)[1]
    for a, b in zip(filled, again[::-1], strict=True):
        np.testing.assert_allclose(a.ref_logprob, b.ref_logprob, atol=1e-5)
        assert max(a.ref_logprob) < 0


@pytest.mark.parametrize("how", ["best_worst", "all"])
def test_one_and_eight_devices_give_the_same_losses_over_twenty_steps(how, one_device, eight_devices):
    settings = dataclasses.replace(SETTINGS, epochs=4, schedule_epochs=4)
    losses = []
    for mesh in (one_device, eight_devices):
        model, _, batches, programs = prepare(pairs_of(20, how), settings, mesh)
        assert len(batches) == 20
        found, _ = steps_of(batches, model, programs, mesh)
        losses.append([m["loss"] for m in found])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert len(set(losses[0])) == 20


def test_a_filled_up_batch_weighs_its_real_rows_only(one_device):
    """Five pairs in a batch of eight give the loss and gradient of a batch of five."""
    rows = pairs_of(5)
    found = []
    for size in (5, 8):
        settings = dataclasses.replace(SETTINGS, global_batch=size, warmup=0.0)
        model, _, batches, programs = prepare(rows, settings, one_device)
        metrics, _ = steps_of(batches, model, programs, one_device, 1)
        found.append((metrics[0]["loss"], metrics[0]["grad_norm"]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_T26_every_loss_trains_from_its_own_predicted_start(loss, one_device):
    settings = dataclasses.replace(SETTINGS, loss=loss)
    model, _, batches, programs = prepare(pairs_of(8), settings, one_device)
    _, first = fit.expected_initial_loss(batches, settings)
    known = {"sppo_hard": 25.0, "ipo": 25.0, "dpo": math.log(2)}
    assert first == pytest.approx(known.get(loss, first), rel=1e-6)
    metrics, _ = steps_of(batches, model, programs, one_device)
    assert metrics[0]["loss"] == pytest.approx(first, rel=1e-6)
    assert metrics[-1]["margin"] > 0.1


@pytest.mark.parametrize("loss", ["sppo", "ipo"])
def test_an_anchor_moves_the_initial_loss_and_leaves_the_log_ratio_at_zero(loss, one_device):
    settings = dataclasses.replace(SETTINGS, loss=loss, anchor=0.25, global_batch=8, epochs=1)
    model, filled, plain, programs = prepare(pairs_of(8), settings, one_device)
    ref = np.array([pair.ref_logprob for pair in filled])
    moved = np.random.default_rng(0).normal(size=ref.shape) * 8
    batches = Batches(
        pairs.with_base(filled, ref - moved), global_batch=8, epochs=1, seed=0, iteration=1, packing=Packing()
    )
    whole, first = fit.expected_initial_loss(batches, settings)
    target = np.array([pair.target for pair in filled])
    by_hand = {"sppo": (target - 0.25 * moved) ** 2, "ipo": (0.25 * (moved[:, 0] - moved[:, 1]) - 5) ** 2}
    assert whole == first == pytest.approx(np.mean(by_hand[loss]), rel=1e-4)
    _, params, frozen = split(model)
    _, metrics = programs.gradients(params, frozen, batches[0].placed(one_device))
    assert float(metrics["loss"]) == pytest.approx(first, rel=1e-5)
    assert float(metrics["max_log_ratio"]) == 0
    _, metrics = programs.gradients(params, frozen, plain[0].placed(one_device))
    assert math.isnan(metrics["loss"])  # pairs without the base's log-probs cannot pass for anchored ones


def test_an_anchor_in_the_policy_itself_changes_no_bit(one_device):
    """As in iteration 1, where the base is the reference."""
    found = []
    for anchor in (0.0, 1 / 3):
        settings = dataclasses.replace(SETTINGS, warmup=0.0, anchor=anchor)
        model, filled, _, programs = prepare(pairs_of(8), settings, one_device)
        rows = pairs.with_base(filled, np.array([pair.ref_logprob for pair in filled])) if anchor else filled
        batches = Batches(rows, global_batch=4, epochs=2, seed=0, iteration=1)
        found.append(steps_of(batches, model, programs, one_device)[0])
    assert len(found[0]) == 4
    assert found[0] == found[1]
    assert found[0][-1]["max_log_ratio"] > 0


def test_T32_the_training_losss_gradient_ignores_the_reference_in_the_batch(one_device):
    _, _, batches, _ = prepare(pairs_of(4), SETTINGS, one_device)
    (batch,) = batches[0].placed(one_device)
    logprob = batch.ref_logprob + 0.3

    def loss(ref):
        return LOSSES["sppo"].compute(logprob, dataclasses.replace(batch, ref_logprob=ref), SETTINGS.eta)

    np.testing.assert_array_equal(jax.grad(loss)(batch.ref_logprob), 0.0)


def test_T38_masters_and_optimiser_state_are_float32_under_bfloat16_compute(one_device):
    model, _, batches, programs = prepare(pairs_of(4), SETTINGS, one_device, jnp.bfloat16)
    _, state = steps_of(batches, model, programs, one_device, 1)
    kinds = {
        x.dtype
        for x in jax.tree.leaves((state.params, state.opt_state))
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert kinds == {jnp.dtype("float32")}


def test_optimiser_state_is_born_sharded_like_the_parameters(eight_devices):
    model, _, batches, programs = prepare(
        pairs_of(8), dataclasses.replace(SETTINGS, global_batch=8), eight_devices
    )
    _, state = steps_of(batches, model, programs, eight_devices, 1)
    q = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.shape == (4, 128, 4, 32)]
    assert len(q) == 2
    assert all(x.sharding.shard_shape(x.shape) == (4, 32, 2, 32) for x in q)


def test_T16_stopped_in_the_middle_and_started_again_gives_the_same_parameters(tmp_path, one_device):
    rows = pairs_of(10)
    whole = train(tmp_path / "whole", rows, SETTINGS, one_device)
    with pytest.raises(Terminated):
        train(tmp_path / "parts", rows, SETTINGS, one_device, stop_at=3)
    steps = []
    resumed = train(tmp_path / "parts", rows, SETTINGS, one_device, stream_log=steps)
    assert min(steps) == 4
    for a, b in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = []
    again = train(tmp_path / "parts", rows, SETTINGS, one_device, stream_log=steps)
    assert steps == []
    np.testing.assert_array_equal(leaves(again)[0], leaves(whole)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_in_training_leaves_a_checkpoint_of_the_last_update(number, tmp_path, one_device):
    model, _, batches, programs = prepare(pairs_of(10), SETTINGS, one_device)
    from_step = batches.from_step

    def stream(start):
        for step, batch in enumerate(from_step(start), start):
            if step == 2:
                signal.raise_signal(number)
            yield batch

    batches.from_step = stream
    run = RunDir(tmp_path)
    with Metrics(run) as metrics, Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(Terminated) as stopped, metrics.stopping_on_signals():
            fit.train(
                model, batches, config=Config(fit=SETTINGS), programs=programs, mesh=one_device,
                checkpoints=checkpoints, stage=Stage(run, 1, 0, 1, {}, metrics),
            )  # fmt: skip
        assert stopped.value.number == number
        assert checkpoints.latest() == 3


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, one_device, eight_devices):
    rows, settings = pairs_of(16), dataclasses.replace(SETTINGS, global_batch=8)
    whole = train(tmp_path / "whole", rows, settings, one_device)
    with pytest.raises(Terminated):
        train(tmp_path / "parts", rows, settings, one_device, stop_at=1)
    moved = train(tmp_path / "parts", rows, settings, eight_devices)
    for a, b in zip(leaves(whole), leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, one_device):
    train(tmp_path, pairs_of(4), SETTINGS, one_device)
    odd = hf.initialise(ODD, jax.random.key(0), one_device)
    _, params = nnx.split(odd)
    programs = make_programs(odd.architecture, odd.compute_dtype, one_device, SETTINGS, 1)
    state = programs.first_state(params)
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(BadInput, match="not a checkpoint"),
    ):
        checkpoints.restore(checkpoints.latest(), state)


@pytest.mark.parametrize("every", [1, 50])
def test_a_loss_that_is_not_finite_stops_with_one_line_and_reaches_no_checkpoint(tmp_path, one_device, every):
    settings = dataclasses.replace(SETTINGS, learning_rate=1e38, warmup=0.0, checkpoint_every=every)
    with pytest.raises(BadInput, match=r"loss is nan .* after 2 others that were skipped; lower fit"):
        train(tmp_path, pairs_of(8), settings, one_device)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == (1 if every == 1 else None)  # update 0 was sound


def test_a_gradient_that_is_not_finite_skips_its_update_and_too_many_end_the_run(
    tmp_path, one_device, monkeypatch, capsys
):
    """Update 1 alone: training goes on from the weights of update 0. Updates 1 to 7: it ends, and the first checkpoint stays."""
    placed, broken = Batch.placed, {1}
    count = itertools.count()

    def damaged(batch, mesh):
        trains = np.isfinite(
            batch.microbatches[0].ref_logprob
        ).all()  # else these are the reference's own log-probs
        number = next(count) if trains else None
        for part in placed(batch, mesh):
            nan = jnp.full_like(part.ref_logprob, jnp.nan)
            yield dataclasses.replace(part, ref_logprob=nan) if number in broken else part

    monkeypatch.setattr(Batch, "placed", damaged)
    settings = dataclasses.replace(SETTINGS, checkpoint_every=1)
    train(tmp_path / "once", pairs_of(36), settings, one_device)
    shown = capsys.readouterr().out
    assert "nan at update 1: skipped, number 1 in a row of at most 5" in shown
    assert "number 2" not in shown
    count, broken = itertools.count(), set(range(1, 8))
    with pytest.raises(BadInput, match="at update 6 after 5 others that were skipped"):
        train(tmp_path / "often", pairs_of(36), settings, one_device)
    with Checkpoints(tmp_path / "often/checkpoints") as checkpoints:
        assert checkpoints.latest() == 1


def test_scalars_are_read_one_update_behind_and_before_a_checkpoint(tmp_path, one_device, monkeypatch):
    events, step, get, save = [], Programs.train_step, jax.device_get, Checkpoints.save

    def dispatched(*args):
        events.append("dispatch")
        return step(*args)

    def read(arrays):
        if isinstance(arrays, dict) and "loss" in arrays:
            events.append("read")
        return get(arrays)

    def saved(*args):
        events.append("checkpoint")
        return save(*args)

    monkeypatch.setattr(Programs, "train_step", dispatched)
    monkeypatch.setattr(fit.jax, "device_get", read)
    monkeypatch.setattr(Checkpoints, "save", saved)
    train(tmp_path, pairs_of(12), dataclasses.replace(SETTINGS, checkpoint_every=4), one_device)
    behind = ["dispatch", "read"]
    assert events == [
        "dispatch",
        *behind * 3,
        "read",
        "checkpoint",
        "dispatch",
        *behind,
        "read",
        "checkpoint",
    ]


def test_a_policy_that_is_not_its_reference_is_a_fault_of_ours(tmp_path, one_device, monkeypatch):
    with_reference = pairs.with_reference
    monkeypatch.setattr(pairs, "with_reference", lambda rows, ref: with_reference(rows, ref + 1e-3))
    with pytest.raises(RuntimeError, match="log-ratio at step 0"):
        train(tmp_path, pairs_of(8), SETTINGS, one_device)


def test_the_updates_that_are_asked_for_are_recorded_for_xprof(tmp_path):
    def recorded(directory, count, updates):
        with Profiler(directory, count) as profiler:
            for n in range(updates):
                profiler.step(n)
                jnp.ones(3).block_until_ready()
        return [str(path) for path in directory.rglob("*.xplane.pb")]

    assert len(recorded(tmp_path / "two", 2, 8)) == 1
    assert len(recorded(tmp_path / "cut short", 5, 4)) == 1
    assert recorded(tmp_path / "none", 0, 8) == recorded(tmp_path / "too few", 2, 2) == []
