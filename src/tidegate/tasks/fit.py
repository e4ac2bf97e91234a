"""Training for synthetic tasks: endless fresh batches, AdamW, warm-up, clipping. Real data has `tidegate.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import constrain_
from tidegate.nn.schedule import factor
from tidegate.nn.weight_decay import weight_decay_groups
from tidegate.tasks.score import losses as losses_of

Batch = tuple[Tensor, Tensor]  # what the model is given, and the targets (not scored: see tasks.targets)
SCHEDULES = ("constant", "cosine", "linear")


def fit(
    model: nn.Module,
    draw: Callable[[], Batch],
    *,
    steps: int,
    lr: float,
    warmup: int = 50,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    clip: float = 1.0,
    penalty: Callable[[], Tensor] | None = None,
    say: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` (as `outputs, state = model(inputs)`) on fresh batches from `draw`; gives the loss of every step.

    AdamW, gradients clipped to norm `clip`. The learning rate rises to `lr` over `warmup` steps and then stays
    ("constant") or falls to zero over the rest ("cosine", "linear"). Parameters whose name contains a key of `rates`
    have that peak instead of `lr`. `weight_decay` leaves out norms, biases, embeddings and what a mixer exempts. The
    loss is that of `tasks.score`, by the kind of the targets; `penalty`, if given, is asked after the forward for
    what is added to it (and left out of the list). `say` is told the steps done and the last loss. A loss that is not
    finite ends the training; its NaN is in the list.

    Raises ValueError for an unknown schedule, or an entry of `rates` that fits no parameter.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: seen {schedule!r}, wanted one of {', '.join(SCHEDULES)}")
    model.train()
    optimiser = torch.optim.AdamW(_groups(model, lr, weight_decay, rates or {}))
    seen: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor(step, kind=schedule, steps=steps, warmup=warmup)
        inputs, targets = draw()
        loss = losses_of(model(inputs)[0], targets)[0].mean()
        seen.append(loss.item())
        if penalty is not None:
            loss = loss + penalty()
        if not torch.isfinite(loss):
            break
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        constrain_(model)
        if say is not None:
            say(step + 1, seen[-1])
    return seen


def _groups(model: nn.Module, lr: float, weight_decay: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The decayed and the exempt parameters, each cut by peak rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for fragment in rates:
        if not any(fragment in name for name in names.values()):
            raise ValueError(f"rates: {fragment!r} is in no parameter's name; there are {', '.join(names.values())}")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in weight_decay_groups(model, weight_decay):
        for parameter in group["params"]:
            peak = next((rate for fragment, rate in rates.items() if fragment in names[id(parameter)]), lr)
            groups.setdefault((peak, group["weight_decay"]), []).append(parameter)
    return [{"params": group, "peak": peak, "weight_decay": decay} for (peak, decay), group in groups.items()]
