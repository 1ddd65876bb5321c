"""Pages of keys and values: their contents, and attention over them, equal to dense attention, in every bit on CPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import sharding
from sppo_jax.models import attention
from sppo_jax.sampler import paged_attention, paging
from sppo_jax.sampler.paging import PAGE
from tests.conftest import ODD

SLOTS, WIDTH, POOL = 32, 4, 136  # pages of one replica; several groups of live ones
LAYER = dataclasses.replace(ODD, heads=6, kv_heads=2, head_dim=10)
LONGEST = WIDTH * PAGE


@dataclasses.dataclass
class Batch:
    """Slots with every column's keys and values: the token at `position` is new."""

    q: np.ndarray  # [B, H, C]
    keys: np.ndarray  # [B, S, N, C]
    values: np.ndarray
    position: np.ndarray
    table: np.ndarray
    active: np.ndarray

    def __getitem__(self, rows):
        return Batch(*(x[rows] for x in vars(self).values()))


def random_batch(seed, replicas=1, a=LAYER):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    keys, values = draw(2, SLOTS, LONGEST, a.kv_heads, a.head_dim)
    position = rng.integers(0, LONGEST, SLOTS).astype(np.int32)
    position[:4] = 0, PAGE - 1, PAGE, LONGEST - 1  # the edges of a page
    own = SLOTS // replicas
    table = [rng.permutation(POOL)[: own * WIDTH].reshape(own, WIDTH) for _ in range(replicas)]
    table = np.concatenate(table).astype(np.int32)
    return Batch(draw(SLOTS, a.heads, a.head_dim), keys, values, position, table, np.ones(SLOTS, bool))


fill, copy = (jax.jit(f, static_argnames="mesh") for f in (paging.fill, paging.copy))
work = jax.jit(paged_attention.work, static_argnames=("window", "mesh"))


def empty(mesh, a=LAYER, dtype=jnp.float32, **options):
    return paging.empty(paging.shapes(POOL, a, dtype, mesh, **options))


@functools.partial(jax.jit, static_argnames=("window", "softcap", "scale", "mesh"))
def fill_and_attend(pages, q, keys, values, position, table, active, *, window, softcap, scale, mesh):
    rows = jnp.arange(len(position))
    pages = paging.fill(pages, keys, values, table, jnp.where(active, position, 0), mesh)
    work = paged_attention.work(position, active, table, window, mesh)
    k, v = keys[rows, position], values[rows, position]
    return paged_attention.attend(q, k, v, pages, work, scale=scale, softcap=softcap, mesh=mesh)


def attend(mesh, batch, *, a=LAYER, quantize=False, pages=None, kernel="xla", **options):
    """Prefill the columns before `position`, then one decode step at it: output [B, H, C], and pages."""
    pages = empty(mesh, a, interleaved=kernel == "ragged", quantize=quantize) if pages is None else pages
    options = {"window": None, "softcap": None, "scale": None, "mesh": mesh} | options
    out, pages = fill_and_attend(pages, *vars(batch).values(), **options)
    return np.asarray(out), jax.tree.map(np.asarray, pages)


def dense(batch, window=None, softcap=None, scale=None):
    q, keys, values, position = map(jnp.asarray, list(vars(batch).values())[:4])
    mask = attention.cache_mask(position, keys.shape[1], window)
    return np.asarray(attention.attend(q[:, None], keys, values, mask, scale=scale, softcap=softcap)[:, 0])


@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"window": 100, "softcap": 3.0, "scale": 0.5}, {"window": 1}]
)
def test_ragged_lengths_equal_dense_attention(one_device, options):
    for seed in range(4):
        batch = random_batch(seed)
        out, _ = attend(one_device, batch, **options)
        np.testing.assert_allclose(out, dense(batch, **options), atol=1e-5)


