"""The CPU's attention in blocks against dense masks: values, gradients, skipped blocks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppo_jax import sharding
from sppo_jax.models import attention, cpu_attention
from sppo_jax.models.attention import Kernel
from sppo_jax.models.trees import Trees
from tests.test_attention import assert_close, padded, seen_and_gradients


def rows_of(*rows, width):
    """Return segment [B, T] for rows of sequences of these lengths; a negative length is padding, as is the rest."""
    found = np.zeros((len(rows), width), np.int32)
    for b, lengths in enumerate(rows):
        begin = 0
        for i, n in enumerate(lengths):
            found[b, begin : begin + abs(n)] = i + 1 if n > 0 else 0
            begin += abs(n)
    return jnp.asarray(found)


def trees_of(*rows, width):
    """Return trees for rows of (tokens of the prompt, of each response...); a number alone is padding, as is the rest."""
    found = np.zeros((3, len(rows), width), np.int32)
    for b, row in enumerate(rows):
        begin = 0
        for s, tree in enumerate(row):
            if isinstance(tree, int):
                begin += tree
                continue
            for branch, n in enumerate(tree):
                place = np.arange(n) + (tree[0] if branch else 0)
                found[0, b, begin : begin + n] = s + 1
                found[1, b, begin : begin + n], found[2, b, begin : begin + n] = branch, place
                begin += n
    return Trees(*map(jnp.asarray, found))


TREES = trees_of(
    ((90, 80, 130, 40), (20, 5, 5)), ((3, 200, 20), (60, 1, 70)), (30, (70, 64, 64), (5, 40, 30)),
    ((1, 1, 1, 1),), (), ((300, 60),), width=400,
)  # fmt: skip
PACKED = rows_of((300,), (100, 3, 61, 64, 70), (-70, 130), (1,), (), (-150, 20, 100), width=300)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 70, "scale": 0.1}, {"window": 1}, {"window": 400}, {"softcap": 3.0}, {"kv_heads": 4}],
    ids=str,
)
def test_blocks_equal_dense_masks(one_device, options):
    for mesh in (one_device, None):
        found = seen_and_gradients(Kernel("blocked", mesh), PACKED, **options)
        assert_close(found, seen_and_gradients(Kernel(), PACKED, **options))


@pytest.mark.parametrize(
    "options", [{}, {"window": 70}, {"window": 100}, {"window": 1}, {"window": 5, "softcap": 3.0}], ids=str
)
def test_blocks_of_trees_equal_dense_masks(one_device, options):
    found = seen_and_gradients(Kernel("blocked", one_device), TREES, **options)
    assert_close(found, seen_and_gradients(Kernel(), TREES, **options))


@pytest.mark.parametrize("window", [None, 20])
def test_a_response_of_a_tree_sees_what_it_sees_in_a_row_of_its_own(window):
    """Outputs of each branch are those of the prompt and the branch alone."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 60, n, 16)), jnp.float32) for n in (4, 2, 2))
    tree = trees_of(((20, 25, 15),), width=60)
    together = attention.whole(tree, [window], Kernel())(0, q, k, v)
    for branch in (1, 2):
        own = np.flatnonzero(np.isin(np.asarray(tree.branch[0]), (0, branch)))
        alone = Trees.of(jnp.ones((1, len(own)), jnp.int32))
        found = attention.whole(alone, [window], Kernel())(0, q[:, own], k[:, own], v[:, own])
        np.testing.assert_allclose(together[:, own], found, atol=1e-6)


@pytest.mark.parametrize(("sizes", "heads"), [((2, 2, 2), 4), ((1, 2, 4), 4), ((1, 2, 4), 6)])
def test_blocks_are_the_same_on_every_mesh(sizes, heads):
    rows = PACKED[:4]
    found = seen_and_gradients(Kernel("blocked", sharding.make_mesh(*sizes)), rows, heads=heads)
    assert_close(found, seen_and_gradients(Kernel(), rows, heads=heads))


