"""Stage 5: the log-ratio starts at exactly zero, the loss where it was predicted, and layouts agree."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import fit, models, pairs, preferences, sharding
from sppo_jax.config import Fit
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.hub import names
from sppo_jax.models import hf
from sppo_jax.plan import compiled
from sppo_jax.records import Preferences, Responses
from sppo_jax.run.directory import RunDir
from sppo_jax.run.metrics import Metrics
from sppo_jax.training.batches import Batches, Layout, steps_per_epoch
from sppo_jax.training.checkpoint import Checkpoints
from tests.conftest import ODD

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
    programs = fit.make_programs(model.architecture, model.compute_dtype, mesh, settings, steps)
    of = {"global_batch": settings.global_batch, "seed": 0, "iteration": 1, "epochs": settings.epochs}
    of |= {"shards": sharding.batch_shards(mesh), "most_tokens": most_tokens, "pack": pack}
    ref = fit.logprobs(model, Batches(rows, **of), len(rows), programs, mesh)
    filled = pairs.with_reference(rows, ref)
    return model, filled, Batches(filled, **of), programs


def steps_of(batches, model, programs, mesh, count=None):
    """Metrics of plain steps without files, and the last state."""

    _, params, frozen = fit.split(model)
    state = fit.TrainState(jnp.int32(0), params, programs.init_optimizer(params))
    found = []
    for step in range(count or len(batches)):
        state, metrics = programs.train_step(state, frozen, list(fit.place(batches[step], mesh)))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, state


def train(tmp_path, rows, settings, mesh, *, stop_at=None, stream_log=None):
    """The real loop with its checkpoints and metrics; `stop_at`: SIGTERM arrives during that step."""
    model, _, batches, programs = prepare(rows, settings, mesh)
    tmp_path.mkdir(exist_ok=True)
    with Metrics(RunDir(tmp_path)) as metrics, Checkpoints(tmp_path / "checkpoints") as checkpoints:
        from_step = batches.from_step

        def stream(start):
            for step, batch in enumerate(from_step(start), start):
                if stream_log is not None:
                    stream_log.append(step)
                if step == stop_at:
                    metrics._stop = True
                yield batch

        batches.from_step = stream
        return fit.fit(
            model, batches, settings=settings, programs=programs, mesh=mesh,
            checkpoints=checkpoints, iteration=1, log_every=1, metrics=metrics,
        )  # fmt: skip


def leaves(model):
    from flax import nnx

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
    assert whole == pytest.approx(np.mean(np.square([pair.target for pair in filled])), rel=1e-6)


@pytest.mark.parametrize("mesh", ["one_device", "eight_devices"])
def test_T24_an_update_takes_global_batch_prompts_however_many_devices_share_them(mesh, request):
    mesh, rows = request.getfixturevalue(mesh), pairs_of(18)
    settings, pieces = dataclasses.replace(SETTINGS, global_batch=9), sharding.batch_shards(mesh)
    for most in (None, 64 * pieces):
        _, _, batches, _ = prepare(rows, settings, mesh, most_tokens=most)
        assert batches.steps_per_epoch == 2
        assert batches[0]["real"].sum() == batches[1]["real"].sum() == 9
        parts = list(fit.place(batches[0], mesh))
        assert (len(parts) > 1) == (most is not None)
        tokens = parts[0]["tokens"]
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


@pytest.mark.parametrize("loss", ["sppo", "sppo_single", "sppo_hard", "dpo", "ipo"])
def test_T26_every_loss_trains_from_its_own_predicted_start(loss, one_device):
    settings = dataclasses.replace(SETTINGS, loss=loss)
    model, _, batches, programs = prepare(pairs_of(8), settings, one_device)
    _, first = fit.expected_initial_loss(batches, settings)
    known = {"sppo_hard": 25.0, "ipo": 25.0, "dpo": math.log(2)}
    assert first == pytest.approx(known.get(loss, first), rel=1e-6)
    metrics, _ = steps_of(batches, model, programs, one_device)
    assert metrics[0]["loss"] == pytest.approx(first, rel=1e-6)
    assert metrics[-1]["margin"] > 0.1


def test_T32_the_training_losss_gradient_ignores_the_reference_in_the_batch(one_device):
    model, _, batches, _ = prepare(pairs_of(4), SETTINGS, one_device)
    (batch,) = fit.place(batches[0], one_device)
    loss = fit.make_loss(SETTINGS)
    logprob = jnp.asarray(batch["ref_logprob"]) + 0.3
    grad = jax.grad(lambda ref: loss(logprob, batch | {"ref_logprob": ref}))(
        jnp.asarray(batch["ref_logprob"])
    )
    np.testing.assert_array_equal(grad, 0.0)
    del model


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
    from flax import nnx

    _, params = nnx.split(odd)
    programs = fit.make_programs(odd.architecture, odd.compute_dtype, one_device, SETTINGS, 1)
    state = fit.TrainState(
        jax.device_put(np.int32(0), programs.shardings.step), params, programs.init_optimizer(params)
    )
    with (
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
        pytest.raises(BadInput, match="not a checkpoint"),
    ):
        checkpoints.restore(checkpoints.latest(), state)


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path, one_device):
    with pytest.raises(BadInput, match=r"lower fit\.learning_rate"):
        train(
            tmp_path, pairs_of(8), dataclasses.replace(SETTINGS, learning_rate=1e38, warmup=0.0), one_device
        )


def plain_gradients(model, rows, settings):
    """Loss and gradient with nothing clever: a row for each sequence, layer by layer, all logits at once, all kept."""
    from flax import nnx

    from sppo_jax.models.attention import Kernel

    graph, params = nnx.split(model)
    loss = fit.make_loss(settings)
    every = [(r.prompt_ids, ids) for r in rows for ids in r.response_ids]
    width = max(len(p) + len(ids) for p, ids in every)
    tokens = np.zeros((len(every), width), np.int32)
    valid, scored = np.zeros((2, *tokens.shape), bool)
    for b, (prompt, ids) in enumerate(every):
        tokens[b, : len(prompt) + len(ids)] = prompt + ids
        valid[b, : len(prompt) + len(ids)] = True
        scored[b, len(prompt) : len(prompt) + len(ids)] = True
    place = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    batch = {
        "ref_logprob": jnp.asarray([r.ref_logprob for r in rows], jnp.float32),
        "win_rate": jnp.asarray([r.win_rate for r in rows], jnp.float32),
        "baseline": jnp.asarray([r.baseline for r in rows], jnp.float32),
        "probability": jnp.asarray([r.chosen_probs for r in rows], jnp.float32),
        "real": jnp.ones(len(rows), bool),
    }

    def total(params):
        model = nnx.merge(graph, params)
        model.kernel = Kernel()  # dense masks
        hidden = model.forward(jnp.asarray(tokens), place, model.whole_attention(jnp.asarray(valid)))
        log_p = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
        return loss(jnp.where(scored[:, 1:], picked, 0).sum(1).reshape(len(rows), -1), batch)

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.fixture(scope="module")
def plain():
    """Pairs whose references are not the policy's own, so that no term vanishes, with loss and gradient by loss and choice."""
    found = {}

    def of(how, loss):
        if (how, loss) not in found:
            settings = dataclasses.replace(SETTINGS, loss=loss, global_batch=6)
            model, rows, *_ = prepare(
                pairs_of(6, how, longest=40), settings, sharding.make_mesh(devices=jax.devices()[:1])
            )
            moved = [
                dataclasses.replace(r, ref_logprob=[x + 20 - 13 * k for k, x in enumerate(r.ref_logprob)])
                for r in rows
            ]
            found[how, loss] = settings, moved, plain_gradients(model, moved, settings)
        return found[how, loss]

    return of


