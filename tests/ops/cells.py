"""Two independent readings of a cell for its tests: its equations run by Python itself, and its kernels uncompiled."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate import Segments
from tidegate.ops import kernels
from tidegate.ops.cell import Cell, numba_cpu
from tidegate.ops.cell.loops import PANEL

Step = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


# -- the equations as Python, one line after the other -----------------------------------------------------------------
class Matrix:
    """`M @ q` with whatever `apply` does."""

    def __init__(self, apply: Callable[[Any], Tensor]) -> None:
        self.apply = apply

    def __matmul__(self, other: Any) -> Tensor:
        return self.apply(other)


def blocks(U: Tensor, q: Tensor) -> Tensor:
    """A block-diagonal matrix (H, d, d) times (B, D), block by block."""
    q = q.expand(q.shape[0], U.shape[0] * U.shape[1])
    return torch.cat([part @ block.T for part, block in zip(q.chunk(len(U), -1), U, strict=True)], -1)


def where(condition: Tensor, value: Any, other: Any) -> Tensor:
    one = torch.ones(getattr(condition, "shape", ()), dtype=torch.float64)
    condition = torch.as_tensor(condition)
    return torch.where(condition, value * one, other * one)


def functions(heads: int, like: Tensor) -> dict[str, Any]:
    """What equations may call; ties are decided as `tidegate.ops.Cell` says: `other` where not a < b."""

    def mean(*quantities: Tensor) -> Tensor:
        total = sum(q + torch.zeros_like(like) for q in quantities) / len(quantities)
        return (
            total.unflatten(-1, (heads, -1)).mean(-1, keepdim=True).expand(-1, heads, like.shape[1] // heads).flatten(1)
        )

    def of_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: function(*(torch.as_tensor(x, dtype=torch.float64) for x in given))

    known = {
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "tanh": torch.tanh,
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "softplus": lambda x: torch.log1p(torch.exp(x)),
        "log_sigmoid": lambda x: -torch.log1p(torch.exp(-x)),
        "relu": lambda x: where(x < 0, 0.0, x),
        "abs": lambda x: where(x < 0, -x, x),
        "maximum": lambda x, y: where(x < y, y, x),
        "minimum": lambda x, y: where(x < y, x, y),
        "clip": lambda x, low, high: where(x < low, low, where(high < x, high, x)),
        "where": where,
        "mean": mean,
    }
    return {name: function if name == "where" else of_numbers(function) for name, function in known.items()}


def python_step(cell: Cell) -> Step:
    """`output, states = step(inputs, matrices, vectors, states)` from the text alone: (G, B, D), (M, H, d, d), ..."""
    lines = [line.split("#")[0].strip() for line in cell.equations.splitlines()]

    def step(inputs: Tensor, matrices: Tensor, vectors: Tensor, states: tuple[Tensor, ...]) -> Any:
        names: dict[str, Any] = functions(matrices.shape[1] if len(matrices) else 1, states[0])
        names["x"] = "x"
        for name, value in zip(cell.inputs, inputs, strict=True):
            names[name] = value if name == "x" else Matrix(lambda _, value=value: value)
        for name, U in zip(cell.matrices, matrices, strict=True):
            names[name] = Matrix(lambda q, U=U: blocks(U, q + torch.zeros_like(states[0])))
        names |= dict(zip(cell.vectors, vectors, strict=True)) | dict(zip(cell.states, states, strict=True))
        for line in lines:
            exec(line, names)
        after = tuple(names[name] + torch.zeros_like(states[0]) for name in cell.states)
        return names.get("y", after[0]) + torch.zeros_like(after[0]), after

    return step


def loop(
    step: Step, inputs: Tensor, matrices: Tensor, vectors: Tensor, state: Tensor, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """A step over all of time: what the operator is to give."""
    states, outputs = state.unbind(1), []
    for t in range(inputs.shape[1]):
        before = states
        if segments is not None:
            before = tuple(torch.where(segments.starts[:, t, None], 0.0, x) for x in before)
        y, after = step(inputs[:, t].unbind(1), matrices, vectors, before)
        if segments is not None:
            real = segments.valid[:, t, None]
            y = torch.where(real, y, 0.0)
            after = tuple(torch.where(real, x, old) for x, old in zip(after, states, strict=True))
        states = after
        outputs.append(y)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def arguments(cell: Cell, batch=2, time=5, heads=1, dim=6) -> list[Tensor]:
    """inputs, matrices, vectors, state: numbers of float32, in float64. States are those of a cell that has begun."""
    width = dim // heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).double()

    inputs, state = normal(batch, time, len(cell.inputs), dim), normal(batch, len(cell.states), dim)
    if "n" in cell.states:  # sLSTM's normaliser
        state[:, cell.states.index("n")] = 1 + torch.rand(batch, dim).double()
    return [
        inputs,
        normal(len(cell.matrices), heads, width, width) * width**-0.5,
        normal(len(cell.vectors), dim),
        state,
    ]


# -- the kernels as Python, on float64 arrays --------------------------------------------------------------------------
@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `numba_cpu._call` takes float64 and runs the generated source in Python, on memory full of NaN."""
    before = numba_cpu.compiled, kernels.run, torch.get_default_dtype(), torch.get_num_threads()
    numba_cpu.compiled, kernels.run = _interpreted, _run  # type: ignore[assignment]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # on one, nobody helps with products
    try:
        yield
    finally:
        numba_cpu.compiled, kernels.run = before[:2]
        torch.set_default_dtype(before[2])
        torch.set_num_threads(before[3])


