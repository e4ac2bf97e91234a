"""Nonlinear recurrent cells from their equations: `h_t = f(x_t, h_{t-1})`, written once, everything else derived."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tidegate.backend import choose, sees_values
from tidegate.ops.calls import recurrence
from tidegate.ops.cell.equations import Program, read
from tidegate.ops.cell.reference import compile_step
from tidegate.ops.cell.source import Kernels, torch_step
from tidegate.segments import Segments, zero_padding

_cells: dict[str, Cell] = {}


class Cell:
    """A recurrent cell, declared by its equations.

    One equation per line, `name = expression`, in the order in which they are computed. What a name is follows from how
    it is used::

        W @ x    the input, through a matrix of its own: computed for all time beforehand, as one product
        U @ h    a recurrent matrix (block-diagonal, one block per head) times a state, or any quantity: U @ (r * h)
        b, p     any other name: a vector, one number per channel (a bias, a peephole)
        h, c     a state: before its equation its value at t - 1, after it that at t
        x        on its own: the input as it is
        y        the output, where it is not the first state

    There are + - * / ** and sigmoid, tanh, exp, log, sqrt, softplus, log_sigmoid, relu, abs, maximum, minimum, clip,
    where(a < b, value, other), and mean(a, ...) over the channels of a head.

    From this follow the step in PyTorch, kernels for forward and backward over whole sequences (SymPy derives the
    gradients; the kernels are compiled by Numba at their first call and kept on disk), and whatever the state contract
    asks for: any split, documents, padding.

    A state that is nothing but a product and that only products take, as `h = R @ (o * tanh(c))` where the gates take
    U @ h, is projected: it may have fewer channels than the rest (`projected_dim`).

    `y, state = cell(inputs, matrices, vectors, state)` with `inputs` (B, T, G, D), the products with x in the order of
    `cell.inputs`; `matrices` (M, H, d, d), each (out, in), as in `cell.matrices`, d = D / H; `vectors` (V, D), as in
    `cell.vectors`; `state` (B, S, D), as in `cell.states`, zeros without. y (B, T, D).

    Raises ValueError that quotes the offending equation with a mark under what is wrong.

    >>> import torch
    >>> fading = Cell("h = sigmoid(a) * h + W @ x", states="h")
    >>> fading.inputs, fading.vectors
    (('W',), ('a',))
    >>> y, state = fading(torch.tensor([[[[4.0]], [[2.0]]]]), None, torch.zeros(1, 1))
    >>> y.flatten().tolist(), state.tolist()
    ([4.0, 4.0], [[[4.0]]])
    """

    def __init__(self, equations: str, states: str | Sequence[str]) -> None:
        self.equations = "\n".join(line.strip() for line in equations.strip().splitlines())
        self.states = tuple(states.replace(",", " ").split() if isinstance(states, str) else states)
        self.key = hashlib.sha256(repr((self.equations, self.states)).encode()).hexdigest()[:16]
        self.program: Program = read(self.equations, self.states)  # mistakes are found where the cell is written
        self.inputs, self.matrices, self.vectors = self.program.inputs, self.program.matrices, self.program.vectors
        self.projected = tuple(s for s in self.states if self.program.old(s) in self.program.projected)
        self.step: Callable[..., Any] = compile_step(torch_step(self.program))  # one token in PyTorch: see `source`
        _cells[self.key] = self

    @cached_property
    def kernels(self) -> Kernels:
        """The source of the CPU kernels, written when they are first needed."""
        return Kernels(self.program, self.equations)

    @cached_property
    def newton_step(self) -> Callable[..., Any]:
        """One token in PyTorch with the blocks of its Jacobian: see `newton.source`."""
        from tidegate.ops.cell import newton

        return compile_step(newton.source(self.program))

    @property
    def source(self) -> str:
        """What is generated from the equations: the step in PyTorch, and the kernels."""
        return f"# PyTorch\n{torch_step(self.program)}\n\n# CPU kernels\n{self.kernels.source()}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (self.equations, self.states)  # copies and pickles are made from the text

    def __repr__(self) -> str:
        return f"Cell({self.equations!r}, states={' '.join(self.states)!r})"

    @partial(recurrence, name="cell")
    def __call__(
        self,
        inputs: Tensor,
        matrices: Tensor | None = None,
        vectors: Tensor | None = None,
        state: Tensor | None = None,
        *,
        segments: Segments | None = None,
        gradient_clip: float | None = None,
        truncate: int | None = None,
        method: str | None = None,
        projected_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the cell over a sequence; see the class.

        `gradient_clip` bounds every element of the gradient that flows from a token to the states before it;
        `truncate` lets none flow past every `truncate`-th token of the call (truncated back-propagation).

        `method` "sequential" takes one token after the other, in kernels where there are some. "newton" solves for all
        tokens at once (see `tidegate.ops.cell.newton`), with the same result; where the iterations do not converge,
        the sequential method takes over. By default, "newton" is for cells without recurrent matrices where no kernels
        are: on other devices than the CPU.

        `projected_dim` is how many channels projected states have, at most d, with one head. The shapes stay: rows and
        columns of matrices, and channels of states and y, that lie beyond are zero and are not computed with.
        """
        matrices, vectors, state = self._check(inputs, matrices, vectors, state, gradient_clip, truncate, method)
        narrow = self._narrow(projected_dim, matrices)
        wide = state.dtype
        inputs_wide = zero_padding(inputs, segments).to(wide)
        clip, cut = float(gradient_clip or 0.0), truncate or 0
        form = choose(inputs)
        if method == "newton" or (method is None and form == "parallel" and self._suits_newton(inputs, clip)):
            from tidegate.ops.cell import newton

            solved = newton.run(self, inputs_wide, matrices.to(wide), vectors.to(wide), state, segments, cut)
            if solved is not None:
                return solved[0].to(inputs.dtype), solved[1]
        # For one token alone, packing the matrices costs the kernels more than the product does.
        if form == "numba" and inputs.shape[0] and inputs.shape[1] > 1:
            from tidegate.ops.cell.numba_cpu import run
        else:
            from tidegate.ops.cell.reference import run
        y, state = run(self, inputs_wide, matrices.to(wide), vectors.to(wide), state, segments, clip, cut, narrow)
        return y.to(inputs.dtype), state

    def _narrow(self, projected_dim: int | None, matrices: Tensor) -> int:
        """The channels that projected states have; 0: as many as others."""
        heads, width = matrices.shape[1], matrices.shape[3]
        if projected_dim is None:
            return 0
        if not self.projected:
            raise ValueError(
                "projected_dim: this cell has no state that is a product and goes into products only, h = R @ ..."
            )
        if heads != 1 or projected_dim != int(projected_dim) or not 1 <= projected_dim <= width:
            raise ValueError(
                f"projected_dim: seen {projected_dim} for {heads} heads of {width}, wanted one head and 1 to {width}"
            )
        return projected_dim

    def _suits_newton(self, inputs: Tensor, clip: float) -> bool:
        """Whether all tokens at once are worth a try: how often one has to is known only when numbers are there."""
        from tidegate.ops.cell.newton import is_elementwise

        worthwhile = inputs.shape[1] > 1 and inputs.numel() > 0 and is_elementwise(self.program)
        return worthwhile and not clip and sees_values(inputs)

    def _check(
        self,
        inputs: Tensor,
        matrices: Tensor | None,
        vectors: Tensor | None,
        state: Tensor | None,
        clip: float | None,
        truncate: int | None,
        method: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if inputs.ndim != 4 or inputs.shape[2] != len(self.inputs) or inputs.shape[1] == 0:
            raise ValueError(
                f"inputs: seen shape {tuple(inputs.shape)}, wanted (batch, time >= 1, {len(self.inputs)}, dim) for "
                f"{', '.join(self.inputs) or 'none'}"
            )
        if not inputs.is_floating_point():
            raise ValueError(f"inputs: seen {inputs.dtype}, wanted real numbers")
        batch, _, _, dim = inputs.shape
        matrices = inputs.new_empty(0, 1, dim, dim) if matrices is None else matrices
        vectors = inputs.new_empty(0, dim) if vectors is None else vectors
        if matrices.ndim != 4 or matrices.shape[0] != len(self.matrices) or matrices.shape[1] < 1:
            raise ValueError(
                f"matrices: seen shape {tuple(matrices.shape)}, wanted ({len(self.matrices)}, heads, d, d) for "
                f"{', '.join(self.matrices) or 'none'}"
            )
        if self.matrices and (dim % matrices.shape[1] or {*matrices.shape[2:]} != {dim // matrices.shape[1]}):
            raise ValueError(
                f"matrices: seen shape {tuple(matrices.shape)}, wanted blocks of (d, d) with heads * d = {dim}"
            )
        if tuple(vectors.shape) != (len(self.vectors), dim):
            raise ValueError(
                f"vectors: seen shape {tuple(vectors.shape)}, wanted ({len(self.vectors)}, {dim}) for "
                f"{', '.join(self.vectors) or 'none'}"
            )
        wide = torch.float32 if inputs.dtype in (torch.bfloat16, torch.float16) else inputs.dtype
        wanted = (batch, len(self.states), dim)
        if state is None:
            state = inputs.new_zeros(wanted, dtype=wide)
        if tuple(state.shape) != wanted:
            raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted {wanted} for {', '.join(self.states)}")
        if clip is not None and not clip > 0:
            raise ValueError(f"gradient_clip: seen {clip}, wanted more than 0, or None")
        if truncate is not None and (truncate < 1 or truncate != int(truncate)):
            raise ValueError(f"truncate: seen {truncate}, wanted a whole number of tokens, at least 1, or None")
        if method not in (None, "sequential", "newton"):
            raise ValueError(f"method: seen {method!r}, wanted 'sequential', 'newton' or None for the one that suits")
        if method == "newton" and clip:
            raise ValueError("gradient_clip: the method 'newton' knows no gradients of single steps; use 'sequential'")
        return matrices, vectors, state.to(wide)


def find(key: str) -> Cell:
    """The cell of a key, for the operators, which take only plain values."""
    return _cells[key]
