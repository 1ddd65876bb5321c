"""Stage 2, second half, in PyTorch: token ids of pairs → PairRM's logits.

The network is built from config.json and filled from model.safetensors. It is never made by `from_pretrained`, which
keeps the data type of whatever checkpoint it meets and so can squeeze float32 weights through float16 on the way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from sppo_jax.errors import BadInput
from sppo_jax.pairrm.format import Pair
from sppo_jax.pairrm.layout import Checkpoint

# A buffer that checkpoints written by old versions of transformers carry; a row of integers, not a weight.
_BUFFERS = {"pretrained_model.embeddings.position_ids"}


class PairRM(nn.Module):
    """DeBERTa-v2 and the pair head: C = f(e_1) - f(e_2), f(e) = W2 tanh(W1 [e_source; e] + b1) + b2.

    e_source, e_1 and e_2 are the last hidden states at the three prefix tokens. sigmoid(C) is the model's probability that
    the first response is better, given that it is shown first.
    """

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

    def hidden(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Last hidden states, float32 [N, T, hidden], T the longest of N; padding is masked and changes nothing."""
        longest = max(map(len, pairs))
        ids = np.full((len(pairs), longest), self.pad_id, np.int64)
        mask = np.zeros((len(pairs), longest), np.int64)
        for row, pair in enumerate(pairs):
            ids[row, : len(pair)] = pair.ids
            mask[row, : len(pair)] = 1
        device = self.head_layer[1].weight.device
        ids_NT, mask_NT = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        return self.pretrained_model(ids_NT, mask_NT).last_hidden_state

    def at_marks(self, hidden: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        """The rows of `hidden` at the three prefix tokens, float32 [N, 3, hidden]."""
        marks = torch.tensor([pair.marks for pair in pairs], device=hidden.device)
        return hidden[torch.arange(len(pairs), device=hidden.device)[:, None], marks]

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """states [N, 3, hidden] → C [N]."""
        source, first, second = states.unbind(1)
        return (
            self.head_layer(torch.cat([source, first], -1)) - self.head_layer(torch.cat([source, second], -1))
        )[:, 0]

    def forward(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """C for N pairs, float32 [N]."""
        return self.head(self.at_marks(self.hidden(pairs), pairs))

    @torch.inference_mode()
    def logits(self, pairs: Sequence[Pair]) -> np.ndarray:
        """C for N pairs as NumPy, float32 [N]. A pair's value does not depend on the others, up to rounding."""
        return self(pairs).float().cpu().numpy() if pairs else np.zeros(0, np.float32)


def load(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PairRM:
    """Its network in `dtype` on `device`, in evaluation mode. Raises BadInput naming the tensor that is missing, extra or misshapen."""
    try:
        model = PairRM(checkpoint.config)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"PairRM: {str(checkpoint.directory)!r} describes no model: {error!r}") from None
    file = checkpoint.weights
    wanted = model.state_dict()
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys()) - _BUFFERS
            for problem, odd in (
                ("lacks", wanted.keys() - names),
                ("has the unknown", names - wanted.keys()),
            ):
                if odd:
                    raise BadInput(f"PairRM: {str(file)!r} {problem} tensor {min(odd)} ({len(odd)} such)")
            for name, tensor in wanted.items():
                value = stored.get_tensor(name)
                if value.shape != tensor.shape:
                    raise BadInput(
                        f"PairRM: {str(file)!r} has {name} as {list(value.shape)}, config.json asks for {list(tensor.shape)}"
                    )
                tensor.copy_(value)
    except SafetensorError as error:
        raise BadInput(f"PairRM: {str(file)!r} is unreadable: {error}") from None
    return model.to(device, dtype).eval()
