"""PairRM on the mesh, stage 2: it shares the policy's devices. Texts → length buckets → logits [n, K, K].

Every device holds the whole network and scores its own pairs. Every batch is full and has one of a few shapes, so that a
run compiles one program per bucket that occurs; the score of a pair does not depend on its batch.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sppo_jax import sharding
from sppo_jax.command import say
from sppo_jax.errors import BadInput
from sppo_jax.pairrm import comparisons, jax_model
from sppo_jax.pairrm.files import Checkpoint
from sppo_jax.pairrm.format import Formatter, Limits

Progress = Callable[[int, int], None]
# (tokens per row after padding, the comparisons of the rows that are not spare).
Batch = tuple[int, list[comparisons.Comparison]]

DTYPES = ("auto", "float32", "bfloat16")
# Tokens of a row after padding. A CPU compiles in a second and pays for every token; an accelerator the other way round.
BUCKETS = {"cpu": (*range(64, 1024, 64), *range(1024, 2049, 128))}
_BUCKETS = (128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
_STEP = 512  # between buckets beyond the last
# Tokens of a batch per device. On a CPU a larger batch is no faster.
DEVICE_TOKENS = {"cpu": 512}
_DEVICE_TOKENS = 4096


class JaxJudge:
    """PairRM on the mesh. It uses no device before `compare`, and frees their memory on `release`.

    Not for use by two threads at once. On a mesh of several processes all must call `compare` with the same texts.
    """

    on_mesh = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        mesh: Mesh | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        dtype: str = "auto",
        form: str | None = None,
    ) -> None:
        """Check the checkpoint's files without reading weights.

        `mesh` (default: all devices) is used data-parallel whatever its axes. `dtype` is auto (float32 on CPUs, else
        bfloat16), float32 or bfloat16, `form` as in deberta_attention.py. Raises BadInput for files that are not a PairRM's.
        """
        if dtype not in DTYPES:
            raise BadInput(f"PairRM: dtype {dtype!r} is unknown; choose one of: {', '.join(DTYPES)}")
        jax_model.check(checkpoint)
        self.cut: Counter[str] = Counter()  # "prompts", "responses" that were read only in part
        self.sources = checkpoint.sources
        self.tell: Callable[[str], None] = say  # for lines to people; this judge writes none
        self._checkpoint = checkpoint
        self._formatter = Formatter.of(checkpoint, limits)
        self._mesh, self._dtype, self._form = mesh, dtype, form
        self._weights: Any = None
        self._forward: Callable[..., jax.Array] | None = None
        self._closed = False

    @cached_property
    def identity(self) -> str:
        """Hash of the files that determine the scores."""
        return self._checkpoint.identity

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]],
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """Return logits, float32 [n, K, K]: [p, i, j] is the logit that response i, shown first, beats j; diagonal 0.

        `prompts` [n] are raw instructions, `responses` [n][K] decoded texts. `on_progress(done, total)` counts ordered
        pairs. Raises ValueError for shapes that do not fit, and BadInput for a score that is not finite or for devices
        without room.
        """
        n, k = comparisons.shape(prompts, responses)
        if self._closed:
            raise BadInput("PairRM: this judge is closed; load it again")
        logits = np.zeros((n, k, k), np.float32)
        texts = comparisons.tokenise(self._formatter, prompts, responses)
        done = 0
        with _room():
            for todo, scores in self._scored(comparisons.distinct(texts)):
                if bad := np.flatnonzero(~np.isfinite(scores)).tolist():
                    p, i, j = todo[bad[0]].cells[0]
                    raise BadInput(
                        f"PairRM: the score of responses {i} and {j} to prompt {prompts[p][:80]!r} is not a finite number"
                    )
                done += comparisons.scatter(logits, todo, scores)
                if on_progress is not None:
                    on_progress(done, n * k * (k - 1))
        self.cut["prompts"] += sum(text.cut_prompt for text in texts)
        self.cut["responses"] += sum(sum(text.cut_responses) for text in texts)
        return logits

    def release(self) -> None:
        """Free the devices' memory; the next `compare` reads the weights again but compiles nothing."""
        self._weights = None

    def close(self) -> None:
        """Free the devices' memory for good."""
        self.release()
        self._forward, self._closed = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scored(
        self, todo: Sequence[comparisons.Comparison]
    ) -> Iterator[tuple[list[comparisons.Comparison], np.ndarray]]:
        """Yield all comparisons with their scores [batch], batch by batch; each is fetched after the next is dispatched."""
        if not todo:
            return
        mesh = self._load()
        waiting: tuple[list[comparisons.Comparison], jax.Array] | None = None
        for size, batch in batches(todo, sharding.platform(mesh), mesh.size):
            ahead = batch, self._dispatch(mesh, size, batch)
            if waiting:
                yield _fetched(*waiting)
            waiting = ahead
        if waiting:
            yield _fetched(*waiting)

    def _dispatch(self, mesh: Mesh, size: int, batch: list[comparisons.Comparison]) -> jax.Array:
        """Start scoring one batch; return its scores, which may not be computed yet."""
        assert self._forward is not None
        arrays = padded(batch, size, mesh.size * rows(size, sharding.platform(mesh)))
        spread = sharding.spread(mesh)
        placed = (jax.make_array_from_callback(x.shape, spread, x.__getitem__) for x in arrays)
        return self._forward(self._weights, *placed)

    def _load(self) -> Mesh:
        """Load the weights onto the devices, unless they are there; return the mesh."""
        if self._mesh is None:
            self._mesh = sharding.make_mesh()
        if self._weights is None:
            dtype = sharding.compute_dtype(self._dtype, self._mesh)
            network, self._weights = nnx.split(
                jax_model.load(self._checkpoint, self._mesh, dtype, self._form)
            )
            self._forward = self._forward or forward(network, self._mesh)
        return self._mesh


