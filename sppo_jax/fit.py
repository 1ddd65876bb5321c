"""Stage 5: reference log-probs once, then the optax loop that minimises the regression; resumable at any update."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sppo_jax import losses, sharding
from sppo_jax.config import Fit
from sppo_jax.errors import BadInput, Terminated
from sppo_jax.models import hf, lora
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.attention import choose
from sppo_jax.models.logprob import packed_logprob
from sppo_jax.models.transformer import Adapter, Remat, Transformer
from sppo_jax.run.metrics import Metrics
from sppo_jax.training.checkpoint import Checkpoints
from sppo_jax.training.optimizer import make_optimizer, schedule
from sppo_jax.training.profiling import Profiler

Batch = dict[str, Any]  # arrays of sppo_jax.dataset
Microbatch = dict[str, Any]  # the same without their first dimension
Batches = Any  # sppo_jax.dataset.Batches
Loss = Callable[[Float[Array, "G R"], Microbatch], Float[Array, ""]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[]
)
@dataclass(frozen=True)
class TrainState:
    """All that resuming needs; the step is also the data position."""

    step: Any  # updates done, int32 scalar
    params: Any  # what is trained: float32 masters, or the adapters alone
    opt_state: Any


def split(model: Transformer) -> tuple[Any, Any, Any]:
    """(graph, trained parameters, frozen ones): adapters alone are trained where the model has them."""
    graph, params, *rest = nnx.split(model, Adapter if model.architecture.lora_rank else nnx.Param, ...)
    (frozen,) = rest
    return graph, params, frozen


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["tree", "places", "dtype"]
)
@dataclass(frozen=True)
class Pullback:
    """What a backward pass needs of its forward pass, without what that was given: a program would copy the weights."""

    kept: Any  # a list of arrays
    tree: Any  # of jax's own pullback, whose leaves are those of `kept` and some of what was given
    places: tuple[int | None, ...]  # of its leaves among what was given; None: the next of `kept`
    dtype: Any  # of the weights in use

    @classmethod
    def of(cls, pullback: Callable[[Array], Any], given: Any, dtype: Any) -> "Pullback":
        leaves, tree = jax.tree.flatten(pullback)
        known = {id(x): i for i, x in enumerate(jax.tree.leaves(given))}
        places = tuple(known.get(id(x)) for x in leaves)
        return cls([x for x, i in zip(leaves, places, strict=True) if i is None], tree, places, dtype)

    def __call__(self, given: Any, gradient_GR: Float[Array, "G R"]) -> Any:
        """d loss / d `given`'s first part from d loss / d log pi; all of `given` is as it was in the forward pass."""
        known, kept = jax.tree.leaves(given), iter(self.kept)
        leaves = [next(kept) if i is None else known[i] for i in self.places]
        return jax.tree.unflatten(self.tree, leaves)(gradient_GR)[0]


def in_use(params: Any, dtype: Any) -> Any:
    """The layers' weights in the dtype that they are computed with, all layers at once.

    A weight's gradient is of that dtype, whoever casts it: cast here, all of them take half of float32's memory.
    """
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, params)


def forward(
    params: Any, frozen: Any, batch: Microbatch, *, graph: Any, remat: Remat
) -> tuple[Float[Array, "G R"], Pullback]:
    """log pi(y|x) of every response of a microbatch, G prompts of R, and its pullback to the trained parameters.

    Reference, training and probes all run this one compiled program: compiled with a loss and its gradient, the same
    forward differs in its last bits (.01 nats in bfloat16), and the log-ratio would not start at exactly 0.
    """

    def logprob(params: Any) -> Array:
        model = nnx.merge(graph, params, frozen)
        logprob_BS = packed_logprob(
            model, batch["tokens"], batch["segment"], batch["scored"], batch["segments"], remat
        )
        return logprob_BS.reshape(-1)[batch["place"]]

    dtype = nnx.merge(graph, params, frozen).compute_dtype
    params = in_use(params, dtype)
    logprob_GR, pullback = jax.vjp(logprob, params)
    return logprob_GR, Pullback.of(pullback, (params, frozen, batch), dtype)


