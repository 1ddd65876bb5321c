"""PairRM in Flax against the reference implementation's numbers and against PyTorch, and the judge on the mesh."""

import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from sppo_jax import sharding
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, deberta_attention, files, jax_model, mesh_judge, torch_model
from sppo_jax.pairrm.format import Formatter, Limits
from sppo_jax.pairrm.mesh_judge import JaxJudge
from tests.test_pairrm import CASES, GOLDEN, MODEL, TEXTS, TOLERANCE, case

CHECKPOINT = files.read(MODEL)
SHIPPED = dict(mesh_judge.BUCKETS)
HERE = ("heads", "gather", "shift", "pallas_interpreted")  # the forms that a CPU can run


@pytest.fixture(autouse=True)
def two_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two buckets, so that a mesh compiles two programs and not seven: compiling takes most of the time."""
    monkeypatch.setitem(mesh_judge.BUCKETS, "cpu", (128, 640))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as stored:
        return dict(stored)


def judge(name: str, mesh: Mesh, **options: Any) -> JaxJudge:
    """Return a judge with the limits of a golden case that reads control tokens as the reference does."""
    limits = TEXTS["cases"][name]
    limits = Limits(limits["source_max_length"], limits["candidate_max_length"])
    made = JaxJudge(CHECKPOINT, mesh=mesh, limits=limits, **options)
    made._formatter = Formatter.of(CHECKPOINT, limits, neutralise=False)
    return made


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (16, 64), (32, 128), (128, 512)])
def test_table_rows_equal_those_of_transformers(
    buckets: int, farthest: int, arrays: dict[str, np.ndarray]
) -> None:
    rows = deberta_attention.table_rows(2047, buckets, farthest)
    distance = torch.arange(-2047, 2048)
    theirs = make_log_bucket_position(distance, buckets, farthest).long().numpy()
    np.testing.assert_array_equal(rows, np.clip(theirs + buckets, 0, 2 * buckets - 1))
    for name, sizes in (("debug/bucket_tiny", (16, 64)), ("debug/bucket_large", (256, 512))):
        if sizes == (buckets, farthest):
            distance, bucket = arrays[name].T
            rows = deberta_attention.table_rows(int(distance[-1]), buckets, farthest)
            np.testing.assert_array_equal(rows, np.clip(bucket + buckets, 0, 2 * buckets - 1))


@dataclass(frozen=True)
class Device:
    """The attributes of a device that the choice of a form reads."""

    platform: str
    device_kind: str
    process_index: int = 0


def test_form_of_attention_follows_the_devices() -> None:
    for platform, kind, form in (
        ("cpu", "cpu", "heads"),
        ("gpu", "NVIDIA H200", "gather"),
        ("tpu", "TPU v2", "shift"),
        ("tpu", "TPU v3", "shift"),
        ("tpu", "TPU v4", "shift"),
        ("tpu", "TPU v5 lite", "pallas"),
        ("tpu", "TPU v5", "pallas"),
        ("tpu", "TPU v6 lite", "pallas"),
    ):
        mesh = Mesh(np.array([Device(platform, kind)], object), ("data",))
        assert deberta_attention.form_of(mesh) == form, kind


@pytest.mark.parametrize("length", [40, 256])
def test_every_form_of_attention_is_the_formula(length: int) -> None:
    rng = np.random.default_rng(0)
    heads, channels, buckets = 3, 8, 64
    q, k, v = rng.standard_normal((3, 2, length, heads, channels), np.float32)
    keys, queries = rng.standard_normal((2, 2 * buckets, heads, channels), np.float32)
    n = np.array([length, length - 37], np.int32)
    rows = deberta_attention.table_rows(length, buckets, 2 * buckets)

    at = np.arange(length)
    row = rows[at[:, None] - at + length]
    score = np.einsum("bihc,bjhc->bhij", q, k)
    score += np.einsum("bihc,ijhc->bhij", q, keys[row]) + np.einsum("bjhc,ijhc->bhij", k, queries[row])
    score = np.where(at < n[:, None, None, None], score / np.sqrt(3 * channels), -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    wanted = np.einsum("bhij,bjhc->bihc", weight / weight.sum(-1, keepdims=True), v)

    arguments = [jnp.asarray(x) for x in (q, k, v, keys, queries, n)]
    for form in HERE:
        found = jax.jit(functools.partial(deberta_attention.attend, rows=rows, form=form))(*arguments)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=form)


@pytest.mark.parametrize("form", HERE[:3])  # the kernel is slow to interpret, and has its own tests
def test_hidden_states_of_every_layer_equal_the_reference(
    form: str, arrays: dict[str, np.ndarray], one_device: Mesh
) -> None:
    network = jax_model.load(CHECKPOINT, one_device, jnp.float32, form)
    read = arrays["debug/input_ids"]
    ids = np.full((2, 128), 9, np.int32)  # padding that would show
    ids[0, : len(read)], ids[1, :50] = read, read[:50]
    _, every = network.hidden(jnp.asarray(ids), jnp.asarray([len(read), 50]), every=True)
    wanted = arrays["debug/hidden_states"][1:]
    assert every is not None
    np.testing.assert_allclose(every[:, 0, : len(read)], wanted, rtol=0, atol=TOLERANCE)


def test_logits_of_the_network_equal_the_reference(arrays: dict[str, np.ndarray], one_device: Mesh) -> None:
    network = jax_model.load(CHECKPOINT, one_device, jnp.float32)
    todo = comparisons.in_order(comparisons.plan(*case("short_b1")))
    wanted = arrays["short_b1/logits"]
    for comparison in (todo[0], todo[-1]):  # alone, without padding
        pair = comparison.pair
        ids, marks = jnp.asarray(pair.ids)[None], jnp.asarray(pair.marks)[None]
        found = jax.jit(network)(ids, jnp.asarray([len(pair)]), marks)
        np.testing.assert_allclose(found[0], wanted[comparison.cells[0]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "devices"), [*((name, "eight") for name in CASES), ("short_b1", "one")])
def test_judge_gives_the_reference_logits_on_any_mesh(
    name: str, devices: str, arrays: dict[str, np.ndarray], request: pytest.FixtureRequest
) -> None:
    _, prompts, responses = case(name)
    mesh = request.getfixturevalue("eight_devices" if devices == "eight" else "one_device")
    with judge(name, mesh) as opened:
        found = opened.compare(prompts, responses)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, arrays[f"{name}/logits"], rtol=0, atol=TOLERANCE)


def test_every_device_scores_pairs_of_its_own(eight_devices: Mesh) -> None:
    with JaxJudge(CHECKPOINT, mesh=eight_devices, limits=Limits(16, 8)) as opened:
        opened._load()
        forward, seen = opened._forward, []

        def noted(weights: Any, *inputs: jax.Array) -> jax.Array:
            assert forward is not None
            scores = forward(weights, *inputs)
            seen.extend([*inputs, scores])
            return scores

        opened._forward = noted
        opened.compare(["x"], [["a", "b", "c"]])
    full = 8 * mesh_judge.rows(128, "cpu")
    assert [x.shape for x in seen] == [(full, 128), (full,), (full, 3), (full,)]
    for x in seen:
        shards = x.addressable_shards
        assert {shard.data.shape for shard in shards} == {(full // 8, *x.shape[1:])}
        assert len({shard.device for shard in shards}) == len({str(shard.index) for shard in shards}) == 8


def test_both_layouts_and_the_kernel_give_the_reference_logits(
    tmp_path: Path, arrays: dict[str, np.ndarray], one_device: Mesh
) -> None:
    config = (GOLDEN / "pairrm/config.json").read_text().replace("@BACKBONE@", str(GOLDEN / "backbone"))
    (tmp_path / "config.json").write_text(config)
    shutil.copy(MODEL / "model.safetensors", tmp_path)
    _, prompts, responses = case("full_b1")
    with JaxJudge(files.read(tmp_path), mesh=one_device, form="pallas_interpreted") as opened:
        found = opened.compare(prompts[:1], [responses[0][:2]])
    np.testing.assert_allclose(found, arrays["full_b1/logits"][:1, :2, :2], rtol=0, atol=TOLERANCE)


def test_score_does_not_depend_on_batch_order_or_bucket(
    monkeypatch: pytest.MonkeyPatch, one_device: Mesh, eight_devices: Mesh
) -> None:
    _, prompts, responses = case("full_b1")
    with JaxJudge(CHECKPOINT, mesh=one_device) as opened:
        whole = opened.compare(prompts, responses)
        alone = np.concatenate(
            [opened.compare([p], [row]) for p, row in zip(prompts, responses, strict=True)]
        )
        np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-5)
        order = [3, 1, 4, 0, 2]
        mixed = opened.compare(prompts[::-1], [[row[k] for k in order] for row in responses[::-1]])
        np.testing.assert_allclose(mixed[::-1], whole[:, order][:, :, order], rtol=0, atol=1e-5)
    monkeypatch.setitem(mesh_judge.BUCKETS, "cpu", (256, 640))
    monkeypatch.setitem(mesh_judge.DEVICE_TOKENS, "cpu", 2000)
    with JaxJudge(CHECKPOINT, mesh=eight_devices) as opened:
        np.testing.assert_allclose(opened.compare(prompts, responses), whole, rtol=0, atol=1e-5)


def test_one_program_per_bucket_whatever_is_left_over(eight_devices: Mesh) -> None:
    _, prompts, responses = case("full_b1")
    seen: list[tuple[int, int]] = []
    with JaxJudge(CHECKPOINT, mesh=eight_devices) as opened:
        whole = opened.compare(prompts, responses, lambda *step: seen.append(step))
        todo = comparisons.plan(opened._formatter, prompts, responses)
        used = {size for size, _ in mesh_judge.batches(todo, "cpu", 8)}
        assert opened._forward._cache_size() == len(used)
        opened.compare(prompts[:3], [row[:2] for row in responses[:3]])
        program = opened._forward
        opened.release()
        assert opened._weights is None
        np.testing.assert_array_equal(opened.compare(prompts, responses), whole)
        assert opened._forward is program
        assert program._cache_size() == len(used)
    assert seen == sorted(seen)
    assert seen[-1] == (100, 100)
    with pytest.raises(BadInput, match="closed"):
        opened.compare(prompts, responses)


def test_batches_hold_every_pair_once_in_few_shapes() -> None:
    _, prompts, responses = case("full_b1")
    todo = comparisons.plan(Formatter.of(CHECKPOINT), prompts, responses)
    for platform in ("cpu", "tpu"):
        found = list(mesh_judge.batches(todo, platform, 4))
        assert sorted(id(comparison) for _, batch in found for comparison in batch) == sorted(map(id, todo))
        for size, batch in found:
            assert len(batch[0].pair) <= size
            assert len(batch) <= 4 * mesh_judge.rows(size, platform)
            full = 4 * mesh_judge.rows(size, platform)
            ids, lengths, marks = mesh_judge.padded(batch, size, full)
            assert (ids.shape, lengths.shape, marks.shape) == ((full, size), (full,), (full, 3))
        assert all(len(batch) == 4 * mesh_judge.rows(size, platform) for size, batch in found[:-1])


def test_bucket_is_the_smallest_that_fits() -> None:
    for platform, shipped in (
        ("cpu", SHIPPED["cpu"]),
        ("tpu", mesh_judge._BUCKETS),
        ("gpu", mesh_judge._BUCKETS),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(mesh_judge, "BUCKETS", SHIPPED)
            found = {length: mesh_judge.bucket(length, platform) for length in range(1, 4000)}
        assert list(shipped) == sorted(set(shipped))
        assert shipped[-1] == 2048  # the longest texts, cut to the checkpoint's own limits
        assert all(found[size] == size for size in shipped)
        assert found[1] == shipped[0]
        for before, size in itertools.pairwise(shipped):
            assert found[before + 1] == size
        assert {found[length] for length in range(2049, 4000)} == {2560, 3072, 3584, 4096}
        assert (found[2049], found[2560], found[2561]) == (2560, 2560, 3072)
        assert all(a <= b for a, b in itertools.pairwise(found.values()))
        if platform != "cpu":
            assert not any(size % deberta_attention.BLOCK for size in found.values())


def test_nothing_is_asked_of_devices_before_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a device was asked for")

    with monkeypatch.context() as patched:
        for owner, name in ((jax, "devices"), (jax, "device_put"), (sharding, "make_mesh")):
            patched.setattr(owner, name, refuse)
        opened = JaxJudge(CHECKPOINT)
        assert opened.identity == CHECKPOINT.identity
    assert opened.compare(["x"], [["a", "b"]]).shape == (1, 2, 2)  # then all devices
    assert opened._mesh is not None
    assert opened._mesh.size == 8


def test_numbers_of_responses_at_the_edge_and_what_is_cut(one_device: Mesh) -> None:
    with JaxJudge(CHECKPOINT, mesh=one_device, limits=Limits(16, 8)) as opened:
        assert opened.compare([], []).shape == (0, 0, 0)
        assert opened.compare(["x"], [["only one"]]).tolist() == [[[0.0]]]
        assert not +opened.cut
        with pytest.raises(ValueError, match="equally many"):
            opened.compare(["x", "y"], [["a", "b"], ["a"]])
        equal = opened.compare(["x " * 40, "x"], [["a", "a", "b"], ["a " * 40, "b", "a"]])
        assert opened.cut == {"prompts": 1, "responses": 1}
    assert equal[0, 0, 1] == equal[0, 1, 0] != 0
    assert equal[0, 0, 2] == equal[0, 1, 2]


def changed(directory: Path, change: dict[str, Any]) -> files.Checkpoint:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, directory)
    weights = {**load_file(MODEL / "model.safetensors"), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, directory / "model.safetensors")
    return files.read(directory)


def test_weights_must_fit_exactly_and_as_in_torch(tmp_path: Path) -> None:
    d = jax_model.Deberta.of(CHECKPOINT)
    ours = {name: t.shape for t in jax_model.table(d) for name in t.names(d.layers)}
    theirs = torch_model.PairRM(CHECKPOINT.config).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    with pytest.raises(BadInput, match=r"lacks tensor head_layer\.1\.bias"):
        JaxJudge(changed(tmp_path, {"head_layer.1.bias": None}))


def test_bad_weights_and_options_are_reported(tmp_path: Path, one_device: Mesh) -> None:
    with pytest.raises(BadInput, match="float16"):
        JaxJudge(CHECKPOINT, dtype="float16")
    with pytest.raises(BadInput, match=r"head_layer.1.bias as I32; give weights of floating point"):
        JaxJudge(changed(tmp_path, {"head_layer.1.bias": np.zeros(32, np.int32)}))
    checkpoint = changed(tmp_path, {"head_layer.4.weight": np.full((1, 32), 3e38, np.float32)})
    with (
        JaxJudge(checkpoint, mesh=one_device) as opened,
        pytest.raises(BadInput, match=r"responses \d and \d to prompt 'what\?' is not a finite number"),
    ):
        opened.compare(["what?"], [["a", "b"]])


def test_bfloat16_is_near_and_float32_is_multiplied_in_float32(
    one_device: Mesh, arrays: dict[str, np.ndarray]
) -> None:
    _, prompts, responses = case("full_b1")
    with JaxJudge(CHECKPOINT, mesh=one_device, dtype="bfloat16") as opened:
        found = opened.compare(prompts[:3], responses[:3])
        assert opened._weights["weights"]["layers/up"][...].dtype == jnp.bfloat16
    error = np.abs(found - arrays["full_b1/logits"][:3])
    assert TOLERANCE < error.max() < 0.3
    network = jax_model.load(CHECKPOINT, one_device, jnp.float32, "shift")
    text = str(jax.make_jaxpr(network)(jnp.zeros((1, 128), int), jnp.ones(1, int), jnp.zeros((1, 3), int)))
    products = text.count("dot_general[")
    assert products > 10
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count(
        "precision=Precision.HIGHEST"
    ) == products  # fmt: skip


def large(directory: Path, layers: int) -> files.Checkpoint:
    """Write random weights of DeBERTa-v3-large's width with a small vocabulary, scaled so that every layer matters."""
    config = json.loads((MODEL / "config.json").read_text()) | {
        "vocab_size": 773, "hidden_size": 1024, "num_attention_heads": 16, "attention_head_size": 64, "intermediate_size": 4096,
        "num_hidden_layers": layers, "position_buckets": 256, "max_position_embeddings": 512, "pooler_hidden_size": 1024,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(MODEL / "tokenizer.json", directory)
    rng = np.random.default_rng(0)
    sizes = jax_model.Deberta.of(
        files.Checkpoint(directory, config | {"max_relative_positions": -1}, directory, directory)
    )
    weights = {}
    for tensor in jax_model.table(sizes):
        for name in tensor.names(layers):
            x = rng.standard_normal(tensor.shape, np.float32)
            if tensor.path.endswith("norm_weight"):
                x = 1 + 0.1 * x
            elif x.ndim == 1:
                x *= 0.1
            elif tensor.path != "embedding":
                x /= np.sqrt(x.shape[1], dtype=np.float32)
            weights[name] = 200 * x if tensor.path == "head_out" else x  # else the logit would be 3e-4
    save_file(weights, directory / "model.safetensors")
    return files.read(directory)


@pytest.fixture
def real_size(tmp_path: Path) -> Iterator[files.Checkpoint]:
    """Return a checkpoint of 24 layers, whose 1.2 GB are deleted from pytest's directory."""
    try:
        yield large(tmp_path, 24)
    finally:
        (tmp_path / "model.safetensors").unlink(missing_ok=True)


def test_the_real_size_equals_torch(real_size: files.Checkpoint, one_device: Mesh) -> None:
    checkpoint = real_size
    theirs = torch_model.load(checkpoint)
    pair = Formatter.of(checkpoint).pair("why? " * 40, "so it is " * 18, "the river crosses the city " * 6)
    assert 250 < len(pair) < 384
    with torch.inference_mode():
        states = theirs.hidden([pair])
        wanted, logit = states.numpy(), theirs.head(theirs.at_marks(states, [pair])).numpy()
    del theirs
    network = jax_model.load(checkpoint, one_device, jnp.float32)
    ids, lengths, marks = (
        jnp.asarray(x) for x in mesh_judge.padded([comparisons.Comparison(pair, [(0, 0, 1)])], 384, 1)
    )
    graph, weights = nnx.split(network)  # weights are arguments: as constants the compiler would copy them
    hidden = jax.jit(lambda w, i, n: nnx.merge(graph, w).hidden(i, n)[0])(weights, ids, lengths)
    np.testing.assert_allclose(hidden[:, : len(pair)], wanted, rtol=0, atol=2e-3)
    found = network.head(jnp.take_along_axis(hidden, marks[:, :, None], axis=1))
    np.testing.assert_allclose(found, logit, rtol=0, atol=2e-3)
    assert abs(float(logit[0])) > 0.02
