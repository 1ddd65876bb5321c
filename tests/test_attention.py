"""Attention kernels against dense masks: splash in Pallas' interpreter, cuDNN by its arguments, and the kernel's choice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import config, main, sharding
from sppo_jax.errors import BadInput
from sppo_jax.models import attention, hf, lora
from sppo_jax.models.attention import Kernel
from sppo_jax.models.transformer import Adapter, Transformer
from sppo_jax.models.trees import Trees
from sppo_jax.training import update
from sppo_jax.training.trainer import Trainer
from tests.conftest import ODD
from tests.small_game import words

ALTERNATING = dataclasses.replace(
    ODD, layers=2, windowed=(True, False), attention_softcap=20.0, query_scale=0.3
)


def padded(lengths, width, side="right"):
    """Return valid [B, T] for rows of these lengths; with "middle", padding is on both sides."""
    valid = np.arange(width)[None] < np.asarray(lengths)[:, None]
    turn = {"right": 0, "left": 1, "middle": 0.5}[side]
    rows = zip(valid, lengths, strict=True)
    return jnp.asarray(np.stack([np.roll(row, int(turn * (width - n))) for row, n in rows]))


def rows_as_trees(valid):
    """Return trees for a mask of real tokens, or for numbers of segments; trees as they are."""
    return valid if isinstance(valid, Trees) else Trees.of(jnp.asarray(valid, jnp.int32))


def seen_and_gradients(kernel, valid, *, heads=4, kv_heads=2, window=None, softcap=None, scale=None):
    """Return the outputs of real queries and the gradients of q, k, v; `valid` may number a row's segments from 1, or be trees."""
    trees = rows_as_trees(valid)
    valid = trees.segment
    rng = np.random.default_rng(0)
    shapes = [(*valid.shape, n, 16) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def run(q, k, v):
        def real(q, k, v):
            seen = attention.whole(trees, [window], kernel, scale=scale, softcap=softcap)(0, q, k, v)
            return jnp.where((valid > 0)[..., None, None], seen, 0)

        out, pullback = jax.vjp(real, q, k, v)
        return out, *pullback(cotangent)

    return [np.asarray(x) for x in run(q, k, v)]


def assert_close(found, expected, atol=5e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
    ("lengths", "width", "side", "options"),
    [
        ((111, 50), 111, "left", {"window": 20, "scale": 0.1}),
        ((128, 90, 0), 128, "middle", {"softcap": 3.0}),
    ],
)
def test_splash_equals_dense_masks(one_device, lengths, width, side, options):
    valid = padded(lengths, width, side)
    found = seen_and_gradients(Kernel("splash", one_device, interpret=True), valid, **options)
    assert_close(found, seen_and_gradients(Kernel(), valid, **options))


@pytest.mark.parametrize(("kernel", "window"), [("xla", 20), ("splash", 20), ("triton", None)])
def test_segments_of_a_row_see_themselves_alone(one_device, kernel, window):
    """A row of three sequences has the outputs and gradients of the same sequences in rows of their own."""
    sizes = (50, 3, 81)  # two of triton's blocks
    packed = jnp.asarray([[i + 1 for i, n in enumerate(sizes) for _ in range(n)] + [0] * 14])
    of = Kernel(kernel, one_device, interpret=kernel != "xla")
    together = seen_and_gradients(of, packed, window=window)
    begin = 0
    for i, n in enumerate(sizes):
        alone = seen_and_gradients(Kernel(), jnp.where(packed == i + 1, 1, 0), window=window)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[:, begin : begin + n], b[:, begin : begin + n], atol=5e-5)
        begin += n


def test_splash_equals_dense_masks_over_many_blocks(one_device, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 256)
    valid = padded((300, 140), 300)  # three by three blocks; the window and the diagonal leave five
    found = seen_and_gradients(Kernel("splash", one_device, interpret=True), valid, window=70)
    assert_close(found, seen_and_gradients(Kernel(), valid, window=70))


