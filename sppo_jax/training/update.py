"""One update of the policy: pure functions, jitted once, whose arrays stay on the devices between them.

Each microbatch goes through four programs; the pullback is the one large thing that lies between two of them:

    forward(params, frozen, microbatch)    → log pi(y|x) [G, R], pullback
    objective(log pi, microbatch)          → d loss / d log pi [G, R], scalars
    backward or accumulate(… pullback …)   → gradients, summed over the update's microbatches
    update(state, gradients)               → the next state, once an update
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
from sppo_jax.models import hf, lora
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.attention import choose
from sppo_jax.models.logprob import Scored, packed_logprob
from sppo_jax.models.transformer import Adapter, Remat, Transformer
from sppo_jax.models.trees import Trees
from sppo_jax.training.checkpoint import TrainState
from sppo_jax.training.microbatch import Microbatch
from sppo_jax.training.optimizer import make_optimizer

Params = Any  # a pytree of arrays: the trained parameters, their gradients, or the frozen parameters
Scalars = dict[str, Array]  # the scalars of an update, or a microbatch's part of them

# KiB of a TPU's vector memory that one operation may use, instead of the compiler's own choice. Both chips have 128 MiB.
VECTOR_MEMORY = {"TPU v5 lite": 65_536, "TPU v6 lite": 98_304}


@dataclass(frozen=True)
class Programs:
    """The jitted functions of one (architecture, dtype, mesh, optimizer, loss), made by `make_programs`."""

    graph: nnx.GraphDef
    shardings: TrainState  # the sharding of each of its arrays
    init_optimizer: Callable[[Params], Any]
    forward: Callable[[Params, Params, Microbatch], tuple[Array, "Pullback"]]
    objective: Callable[[Array, Microbatch], tuple[Array, Scalars]]
    backward: Callable[[Params, Params, Microbatch, "Pullback", Array], Params]
    accumulate: Callable[[Params, Params, Params, Microbatch, "Pullback", Array], Params]
    update: Callable[[TrainState, Params], tuple[TrainState, Scalars]]

    def train_step(
        self, state: TrainState, frozen: Params, microbatches: Iterable[Microbatch]
    ) -> tuple[TrainState, Scalars]:
        """Do one update, (state, batch) -> (state, scalars). Donates `state`'s arrays."""
        grads, scalars = self.gradients(state.params, frozen, microbatches)
        state, norm = self.update(state, grads)
        return state, scalars | norm

    def gradients(
        self, params: Params, frozen: Params, microbatches: Iterable[Microbatch]
    ) -> tuple[Params, Scalars]:
        """d loss / d params of a batch, summed over its microbatches, and the update's scalars."""
        grads, parts = None, []
        for batch in microbatches:
            logprob_GR, pullback = self.forward(params, frozen, batch)
            gradient_GR, scalars = self.objective(logprob_GR, batch)
            if grads is None:
                grads = self.backward(params, frozen, batch, pullback, gradient_GR)
            else:
                grads = self.accumulate(grads, params, frozen, batch, pullback, gradient_GR)
            del pullback  # otherwise it would stay in memory during the next forward pass
            parts.append(scalars)
        return grads, _combined(parts)

    def first_state(self, params: Params) -> TrainState:
        """The state before the first update."""
        step = sharding.put(np.asarray(0, np.int32), self.shardings.step)
        return TrainState(step, params, self.init_optimizer(params))


def forward(
    params: Params, frozen: Params, batch: Microbatch, *, graph: nnx.GraphDef, remat: Remat
) -> tuple[Float[Array, "G R"], "Pullback"]:
    """log pi(y|x) of every response of a microbatch, and its pullback to the trained parameters.

    Reference, training and probes all run this one compiled program: compiled with a loss and its gradient, the same
    forward differs in its last bits (.01 nats in bfloat16), and the log-ratio would not start at exactly 0.
    """

    def logprob(params: Params) -> Array:
        model = nnx.merge(graph, params, frozen)
        trees = Trees(batch.segment, batch.branch, batch.position)
        scored = Scored(batch.before, batch.label, batch.slot)
        logprob_BS = packed_logprob(model, batch.tokens, trees, scored, batch.slots, remat)
        return logprob_BS.reshape(-1)[batch.place]

    dtype = nnx.merge(graph, params, frozen).compute_dtype
    params = compute_weights(params, dtype)
    logprob_GR, pullback = jax.vjp(logprob, params)
    return logprob_GR, Pullback.of(pullback, (params, frozen, batch), dtype)


