"""The same as fused CPU kernels. A problem is a block of tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import exp32, inline, jit_views, wide_vectors
from tidegate.ops.rg_lru import parallel

BLOCK = 32  # tokens of one problem
ONE, ZERO = np.float32(1.0), np.float32(0.0)


# -- kernels -----------------------------------------------------------------------------------------------------------
@inline
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, exact where exp(x) is nearly one."""
    series = x * np.float32(1 / 8) + ONE
    series = series * (x * np.float32(1 / 7)) + ONE
    series = series * (x * np.float32(1 / 6)) + ONE
    series = series * (x * np.float32(1 / 5)) + ONE
    series = series * (x * np.float32(1 / 4)) + ONE
    series = series * (x * np.float32(1 / 3)) + ONE
    series = series * (x * np.float32(1 / 2)) + ONE
    return -x * series if x > np.float32(-0.5) else ONE - exp32(x)


@jit_views
def _gates(begin, end, u, gates, rate, first, a, b):
    wide_vectors()
    heads, block = gates.shape[1], gates.shape[2] // 2
    for n in range(begin * BLOCK, min(end * BLOCK, u.shape[0])):
        for h in range(heads):
            lo, hi = h * block, (h + 1) * block
            r, i, un, an, bn = gates[n, h, :block], gates[n, h, block:], u[n, lo:hi], a[n, lo:hi], b[n, lo:hi]
            own = rate[lo:hi]
            for j in range(block):
                an[j] = -own[j] / (ONE + exp32(-r[j]))
            if first[n]:
                for j in range(block):
                    bn[j] = un[j] / (ONE + exp32(-i[j]))
            else:
                for j in range(block):
                    bn[j] = np.sqrt(one_minus_exp(an[j] + an[j])) * un[j] / (ONE + exp32(-i[j]))
            for j in range(block):
                an[j] = exp32(an[j])


@jit_views
def _gates_backward(begin, end, u, gates, rate, first, da, db, du, dgates, drate, scratch):
    wide_vectors()
    heads, block = gates.shape[1], gates.shape[2] // 2
    for problem in range(begin, end):
        log_a, root = scratch[problem, 0], scratch[problem, 1]
        total = drate[problem]
        for j in range(total.shape[0]):
            total[j] = ZERO
        for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, u.shape[0])):
            for h in range(heads):
                lo, hi = h * block, (h + 1) * block
                r, i, own, sums = gates[n, h, :block], gates[n, h, block:], rate[lo:hi], total[lo:hi]
                un, dan, dbn, dun = u[n, lo:hi], da[n, lo:hi], db[n, lo:hi], du[n, lo:hi]
                dr, di = dgates[n, h, :block], dgates[n, h, block:]
                for j in range(block):
                    log_a[j] = -own[j] / (ONE + exp32(-r[j]))
                if first[n]:
                    for j in range(block):
                        root[j] = ONE
                else:
                    for j in range(block):
                        root[j] = np.sqrt(one_minus_exp(log_a[j] + log_a[j]))
                for j in range(block):  # sigmoid(i), until its gradient takes the place
                    di[j] = ONE / (ONE + exp32(-i[j]))
                for j in range(block):  # that of log a
                    a = exp32(log_a[j])
                    slope = min(np.float32(0.5) / max(root[j], np.float32(1e-10)), np.float32(1e3))
                    if first[n]:
                        slope = ZERO
                    dr[j] = a * (dan[j] - np.float32(2.0) * a * slope * dbn[j] * di[j] * un[j])
                for j in range(block):
                    dun[j] = dbn[j] * root[j] * di[j]
                for j in range(block):
                    di[j] *= (ONE - di[j]) * dbn[j] * root[j] * un[j]
                for j in range(block):
                    sums[j] -= dr[j] / (ONE + exp32(-r[j]))
                for j in range(block):
                    s = ONE / (ONE + exp32(-r[j]))
                    dr[j] *= -own[j] * s * (ONE - s)


# -- operators ---------------------------------------------------------------------------------------------------------
def _rows(x: Tensor) -> np.ndarray:
    return kernels.array(x).reshape(-1, x.shape[-1])


@torch.library.custom_op("tidegate::rg_lru_gates", mutates_args=(), device_types="cpu")
def rg_lru_gates(u: Tensor, gates: Tensor, rate: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.empty(u.shape), torch.empty(u.shape)
    inputs = _gate_arrays(u, gates, rate, first)
    kernels.run(_gates, -(-len(inputs[0]) // BLOCK), *inputs, _rows(a), _rows(b))
    return a, b


@torch.library.custom_op("tidegate::rg_lru_gates_backward", mutates_args=(), device_types="cpu")
def rg_lru_gates_backward(
    u: Tensor, gates: Tensor, rate: Tensor, first: Tensor, da: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    du, dgates = torch.empty(u.shape), torch.empty(gates.shape)
    inputs = _gate_arrays(u, gates, rate, first)
    problems = -(-len(inputs[0]) // BLOCK)
    drate = torch.empty(problems, len(rate))
    scratch = np.empty((problems, 2, gates.shape[-1] // 2), np.float32)
    results = _rows(du), dgates.numpy().reshape(inputs[1].shape), drate.numpy(), scratch
    kernels.run(_gates_backward, problems, *inputs, _rows(da), _rows(db), *results)
    return du.to(u.dtype), dgates.to(gates.dtype), drate.sum(0).to(rate.dtype)


def _gate_arrays(u: Tensor, gates: Tensor, rate: Tensor, first: Tensor) -> tuple[np.ndarray, ...]:
    return (
        _rows(u),
        kernels.array(gates).reshape(-1, *gates.shape[2:]),
        kernels.array(rate),
        kernels.array(first).ravel(),
    )


@rg_lru_gates.register_fake
def _(u, gates, rate, first):
    return u.new_empty(u.shape, dtype=torch.float32), u.new_empty(u.shape, dtype=torch.float32)


@rg_lru_gates_backward.register_fake
def _(u, gates, rate, first, da, db):
    return u.new_empty(u.shape), gates.new_empty(gates.shape), rate.new_empty(rate.shape)


_call_rg_lru_gates_backward = kernels.direct(rg_lru_gates_backward)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _formula(ctx, da, db):
    inputs = [*ctx.saved_tensors]
    if torch.is_grad_enabled():
        return (*kernels.differentiable_gradients(parallel.rg_lru_gates, inputs, (da, db)),)
    return (*_call_rg_lru_gates_backward(*inputs, da, db), None)


rg_lru_gates.register_autograd(_formula, setup_context=_setup)
direct = kernels.direct(rg_lru_gates, _setup, _formula)
