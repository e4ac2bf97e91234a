"""How answers are scored, whatever the task: by the kind of its targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from tidegate.tasks.targets import scored


def losses(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every scored target, the answers and the targets there.

    - Real targets, of the outputs' shape: squared error; the answer is the output itself.
    - Whole ones without the outputs' last axis: classes, cross-entropy of logits; the answer is the likeliest.
    - Whole ones of the outputs' shape: bits 0 and 1, cross-entropy of one logit each; the answer is its sign.
    """
    where = scored(targets)
    if outputs.shape == targets.shape:
        outputs, targets = outputs[where], targets[where]
        if targets.is_floating_point():
            return mse_loss(outputs, targets, reduction="none"), outputs, targets
        bits = targets.to(outputs.dtype)
        return binary_cross_entropy_with_logits(outputs, bits, reduction="none"), (outputs > 0).long(), targets
    if targets.is_floating_point() or outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"outputs, targets: seen shapes {tuple(outputs.shape)} and {tuple(targets.shape)} ({targets.dtype}), "
            "wanted equal shapes, or whole numbers without the outputs' last axis"
        )
    outputs, targets = outputs[where], targets[where]
    return cross_entropy(outputs, targets, reduction="none"), outputs.argmax(-1), targets


@torch.no_grad()
def score(model: Callable[..., tuple[Tensor, Any]], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean loss over all targets in `batches` (nats or squared error), and beside it what reads more easily.

    That is the share of right answers, "accuracy", for classes and bits; the error over the targets' variance, "nmse"
    (1 for answering the mean), for real targets. A model that has an `eval` is put into evaluation mode.

    Raises ValueError if there is no target among them.
    """
    if isinstance(model, torch.nn.Module):
        model.eval()
    parts = [losses(model(inputs)[0], targets) for inputs, targets in batches]
    if not sum(len(part) for part, _, _ in parts):
        raise ValueError("batches: no position has a target; draw longer rows")
    loss, answers, targets = (torch.cat(column).double() for column in zip(*parts, strict=True))
    mean = loss.mean().item()
    if parts[0][2].is_floating_point():
        return {"loss": mean, "nmse": mean / targets.var(correction=0).item()}
    return {"loss": mean, "accuracy": (answers == targets).double().mean().item()}


def majority(targets: Tensor) -> float:
    """The accuracy of always answering the most frequent class.

    >>> majority(torch.tensor([3, 3, 1, -100]))
    0.6666666666666666
    """
    targets = targets[scored(targets)]
    return targets.unique(return_counts=True)[1].max().item() / len(targets)
