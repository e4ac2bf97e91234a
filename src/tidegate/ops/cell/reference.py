"""A cell, token by token, in PyTorch: any dtype, any device, differentiable as often as one likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.ops.cell.equations import Product
from tidegate.ops.loop import over_time
from tidegate.segments import Segments

if TYPE_CHECKING:
    from tidegate.ops.cell import Cell


def product(matrix: Tensor, operand: Tensor) -> Tensor:
    """(H, d_out, d_in) on (B, H, d), of which d_in count; filled up to d with zeros."""
    missing = operand.shape[-1] - matrix.shape[1]
    if matrix.shape[2] < operand.shape[-1]:
        operand = operand[..., : matrix.shape[2]]
    if matrix.shape[0] > 1:
        return torch.einsum("hij,bhj->bhi", matrix, operand)
    y = functional.linear(operand[:, 0], matrix[0])[:, None]
    return functional.pad(y, (0, missing)) if missing else y


def mean(*quantities: Tensor) -> Tensor:
    """Over all of them and the channels of each head, (B, H, 1)."""
    total = quantities[0]
    for other in quantities[1:]:
        total = total + other
    return total.mean(-1, keepdim=True) / len(quantities)


def where_negative(x: Tensor, yes: Tensor | float, no: Tensor | float) -> Tensor:
    # Of two plain numbers torch.where would make a tensor of the default dtype.
    return torch.where(x < 0, yes if isinstance(yes, Tensor) else x.new_full((), yes), no)


def full(x: Tensor, like: Tensor) -> Tensor:
    """What is the same for a whole batch, or for all channels of a head, written out."""
    return x.expand_as(like)


NAMES: dict[str, Any] = {
    "product": product,
    "mean": mean,
    "full": full,
    "where_negative": where_negative,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "softplus": lambda x: -functional.logsigmoid(-x),  # exact; PyTorch's own softplus is x above 20
}


def compile_step(source: str) -> Callable[..., Any]:
    """The function that `source.torch_step` wrote."""
    namespace = dict(NAMES)
    exec(compile(source, "<a cell's equations>", "exec"), namespace)
    step: Callable[..., Any] = namespace["step"]
    return step


def run(
    cell: Cell,
    inputs: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    state: Tensor,
    segments: Segments | None,
    clip: float,
    cut: int,
    narrow: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `Cell.__call__` after its checks. `clip` and `cut` are about gradients and act where they flow back.

    A projected state has `narrow` channels, or with 0 as many as the others.
    """
    heads, batch = matrices.shape[1] if cell.matrices else 1, inputs.shape[0]
    scales = vectors.unflatten(-1, (heads, -1))

    def step(carry: tuple[Tensor, ...], now: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (kept,) = carry  # (B, S, H, d)
        before = kept
        if cut or clip:
            number, flags = flags[0], flags[1:]
            before = _Gate.apply(before, number, clip, cut) if before.requires_grad else before
        if flags:
            before = torch.where(flags[0][:, None, None, None], 0, before)
        # Unbound in here: a traced loop may not hold two views of one tensor.
        output, new = cell.step(now.unbind(1), _used(cell, matrices, narrow), scales.unbind(0), before.unbind(1))
        after = new[0][:, None] if len(cell.states) == 1 else torch.stack(new, 1)
        if flags:
            real = flags[1][:, None, None]
            return (torch.where(real[..., None], after, kept),), torch.where(real, output, 0)
        return (after,), output

    flags = () if segments is None else (segments.starts, segments.valid)
    if cut or clip:
        flags = (torch.arange(inputs.shape[1], device=inputs.device).expand(batch, -1), *flags)
    (last,), y = over_time(step, (state.unflatten(-1, (heads, -1)),), (inputs.unflatten(-1, (heads, -1)), *flags))
    return y.flatten(-2), last.flatten(-2)


def _used(cell: Cell, matrices: Tensor, narrow: int) -> tuple[Tensor, ...]:
    """Every matrix without the rows and columns that belong to no channel of a projected state."""
    found = matrices.unbind(0)
    if not narrow:
        return found
    named, projected = dict(zip(cell.matrices, found, strict=True)), cell.program.projected
    for step in cell.program.steps:
        if isinstance(step, Product):
            matrix = named[step.matrix]
            matrix = matrix[:, :narrow] if step.symbol in projected else matrix
            named[step.matrix] = matrix[:, :, :narrow] if step.operand in projected else matrix
    return tuple(named.values())


class _Gate(torch.autograd.Function):
    """Nothing forward; backward the gradient of a step's states is clipped, and cut at every `cut`-th token."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, number: Tensor, clip: float, cut: int) -> Tensor:
        ctx.clip, ctx.stop = clip, bool(cut) and int(number[0]) % cut == 0
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> Any:
        if ctx.stop:
            return torch.zeros_like(flow), None, None, None
        return (flow.clamp(-ctx.clip, ctx.clip) if ctx.clip else flow), None, None, None
