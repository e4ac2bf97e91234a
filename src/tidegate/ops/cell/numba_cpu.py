"""Cells as CPU kernels: their generated source, compiled once and kept on disk, and the operator around it.

Arrays, with G inputs, M products, V vectors, S states, E kept quantities and Q means of the cell, and d = D / H:

    x (B, T, G, D)   v (V, D)   state, last (B, S, D)   y (B, T, D)   old (B, T, S, D): the states before each token
    p (B, T, H, M, d): the products   e (B, T, E, D)   mu (T, H, Q, B)   codes (B, T), see Segments.codes

Where there is no backward, old, p, e and mu have memory for one token, which every token writes over.

A problem is up to R rows of the batch and one head. R depends on the batch alone, so that the number of threads
changes no result.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.cache import cache_folder
from tidegate.ops import kernels
from tidegate.ops.cell import Cell, find, loops, reference, team
from tidegate.ops.cell.equations import Product
from tidegate.ops.cell.loops import PANEL, pack
from tidegate.segments import Segments
from tidegate.state import write_atomically


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
    codes = None if segments is None else segments.codes()
    given = [tensor.float() for tensor in (inputs, matrices, vectors, state)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    y, last = _call(cell.key, *given, codes, clip, cut, narrow, keep)[:2]
    return y, last.to(state.dtype)


# -- compilation -------------------------------------------------------------------------------------------------------
@functools.cache
def _fingerprint() -> bytes:
    """Of everything that generated kernels are made from: another version of it must not meet an old cache."""
    folder = Path(loops.__file__).parent
    files = [*sorted(folder.glob("*.py")), *(folder.parent / name for name in ("kernels.py", "passes.py", "tiles.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


@functools.cache
def compiled(key: str) -> ModuleType:
    """The module of a cell's kernels. Its source is a file in the cache, where Numba keeps what it compiles, too."""
    source = find(key).kernels.source()
    name = "tidegate_cell_" + hashlib.sha256(source.encode() + _fingerprint()).hexdigest()[:20]
    try:
        path = cache_folder() / "cells" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, source.encode())
    except OSError:  # a home that cannot be written: compile for this process alone
        path = Path(tempfile.mkdtemp(prefix="tidegate-")) / f"{name}.py"
        path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Numba finds a cached function's module by its name
    spec.loader.exec_module(module)
    return module


# -- operators ---------------------------------------------------------------------------------------------------------
def _rows(batch: int) -> int:
    return 8 if batch < 32 else 16 if batch < 128 else 32


def _weights(cell: Cell, matrices: Tensor, narrow: int, transposed: bool) -> list[np.ndarray]:
    """The matrices of each group of products, packed: for forward, or transposed for backward."""
    given, (_, H, d, _) = kernels.flat(matrices), matrices.shape
    return [_packed(given, H, d, *_group(cell, group, narrow, d), transposed) for group in cell.kernels.groups]


def _group(cell: Cell, group: list[Product], narrow: int, d: int) -> tuple[np.ndarray, int, int]:
    """The numbers of a group's matrices, and how many rows and columns they have that are not left out."""
    projected, numbers = cell.program.projected, [cell.matrices.index(product.matrix) for product in group]
    rows, columns = (narrow if narrow and end in projected else d for end in (group[0].symbol, group[0].operand))
    return np.array(numbers), rows, columns


