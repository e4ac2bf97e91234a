"""How recall is scored, and the model for bindings that arrive as one token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tidegate.models.block import Block
from tidegate.models.layers import Layers, parse
from tidegate.state import State
from tidegate.tasks.recall.data import IGNORE


class PairModel(nn.Module):
    """The blocks of a language model between sums of two embeddings and a head: `logits, state = model(pairs)`.

    pairs (B, T, 2) of key and value, where value number `values` is the mark of a question; logits (B, T, values).
    A token is the sum of its key's and its value's embedding, both standard normal.

    >>> model = PairModel(keys=8, values=4, dim=16, layers="2*gla")
    >>> logits, state = model(torch.zeros(1, 5, 2, dtype=torch.long))
    >>> logits.shape
    torch.Size([1, 5, 4])
    """

    def __init__(self, keys: int, values: int, dim: int, layers: Layers, **block_options: Any) -> None:
        super().__init__()
        self.keys, self.values, self.dim, self.layers = keys, values, dim, parse(layers)
        self.key_embedding = nn.Embedding(keys, dim)
        self.value_embedding = nn.Embedding(values + 1, dim)
        self.blocks = nn.ModuleList(
            Block(dim, name, options, layer_index=index, num_layers=len(self.layers), **block_options)
            for index, (name, options) in enumerate(self.layers)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, values, bias=False)

    def forward(self, pairs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if pairs.ndim != 3 or pairs.shape[-1] != 2:
            raise ValueError(f"pairs: seen shape {tuple(pairs.shape)}, wanted (batch, time, 2), key and value")
        x = self.key_embedding(pairs[..., 0]) + self.value_embedding(pairs[..., 1])
        side: dict[str, Tensor] = {}
        after: dict[str, State] = {}
        for index, block in enumerate(self.blocks):
            name = str(index)
            x, after[name] = block(x, None if state is None else state[name], None, side)
        return self.head(self.norm(x)), State(after)


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean loss (nats) and the share of right answers over all targets in `batches`.

    Raises ValueError if there is no target among them.
    """
    model.eval()
    losses: list[Tensor] = []
    right: list[Tensor] = []
    for inputs, targets in batches:
        scored = targets != IGNORE
        logits, targets = model(inputs)[0][scored], targets[scored]
        losses.append(cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(-1) == targets)
    if not sum(map(len, losses)):
        raise ValueError("batches: no position has a target; draw longer rows")
    return {"loss": _mean(losses), "accuracy": _mean(right)}


def _mean(parts: Sequence[Tensor]) -> float:
    return torch.cat(list(parts)).double().mean().item()