@pytest.mark.parametrize(("quantize", "window"), [(False, 200), (True, 201)])
def test_what_other_platforms_run_equals_dense_attention(one_device, monkeypatch, quantize, window):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(paged_attention, "GROUP", 48)  # several groups
    # Windows that no other test has, so that it is compiled anew.
    batch = random_batch(0)
    out, pages = attend(one_device, batch, window=window, quantize=quantize)
    assert pages.keys.shape == pages.values.shape == (POOL, PAGE, 2, 10)  # no token's place is cut
    np.testing.assert_allclose(out, dense(batch, window=window), atol=0.05 if quantize else 1e-5)


def test_a_window_visits_only_its_pages(one_device):
    position = np.random.default_rng(0).integers(0, LONGEST, SLOTS).astype(np.int32)
    found = work(position, np.ones(SLOTS, bool), random_batch(0).table, window=65, mesh=one_device)
    first = np.maximum(position + 1 - 65, 0) // PAGE
    assert found.items_R.tolist() == [(position // PAGE - first + 1).sum()]
    assert found.table_BW.shape[1] == 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_prefill_lands_in_its_own_pages_alone(one_device, interleaved):
    batch = random_batch(1)
    before = jax.tree.map(lambda x: jnp.full_like(x, 7), empty(one_device, interleaved=interleaved))
    length = np.tile(np.array([0, 1, 63, 64, 65, 200, 256, 0], np.int32), SLOTS // 8)
    after = fill(before, batch.keys, batch.values, batch.table, length, mesh=one_device)
    expected = np.full((2, POOL, 2, PAGE, 10), 7, np.float32)
    for row, n in enumerate(length):
        pages = batch.table[row, : -(-n // PAGE)]
        kv = np.stack([batch.keys[row], batch.values[row]]).reshape(2, WIDTH, PAGE, 2, 10)
        kv[:, np.arange(LONGEST).reshape(WIDTH, PAGE) >= n] = 0  # the rest of the last page
        expected[:, pages] = kv.swapaxes(2, 3)[:, : len(pages)]
    if interleaved:
        found = np.asarray(after.both).reshape(POOL, PAGE, 2, 2, 10).transpose(3, 0, 2, 1, 4)
    else:
        assert after.turned  # on a CPU
        found = np.stack([after.keys.swapaxes(2, 3), after.values])
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_shorter_than_a_page_is_stored_too(one_device):
    batch = random_batch(2)
    pages = empty(one_device)
    length = np.full(SLOTS, 20, np.int32)
    short = fill(pages, batch.keys[:, :32], batch.values[:, :32], batch.table[:, :1], length, mesh=one_device)
    whole = fill(pages, batch.keys, batch.values, batch.table, length, mesh=one_device)
    jax.tree.map(np.testing.assert_array_equal, short, whole)


def test_copying_takes_the_page_and_leaves_the_rest(one_device):
    _, pages = attend(one_device, random_batch(3), quantize=True)
    source, target = (
        np.resize(np.array([3, 5, 3, 0, 1, 2, 9, 9], np.int32), SLOTS),
        np.resize(np.array([-1, 130, 131, -1, -1, 0] + [-1] * 26, np.int32), SLOTS),
    )
    after = copy(jax.tree.map(jnp.asarray, pages), source, target, mesh=one_device)
    for was, now in zip(*map(jax.tree.leaves, (pages, after)), strict=True):
        expected = was.copy()
        expected[[130, 131, 0]] = was[[5, 3, 2]]
        np.testing.assert_array_equal(now, expected)


def test_slots_that_are_not_active_write_nothing_and_stay_finite(one_device):
    batch = random_batch(4)
    batch.active[2:6] = False
    batch.table[2], batch.table[3], batch.table[4] = -1, POOL + 5, batch.table[0]
    batch.position[5] = LONGEST + 3  # beyond the table
    pages = empty(one_device)
    out, pages = attend(one_device, batch, pages=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pages))
    assert np.isfinite(out).all()
    live = batch[batch.active]
    np.testing.assert_allclose(out[batch.active], dense(live), atol=1e-5)
    used = [page for row, n in zip(live.table, live.position, strict=True) for page in row[: n // PAGE + 1]]
    for x in (pages.keys, pages.values):
        assert np.isnan(np.delete(x, used, axis=0)).all()


def test_int8_pages_are_right_to_half_a_step(one_device):
    batch = random_batch(5)
    batch.keys[:, 3] = 0  # a vector of zeros stays one
    out, pages = attend(one_device, batch, quantize=True)
    exact, plain = attend(one_device, batch)
    for x, scale, wanted in (
        (pages.keys, pages.key_scale, plain.keys),
        (pages.values, pages.value_scale, plain.values),
    ):
        assert x.dtype == np.int8
        assert x.shape == wanted.shape
        axis = 2 if x is pages.keys else 3  # of the channels, on a CPU
        step = np.abs(wanted).max(axis, keepdims=True) / 127
        assert (np.abs(x * np.expand_dims(scale, axis) - wanted) <= 0.5001 * step).all()
    np.testing.assert_allclose(out, exact, atol=0.05)
    assert np.abs(out - exact).max() > 0


@pytest.mark.parametrize("window", [None, 90])
def test_a_slot_depends_in_no_bit_on_its_neighbours_or_its_pages(one_device, window):
    for seed in range(6):
        rng = np.random.default_rng(100 + seed)
        batch = random_batch(seed)
        alone, _ = attend(one_device, batch, window=window)
        wide = dataclasses.replace(batch, table=np.pad(batch.table, ((0, 0), (0, 60))))
        np.testing.assert_array_equal(attend(one_device, wide, window=window)[0], alone)
        order = rng.permutation(SLOTS)
        moved = batch[order]
        moved.table = rng.permutation(POOL)[: SLOTS * WIDTH].reshape(SLOTS, WIDTH).astype(np.int32)
        kept = rng.random(SLOTS) < 0.5  # the others have other texts, of other lengths
        other = random_batch(seed + 50)
        for name in ("q", "keys", "values", "position", "active"):
            getattr(moved, name)[~kept] = getattr(other, name)[~kept]
        moved.active[~kept] = rng.random((~kept).sum()) < 0.7
        out, _ = attend(one_device, moved, window=window)
        np.testing.assert_array_equal(out[kept], alone[order][kept])


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_eight_devices_give_the_same_bits(one_device, kv_heads):
    """Over `tensor` the kv heads are cut where it divides them, and whole on every device where not."""
    mesh = sharding.make_mesh(2, 2, 2)
    a = dataclasses.replace(LAYER, kv_heads=kv_heads)
    batch = random_batch(6, replicas=4, a=a)
    single = dataclasses.replace(batch, table=np.arange(SLOTS * WIDTH, dtype=np.int32).reshape(SLOTS, WIDTH))
    out, _ = attend(one_device, single, a=a, window=90)
    pages = empty(mesh, a)
    for x, page in ((pages.keys, (10, PAGE)), (pages.values, (PAGE, 10))):
        assert x.sharding.shard_shape(x.shape) == (POOL, 1 if kv_heads == 2 else 3, *page)
    spread, _ = attend(mesh, batch, a=a, window=90, pages=pages)
    np.testing.assert_array_equal(spread, out)


def test_pages_have_the_shapes_and_bytes_that_are_computed_beforehand(eight_devices):
    for interleaved, quantize in ((False, False), (False, True), (True, False)):
        like = paging.shapes(
            5, LAYER, jnp.bfloat16, eight_devices, interleaved=interleaved, quantize=quantize
        )
        pages = paging.empty(like)
        for x, y in zip(jax.tree.leaves(pages), jax.tree.leaves(like), strict=True):
            assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
        total = sum(x.nbytes for x in jax.tree.leaves(pages)) * LAYER.layers
        assert total == 5 * 4 * paging.bytes_per_page(LAYER, jnp.bfloat16, quantize)


@pytest.mark.parametrize(
    ("tensor", "kv_heads", "head_dim", "dtype", "kernel"),
    [
        (4, 8, 128, jnp.bfloat16, "ragged"),  # Mistral
        (1, 8, 128, jnp.float32, "ragged"),
        (4, 2, 128, jnp.bfloat16, "ragged"),  # Qwen2.5-1.5B, heads whole
        (1, 3, 128, jnp.bfloat16, "xla"),
        (4, 4, 256, jnp.bfloat16, "ragged"),  # Gemma-2-2B
        (4, 8, 256, jnp.bfloat16, "xla"),
        (4, 4, 256, jnp.float32, "xla"),
        (1, 8, 64, jnp.bfloat16, "xla"),
    ],
)
def test_the_tpu_kernel_is_taken_where_it_compiles(monkeypatch, tensor, kv_heads, head_dim, dtype, kernel):
    """As benchmarks/sampler_tpu.py found with libtpu 0.0.42."""
    mesh = sharding.make_mesh(8 // tensor, 1, tensor)
    a = dataclasses.replace(LAYER, kv_heads=kv_heads, head_dim=head_dim)
    assert paged_attention.choose(mesh, "auto", a, dtype) == "xla"
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")
    assert paged_attention.choose(mesh, "auto", a, dtype) == kernel
    assert paged_attention.choose(mesh, "xla", a, dtype) == "xla"


def test_replicas_are_supported_where_the_kernel_compiles(monkeypatch, one_device):
    gemma = dataclasses.replace(LAYER, kv_heads=8, head_dim=256)

    def sizes(forced, a):
        return list(filter(paged_attention.supported(one_device, forced, a, jnp.bfloat16), range(1, 21)))

    assert sizes("auto", gemma) == list(range(1, 21))  # on a CPU
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")
    assert sizes("auto", gemma) == [8]
    assert sizes("xla", gemma) == list(range(1, 21))
    # Llama-2-13B: 10 or 5 heads are no whole tiles, and 16 devices would each hold all 40.
    assert sizes("auto", dataclasses.replace(LAYER, kv_heads=40, head_dim=128)) == [1, 5, 10, 20]


def kernel_by_its_words(
    q, pages, lengths, table, starts, count, *, sm_scale, sliding_window, soft_cap, **blocks
):
    """ragged_paged_attention as its documentation describes it, for one query each. Its sequences are not empty."""
    kv = pages[table].reshape(len(table), -1, *pages.shape[2:])
    k, v = (kv[:, :, i::2] for i in range(2))
    mask = attention.cache_mask(lengths - 1, kv.shape[1], sliding_window)
    v = jnp.where(mask[:, 0, :, None, None], v, 0)
    out = attention.attend(q[:, None], k, v, mask, scale=sm_scale, softcap=soft_cap)[:, 0]
    right = jnp.all(starts == jnp.arange(len(table) + 1)) & (count[0] == len(table))
    right &= jnp.all((lengths >= 1) & (table[:, 0] >= 0) & (table[:, 0] < len(pages)))
    return jnp.where(right, out, jnp.nan)


@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 3.0, "scale": 0.5}])
def test_the_tpu_kernel_is_given_what_it_should_see(one_device, monkeypatch, options):
    monkeypatch.setattr(paged_attention, "ragged_paged_attention", kernel_by_its_words)
    batch = random_batch(8)
    batch.active[5:9] = False
    batch.table[5:9] = -1
    out, _ = attend(one_device, batch, kernel="ragged", **options)
    assert np.isfinite(out).all()
    live = batch[batch.active]
    np.testing.assert_allclose(out[batch.active], dense(live, **options), atol=1e-5)


def test_the_tpu_kernel_refuses_int8_pages(one_device):
    with pytest.raises(ValueError, match="int8"):
        attend(one_device, random_batch(0), quantize=True, kernel="ragged")


@pytest.mark.parametrize(("heads", "channels", "pages"), [(3, 64, 8), (2, 32, 24), (1, 16, 32), (32, 256, 1)])
def test_the_pages_that_a_cpu_reads_at_a_time_fit_its_cache(heads, channels, pages):
    like = jax.ShapeDtypeStruct((9, heads, PAGE, channels), jnp.float32)
    assert paged_attention._group_of_cpu(paging.Pages(like, like, turned=True)) == pages
