"""The loop over time that every `reference.py` is written with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def over_time(
    step: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    carry: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    *,
    reverse: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Run `carry, output = step(carry, *inputs_at_t)` for every t and stack the outputs.

    `inputs` are (B, T, ...); a step sees (B, ...). Returns the last carry and the outputs (B, T, ...). Under
    `torch.export` the loop becomes one scan operator, so that the exported program takes any length.
    """
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.scan import scan

        def body(state: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            state, output = step(tuple(state), *now)
            return [tensor.clone() for tensor in state], [output.clone()]  # a scan's outputs may not alias its inputs

        last, (outputs,) = scan(body, list(carry), [x.movedim(1, 0) for x in inputs], dim=0, reverse=reverse)
        return tuple(last), outputs.movedim(0, 1)

    outputs = []
    order = range(inputs[0].shape[1])
    for t in reversed(order) if reverse else order:
        carry, output = step(carry, *(x[:, t] for x in inputs))
        outputs.append(output)
    return carry, torch.stack(outputs[::-1] if reverse else outputs, dim=1)