def backward(
    params: Any, frozen: Any, batch: Microbatch, pullback: Pullback, gradient_GR: Float[Array, "G R"]
) -> Any:
    """d loss / d params of the microbatch whose forward pass gave `pullback`."""
    grads = pullback((in_use(params, pullback.dtype), frozen, batch), gradient_GR)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), grads, params)


def accumulate(
    grads: Any,
    params: Any,
    frozen: Any,
    batch: Microbatch,
    pullback: Pullback,
    gradient_GR: Float[Array, "G R"],
) -> Any:
    """`grads` and those of one more microbatch."""
    return jax.tree.map(jnp.add, grads, backward(params, frozen, batch, pullback, gradient_GR))


def objective(
    logprob_GR: Float[Array, "G R"], batch: Microbatch, *, loss: Loss
) -> tuple[Array, dict[str, Array]]:
    """d loss / d log pi [G, R], and the microbatch's part of the step's scalars, which add up (the largest: max)."""
    real_G, share = batch["real"], batch["share"]
    # A microbatch without a prompt counts for nothing; its mean must be finite all the same.
    value, gradient_GR = jax.value_and_grad(loss)(logprob_GR, batch | {"real": real_G | (share == 0)})
    ratio_GR = losses.log_ratio(logprob_GR, batch["ref_logprob"])
    margin_G = ratio_GR[:, 0] - ratio_GR[:, -1]

    def part(x_G: Array) -> Array:
        return share * jnp.sum(jnp.where(real_G, x_G, 0)) / jnp.maximum(jnp.sum(real_G), 1)

    return share * gradient_GR, {
        "loss": share * value,
        "log_ratio_chosen": part(ratio_GR[:, 0]),
        "log_ratio_rejected": part(ratio_GR[:, -1]),
        "margin": part(margin_G),
        "accuracy": part((margin_G > 0).astype(jnp.float32)),
        "max_log_ratio": jnp.max(jnp.abs(ratio_GR), where=real_G[:, None], initial=0.0),
    }


