"""Training for synthetic tasks: endless fresh batches, AdamW, warm-up, clipping. Real data has `tidegate.train`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]  # what the model is given, and the target of every position (-100: not scored)


def fit(
    model: nn.Module,
    draw: Callable[[], Batch],
    *,
    steps: int,
    lr: float,
    warmup: int = 50,
    clip: float = 1.0,
    say: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` (as `logits, state = model(inputs)`) on fresh batches from `draw`; gives the loss of every step.

    AdamW without weight decay, a linear warm-up and then a constant rate, gradients clipped to norm `clip`. `say` is
    told the steps done and the last loss. A loss that is not finite ends the training; its NaN is in the list.
    """
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        inputs, targets = draw()
        loss = cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        if not torch.isfinite(loss):
            break
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        if say is not None:
            say(step + 1, losses[-1])
    return losses
