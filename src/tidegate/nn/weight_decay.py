"""Which parameters weight decay pulls towards zero."""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_decay_groups(model: nn.Module, weight_decay: float, *, embeddings: bool = False) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: decayed, and exempt.

    Matrices decay. Exempt are vectors (norms, biases), parameters named in a module's `no_weight_decay` (gates and
    decays, whose zero is no natural resting place), and embeddings unless `embeddings`: a rare token would shrink by
    the steps in which it does not occur. Frozen parameters are in neither group.
    """
    exempt = set()
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", ())
        if isinstance(module, nn.Embedding) and not embeddings:
            names = (*names, "weight")
        exempt |= {f"{prefix}.{name}" if prefix else name for name in names}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
