"""Attention of one layer: with an explicit mask, or over whole sequences by the kernel for the mesh's platform."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu import attention as triton
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.models import cpu_attention
from sppo_jax.models.architecture import Architecture
from sppo_jax.models.cpu_attention import MASKED, SAVED
from sppo_jax.models.trees import Trees

PLATFORMS = {
    "splash": "tpu",
    "cudnn": "gpu",
    "triton": "gpu",
    "blocked": "cpu",
}  # for "auto", a platform's first
LANES = 128  # splash's blocks are multiples of this
BLOCK = 1024  # splash's largest block

Seen = Callable[[Any, Array, Array, Array], Array]  # (kind of layer, q, k, v) -> output of attention


@dataclass(frozen=True)
class Kernel:
    """The implementation of attention over whole sequences, and the mesh that it is compiled for.

    "xla" keeps the scores [B, H, T, T] in memory; "splash" (Pallas, TPU), "cudnn" and "triton" (Pallas; GPU) and "blocked"
    (CPU) do not.
    """

    name: str = "xla"
    mesh: Mesh | None = None  # xla needs none, nor does blocked on one device
    interpret: bool = False  # Pallas' kernels on any device, slowly: for tests


def branches(kernel: str) -> bool:
    """Return whether prompts share their tokens among their responses under the kernel of this name.

    xla could, too, but its scores are of whole rows, which would be as long as a prompt with all of its responses.
    """
    return kernel == "blocked"


def choose(forced: str, mesh: Mesh, a: Architecture, dtype: Any) -> Kernel:
    """Return the kernel `forced` (model.attention); for "auto" the platform's own if it supports the model, else xla.

    Raises BadInput where the named kernel does not support the model.
    """
    found = sharding.platform(mesh)
    name = forced
    if forced == "auto":
        name = next((own for own, platform in PLATFORMS.items() if platform == found), "xla")
    why = obstacle(name, mesh, a, jnp.dtype(dtype))
    if why is not None and forced != "auto":
        raise BadInput(f"model.attention={forced} {why}; choose auto or xla")
    return Kernel("xla" if why else name, mesh)


def obstacle(name: str, mesh: Mesh, a: Architecture, dtype: Any) -> str | None:
    """Return why a kernel cannot serve a model on this mesh, or None. Splash serves every model on a TPU."""
    found = sharding.platform(mesh)
    if PLATFORMS.get(name, found) != found:
        return f"runs on a {PLATFORMS[name]}, and the mesh is of {found} devices"
    if name not in ("cudnn", "triton"):
        return None
    capability = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
    # AMD's capabilities begin with gfx.
    major = int(capability.split(".")[0]) if capability[:1].isdigit() else 0
    widest = 256 if major >= 9 and name == "cudnn" else 128
    if major < 8:
        return "needs an NVIDIA GPU of compute capability 8 or later"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs model.compute_dtype=bfloat16, and this is {dtype}"
    if a.attention_softcap is not None:
        return "has no soft cap of the scores, which this model has"
    if name == "triton" and a.window is not None:
        return "has no sliding window, which this model has"
    if a.head_dim % 8 or a.head_dim > widest:
        return f"needs a head_dim that is a multiple of 8 up to {widest}, and this is {a.head_dim}"
    return None


def whole(
    trees: Trees,
    windows: Sequence[int | None],
    kernel: Kernel,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Seen:
    """Return causal attention among the tokens of each tree of a row, for layers of each kind.

    `windows` holds the window of each kind of layer. The returned function takes a kind (an int, or traced), q [B, T, H,
    C], and k, v [B, T, N, C]. The outputs of padding are finite and have no meaning. Only xla and blocked tell branches
    apart (`branches`): for the others a tree has one response. With cudnn a row has one tree, and padding is on the right.
    """
    length = trees.segment.shape[1]
    if kernel.name == "xla" or (kernel.name == "blocked" and length <= 2 * cpu_attention.BLOCK):
        masks = [trees.mask(window) for window in windows]

        def dense(kind: Any, q: Array, k: Array, v: Array) -> Array:
            if isinstance(kind, int) or len(masks) == 1:
                mask_BTS = masks[kind if isinstance(kind, int) else 0]
            else:
                mask_BTS = jnp.where(kind, masks[1], masks[0])
            return checkpoint_name(attend(q, k, v, mask_BTS, scale=scale, softcap=softcap), SAVED)

        return dense

    windows = [None if window is None or window >= length else window for window in windows]
    of: Callable[..., Array] = functools.partial(_cudnn, scale=scale)
    if kernel.name == "splash":
        of = functools.partial(_splash, scale=scale, softcap=softcap, interpret=kernel.interpret)
    if kernel.name == "triton":
        of = functools.partial(_triton, scale=scale, interpret=kernel.interpret)
    if kernel.name == "blocked":
        of = functools.partial(cpu_attention.attend, scale=scale, softcap=softcap)
    kinds: list[Callable[..., Array]] = [functools.partial(of, window=window) for window in windows]
    if kernel.mesh is not None:
        kinds = [_sharded(one, kernel.mesh) for one in kinds]

    def fused(kind: Any, q: Array, k: Array, v: Array) -> Array:
        if len(set(windows)) == 1:  # also if no sequence is longer than the window
            kind = 0
        if isinstance(kind, int):
            return kinds[kind](q, k, v, trees)
        return jax.lax.switch(kind, kinds, q, k, v, trees)

    return fused


def _sharded(of: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    """Return `of` applied on each device to its own rows and heads, because the compiler cannot partition a kernel.

    Where the mesh does not divide the kv heads, they are repeated (2 kv heads over 4 devices); where that does not help,
    every device computes all heads.
    """

    def call(
        q_BTHC: Float[Array, "B T H C"],
        k_BTNC: Float[Array, "B T N C"],
        v_BTNC: Float[Array, "B T N C"],
        trees: Trees,
    ) -> Float[Array, "B T H C"]:
        heads, kv_heads = q_BTHC.shape[2], k_BTNC.shape[2]
        cut = math.lcm(kv_heads, sharding.shards(mesh, sharding.TABLE["N"]))
        h, n = ("H", "N") if heads % cut == 0 else (".", ".")
        if n == "N" and cut != kv_heads:
            k_BTNC, v_BTNC = (jnp.repeat(x, cut // kv_heads, axis=2) for x in (k_BTNC, v_BTNC))
        q, kv = sharding.spec(f"BT{h}C", mesh, q_BTHC.shape), sharding.spec(f"BT{n}C", mesh, k_BTNC.shape)
        rows = sharding.spec("BT", mesh, trees.segment.shape)
        # check_vma requires the axes over which the kernel's result varies, which the kernel does not declare.
        local = jax.shard_map(of, mesh=mesh, in_specs=(q, kv, kv, rows), out_specs=q, check_vma=False)
        return local(q_BTHC, k_BTNC, v_BTNC, trees)

    return call


def _splash(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    trees: Trees,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B T H C"]:
    """Return Pallas' splash attention. The scale is multiplied into the queries; padding is a segment of its own."""
    length, heads, channels = q_BTHC.shape[1:]
    size, blocks = block_sizes(length)
    shape = (size, size)
    mask = (
        splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    )
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )

    def rows(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, size - length), (0, 0), (0, 0))), 2, 1)

    segment_BT = jnp.pad(trees.segment, ((0, 0), (0, size - length)))
    q_BTHC *= jnp.asarray(channels**-0.5 if scale is None else scale, q_BTHC.dtype)
    seen_BHTC = jax.vmap(kernel)(
        rows(q_BTHC), rows(k_BTNC), rows(v_BTNC), splash.SegmentIds(segment_BT, segment_BT)
    )
    return jnp.moveaxis(seen_BHTC, 1, 2)[:, :length]