def forward(network: nnx.GraphDef, mesh: Mesh) -> Callable[..., jax.Array]:
    """Return the jitted function (weights, ids [B, T], lengths [B], marks [B, 3]) → C [B].

    B is split over all devices of `mesh`; weights are whole on each.
    """
    whole, spread = sharding.replicated(mesh), sharding.spread(mesh)

    def one_device(weights: Any, ids: jax.Array, length: jax.Array, marks: jax.Array) -> jax.Array:
        return nnx.merge(network, weights)(ids, length, marks)

    all_devices = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(whole.spec, spread.spec, spread.spec, spread.spec),
        out_specs=spread.spec,
        check_vma=False,
    )
    # Every process of a pod needs every logit; within one, nothing has to be exchanged.
    program = jax.jit(all_devices, out_shardings=whole if mesh.is_multi_process else spread)
    return sharding.one_at_a_time(program, mesh)


def bucket(length: int, platform: str) -> int:
    """Return the tokens of the row in which a pair of `length` tokens is scored."""
    sizes = BUCKETS.get(platform, _BUCKETS)
    return next((size for size in sizes if size >= length), -(-length // _STEP) * _STEP)


def rows(size: int, platform: str) -> int:
    """Return the rows per device of a batch whose rows have `size` tokens."""
    return max(1, DEVICE_TOKENS.get(platform, _DEVICE_TOKENS) // size)


def batches(todo: Sequence[comparisons.Comparison], platform: str, devices: int) -> Iterator[Batch]:
    """Yield batches, longest first. A bucket's last batch is filled with shorter pairs, which cost as much as spare rows."""
    todo = comparisons.in_order(todo)
    while todo:
        size = bucket(len(todo[0].pair), platform)
        full = devices * rows(size, platform)
        yield size, todo[:full]
        todo = todo[full:]


def padded(
    batch: Sequence[comparisons.Comparison], size: int, full: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids [full, size], lengths [full] and marks [full, 3], int32; spare rows hold one token of padding."""
    ids = np.zeros((full, size), np.int32)
    lengths = np.ones(full, np.int32)
    marks = np.zeros((full, 3), np.int32)
    for row, comparison in enumerate(batch):
        ids[row, : len(comparison.pair)] = comparison.pair.ids
        lengths[row] = len(comparison.pair)
        marks[row] = comparison.pair.marks
    return ids, lengths, marks


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Turn lack of device memory, at run time or in the compiler, into BadInput with one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BadInput(
            "PairRM: the devices have no room for it beside the policy; lower judge.total_tokens, or use judge.backend=torch"
        ) from None


def _fetched(
    batch: list[comparisons.Comparison], scores: jax.Array
) -> tuple[list[comparisons.Comparison], np.ndarray]:
    return batch, np.asarray(scores)[: len(batch)]