def update(
    state: TrainState, grads: Any, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
    """The optimiser's move."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"grad_norm": optax.tree.norm(grads)}


@functools.lru_cache(maxsize=8)
def make_loss(fit: Fit) -> Loss:
    """`fit.loss` as a function of policy log-probs [G, R] and the batch."""
    eta = fit.eta
    table: dict[str, Loss] = {
        "sppo": lambda logprob, b: losses.sppo_loss(
            logprob, b["ref_logprob"], b["win_rate"],
            eta=eta, baseline=b["baseline"][:, None], where=b["real"][:, None],
        ),
        "sppo_single": lambda logprob, b: losses.sppo_single_loss(
            logprob, b["ref_logprob"], b["probability"], eta=eta, where=b["real"]
        ),
        "sppo_hard": lambda logprob, b: losses.sppo_hard_loss(
            logprob, b["ref_logprob"], eta=eta, where=b["real"]
        ),
        "dpo": lambda logprob, b: losses.dpo_loss(logprob, b["ref_logprob"], eta=eta, where=b["real"]),
        "ipo": lambda logprob, b: losses.ipo_loss(logprob, b["ref_logprob"], eta=eta, where=b["real"]),
    }  # fmt: skip
    return table[fit.loss]


@dataclass(frozen=True)
class Programs:
    """The jitted functions of one (architecture, dtype, mesh, optimizer, loss), with the state's sharding said."""

    graph: Any
    shardings: TrainState  # of a TrainState
    init_optimizer: Callable[[Any], Any]
    forward: Callable[[Any, Any, Microbatch], tuple[Array, Pullback]]
    objective: Callable[[Array, Microbatch], tuple[Array, dict[str, Array]]]
    backward: Callable[[Any, Any, Microbatch, Pullback, Array], Any]
    accumulate: Callable[[Any, Any, Any, Microbatch, Pullback, Array], Any]
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]

    def train_step(
        self, state: TrainState, frozen: Any, microbatches: Iterable[Microbatch]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update, (state, batch) -> (state, metrics); `state`'s arrays are given up."""
        grads, scalars = self.gradients(state.params, frozen, microbatches)
        state, norm = self.update(state, grads)
        return state, scalars | norm

    def gradients(
        self, params: Any, frozen: Any, microbatches: Iterable[Microbatch]
    ) -> tuple[Any, dict[str, Array]]:
        """d loss / d params of a batch, added up over its microbatches, and the step's scalars."""
        grads, found = None, []
        for batch in microbatches:
            logprob_GR, pullback = self.forward(params, frozen, batch)
            gradient_GR, scalars = self.objective(logprob_GR, batch)
            if grads is None:
                grads = self.backward(params, frozen, batch, pullback, gradient_GR)
            else:
                grads = self.accumulate(grads, params, frozen, batch, pullback, gradient_GR)
            del pullback  # or it lies beside the next forward pass
            found.append(scalars)
        return grads, _joined(found)


def _joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """The step's scalars from those of its microbatches."""
    first, *others = parts
    for part in others:
        first = {
            name: jnp.maximum(x, part[name]) if name == "max_log_ratio" else x + part[name]
            for name, x in first.items()
        }
    return first


@functools.lru_cache(maxsize=4)
def make_programs(
    architecture: Architecture,
    compute_dtype: Any,
    mesh: Mesh,
    fit: Fit,
    steps_per_epoch: int,
    attention: str = "auto",
) -> Programs:
    """Cached, so that iterations of equal shapes compile once."""
    optimizer = make_optimizer(fit, steps_per_epoch)
    weights = hf.abstract(architecture, mesh) | lora.abstract(architecture, mesh)
    kernel = choose(attention, mesh, architecture, compute_dtype)
    graph, params, _ = split(Transformer(architecture, dict(weights), compute_dtype, kernel))
    placed = jax.tree.map(lambda x: x.sharding, params)
    replicated, options = sharding.named("", mesh), sharding.compiler_options(mesh)
    opt_placed = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, params),
        placed,
        transform_non_params=lambda _: replicated,
    )
    shardings = TrainState(replicated, placed, opt_placed)
    return Programs(
        graph,
        shardings,
        init_optimizer=jax.jit(optimizer.init, out_shardings=opt_placed),
        forward=jax.jit(functools.partial(forward, graph=graph, remat=fit.remat), compiler_options=options),
        objective=jax.jit(functools.partial(objective, loss=make_loss(fit)), out_shardings=replicated),
        # What is not used lies there all the same: kept as an argument, it is counted.
        backward=jax.jit(backward, keep_unused=True, out_shardings=placed, compiler_options=options),
        accumulate=jax.jit(
            accumulate, keep_unused=True, donate_argnums=0, out_shardings=placed, compiler_options=options
        ),
        update=jax.jit(
            functools.partial(update, optimizer=optimizer),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
        ),
    )


