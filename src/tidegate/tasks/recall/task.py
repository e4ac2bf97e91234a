"""The model for bindings that arrive as one token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tidegate.models.layers import Layers
from tidegate.models.stack import Stack
from tidegate.state import State


class PairModel(Stack):
    """The blocks of a language model between sums of two embeddings and a head: `logits, state = model(pairs)`.

    pairs (B, T, 2) of key and value, where value number `values` is the mark of a question; logits (B, T, values).
    A token is the sum of its key's and its value's embedding, both standard normal.

    >>> import torch
    >>> model = PairModel(keys=8, values=4, dim=16, layers="2*gla")
    >>> logits, state = model(torch.zeros(1, 5, 2, dtype=torch.long))
    >>> logits.shape
    torch.Size([1, 5, 4])
    """

    def __init__(self, keys: int, values: int, dim: int, layers: Layers, **block_options: Any) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.key_embedding = nn.Embedding(keys, dim)
        self.value_embedding = nn.Embedding(values + 1, dim)
        self._build_blocks(dim, layers, **block_options)
        self.head = nn.Linear(dim, values, bias=False)

    def forward(self, pairs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if pairs.ndim != 3 or pairs.shape[-1] != 2:
            raise ValueError(f"pairs: seen shape {tuple(pairs.shape)}, wanted (batch, time, 2), key and value")
        self._check_state(state)
        x = self.key_embedding(pairs[..., 0]) + self.value_embedding(pairs[..., 1])
        x, after = self._run(x, state, None)
        return self.head(x), State(after)