@pytest.mark.parametrize("remat", ["layer", "attention"])
@pytest.mark.parametrize(
    ("mesh", "most", "pack"),
    [("one_device", None, True), ("one_device", None, False), ("one_device", 128, True), ("eight_devices", 256, True),
     ("eight_devices", None, False)],
)  # fmt: skip
def test_gradients_equal_a_plain_reference(plain, mesh, most, pack, remat, request, monkeypatch):
    """Packed or not, in microbatches or not, on one device or eight, whatever is computed again, small chunks and blocks."""
    from sppo_jax.models import cpu_attention, logprob

    settings, rows, expected = plain("best_worst", "sppo")
    monkeypatch.setattr(logprob, "CHUNK", 40)
    monkeypatch.setattr(logprob, "LOGITS", 40 * 512)
    monkeypatch.setattr(cpu_attention, "BLOCK", 16)
    fit.make_programs.cache_clear()  # of programs traced with other sizes
    check_gradients(
        dataclasses.replace(settings, remat=remat), rows, expected, request.getfixturevalue(mesh), most, pack
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)])
def test_what_the_backward_pass_is_kept_holds_no_weights(sizes, tied, dtype, monkeypatch):
    """Each program writes its results anew: weights among what is kept, in whatever shape, would be there twice."""
    from sppo_jax.models import hf, logprob
    from sppo_jax.models.attention import Kernel
    from sppo_jax.models.transformer import Transformer

    count = int(np.prod(sizes))
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:count])
    a = dataclasses.replace(ODD, vocab=4096, tied=tied)
    rows = 8
    tokens = rows // sharding.batch_shards(mesh) * 7
    monkeypatch.setattr(logprob, "LOGITS", tokens * a.vocab // 4)  # four blocks
    model = Transformer(a, dict(hf.abstract(a, mesh)), dtype, Kernel("blocked", mesh))
    graph, params, frozen = fit.split(model)
    batch = compiled.microbatch(mesh, Layout(1, 4, rows, 7, 1, 1.0), 2)
    forward = functools.partial(fit.forward, graph=graph, remat="layer")
    _, pullback = jax.eval_shape(forward, params, frozen, batch)
    assert len(pullback.kept) > 1
    largest = max(x.size for x in pullback.kept)
    assert largest < a.vocab * a.model // count  # the head, or a device's own part of it


@pytest.mark.parametrize(
    ("how", "loss"), [("all", "sppo"), ("best_worst", "dpo"), ("best_worst", "sppo_single")]
)
def test_gradients_of_other_losses_and_of_all_k_equal_a_plain_reference(plain, how, loss, eight_devices):
    settings, rows, expected = plain(how, loss)
    check_gradients(settings, rows, expected, eight_devices, 256, True)


def check_gradients(settings, rows, expected, mesh, most, pack):
    model = models.load(names.path("policy"), mesh=mesh)
    programs = fit.make_programs(model.architecture, model.compute_dtype, mesh, settings, 1)
    batches = Batches(
        rows, global_batch=6, epochs=1, seed=0, iteration=1,
        shards=sharding.batch_shards(mesh), most_tokens=most, pack=pack,
    )  # fmt: skip
    assert (batches.layout.microbatches > 1) == (most is not None)
    assert (batches.layout.segments > 1) == pack
    _, params, frozen = fit.split(model)
    grads, scalars = programs.gradients(params, frozen, fit.place(batches[0], mesh))
    loss, plain_grads = expected
    assert float(scalars["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_the_updates_that_are_asked_for_are_recorded_for_xprof(tmp_path):
    from sppo_jax.training.profiling import Profiler

    def recorded(directory, count, updates):
        with Profiler(directory, count) as profiler:
            for n in range(updates):
                profiler.step(n)
                jnp.ones(3).block_until_ready()
        return [str(path) for path in directory.rglob("*.xplane.pb")]

    assert len(recorded(tmp_path / "two", 2, 8)) == 1
    assert len(recorded(tmp_path / "cut short", 5, 4)) == 1
    assert recorded(tmp_path / "none", 0, 8) == recorded(tmp_path / "too few", 2, 2) == []
