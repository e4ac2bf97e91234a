"""The linear recurrence of small blocks, x_t = A_t x_{t-1} + b_t: what each Newton iteration solves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops import kernels
from tidegate.ops.scan import scan


@torch.no_grad()
def block_scan(A: Tensor, b: Tensor, *, reverse: bool = False) -> Tensor:
    """x_t = A_t x_{t-1} + b_t from x = 0, for every channel on its own; `reverse` runs x_t = A_t x_{t+1} + b_t.

    Shapes: b, x (B, T, S, D), A (B, T, S, S, D). No gradients flow.
    """
    size = b.shape[2]
    if size == 1:
        return scan(A[:, :, 0, 0], b[:, :, 0], reverse=reverse)[0][:, :, None]
    if choose(b) == "numba":
        x = torch.empty(b.shape)
        arrays = (kernels.array(A), kernels.array(b), x.numpy())
        block = kernels.block(b.shape[3], b.shape[0])
        kernels.run(_kernel, b.shape[0] * -(-b.shape[3] // block), block, reverse, *arrays)
        return x
    if reverse:
        return _sweeps(A.flip(1), b.flip(1)).flip(1)
    return _sweeps(A, b)


def _sweeps(A: Tensor, x: Tensor) -> Tensor:
    """Hillis and Steele: after sweep i every token has what the 2^i tokens up to it do to it."""
    reach = 1
    while reach < x.shape[1]:
        earlier = (A[:, reach:] * x[:, :-reach, None]).sum(3)
        both = torch.einsum("btijd,btjkd->btikd", A[:, reach:], A[:, :-reach])
        x = torch.cat([x[:, :reach], x[:, reach:] + earlier], 1)
        A = torch.cat([A[:, :reach], both], 1)
        reach *= 2
    return x


@kernels.jit
def _kernel(begin, end, block, reverse, A, b, x):
    time, size, width = b.shape[1], b.shape[2], b.shape[3]
    blocks = (width + block - 1) // block
    zeros = np.zeros((size, block), np.float32)
    for problem in range(begin, end):
        n, lo = problem // blocks, (problem % blocks) * block
        hi = min(lo + block, width)
        before = zeros[:, : hi - lo]
        for step in range(time):
            t = time - 1 - step if reverse else step
            for s in range(size):
                xt, bt = x[n, t, s, lo:hi], b[n, t, s, lo:hi]
                for j in range(xt.shape[0]):
                    xt[j] = bt[j]
                for k in range(size):
                    at, row = A[n, t, s, k, lo:hi], before[k]
                    for j in range(xt.shape[0]):
                        xt[j] += at[j] * row[j]
            before = x[n, t, :, lo:hi]