@pytest.mark.parametrize(
    ("sizes", "rows", "heads"),
    [((2, 2, 2), 8, 4), ((1, 2, 4), 2, 4), ((1, 2, 4), 3, 6)],
    ids=["rows and heads cut", "kv heads repeated", "neither divides"],
)
def test_splash_is_the_same_on_every_mesh(sizes, rows, heads):
    valid = padded([128, 100, 60, 90, 128, 3, 128, 128][:rows], 128)
    found = seen_and_gradients(
        Kernel("splash", sharding.make_mesh(*sizes), interpret=True), valid, heads=heads
    )
    assert_close(found, seen_and_gradients(Kernel(), valid, heads=heads))


def loss_and_gradients(model, tokens, valid):
    graph, weights = nnx.split(model)

    def loss(weights):
        logits = nnx.merge(graph, weights)(tokens, valid)
        return jnp.sum(jnp.where(valid[..., None], jax.nn.log_softmax(logits)[..., :9], 0)) / valid.sum()

    return jax.jit(jax.value_and_grad(loss))(weights)


def with_kernel(model, kernel):
    graph, weights = nnx.split(model)
    model = nnx.merge(graph, weights)
    model.kernel = kernel
    return model


def random_model(architecture, mesh):
    shapes = hf.abstract(architecture, mesh) | lora.abstract(architecture, mesh)
    rng = np.random.default_rng(0)
    arrays = {name: 0.2 * rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}
    return Transformer(
        architecture, {name: jax.device_put(x, shapes[name].sharding) for name, x in arrays.items()}
    )


def random_texts(rows, width):
    return jnp.asarray(np.random.default_rng(1).integers(0, ODD.vocab, (rows, width)))


def test_a_model_with_windows_in_some_layers_is_the_same_under_splash(one_device):
    model = random_model(ALTERNATING, one_device)
    tokens, valid = random_texts(2, 40), padded((40, 9), 40, "middle")
    splash = with_kernel(model, Kernel("splash", one_device, interpret=True))
    assert_close(loss_and_gradients(splash, tokens, valid), loss_and_gradients(model, tokens, valid))


def test_whole_attention_gives_each_layer_its_window_on_another_mesh(one_device, eight_devices):
    model = random_model(ALTERNATING, one_device)
    tokens, valid = random_texts(4, 40), padded((40, 9, 31, 22), 40)
    place = jnp.broadcast_to(jnp.arange(40)[None], tokens.shape)
    there = jax.device_put(model, sharding.replicated(eight_devices))
    splash = with_kernel(there, Kernel("splash", one_device, interpret=True))
    seen = jax.jit(lambda m: m.forward(tokens, m.rope(place), m.whole_attention(valid, eight_devices)))(
        splash
    )
    assert_close(
        np.asarray(seen)[valid],
        np.asarray(jax.jit(lambda m: m.hidden(tokens, rows_as_trees(valid)))(model))[valid],
    )


@pytest.mark.parametrize("length", [1, 128, 129, 512, 513, 700, 1024, 1025, 1536, 2560, 4097])
def test_blocks_of_splash_tile_the_padded_length(length):
    size, blocks = attention.block_sizes(length)
    assert length <= size < length + 512
    for block in dataclasses.astuple(blocks)[:6]:
        assert size % block == 0
        assert block % attention.LANES == 0
    # These sizes fit into a TPU's vector memory with 256 channels.
    assert blocks.block_q <= 512
    assert blocks.block_kv <= 1024