def _interpreted(key: str) -> Any:
    source = re.sub(r"^from .*\n", "", numba_cpu.find(key).kernels.source(), flags=re.M)
    names = dict(PARTS)
    exec(source, names)
    return SimpleNamespace(**names)


def _run(kernel: Callable[..., None], problems: int, *arguments: Any, scratch: int | None = None) -> None:
    for problem in range(problems):  # each with memory of its own
        kernel(problem, problem + 1, *([] if scratch is None else [np.full(scratch, np.nan)]), *arguments)


def elementwise(function: Callable[..., Any], *, total: bool = False) -> Callable[..., None]:
    def run(rows: int, columns: int, outputs: tuple, inputs: tuple) -> None:
        for m in range(rows):
            values = []
            for place in inputs:
                if not isinstance(place, tuple):
                    values.append(place)
                elif len(place) == 2:
                    values.append(place[0][place[1] + m])
                else:
                    x, at, row = place
                    values.append(x[at + m * row : at + m * row + columns].copy())
            found = function(*values)
            if total:
                ((x, at),) = outputs
                x[at + m] = np.broadcast_to(found, columns).sum()
                continue
            for (x, at, row), value in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True):
                x[at + m * row : at + m * row + columns] = value

    return run


def multiply(board, number, rows, columns, o, at_o, row_o, a, at_a, row_a, u, head, inner, added):
    panels = -(-columns // PANEL)
    dense = u.reshape(-1, panels, inner, PANEL)[head].transpose(1, 0, 2).reshape(inner, -1)[:, :columns]
    for r in range(rows):
        place = slice(at_o + r * row_o, at_o + r * row_o + columns)
        o[place] = a[at_a + r * row_a : at_a + r * row_a + inner] @ dense + (o[place] if added else 0.0)


def load_states(states, rows, R, d, w, D, source, at, row, scratch):
    for s in range(states):
        for r in range(rows):
            scratch[(s * R + r) * w : (s * R + r) * w + d] = source[at + r * row + s * D : at + r * row + s * D + d]


def store_states(states, rows, R, d, w, D, scratch, target, at, row):
    for s in range(states):
        for r in range(rows):
            target[at + r * row + s * D : at + r * row + s * D + d] = scratch[(s * R + r) * w : (s * R + r) * w + d]


def clear(x, at, count):
    x[at : at + count] = 0.0


def clear_starts(states, rows, R, w, codes, at, row, scratch):
    for s in range(states):
        for r in range(rows):
            if codes[at + r * row] == 1:
                clear(scratch, (s * R + r) * w, w)


def finish_step(states, rows, R, w, codes, at, row, cut, clip, scratch):
    for r in range(rows):
        code = codes[at + r * row] if len(codes) else 0
        for s in range(states):
            now = slice((s * R + r) * w, (s * R + r) * w + w)
            before = scratch[(states * R + s * R + r) * w :][:w]
            if code != 2:
                kept = 0.0 if code == 1 or cut else before
                scratch[now] = np.clip(kept, -clip, clip) if clip > 0 else kept


def store_gradients(vectors, d, w, scratch, sums, target, at):
    for i in range(vectors):
        target[at + i * d : at + i * d + d] = scratch[sums + i * w : sums + i * w + d]


def add(x, target, source, count):
    x[target : target + count] += x[source : source + count]


PARTS: dict[str, Any] = {
    "elementwise": elementwise,
    "jit_views": lambda function: function,
    "multiply": multiply,
    "add_mean": elementwise(lambda before, mean, share: before + mean * share),
    "pad": kernels.pad,
    "load_states": load_states,
    "store_states": store_states,
    "clear": clear,
    "clear_starts": clear_starts,
    "finish_step": finish_step,
    "store_gradients": store_gradients,
    "add": add,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "where_negative": lambda x, yes, no: np.where(x < 0, yes, no),
}


# -- how they are compared ---------------------------------------------------------------------------------------------
def results(function, given: list[Tensor], dtype=torch.float64) -> dict[str, Tensor]:
    """y, the last state, and all gradients of one random combination of both."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given]
    y, last = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (z * torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z.dtype)).sum() for z in (y, last)
    )
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    names = ("y", "state", "d inputs", "d matrices", "d vectors", "d state")
    return dict(zip(names, (y, last, *gradients), strict=True))


def layouts(batch: int, time: int):
    """None, documents, padding with holes and a row without tokens, both."""
    yield None
    lengths = [[time], [1, time - 1], [time // 2, time - time // 2], [1] * time]
    packed = Segments.packed([lengths[row % 4] for row in range(batch)], continues=True) if time > 2 else None
    holes = torch.rand(batch, time) > 0.3
    holes[-1] = False
    yield Segments.padded(holes)
    if packed:
        yield packed
        yield packed & Segments.padded(holes)


def uncompiled(cell, given, segments=None, clip=0.0, cut=0, narrow=0):
    codes = None if segments is None else segments.codes()
    with interpreted():
        return results(lambda *leaves: numba_cpu._call(cell.key, *leaves, codes, clip, cut, narrow, True)[:2], given)