def backward(
    params: Params, frozen: Params, batch: Microbatch, pullback: "Pullback", gradient_GR: Float[Array, "G R"]
) -> Params:
    """d loss / d params of the microbatch whose forward pass gave `pullback`."""
    grads = pullback((compute_weights(params, pullback.dtype), frozen, batch), gradient_GR)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), grads, params)


def accumulate(
    grads: Params,
    params: Params,
    frozen: Params,
    batch: Microbatch,
    pullback: "Pullback",
    gradient_GR: Float[Array, "G R"],
) -> Params:
    """Add the gradients of one more microbatch to `grads`."""
    return jax.tree.map(jnp.add, grads, backward(params, frozen, batch, pullback, gradient_GR))


def compute_weights(params: Params, dtype: Any) -> Params:
    """The layers' weights in the compute dtype, all layers at once.

    Cast before the scan over the layers, so that the stacked gradients have that dtype too: half of float32's memory.
    """
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 2 else x, params)


def objective(
    logprob_GR: Float[Array, "G R"], batch: Microbatch, *, loss: losses.Loss, eta: float, anchor: float
) -> tuple[Float[Array, "G R"], Scalars]:
    """d loss / d log pi, and the microbatch's part of the update's scalars, which add up (max_log_ratio: their maximum)."""
    real_G, share = batch.real, batch.share
    # A microbatch without prompts has share 0, but its mean must be finite all the same.
    counted = replace(anchored(batch, anchor), real=real_G | (share == 0))
    value, gradient_GR = jax.value_and_grad(lambda x_GR: loss.compute(x_GR, counted, eta))(logprob_GR)
    ratio_GR = losses.log_ratio(logprob_GR, batch.ref_logprob)
    margin_G = ratio_GR[:, 0] - ratio_GR[:, -1]

    def part(x_G: Array) -> Array:
        return share * jnp.sum(jnp.where(real_G, x_G, 0)) / jnp.maximum(jnp.sum(real_G), 1)

    return share * gradient_GR, {
        "loss": share * value,
        "logprob_chosen": part(logprob_GR[:, 0]),
        "logprob_rejected": part(logprob_GR[:, -1]),
        "log_ratio_chosen": part(ratio_GR[:, 0]),
        "log_ratio_rejected": part(ratio_GR[:, -1]),
        "margin": part(margin_G),
        "accuracy": part((margin_G > 0).astype(jnp.float32)),
        "max_log_ratio": jnp.max(jnp.abs(ratio_GR), where=real_G[:, None], initial=0.0),
    }


def anchored(batch: Microbatch, anchor: float) -> Microbatch:
    """The microbatch as the loss reads it: the base has the share `anchor` in its reference. Log-ratios stay those to pi_t."""
    if anchor == 0:
        return batch
    return replace(batch, ref_logprob=losses.anchor(batch.ref_logprob, batch.base_logprob, anchor))


def _combined(parts: Sequence[Scalars]) -> Scalars:
    """The update's scalars from those of its microbatches."""
    total, *others = parts
    for part in others:
        total = {
            name: jnp.maximum(x, part[name]) if name == "max_log_ratio" else x + part[name]
            for name, x in total.items()
        }
    return total


