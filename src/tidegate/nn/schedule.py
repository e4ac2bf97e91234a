"""Learning-rate schedules, as factors of the peak."""

from __future__ import annotations

import math


def factor(step: int, *, kind: str, steps: int, warmup: int, decay: float = 0.0, minimum: float = 0.0) -> float:
    """The learning rate's factor at `step`: linear warm-up, then

    `"cosine"` falls along half a cosine to `minimum`, `"linear"` along a line; `"wsd"` stays at the peak and falls
    linearly to `minimum` over the last share `decay` of the steps; `"constant"` stays.

    >>> [round(factor(s, kind="wsd", steps=10, warmup=2, decay=0.4, minimum=0.0), 2) for s in (0, 1, 5, 8, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    if kind == "cosine":
        return minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2
    if kind == "linear":
        return 1 - (1 - minimum) * progress
    if kind == "wsd":
        length = decay * steps
        progress = min(max(step - (steps - length), 0) / length, 1.0) if length else 0.0
        return 1 - (1 - minimum) * progress
    return 1.0