def test_a_row_does_not_depend_on_its_neighbours(one_device):
    of = Kernel("blocked", one_device)
    q, k, v = (
        jnp.asarray(np.random.default_rng(n).normal(size=(6, 300, n, 16)).astype(np.float32))
        for n in (4, 2, 2)
    )

    @jax.jit
    def run(q, k, v, rows):
        return attention.whole(Trees.of(rows), [None], of)(0, q, k, v)

    together = run(q, k, v, PACKED)
    for b in range(6):
        alone = run(q[b : b + 1], k[b : b + 1], v[b : b + 1], PACKED[b : b + 1])
        np.testing.assert_array_equal(together[b : b + 1], alone)


def test_bfloat16_is_as_good_as_dense(one_device):
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.normal(size=(6, 300, n, 16)), jnp.float32) for n in (4, 2, 2)]
    real = (PACKED > 0)[..., None, None]

    def run(kernel, dtype):
        def loss(q, k, v):
            seen = attention.whole(Trees.of(PACKED), [None], kernel)(0, q, k, v)
            return jnp.sum(jnp.where(real, seen.astype(jnp.float32), 0) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(dtype) for x in exact))

    def away(found):
        return [float(jnp.abs(a.astype(jnp.float32) - b).max()) for a, b in zip(found, truth, strict=True)]

    truth = run(Kernel(), jnp.float32)
    dense, mine = away(run(Kernel(), jnp.bfloat16)), away(run(Kernel("blocked", one_device), jnp.bfloat16))
    assert all(a <= 1.5 * b for a, b in zip(mine, dense, strict=True)), (mine, dense)


@pytest.mark.parametrize("window", [None, 1, 65, 130])
@pytest.mark.parametrize("trees", [Trees.of(PACKED), TREES], ids=["sequences", "trees"])
def test_only_blocks_that_share_a_sequence_are_computed(trees, window):
    size, (rows, length) = cpu_attention.BLOCK, trees.segment.shape
    wide = Trees(*(jnp.pad(x, ((0, 0), (0, -length % size))) for x in trees))
    visits = cpu_attention.visits(wide, window)
    seen = np.asarray(wide.mask(window))
    blocks = seen.shape[1] // size
    cut = seen.reshape(rows, blocks, size, blocks, size).any(axis=(2, 4))
    # Padding before a sequence counts as its own, and a later sequence's window may begin where nothing is seen.
    exact = (0, 1, 3, 4) if window is None else ()
    for b in range(rows):
        for i in range(blocks):
            own, last, every = (int(x[b, i]) for x in visits)
            found = [i - step if step < own else last - (step - own) for step in range(every)]
            needed = set(np.flatnonzero(cut[b, i]))
            assert len(set(found)) == len(found)
            assert needed <= set(found) <= set(range(i + 1))
            assert not found or found[0] == i
            if b in exact:
                assert set(found) == needed


@pytest.mark.parametrize("kernel", ["blocked", "xla"])
def test_scores_of_whole_rows_do_not_exist(one_device, kernel):
    length, heads = 2048, 4
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = [like((1, length, n, 16)) for n in (heads, 2, 2)]
    rows = jnp.ones((1, length), jnp.int32)

    def loss(*args):
        return jnp.sum(attention.whole(Trees.of(rows), [None], Kernel(kernel, one_device))(0, *args))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    taken, scores = compiled.memory_analysis().temp_size_in_bytes, 4 * heads * length**2
    assert taken < 0.15 * scores if kernel == "blocked" else taken > scores


def test_short_rows_are_computed_at_once(one_device):
    """Short rows have no block to skip: the loop would only take time."""

    def loops(length):
        rows = jnp.ones((1, length), jnp.int32)
        heads = jnp.ones((1, length, 2, 16))
        of = attention.whole(Trees.of(rows), [None], Kernel("blocked", one_device))
        return "while" in str(jax.make_jaxpr(lambda x: of(0, x, x, x))(heads))

    assert (loops(2 * cpu_attention.BLOCK), loops(2 * cpu_attention.BLOCK + 1)) == (False, True)


def test_padding_is_finite(one_device):
    valid = padded((0, 130, 200), 200, "middle").astype(jnp.int32)
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 200, 2, 16)), jnp.float32)
    of = attention.whole(Trees.of(valid), [None], Kernel("blocked", one_device))
    out, pullback = jax.vjp(lambda q, k, v: of(0, q, k, v), heads, heads, heads)
    for x in (out, *pullback(jnp.ones_like(out))):
        assert np.isfinite(x).all()