def update(
    state: TrainState, grads: Params, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Scalars]:
    """Apply one optimiser step; a gradient that is not finite changes nothing but counts of steps, and so the rate."""
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: (
            new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(jnp.isfinite(norm), new, old)
        ),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    return TrainState(state.step + 1, params, opt_state), {"grad_norm": norm}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["residuals"], meta_fields=["tree", "places", "dtype"]
)
@dataclass(frozen=True)
class Pullback:
    """Residuals of a forward pass without its inputs.

    `jax.vjp`'s own pullback, returned from a jitted program, would copy the weights out; instead the backward program
    gets the inputs again.
    """

    residuals: list[Any]  # arrays
    tree: Any  # structure of jax's own pullback, whose leaves are `residuals` and some of the inputs
    # Each leaf's index among the inputs; None: the leaf is the next of `residuals`.
    places: tuple[int | None, ...]
    dtype: Any  # dtype of the weights that the forward pass computed with

    @classmethod
    def of(cls, pullback: Callable[[Array], Any], inputs: Any, dtype: Any) -> "Pullback":
        """Split jax's pullback of a function of some of `inputs`."""
        leaves, tree = jax.tree.flatten(pullback)
        index = {id(x): i for i, x in enumerate(jax.tree.leaves(inputs))}
        places = tuple(index.get(id(x)) for x in leaves)
        return cls([x for x, i in zip(leaves, places, strict=True) if i is None], tree, places, dtype)

    def __call__(self, inputs: Any, gradient_GR: Float[Array, "G R"]) -> Any:
        """d loss / d (the first of `inputs`) from d loss / d log pi; `inputs` are as they were in the forward pass."""
        given, residuals = jax.tree.leaves(inputs), iter(self.residuals)
        leaves = [next(residuals) if i is None else given[i] for i in self.places]
        return jax.tree.unflatten(self.tree, leaves)(gradient_GR)[0]


def split(model: Transformer) -> tuple[nnx.GraphDef, Params, Params]:
    """(graph, trained parameters, frozen ones): where the model has adapters, these alone are trained."""
    graph, params, *rest = nnx.split(model, Adapter if model.architecture.lora_rank else nnx.Param, ...)
    (frozen,) = rest
    return graph, params, frozen


def make_programs(
    architecture: Architecture,
    compute_dtype: Any,
    mesh: Mesh,
    fit: Fit,
    steps_per_epoch: int,
    attention: str = "auto",
) -> Programs:
    """Jit the functions above for a model and a mesh; they compile when they are first called.

    Keep the result: another call's programs compile anew. Raises BadInput where the attention kernel does not support it.
    """
    optimizer = make_optimizer(fit, steps_per_epoch)
    weights = hf.abstract(architecture, mesh) | lora.abstract(architecture, mesh)
    kernel = choose(attention, mesh, architecture, compute_dtype)
    graph, params, _ = split(Transformer(architecture, dict(weights), compute_dtype, kernel))
    placed = jax.tree.map(lambda x: x.sharding, params)
    replicated, options = sharding.named("", mesh), compiler_options(mesh)
    opt_placed = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, params),
        placed,
        transform_non_params=lambda _: replicated,
    )
    shardings = TrainState(replicated, placed, opt_placed)
    alone = functools.partial(sharding.one_at_a_time, mesh=mesh)
    of_loss = functools.partial(objective, loss=losses.LOSSES[fit.loss], eta=fit.eta, anchor=fit.anchor)
    return Programs(
        graph,
        shardings,
        init_optimizer=alone(jax.jit(optimizer.init, out_shardings=opt_placed)),
        forward=alone(
            jax.jit(functools.partial(forward, graph=graph, remat=fit.remat), compiler_options=options)
        ),
        objective=alone(jax.jit(of_loss, out_shardings=replicated)),
        # keep_unused: frozen weights stay on the devices either way; as arguments they show in memory_analysis().
        backward=alone(jax.jit(backward, keep_unused=True, out_shardings=placed, compiler_options=options)),
        accumulate=alone(
            jax.jit(
                accumulate, keep_unused=True, donate_argnums=0, out_shardings=placed, compiler_options=options
            )
        ),
        update=alone(
            jax.jit(
                functools.partial(update, optimizer=optimizer),
                donate_argnums=0,
                out_shardings=(shardings, replicated),
            )
        ),
    )


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for programs that gather weights over the mesh axis fsdp; None where its defaults serve.

    TPUs: weights are gathered whole before a product. Left alone XLA multiplies piece by piece while they travel, which
    costs twice the cycles for a Mistral-7B on v5e. Products may use more of the vector memory than a few MiB, or else
    gathered weights wait there and leave too little for large tiles.
    """
    if sharding.platform(mesh) != "tpu":
        return None
    kib = VECTOR_MEMORY.get(mesh.devices.flat[0].device_kind)
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} | (
        {"xla_tpu_scoped_vmem_limit_kib": str(kib)} if kib else {}
    )
