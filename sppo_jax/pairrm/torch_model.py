"""Stage 2, second half, in PyTorch: token ids of pairs → PairRM's logits.

Parameters and layers are those of transformers; only the attention is written here, because transformers' spends more time
on moving the position terms than on matrix products. The network is built from config.json and filled from
model.safetensors. It is never made by `from_pretrained`, which keeps the dtype of the checkpoint and so can round float32
weights to float16 on the way.

Letters: N pairs, T tokens of the longest, H heads, C channels of a head, O = 2T - 1 offsets i - j between two tokens,
R rows of the table of relative positions, L layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import DebertaV2Config, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    make_log_bucket_position,
)

from sppo_jax.errors import BadInput
from sppo_jax.pairrm import files
from sppo_jax.pairrm.files import Checkpoint
from sppo_jax.pairrm.format import TextPair

# On a CPU, scores are computed in pieces that stay in its cache: most numbers of a piece, and rows of a strip.
_PIECE, _STRIP = 2**21, 64
_POSITION_IDS = "pretrained_model.embeddings.position_ids"


def skew(products: torch.Tensor) -> torch.Tensor:
    """Return a view [..., S, T] of products [..., S, T + S - 1] in which row r begins S - 1 - r places to the right.

    This turns products of S tokens i with all offsets i - j, in falling order, into terms of (i, j).
    """
    rows, width = products.shape[-2:]
    if rows == 1:
        return products
    lines = products.flatten(-2)[..., rows - 1 : -1].unflatten(-1, (rows, width - 1))
    return lines[..., : width - rows + 1]


def position_scores(
    query_NHTC: torch.Tensor,
    key_NHTC: torch.Tensor,
    far_key_HOC: torch.Tensor,
    far_query_HOC: torch.Tensor,
    strip: int,
) -> torch.Tensor:
    """Return scores [N, H, T, T] of content to position and position to content: Q_i Kr(i - j) + K_j Qr(i - j).

    Both tables are in falling order of the offset from their own token: of i - j for the keys, of j - i for the queries.
    In strips of `strip` rows, only `strip` - 1 products per row are not needed.
    """
    tokens = query_NHTC.shape[2]
    scores = query_NHTC.new_empty(*query_NHTC.shape[:3], tokens)
    starts = range(0, tokens, strip)
    for start in starts:
        end = min(start + strip, tokens)
        near = slice(tokens - end, 2 * tokens - 1 - start)
        scores[:, :, start:end] = skew(query_NHTC[:, :, start:end] @ far_key_HOC[:, near].mT)
    for start in starts:
        end = min(start + strip, tokens)
        near = slice(tokens - end, 2 * tokens - 1 - start)
        scores[..., start:end] += skew(key_NHTC[:, :, start:end] @ far_query_HOC[:, near].mT).mT
    return scores


class PairRM(nn.Module):
    """DeBERTa-v2 and the pair head: C = f(e_1) - f(e_2), f(e) = W2 tanh(W1 [e_source; e] + b1) + b2.

    e_source, e_1 and e_2 are the last hidden states at the three prefix tokens. sigmoid(C) is the model's probability that
    the first response is better, given that it is shown first.
    """

    pretrained_model: Any  # transformers' modules, whose attributes have no types
    # The projected tables of positions [L, 2, H, R, C], once the weights are final.
    positions: torch.Tensor | None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.pretrained_model = DebertaV2Model(DebertaV2Config(**config))
        hidden = int(config["hidden_size"])
        dropout = float(config.get("drop_out", 0.05))
        # Indices 1 and 4 are the names in the checkpoint.
        self.head_layer = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * hidden, hidden),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.pad_id = int(config.get("pad_token_id") or 0)
        self.register_buffer("positions", None, persistent=False)

    def train(self, mode: bool = True) -> "PairRM":
        """Switch to training, which drops the tables of positions, or to evaluation."""
        if mode:
            self.positions = None
        return super().train(mode)

    def fix(self) -> "PairRM":
        """Switch to evaluation and compute the tables of positions once; the weights must not change afterwards."""
        self.eval()
        with torch.no_grad():
            self.positions = torch.stack(
                [self._positions(n) for n in range(len(self.pretrained_model.encoder.layer))]
            )
        return self

    def hidden(self, pairs: Sequence[TextPair]) -> torch.Tensor:
        """Return the last hidden states, float32 [N, T, hidden], T the longest of N; padding is masked."""
        longest = max(map(len, pairs))
        ids = np.full((len(pairs), longest), self.pad_id, np.int64)
        mask = np.zeros((len(pairs), longest), np.int64)
        for row, pair in enumerate(pairs):
            ids[row, : len(pair)] = pair.ids
            mask[row, : len(pair)] = 1
        device = next(self.parameters()).device
        ids_NT, mask_NT = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        rows_O = self._rows(longest).to(device)
        padding = None if mask.all() else mask_NT[:, None, None] == 0
        hidden = self.pretrained_model.embeddings(ids_NT, mask=mask_NT)
        for n, layer in enumerate(self.pretrained_model.encoder.layer):
            known = None if torch.is_grad_enabled() else self.positions
            far_key, far_query = self._positions(n) if known is None else known[n]
            far = far_key[:, rows_O.flip(0)], far_query[:, rows_O]
            mixed = self._attend(layer.attention.self, hidden, *far, padding)
            attended = layer.attention.output(mixed, hidden)
            hidden = layer.output(layer.intermediate(attended), attended)
        return hidden

    def _rows(self, tokens: int) -> torch.Tensor:
        """Return the row of the table of relative positions for the offsets from 1 - T to T - 1, int64 [O]."""
        attention = self.pretrained_model.encoder.layer[0].attention.self
        offset, span = torch.arange(1 - tokens, tokens), attention.pos_ebd_size
        bucket = make_log_bucket_position(offset, span, attention.max_relative_positions).long()
        return (bucket + span).clamp(0, 2 * span - 1)

    def _positions(self, layer: int) -> torch.Tensor:
        """Return keys and queries [2, H, R, C] of the relative positions, divided by sqrt(3 C) as the scores are."""
        encoder = self.pretrained_model.encoder
        attention = encoder.layer[layer].attention.self
        table = attention.pos_dropout(encoder.get_rel_embedding())
        both = torch.stack([attention.key_proj(table), attention.query_proj(table)]) * _scale(attention)
        return both.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    def _attend(
        self,
        attention: DisentangledSelfAttention,
        hidden: torch.Tensor,
        far_key_HOC: torch.Tensor,
        far_query_HOC: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return softmax((Q_i K_j + Q_i Kr(i - j) + K_j Qr(i - j)) / sqrt(3 C)) V, [N, T, hidden] (arXiv:2006.03654)."""
        heads, tokens = attention.num_attention_heads, hidden.shape[1]
        query, key, value = (
            project(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project in (attention.query_proj, attention.key_proj, attention.value_proj)
        )
        cached = hidden.device.type == "cpu"
        some = max(1, _PIECE // (len(hidden) * tokens**2)) if cached else heads
        strip = _STRIP if cached else tokens
        mixed = []
        for start in range(0, heads, some):
            part = slice(start, start + some)
            q, k, v = query[:, part], key[:, part], value[:, part]
            bias = position_scores(q, k, far_key_HOC[part], far_query_HOC[part], strip)
            if padding is not None:
                bias = bias.masked_fill(padding, -torch.inf)
            dropout = attention.dropout.p if self.training else 0.0
            mixed.append(
                functional.scaled_dot_product_attention(q, k, v, bias, dropout, scale=_scale(attention))
            )
        return torch.cat(mixed, 1).transpose(1, 2).flatten(2)

    def at_marks(self, hidden: torch.Tensor, pairs: Sequence[TextPair]) -> torch.Tensor:
        """Return the rows of `hidden` at the three prefix tokens, float32 [N, 3, hidden]."""
        marks = torch.tensor([pair.marks for pair in pairs], device=hidden.device)
        return hidden[torch.arange(len(pairs), device=hidden.device)[:, None], marks]

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Return C [N] for the states [N, 3, hidden] at the prefix tokens."""
        source, first, second = states.unbind(1)
        return (
            self.head_layer(torch.cat([source, first], -1)) - self.head_layer(torch.cat([source, second], -1))
        )[:, 0]

    def forward(self, pairs: Sequence[TextPair]) -> torch.Tensor:
        """Return C for N pairs, float32 [N]."""
        return self.head(self.at_marks(self.hidden(pairs), pairs))

    @torch.inference_mode()
    def logits(self, pairs: Sequence[TextPair]) -> np.ndarray:
        """Return C for N pairs as NumPy, float32 [N]. Up to rounding, a pair's value does not depend on the others."""
        return self(pairs).float().cpu().numpy() if pairs else np.zeros(0, np.float32)


def _scale(attention: DisentangledSelfAttention) -> float:
    return 1 / math.sqrt(3 * attention.attention_head_size)


def _allocated(model: PairRM) -> PairRM:
    """Return a model of the meta device in memory, with arbitrary parameters and its one buffer filled."""
    assert {name for name, _ in model.named_buffers()} <= {_POSITION_IDS}, "a buffer that no checkpoint fills"
    model = model.to_empty(device="cpu")
    for _, ids in model.named_buffers():
        ids.copy_(torch.arange(ids.shape[-1]))
    return model


def load(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PairRM:
    """Return the network of a checkpoint in `dtype` on `device`, in evaluation mode.

    Raises BadInput, naming the tensor that is missing, extra, misshapen or not finite.
    """
    try:
        with torch.device("meta"):  # drawing random parameters would take most of the time
            model = PairRM(checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"PairRM: {str(checkpoint.directory)!r} describes no model: {error!r}") from None
    files.check_tensors(checkpoint, {name: tensor.shape for name, tensor in model.state_dict().items()})
    model = _allocated(model)
    wanted = model.state_dict()
    with files.opened(checkpoint.weights, "pt") as stored:
        for name, tensor in wanted.items():
            tensor.copy_(stored.get_tensor(name))
    model = model.to(device, dtype)
    for name, tensor in model.state_dict().items():
        kept = str(tensor.dtype).removeprefix("torch.")
        files.check_finite(checkpoint, name, bool(torch.isfinite(tensor).all()), kept)
    return model.fix()