def _packed(
    matrices: np.ndarray, H: int, d: int, own: np.ndarray, rows: int, columns: int, transposed: bool
) -> np.ndarray:
    wide, deep = (columns, rows * own.size) if transposed else (rows * own.size, columns)
    panels = H * -(-wide // PANEL)
    packed = np.empty(panels * deep * PANEL, matrices.dtype)
    kernels.run(pack, panels, matrices, own, H, d, rows, columns, transposed, packed)
    return packed


def _sizes(cell: Cell, inputs: Tensor, matrices: Tensor) -> tuple[int, int, int, int]:
    """B, T, H, d."""
    batch, time, _, width = inputs.shape
    if cell.matrices:
        heads = matrices.shape[1]
    elif cell.kernels.means:
        heads = 1
    else:  # channels that never meet: as many problems of 128 or more as there are equal ones
        heads = max(h for h in range(1, 1 + max(1, width // 128)) if width % h == 0)
    return batch, time, heads, width // heads


def _run(
    key: str, name: str, problems: int, arguments: tuple[Any, ...], shared: tuple[np.ndarray, ...], scratch: int
) -> None:
    """Call a kernel over all problems; where there is one alone, other threads help with its products."""
    kernel, products = getattr(compiled(key), name), find(key).kernels.groups
    R, B, T, _, d = arguments[:5]
    largest = min(R, B) * d * d * max(map(len, products), default=0)
    if problems > 1 or torch.get_num_threads() == 1 or largest < team.WORTHWHILE or T < team.LONG:
        kernels.run(kernel, problems, team.nobody, *arguments, scratch=scratch)
        return
    board, (memory,), help_out = team.board(), kernels.memory(scratch), getattr(compiled(key), f"help_{name}")

    kernels.together(
        lambda: kernel(0, 1, memory, board, *arguments),
        lambda: help_out(board, memory, *shared),
        lambda: team.close(board),
    )


@torch.library.custom_op("tidegate::cell", mutates_args=(), device_types="cpu")
def _forward_op(
    key: str,
    inputs: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    state: Tensor,
    codes: Tensor | None,
    clip: float,
    cut: int,
    narrow: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, last, and what backward needs, if it is to be kept: old, p, e, mu."""
    cell = find(key)
    B, T, H, d = _sizes(cell, inputs, matrices)
    R, size, D = _rows(B), cell.kernels.sizes, H * d
    of = functools.partial(torch.empty, dtype=inputs.dtype)
    zeros = functools.partial(torch.zeros, dtype=inputs.dtype)
    empty = of if codes is None else zeros  # passes leave out padding
    kept = T if keep else 1
    y, e = empty(B, T, D), empty(B, kept, size["E"], D)
    last, old = of(B, size["S"], D), of(B, kept, size["S"], D)
    p, mu = (zeros if narrow else of)(B, kept, H, size["M"], d), of(kept, H, size["Q"], B)
    flags = np.zeros(0, np.uint8) if codes is None else kernels.flat(codes)
    given = (kernels.flat(inputs), kernels.flat(vectors), kernels.flat(state), flags)
    results = tuple(x.numpy().reshape(-1) for x in (y, last, old, p, e, mu))
    weights = _weights(cell, matrices, narrow, transposed=False)
    arguments = (R, B, T, H, d, narrow or d, kept, *given, *weights, *results)
    shared = (results[3], results[4], *weights)  # p and e
    _run(key, "forward", -(-B // R) * H, arguments, shared, size["S"] * R * kernels.pad(d) + 1)
    return y, last, old, p, e, mu


@torch.library.custom_op("tidegate::cell_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    key: str,
    inputs: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    codes: Tensor | None,
    clip: float,
    cut: int,
    narrow: int,
    old: Tensor,
    p: Tensor,
    e: Tensor,
    mu: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, matrices, vectors and state."""
    cell = find(key)
    B, T, H, d = _sizes(cell, inputs, matrices)
    R, size, D, code = _rows(B), cell.kernels.sizes, H * d, cell.kernels
    problems, w = -(-B // R) * H, kernels.pad(d)
    of = functools.partial(torch.empty, dtype=inputs.dtype)
    zeros = functools.partial(torch.zeros, dtype=inputs.dtype)
    empty = of if codes is None else zeros
    # Where the gradients of all inputs are those of the products, in their order, one memory serves both.
    memory = {product.matrix: m for m, product in enumerate(code.matrices)}
    one = H == 1 and [memory.get(code.same.get(name, "")) for name in cell.inputs] == [*range(size["M"])]
    dp = empty(B, T, H, size["M"], d)
    dx = dp.flatten(2, 3) if one else empty(B, T, size["G"], D)
    dstate, dv = of(B, size["S"], D), of(problems, size["V"], d)
    flags = np.zeros(0, np.uint8) if codes is None else kernels.flat(codes)
    given = [kernels.flat(inputs), kernels.flat(vectors), flags]
    weights = _weights(cell, matrices, narrow, transposed=True)
    given += [*weights, *(kernels.flat(tensor) for tensor in (old, p, e, mu, dy, dlast))]
    results = tuple(x.numpy().reshape(-1) for x in (dx, dp, dv, dstate))
    scratch = (2 * size["S"] + size["E"]) * R * w + (size["Q"] + 1) * R + size["V"] * w + 1
    arguments = (R, B, T, H, d, narrow or d, np.float32(clip), cut, *given, *results)
    _run(key, "backward", problems, arguments, (results[1], *weights), scratch)
    # 1. Matrices: one product over all tokens for each operand.
    dmatrices = (zeros if narrow else of)(matrices.shape)
    flows = dp.flatten(0, 1).movedim(1, 0)  # (H, B T, M, d)
    first = 0
    for group in code.groups:
        operand = (
            e[:, :, code.kept.index(group[0].operand)]
            if group[0].operand in code.kept
            else old[:, :, cell.states.index(str(group[0].operand))]
        )
        own, rows, columns = _group(cell, group, narrow, d)
        taken = operand.reshape(B * T, H, d).movedim(1, 0)[:, :, :columns]
        flow = flows[:, :, first : first + len(group), :rows].flatten(2)
        found = torch.bmm(flow.transpose(1, 2), taken).unflatten(1, (len(group), rows))
        for number, gradient in zip(own, found.unbind(1), strict=True):
            dmatrices[number, :, :rows, :columns] = gradient
        first += len(group)
    # 2. Vectors whose gradient is a product's.
    dvectors = dv.unflatten(0, (-1, H)).sum(0).movedim(0, 1).flatten(1) if size["V"] else of(vectors.shape)
    for name, matrix in code.same.items():
        if name in cell.vectors:
            dvectors[cell.vectors.index(name)] = dp[:, :, :, memory[matrix]].sum((0, 1)).flatten()
    return dx, dmatrices, dvectors, dstate


@_forward_op.register_fake
def _(key, inputs, matrices, vectors, state, codes, clip, cut, narrow, keep):
    cell = find(key)
    B, T, H, d = _sizes(cell, inputs, matrices)
    size, D, new = cell.kernels.sizes, H * d, inputs.new_empty
    kept = T if keep else 1
    saved = new(B, kept, size["S"], D), new(B, kept, H, size["M"], d), new(B, kept, size["E"], D)
    return new(B, T, D), new(B, size["S"], D), *saved, new(kept, H, size["Q"], B)


@_backward_op.register_fake
def _(key, inputs, matrices, vectors, codes, clip, cut, narrow, old, p, e, mu, dy, dlast):
    return (
        inputs.new_empty(inputs.shape),
        matrices.new_empty(matrices.shape),
        vectors.new_empty(vectors.shape),
        dlast.new_empty(dlast.shape),
    )


_call_backward = kernels.direct(_backward_op)


def _setup(ctx, inputs, output):
    ctx.key, *tensors, codes, ctx.clip, ctx.cut, ctx.narrow, _ = inputs
    ctx.save_for_backward(*tensors, codes, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _formula(ctx, dy, dlast, *_):
    inputs, matrices, vectors, state, codes, *saved = ctx.saved_tensors
    dy = inputs.new_zeros(inputs.shape[0], inputs.shape[1], inputs.shape[3]) if dy is None else dy
    dlast = torch.zeros_like(state) if dlast is None else dlast
    if not torch.is_grad_enabled():
        how = ctx.clip, ctx.cut, ctx.narrow
        found = _call_backward(ctx.key, inputs, matrices, vectors, codes, *how, *saved, dy, dlast)
        return (None, *found, None, None, None, None, None)
    segments = None if codes is None else Segments(codes == 1, codes != 2)

    def form(x: Tensor, matrices: Tensor, vectors: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return reference.run(find(ctx.key), x, matrices, vectors, state, segments, ctx.clip, ctx.cut, ctx.narrow)

    found = kernels.differentiable_gradients(form, [inputs, matrices, vectors, state], (dy, dlast))
    return (None, *found, None, None, None, None, None)


_forward_op.register_autograd(_formula, setup_context=_setup)
_call: Any = kernels.direct(_forward_op, _setup, _formula)
