"""The memory that an update takes on a device, by formula: it sizes microbatches, and serves plans without a compiler."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sppo_jax import sharding
from sppo_jax.config import Config
from sppo_jax.models import Architecture, attention, cpu_attention, hf, lora
from sppo_jax.models.hf import Tensor
from sppo_jax.models.logprob import LOGITS, chunk_size
from sppo_jax.models.transformer import Remat
from sppo_jax.training.packing import Packing

FILLED = 0.9  # share of a device's memory that the formula may fill: it is good to a tenth
FEWEST, MOST = 1024, 16_384  # tokens of a microbatch on one device
# An update does 4.5 times the FLOPs of attention's forward pass (forward, again, and 2.5 as many backward), and 4 times those of
# the products'; one of attention's takes about twice as long.
ATTENTION = 2 * 4.5 / 4
# FLOPs that a device could compute while it waits for one more shape to be compiled, by rough rates: half a minute's on a CPU,
# twenty seconds' elsewhere.
COMPILING = {"cpu": 3e12, "gpu": 1e15, "tpu": 1e15}


def parameters(a: Architecture) -> int:
    """Number of the model's parameters without adapters."""
    return sum(math.prod(t.shape(a)) for t in hf.table(a))


def adapters(a: Architecture) -> int:
    """Number of the adapters' parameters; 0 where the architecture has none."""
    return sum(math.prod(t.shape(a)) for t in lora.table()) if a.lora_rank else 0


@dataclass(frozen=True)
class Update:
    """An update of a model on a mesh. With adapters (`a.lora_rank`) the rest is frozen, in the compute dtype."""

    a: Architecture
    mesh: Any  # a jax Mesh, of real devices or of a plan's stand-ins
    width: int  # bytes of the compute dtype
    kernel: str  # name of the attention kernel
    remat: Remat
    # Tokens of the longest sequence: XLA's attention holds every query's scores with a whole row. Where the kernel lets
    # prompts be shared, of the longest prompt with all of its responses.
    longest: int

    @staticmethod
    def of(config: Config, a: Architecture, mesh: Any, longest: int, tree: int | None = None) -> "Update":
        """The update that a run of `config` does on `mesh`, and that a plan assumes.

        `longest`: tokens of the longest sequence; `tree`: of the longest prompt with all of its responses (None: as many).
        Raises BadInput where the attention kernel that `config` names does not support the model.
        """
        dtype = sharding.compute_dtype(config.model.compute_dtype, mesh)
        kernel = attention.choose(config.model.attention, mesh, a, dtype).name
        row = tree if tree is not None and attention.branches(kernel) else longest
        return Update(a, mesh, dtype.itemsize, kernel, config.fit.remat, row)

    def packing(self, limit: float | None) -> Packing:
        """The packing of its sequences into rows, with `limit` bytes on each device (None: a CPU)."""
        a, n = self.a, parameters(self.a)
        # On a CPU short rows have dense attention (models/attention.py), which is faster for them.
        short = self.kernel == "blocked" and self.longest <= 2 * cpu_attention.BLOCK
        # Pallas' kernels compute all scores of a row that are not in the future; blocked skips those between trees.
        scores = a.layers * a.heads * a.head_dim / n if self.kernel in ("splash", "triton") else 0.0
        return Packing(
            sharding.batch_shards(self.mesh),
            self.most_tokens(limit),
            pack=self.kernel != "cudnn",  # whose attention takes one sequence a row
            wide=self.kernel in ("splash", "triton", "blocked") and not short,
            shared=attention.branches(self.kernel),
            attention=ATTENTION * scores,
            compiling=COMPILING[sharding.platform(self.mesh)] * self.mesh.size / (8 * n),
        )

    @property
    def state(self) -> dict[str, float]:
        """Bytes that one device holds between updates, by kind."""
        model = self._pieces(hf.table(self.a))
        if not self.a.lora_rank:
            return {"parameters": 4 * model, "optimiser": 4 * model}
        factors = self._pieces(lora.table())
        return {"parameters": 4 * factors, "frozen": self.width * model, "optimiser": 4 * factors}

    def kinds(self, tokens: float, accumulated: bool) -> dict[str, float]:
        """Bytes of one device at an update's peak, by kind.

        `tokens`: number of a microbatch's tokens on this device. `accumulated`: whether the gradients of several
        microbatches are added up.
        """
        a, tensor = self.a, self.mesh.shape["tensor"]
        heads = a.heads * a.head_dim
        layer = (2 * heads + 2 * a.kv_heads * a.head_dim) * a.model + 3 * a.mlp * a.model
        saved = self.width * a.layers * a.model  # each layer's input, for every token
        saved += (3 * self.width + 4) * a.model  # after the last layer, for its norm and the head
        # Attention's outputs too; kernels also keep their softmax's sums.
        if self.remat == "attention" and self.kernel not in ("cudnn", "triton"):
            saved += a.layers * (self.width * heads + 4 * a.heads * (self.kernel != "xla")) / tensor
        layers = self._pieces([t for t in hf.table(a) if t.letters.startswith("L")])
        # All layers' weights in the compute dtype, and as much for their gradients.
        lower = 0 if a.lora_rank or self.width == 4 else self.width * layers
        inner = self.width * ((2 * heads + 2 * a.kv_heads * a.head_dim + 3 * a.mlp) / tensor + 6 * a.model)
        if self.kernel == "xla":
            inner += 2 * 4 * self.longest * a.heads / tensor
        cut = sharding.shards(self.mesh, sharding.spec("DV", self.mesh, (a.model, a.vocab))[1])
        # The larger of two peaks: a layer's gathered weights and its gradients, or the head.
        working = 2 * self.width * layer / tensor + tokens * inner
        if sharding.batch_shards(self.mesh) == 1:  # the whole head, and the logits of a chunk of tokens
            head = self.width * a.model * a.vocab / cut
            head += 3 * 4 * min(tokens, chunk_size(a.vocab, self.mesh)) * a.vocab / cut
        else:  # a block of the head's columns, its gradient, and all tokens' logits; their hidden states' gradient
            columns = min(a.vocab, LOGITS / tokens) / cut
            head = (self.width + 8) * a.model * columns + 3 * 4 * tokens * columns + 4 * tokens * a.model
        state = self.state
        return state | {
            "gradients": state["optimiser"] + (state["optimiser"] if accumulated and not lower else lower),
            "saved activations": tokens * saved,
            "temporaries": lower + max(working, head),
        }

    def most_tokens(self, limit: float | None) -> int:
        """The most tokens of a microbatch, over all devices, that fit into `limit` bytes of each (None: a CPU).

        At most MOST per device: more are no faster once the products are large. At least FEWEST: with fewer, weights are
        gathered more often.
        """
        tokens = 4 * FEWEST if limit is None else MOST
        while limit is not None and tokens > FEWEST:
            if sum(self.kinds(tokens, accumulated=True).values()) <= FILLED * limit:
                break
            tokens //= 2
        return tokens * sharding.batch_shards(self.mesh)

    def _pieces(self, table: Sequence[Tensor]) -> float:
        """Number of the tensors' elements that one device holds."""
        count = 0.0
        for t in table:
            shape = t.shape(self.a)
            axes = sharding.spec(t.letters, self.mesh, shape)
            count += math.prod(shape) / math.prod(sharding.shards(self.mesh, axis) for axis in axes)
        return count
