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
    `torch.export` and `torch.compile` the loop becomes one scan operator, so that the program takes any length; the
    output of a step is then to be complex if the first of its carry is.
    """
    if torch.compiler.is_compiling():
        return _as_one_operator(step, carry, inputs, reverse)

    outputs = []
    order = range(inputs[0].shape[1])
    for t in reversed(order) if reverse else order:
        carry, output = step(carry, *(x[:, t] for x in inputs))
        outputs.append(output)
    return carry, torch.stack(outputs[::-1] if reverse else outputs, dim=1)


def _as_one_operator(
    step: Callable[..., tuple[tuple[Tensor, ...], Tensor]],
    carry: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    reverse: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    from torch._higher_order_ops.scan import scan

    # The operator cannot cut complex tensors into time steps: they go in and out as pairs of real numbers.
    of_carry, of_inputs = [x.is_complex() for x in carry], [x.is_complex() for x in inputs]

    def body(state: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new, output = step(tuple(_complex(state, of_carry)), *_complex(now, of_inputs))
        # The operator's outputs may not alias its inputs.
        return [tensor.clone() for tensor in _real(new)], [tensor.clone() for tensor in _real([output])]

    last, (outputs,) = scan(body, _real(carry), [x.movedim(1, 0) for x in _real(inputs)], dim=0, reverse=reverse)
    (outputs,) = _complex([outputs.movedim(0, 1)], of_carry[:1])
    return tuple(_complex(last, of_carry)), outputs


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in tensors]


def _complex(tensors: Sequence[Tensor], which: Sequence[bool]) -> list[Tensor]:
    return [torch.complex(x[..., 0], x[..., 1]) if pair else x for x, pair in zip(tensors, which, strict=True)]