def logprobs(
    model: Transformer,
    batches: Batches,
    count: int,
    programs: Programs,
    mesh: Mesh,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """log pi(y|x) of `count` pairs' responses [count, R], from one pass over `batches`' first epoch.

    `on_progress` hears how many pairs each batch added.
    """
    _, params, frozen = split(model)
    out: np.ndarray | None = None
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        found = [programs.forward(params, frozen, part)[0] for part in place(batch, mesh)]
        values = np.stack([np.asarray(x) for x in found])
        if out is None:
            out = np.full((count, values.shape[-1]), np.nan)
        out[batch["pair"][batch["real"]]] = values[batch["real"]]
        if on_progress is not None:
            on_progress(int(batch["real"].sum()))
    assert out is not None
    if bad := np.flatnonzero(~np.isfinite(out).all(axis=1)).tolist():
        raise BadInput(
            f"the policy gives pair {bad[0]} a log-probability that is not finite: its weights are damaged"
        )
    return out


def fit(
    model: Transformer,
    batches: Batches,
    *,
    settings: Fit,
    programs: Programs,
    mesh: Mesh,
    checkpoints: Checkpoints,
    iteration: int,
    log_every: int,
    metrics: Metrics,
    profiler: Profiler | None = None,
) -> Transformer:
    """Train over `batches`, from the last checkpoint on if there is one, and return the new policy.

    `model`'s arrays are given up to the optimiser; `profiler` records the updates that it is to.
    Raises BadInput when the loss stops being finite; the last checkpoint then is from before that.
    """
    total, rate = len(batches), schedule(settings, batches.steps_per_epoch)
    _, params, frozen = split(model)
    state = TrainState(
        jax.device_put(np.int32(0), programs.shardings.step), params, programs.init_optimizer(params)
    )
    start = checkpoints.latest() or 0
    if start:
        state = checkpoints.restore(start, state)
        metrics.say(f"iteration {iteration} fit: resumes at update {start} of {total}")
    else:
        whole, first = expected_initial_loss(batches, settings)
        metrics.say(
            f"iteration {iteration} fit: expected initial loss {whole:.6g} (mean target^2); first batch {first:.6g}"
            if settings.loss.startswith("sppo")
            else f"iteration {iteration} fit: expected initial loss {whole:.6g} (log-ratios 0)"
        )
    at = batches.layout
    metrics.say(
        f"iteration {iteration} fit: at most {at.microbatches} microbatches of {at.rows} rows of {at.width} tokens, "
        f"{at.real_token_share:.0%} of which are real"
    )
    with metrics.progress(f"iteration {iteration} fit", total - start, "updates") as advance:
        for step, batch in zip(range(start, total), batches.from_step(start), strict=True):
            if profiler is not None:
                profiler.step(step - start)
            state, scalars = programs.train_step(state, frozen, place(batch, mesh))
            values = {name: float(value) for name, value in jax.device_get(scalars).items()}
            _check(step, values, iteration)
            if step == 0:
                worst = values["max_log_ratio"]
                metrics.say(
                    f"iteration {iteration} fit: step 0 loss {values['loss']:.6g}, largest log-ratio {worst:g}"
                )
            if step % log_every == 0 or step + 1 == total:
                metrics.scalars(iteration, "fit", step, learning_rate=float(rate(step)), **values)
            advance(1, loss=values["loss"], margin=values["margin"])
            stopping = metrics.stop_requested and step + 1 < total
            if stopping or (step + 1) % settings.checkpoint_every == 0 or step + 1 == total:
                checkpoints.save(step + 1, state)
            if stopping:
                checkpoints.wait()
                raise Terminated
    checkpoints.wait()
    checkpoints.keep_only(total)
    return nnx.merge(programs.graph, state.params, frozen)


def expected_initial_loss(batches: Batches, settings: Fit) -> tuple[float, float]:
    """The loss where every log-ratio is 0 (SPPO: mean target^2), over the first epoch and in its first batch."""
    loss = make_loss(settings)
    values, weights = [], []
    for step in range(batches.steps_per_epoch):
        batch = batches[step]
        parts = [part for part in _microbatches(batch) if part["share"] > 0]
        values.append(
            sum(float(part["share"] * loss(jnp.asarray(part["ref_logprob"]), part)) for part in parts)
        )
        weights.append(int(batch["real"].sum()))
    return float(np.average(values, weights=weights)), values[0]


def place(batch: Batch, mesh: Mesh) -> Iterator[Microbatch]:
    """A batch's microbatches onto the mesh one by one, rows over its batch axes."""
    rows = {"tokens": "BT", "segment": "BT", "scored": "BT"}
    for part in _microbatches(batch):
        part.pop("pair")
        yield {name: jax.device_put(x, sharding.named(rows.get(name, ""), mesh)) for name, x in part.items()}


def _microbatches(batch: Batch) -> list[Microbatch]:
    return [{name: x[i] for name, x in batch.items()} for i in range(len(batch["share"]))]


def _check(step: int, values: dict[str, float], iteration: int) -> None:
    if not all(np.isfinite([values["loss"], values["grad_norm"]])):
        raise BadInput(
            f"iteration {iteration}: the loss is {values['loss']} with gradient norm {values['grad_norm']} at update "
            f"{step}; lower fit.learning_rate or set fit.max_grad_norm, and start in a new --out"
        )
    if step == 0 and values["max_log_ratio"] != 0:  # the same program on the same batch: exactly 0
        raise RuntimeError(f"log-ratio at step 0 is {values['max_log_ratio']}: reference and policy differ")
