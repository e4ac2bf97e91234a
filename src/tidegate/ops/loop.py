"""The loop over time that every `reference.py` is written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    `torch.export` and `torch.compile` the loop becomes one scan operator, so that the program takes any length. That
    operator has no gradients for complex numbers.
    """
    if torch.compiler.is_compiling():
        return _as_one_operator(step, carry, inputs, reverse)

    outputs = []
    # Unbound, not indexed: the gradient of x[:, t] is a tensor as large as x, at every step.
    steps = list(zip(*(x.unbind(1) for x in inputs), strict=True))
    for now in reversed(steps) if reverse else steps:
        carry, output = step(carry, *now)
        outputs.append(output)
    return carry, torch.stack(outputs[::-1] if reverse else outputs, dim=1)


def _as_one_operator(
    step: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    carry: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    reverse: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    from torch._higher_order_ops.scan import scan

    def body(state: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new, output = step(tuple(state), *now)
        return _copies(new), _copies([output])

    last, (outputs,) = scan(body, _copies(carry), [x.movedim(1, 0) for x in inputs], dim=0, reverse=reverse)
    return tuple(last), outputs.movedim(0, 1)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    # The operator's outputs may not alias its inputs, and a carry must keep its strides.
    return [x.clone(memory_format=torch.contiguous_format) for x in tensors]
