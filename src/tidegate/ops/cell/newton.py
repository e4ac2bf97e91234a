"""A cell without a loop over time: all tokens at once, by Newton's method.

The states h_1 ... h_T of h_t = f(h_{t-1}, x_t) are the root of T equations. Linearised where an iterate stands, they
are a linear recurrence (arXiv 2510.21450)::

    r_t = f(h_{t-1}, x_t) - h_t        delta_t = J_t delta_{t-1} + r_t        h <- h + delta        J_t = df / dh_{t-1}

After k iterations the first k tokens are exact, whatever the start; usually all are after a few. Where every channel
depends on itself alone, J_t is a block of S x S per channel, S the number of states, and this is Newton's method. With
recurrent matrices, their diagonals stand in for them (quasi-Newton): the same root, reached more slowly.

Backward there is nothing to iterate: the gradients of the states are a linear recurrence with the transposed blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy import Expr, Symbol
from torch import Tensor

from tidegate.ops.block_scan import block_scan
from tidegate.ops.cell import derivatives, reference
from tidegate.ops.cell.equations import Let, Mean, Product, Program
from tidegate.ops.cell.printing import emit, identifier
from tidegate.segments import Segments

if TYPE_CHECKING:
    from tidegate.ops.cell import Cell

MAX_ITERATIONS = 32


@dataclass(frozen=True)
class Solution:
    """`states` (B, T, S, D) after `iterations`, and the largest |r| that is left, relative to the states."""

    states: Tensor
    iterations: int
    residual: float
    converged: bool


# -- the Jacobian ------------------------------------------------------------------------------------------------------
def is_elementwise(program: Program) -> bool:
    """Whether every channel depends on itself alone, so that the blocks are the whole Jacobian."""
    return not any(isinstance(step, Product | Mean) for step in program.steps)


def jacobian(program: Program) -> list[list[Expr]]:
    """d new state / d old state, within a channel. A matrix counts with its diagonal, a mean not at all."""
    columns = []
    for state in program.states:
        tangents: dict[Symbol, Expr] = {program.old(state): sympy.Integer(1)}
        for step in program.steps:
            if isinstance(step, Product):
                tangents[step.symbol] = Symbol(f"diagonal {step.matrix}") * tangents.get(step.operand, 0)
            elif isinstance(step, Let):
                parts = [
                    sympy.diff(step.expression, symbol) * tangents[symbol]
                    for symbol in sorted(step.expression.free_symbols, key=str)
                    if tangents.get(symbol, 0) != 0
                ]
                tangents[step.symbol] = sympy.Add(*parts)
        columns.append([tangents.get(new, sympy.Integer(0)) for new in program.new])
    return [list(row) for row in zip(*columns, strict=True)]


def source(program: Program) -> str:
    """`new, blocks = step(inputs, matrices, vectors, states)`, in PyTorch: new states, and their Jacobian by rows."""
    entries = jacobian(program)
    lets = [step for step in program.steps if isinstance(step, Let)]
    wanted = [(Symbol(f"J {s} {k}"), entry) for s, row in enumerate(entries) for k, entry in enumerate(row)]
    results = [*((new, new) for new in program.new), *wanted]
    taken = [(let.symbol, let.symbol) for let in lets]  # what only a product or a mean needs has to be there, too
    done = derivatives.shared(lets, [*results, *taken])
    lines: dict[Symbol, str] = {}
    needs: dict[Symbol, Iterable[Symbol]] = {}
    for symbol, expression in done.lets:
        lines[symbol], needs[symbol] = emit(expression), expression.free_symbols
    for step in program.steps:
        if isinstance(step, Product):
            lines[step.symbol] = f"product({identifier(step.matrix)}, {identifier(step.operand)})"
            needs[step.symbol] = (step.operand,)
        elif isinstance(step, Mean):
            lines[step.symbol] = f"mean({', '.join(map(identifier, step.operands))})"
            needs[step.symbol] = step.operands
    order: dict[Symbol, None] = {}

    def visit(symbols: Iterable[Symbol]) -> None:
        for symbol in sorted(symbols, key=str):
            if symbol in lines and symbol not in order:
                visit(needs[symbol])
                order[symbol] = None

    stored = [expression for _, expression in done.results[: len(results)]]
    for expression in stored:
        visit(expression.free_symbols)
    text = "def step(inputs, matrices, vectors, states):\n"
    for names, argument in (
        (program.inputs, "inputs"),
        (program.matrices, "matrices"),
        (program.vectors, "vectors"),
        (program.states, "states"),
    ):
        text += f"    {', '.join(map(identifier, names))}, = {argument}\n" if names else ""
    for matrix in program.matrices:
        text += f"    {identifier(f'diagonal {matrix}')} = {identifier(matrix)}.diagonal(dim1=1, dim2=2)\n"
    text += "".join(f"    {identifier(symbol)} = {lines[symbol]}\n" for symbol in order)
    written, states = [emit(expression) for expression in stored], len(program.states)
    return text + f"    return ({', '.join(written[:states])},), ({', '.join(written[states:])},)\n"


# -- all tokens at once ------------------------------------------------------------------------------------------------
class _Sequence:
    """A cell on a whole sequence, given the states before every token."""

    def __init__(
        self, cell: Cell, inputs: Tensor, matrices: Tensor, vectors: Tensor, segments: Segments | None, cut: int
    ) -> None:
        self.cell, self.heads = cell, matrices.shape[1] if cell.matrices else 1
        self.inputs, self.matrices, self.vectors = inputs, matrices, vectors
        self.starts = None if segments is None else segments.starts[..., None, None]
        self.valid = None if segments is None else segments.valid[..., None, None]
        batch, time = inputs.shape[:2]
        through = torch.ones(batch, time, dtype=torch.bool, device=inputs.device)
        if cut:
            through &= (torch.arange(time, device=inputs.device) % cut) != 0
        if segments is not None:  # a cut on padding is none: there is no step
            through = torch.where(segments.valid, through & ~segments.starts, True)
        self.through = through[..., None, None]  # where gradient flows into the token before

    def before(self, states: Tensor, first: Tensor) -> Tensor:
        """The states that each token begins with."""
        shifted = torch.cat([first[:, None], states[:, :-1]], 1)
        return shifted if self.starts is None else torch.where(self.starts, 0, shifted)

    def step(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, T, D) and the new states (B, T, S, D)."""
        output, new = self.cell.step(*self._arguments(before))
        y, after = self._whole(output), torch.stack([self._whole(state) for state in new], 2)
        if self.valid is None:
            return y, after
        return torch.where(self.valid[..., 0], y, 0), torch.where(self.valid, after, before)

    def linearised(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The new states and the blocks (B, T, S, S, D)."""
        new, entries = self.cell.newton_step(*self._arguments(before))
        after, size = torch.stack([self._whole(state) for state in new], 2), len(self.cell.states)
        blocks = torch.stack([self._whole(entry) for entry in entries], 2).unflatten(2, (size, size))
        if self.valid is not None and self.starts is not None:
            same = torch.eye(size, dtype=blocks.dtype, device=blocks.device)[..., None]
            after = torch.where(self.valid, after, before)
            blocks = torch.where(self.valid[..., None], blocks, same)
            blocks = torch.where(self.starts[..., None], 0, blocks)
        return after, blocks

    def _arguments(self, before: Tensor) -> tuple[Any, ...]:
        def split(x: Tensor) -> Tensor:
            return x.flatten(0, 1).unflatten(-1, (self.heads, -1))

        scales = self.vectors.unflatten(-1, (self.heads, -1))
        return split(self.inputs).unbind(1), self.matrices.unbind(0), scales.unbind(0), split(before).unbind(1)

    def _whole(self, x: Tensor | float) -> Tensor:
        batch, time, _, dim = self.inputs.shape
        if not isinstance(x, Tensor):
            return self.inputs.new_full((batch, time, dim), x)
        return x.expand(batch * time, self.heads, dim // self.heads).reshape(batch, time, dim)


@torch.no_grad()
def solve(
    cell: Cell,
    inputs: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    state: Tensor,
    segments: Segments | None = None,
    *,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float | None = None,
) -> Solution:
    """The states of all tokens; arguments as `Cell.__call__`'s. It starts from f(0, x_t).

    The tolerance is by default 16 times the dtype's rounding; a residual that small is mostly rounding.
    """
    tolerance = 16 * torch.finfo(inputs.dtype).eps if tolerance is None else tolerance
    sequence = _Sequence(cell, inputs, matrices, vectors, segments, 0)
    states = sequence.step(torch.zeros_like(state)[:, None].expand(-1, inputs.shape[1], -1, -1))[1]
    for iterations in range(max_iterations + 1):
        after, blocks = sequence.linearised(sequence.before(states, state))
        rest = after - states
        # Of a state that is large somewhere zeros count as zeros; of one that is small everywhere its size counts.
        size = after.abs().amax((0, 1, 3), keepdim=True).clamp(torch.finfo(after.dtype).tiny, 1)
        residual = float((rest.abs() / (size + after.abs())).max())
        if residual <= tolerance:
            return Solution(after, iterations, residual, True)
        if iterations == max_iterations or not residual < float("inf"):
            break
        states = states + block_scan(blocks, rest)
    return Solution(states, iterations, residual, False)


def run(
    cell: Cell,
    inputs: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    state: Tensor,
    segments: Segments | None,
    cut: int,
) -> tuple[Tensor, Tensor] | None:
    """As `reference.run`; None where the iterations do not converge, which a loop over time is the answer to."""
    if not inputs.numel():  # of nothing, no largest residual
        return None
    solution = solve(cell, inputs, matrices, vectors, state, segments)
    if not solution.converged:
        return None
    flags = (None, None) if segments is None else (segments.starts, segments.valid)
    y, last = _Solved.apply(cell, inputs, matrices, vectors, state, solution.states, *flags, cut)
    return y, last


class _Solved(torch.autograd.Function):
    """y and the last states from all states, which are known; gradients by the adjoint recurrence."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        inputs: Tensor,
        matrices: Tensor,
        vectors: Tensor,
        state: Tensor,
        states: Tensor,
        starts: Tensor | None,
        valid: Tensor | None,
        cut: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.cell, ctx.cut = cell, cut
        ctx.save_for_backward(inputs, matrices, vectors, state, states, starts, valid)
        sequence = _Sequence(cell, inputs, matrices, vectors, _segments(starts, valid), cut)
        y, after = sequence.step(sequence.before(states, state))
        return y, after[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        inputs, matrices, vectors, state, states, starts, valid = ctx.saved_tensors
        cell, cut, segments = ctx.cell, ctx.cut, _segments(starts, valid)
        if torch.is_grad_enabled():  # gradients of gradients: as functions of everything, from the loop over time

            def form(x: Tensor, matrices: Tensor, vectors: Tensor, state: Tensor) -> tuple[Tensor, ...]:
                return reference.run(cell, x, matrices, vectors, state, segments, 0.0, cut)

            from tidegate.ops.kernels import differentiable_gradients

            found = differentiable_gradients(form, [inputs, matrices, vectors, state], (dy, dlast))
            return (None, *found, None, None, None, None)
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in (inputs, matrices, vectors)]
            sequence = _Sequence(cell, given[0], given[1], given[2], segments, cut)
            before = sequence.before(states, state).detach().requires_grad_()
            y, after = sequence.step(before)

        def pulled(flow: Tensor) -> list[Tensor]:
            """What `flow` into the new states and dy into y give to inputs, matrices, vectors and old states."""
            wanted = [*given, before]
            found = torch.autograd.grad((y, after), wanted, (dy, flow), retain_graph=True, allow_unused=True)
            return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]

        with torch.no_grad():
            blocks = sequence.linearised(before)[1].transpose(2, 3)
            blocks = torch.where(sequence.through[..., None], blocks, 0)
            following = torch.cat([blocks[:, 1:], torch.zeros_like(blocks[:, :1])], 1)
        flow, accuracy = torch.zeros_like(states), 8 * torch.finfo(states.dtype).eps
        # Once for blocks that are the whole Jacobian; with matrices each round makes at least one more token exact.
        for _ in range(states.shape[1] + 1):
            gradients = pulled(flow)
            earlier = torch.where(sequence.through, gradients[-1], 0)
            rest = torch.cat([earlier[:, 1:], dlast[:, None]], 1) - flow
            if float(rest.abs().max()) <= accuracy * float(flow.abs().max()):
                break
            flow = flow + block_scan(following, rest, reverse=True)
        return (None, *gradients[:-1], earlier[:, 0], None, None, None, None)


def _segments(starts: Tensor | None, valid: Tensor | None) -> Segments | None:
    return None if starts is None or valid is None else Segments(starts, valid)
