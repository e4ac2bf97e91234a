"""The recurrence of blocks as a CPU kernel: a problem is a row of the batch and a block of channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels


def block_scan(A: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """As `tidegate.ops.block_scan`, in float32."""
    x = torch.empty(b.shape)
    block = kernels.block(b.shape[3], b.shape[0])
    problems = b.shape[0] * -(-b.shape[3] // block)
    kernels.run(_forward, problems, block, reverse, kernels.array(A), kernels.array(b), x.numpy())
    return x


@kernels.jit
def _forward(begin, end, block, reverse, A, b, x):
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