@pytest.mark.parametrize(
    ("kernel", "platform", "window", "names", "heads"),
    [
        ("splash", "tpu", 9, ("splash_mha_fwd_", "splash_mha_dkv_"), "tensor<4x128x64xbf16>"),
        (
            "cudnn",
            "cuda",
            9,
            ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("),
            "tensor<1x40x4x64xbf16>",
        ),
        (
            "triton",
            "cuda",
            None,
            ("__gpu$xla.gpu.triton",) * 3,
            "tensor<1x128x4x64xbf16>",
        ),
    ],
)
def test_each_device_calls_the_kernel_for_its_own_row_and_heads(
    kernel, platform, window, names, heads, monkeypatch
):
    """Lowered for absent devices, the kernels and their gradients accept their arguments."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    mesh = sharding.make_mesh(2, 2, 2)

    def gradients(q, k, v, valid):
        seen = attention.whole(rows_as_trees(valid), [window], Kernel(kernel, mesh), scale=0.2)
        return jax.grad(lambda *qkv: jnp.sum(seen(0, *qkv).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    like = [jax.ShapeDtypeStruct((4, 40, n, 64), jnp.bfloat16) for n in (8, 2, 2)]
    traced = jax.jit(gradients).trace(*like, jax.ShapeDtypeStruct((4, 40), jnp.bool_))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in lowered.splitlines() if "custom_call" in line]
    assert len(calls) == len(names)
    for call, name in zip(calls, names, strict=True):
        assert name in call
        assert heads in call  # 4 rows and 8 heads


class Device:
    """The attributes of a device that the choice of a kernel reads."""

    id = process_index = 0

    def __init__(self, platform, capability=None):
        self.platform = platform
        if capability is not None:
            self.compute_capability = capability


def mesh_of(*device):
    return Mesh(np.asarray([[[Device(*device)]]]), sharding.MESH_AXES)


CPU, TPU, H100, A100 = ("cpu",), ("tpu",), ("gpu", "9.0"), ("gpu", "8.0")
CAPPED = {"attention_softcap": 50.0}


@pytest.mark.parametrize(
    ("forced", "device", "dtype", "model", "expected"),
    [
        ("auto", CPU, "bfloat16", CAPPED, "blocked"),
        ("auto", TPU, "bfloat16", {}, "splash"),
        ("auto", TPU, "float32", CAPPED, "splash"),
        ("auto", A100, "bfloat16", {"head_dim": 128}, "cudnn"),
        ("auto", H100, "float16", {"head_dim": 256}, "cudnn"),
        ("auto", A100, "bfloat16", {"head_dim": 256}, "xla"),
        ("auto", H100, "bfloat16", {"head_dim": 100}, "xla"),
        ("auto", H100, "float32", {"head_dim": 128}, "xla"),
        ("auto", H100, "bfloat16", {"head_dim": 128} | CAPPED, "xla"),
        ("auto", ("gpu", "7.5"), "bfloat16", {"head_dim": 128}, "xla"),
        ("auto", ("gpu", "gfx90a"), "bfloat16", {"head_dim": 128}, "xla"),
        ("auto", ("METAL",), "float32", {}, "xla"),
        ("xla", TPU, "bfloat16", {}, "xla"),
        ("splash", TPU, "bfloat16", {}, "splash"),
        ("cudnn", H100, "bfloat16", {"head_dim": 64}, "cudnn"),
        ("triton", A100, "bfloat16", {"head_dim": 128, "window": None}, "triton"),
    ],
)
def test_the_kernel_is_that_of_the_meshs_platform(forced, device, dtype, model, expected):
    mesh = mesh_of(*device)
    kernel = attention.choose(forced, mesh, dataclasses.replace(ODD, **model), dtype)
    assert kernel == Kernel(expected, mesh)


@pytest.mark.parametrize(
    ("forced", "device", "dtype", "model", "why"),
    [
        ("splash", CPU, "float32", {}, "runs on a tpu, and the mesh is of cpu devices"),
        ("blocked", TPU, "float32", {}, "runs on a cpu, and the mesh is of tpu devices"),
        ("cudnn", TPU, "bfloat16", {}, "runs on a gpu, and the mesh is of tpu devices"),
        ("cudnn", H100, "float32", {"head_dim": 128}, "needs model.compute_dtype=bfloat16"),
        ("cudnn", H100, "bfloat16", {"head_dim": 128} | CAPPED, "no soft cap"),
        ("cudnn", H100, "bfloat16", {}, "multiple of 8 up to 256, and this is 10"),
        ("cudnn", A100, "bfloat16", {"head_dim": 256}, "multiple of 8 up to 128, and this is 256"),
        ("cudnn", ("gpu", "gfx90a"), "bfloat16", {}, "NVIDIA GPU of compute capability 8"),
        ("triton", TPU, "bfloat16", {}, "runs on a gpu, and the mesh is of tpu devices"),
        ("triton", H100, "bfloat16", {"head_dim": 64, "window": 9}, "no sliding window"),
        (
            "triton",
            H100,
            "bfloat16",
            {"head_dim": 256, "window": None},
            "multiple of 8 up to 128, and this is 256",
        ),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(forced, device, dtype, model, why):
    with pytest.raises(BadInput, match=f"model.attention={forced} .*{why}.*; choose auto or xla"):
        attention.choose(forced, mesh_of(*device), dataclasses.replace(ODD, **model), dtype)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_is_refused_a_kernel_that_its_mesh_has_not(rank, tmp_path):
    with pytest.raises(BadInput, match="attention=splash runs on a tpu"):
        main.main(
            words(tmp_path, model__attention="splash", model__lora_rank=rank, mesh__fsdp=4, mesh__tensor=2)
        )


def test_the_kernel_that_is_named_trains_too(one_device, monkeypatch):
    with pytest.raises(BadInput, match="attention=splash runs on a tpu"):
        update.make_programs(ODD, jnp.float32, one_device, config.Fit(), 1, "splash")
    named, made = [], update.make_programs
    monkeypatch.setattr(update, "make_programs", lambda *args: named.append(args[-1]) or made(*args))
    settings = config.Config(model=config.Model(attention="xla"))
    Trainer(settings, ODD, one_device, jnp.dtype(jnp.float32)).programs(1)
    assert named == ["xla"]


def test_adapters_keep_the_kernel(one_device):
    model = random_model(ODD, one_device)
    model.kernel = Kernel("xla", one_device)
    a = dataclasses.replace(ODD, lora_rank=2)
    assert lora.beside(model, a, dict(lora.abstract(a, one_device))).kernel == model.kernel


@pytest.fixture
def told(monkeypatch):
    """Return the arguments of calls of cuDNN's attention. XLA, which takes the same arguments, computes in its place."""
    calls = []
    original = jax.nn.dot_product_attention

    def answer(*args, implementation, **options):
        if implementation == "cudnn":
            calls.append(options)
        return original(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


@pytest.mark.parametrize("window", [None, 9, 40])
def test_what_cudnn_is_reported_means_the_dense_masks(one_device, told, window):
    valid = padded((40, 9, 1, 0), 40)
    found = seen_and_gradients(Kernel("cudnn", one_device), valid, window=window, scale=0.2)
    assert_close(found, seen_and_gradients(Kernel(), valid, window=window, scale=0.2))
    (options,) = told
    # No mask of T x T: these are the only arguments that cuDNN's own kernel supports.
    assert options.keys() == {
        "scale", "is_causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths"
    }  # fmt: skip
    assert options["is_causal"] is True
    assert options["local_window_size"] == ((8, 0) if window == 9 else None)  # 40 is longer than the row


def test_lengths_of_cudnn_are_those_of_the_texts_and_never_0(one_device, monkeypatch):
    told = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: told.update(options) or q)
    heads = jnp.ones((4, 40, 2, 16))
    segment = padded((40, 9, 1, 0), 40).astype(jnp.int32)
    attention._cudnn(heads, heads, heads, rows_as_trees(segment), window=None, scale=None)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        assert told[name].tolist() == [40, 9, 1, 1]


def test_a_model_padded_on_the_left_is_the_same_under_cudnn(one_device, told):
    model = random_model(dataclasses.replace(ALTERNATING, attention_softcap=None), one_device)
    tokens, valid = random_texts(2, 40), padded((40, 9), 40, "left")
    cudnn = with_kernel(model, Kernel("cudnn", one_device))
    assert_close(loss_and_gradients(cudnn, tokens, valid), loss_and_gradients(model, tokens, valid))
    assert len({options["local_window_size"] for options in told}) == 2  # a program for each kind of layer


def test_an_array_per_layer_computes_the_same(one_device):
    model = random_model(dataclasses.replace(ALTERNATING, lora_rank=2), one_device)
    model.kernel = Kernel("xla", one_device)
    graph, weights = nnx.split(model)
    graph, weights = jax.jit(lambda w: nnx.split(nnx.merge(graph, w).unstacked()))(weights)
    apart: Transformer = nnx.merge(graph, weights)
    assert apart.layers[1]["gate"][...].shape == (ODD.model, ODD.mlp)
    assert isinstance(apart.layers[1]["gate_lora_a"], Adapter)
    assert apart.kernel == model.kernel
    tokens, valid = random_texts(2, 20), jnp.ones((2, 20), bool)
    place = jnp.broadcast_to(jnp.arange(20)[None], tokens.shape)
    hidden = jax.jit(lambda m: m.forward(tokens, m.rope(place), m.whole_attention(valid)))
    np.testing.assert_array_equal(hidden(apart), hidden(model))