def block_sizes(length: int) -> tuple[int, splash.BlockSizes]:
    """Return (length after padding, block sizes): up to BLOCK keys and half as many queries.

    Larger blocks do not fit with 256 channels a head. The backward pass is fused; each block of keys writes its own part
    of the queries' gradient, so few blocks are better.
    """
    half = BLOCK // 2
    step = LANES if length <= half else 2 * LANES if length <= BLOCK else half
    size = -(-length // step) * step
    q = size if size <= half else size // 2 if size <= BLOCK else half
    kv = size if size <= BLOCK else BLOCK if size % BLOCK == 0 else half
    return size, splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )


def _cudnn(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    trees: Trees,
    *,
    window: int | None,
    scale: float | None,
) -> Float[Array, "B T H C"]:
    """Return cuDNN's flash attention, with lengths instead of a mask [T, T]: padding is on the right."""
    # A length of 0 is undefined.
    length_B = jnp.maximum(jnp.sum(trees.segment > 0, axis=1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BTNC,
        v_BTNC,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )


def _triton(
    q_BTHC: Float[Array, "B T H C"],
    k_BTNC: Float[Array, "B T N C"],
    v_BTNC: Float[Array, "B T N C"],
    trees: Trees,
    *,
    window: None,
    scale: float | None,
    interpret: bool,
) -> Float[Array, "B T H C"]:
    """Return the flash attention for GPUs that comes with Pallas. Kv heads are repeated; padding is a segment of its own."""
    del window  # `obstacle` refuses models that have one
    length, groups = q_BTHC.shape[1], q_BTHC.shape[2] // k_BTNC.shape[2]
    blocks = triton.BlockSizes.get_default()
    padded = [(0, 0), (0, -length % blocks.block_q)]
    q_BTHC, k_BTHC, v_BTHC = (
        jnp.pad(x, [*padded, (0, 0), (0, 0)])
        for x in (q_BTHC, jnp.repeat(k_BTNC, groups, axis=2), jnp.repeat(v_BTNC, groups, axis=2))
    )
    seen_BTHC = triton.mha(
        q_BTHC,
        k_BTHC,
        v_BTHC,
        jnp.pad(trees.segment, padded),
        sm_scale=q_BTHC.shape[3] ** -0.5 if scale is None else scale,
        causal=True,
        block_sizes=blocks,
        interpret=interpret,
    )
    return seen_BTHC[:, :length]


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BSNC: Float[Array, "B S N C"],
    v_BSNC: Float[Array, "B S N C"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H C"]:
    """Return grouped-query attention with scores times `scale` (None: 1/sqrt(C)) and softmax in float32.

    With `softcap` c, scores become c tanh(score / c) before masking, as in Gemma-2. The output of a query that may see
    no key, as at padding, is finite and has no meaning.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(
            q_BTHC, k_BSNC, v_BSNC, mask=mask_BTS[:, None], scale=scale, implementation="xla"
        )
    heads, kv_heads = q_BTHC.shape[2], k_BSNC.shape[2]
    q_BTNGC = q_BTHC.reshape(*q_BTHC.shape[:2], kv_heads, heads // kv_heads, q_BTHC.shape[3])
    score_BNGTS = jnp.einsum("BTNGC,BSNC->BNGTS", q_BTNGC, k_BSNC, preferred_element_type=jnp.float32)
    score_BNGTS *= q_BTHC.shape[3] ** -0.5 if scale is None else scale
    score_BNGTS = jnp.where(mask_BTS[:, None, None], softcap * jnp.tanh(score_BNGTS / softcap), MASKED)
    weight_BNGTS = jax.nn.softmax(score_BNGTS, axis=-1).astype(v_BSNC.dtype)
    return jnp.einsum("BNGTS,BSNC->BTNGC", weight_BNGTS, v_BSNC).reshape(q_BTHC.shape)


def cache_mask(position_B: Int[Array, " B"], size: int, window: int | None) -> Bool[Array, "B 1 S"]:
    """Return the causal mask of one query per row at `position_B`, over a cache whose column is the position."""
    distance_BS = position_B[:, None] - jnp.arange(size)[None, :]
    seen_BS = distance_BS >= 0
    if window is not None:
        seen_BS &= distance_BS < window
    return seen_BS[:, None, :]
