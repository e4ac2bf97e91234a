"""How recall is scored, and the model for bindings that arrive as one token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tidegate.tasks.recall.data import IGNORE


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean loss (nats) and the share of right answers over all targets in `batches`."""
    model.eval()
    loss = right = count = 0.0
    for inputs, targets in batches:
        scored = targets != IGNORE
        logits, targets = model(inputs)[0][scored], targets[scored]
        loss += cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += targets.numel()
    return {"loss": loss / count, "accuracy": right / count}
