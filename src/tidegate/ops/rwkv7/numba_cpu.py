"""The same as fused CPU kernels. A problem is a block of tokens; all arrays are (tokens, heads, dim)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import exp32, jit_views, wide_vectors
from tidegate.ops.rwkv7 import parallel

BLOCK = 32  # tokens of one problem
ONE, ZERO = np.float32(1.0), np.float32(0.0)
FLOOR, HUGE = np.float32(1e-12), np.float32(1e38)  # of sums under a root, which stays finite between them


# -- keys --------------------------------------------------------------------------------------------------------------
@jit_views
def _inverse_norm(k, k_k):
    wide_vectors()
    total = ZERO
    for j in range(k.shape[0]):
        total += k[j] * k_k[j] * (k[j] * k_k[j])
    return ONE / np.sqrt(min(total, HUGE) + FLOOR)


@jit_views
def _keys(begin, end, k, logits, k_k, k_a, rate, key, reads, writes):
    wide_vectors()
    for n in range(begin * BLOCK, min(end * BLOCK, k.shape[0])):
        for h in range(k.shape[1]):
            kn, ln, scale, learn = k[n, h], logits[n, h], k_k[h], k_a[h]
            key_n, reads_n, writes_n = key[n, h], reads[n, h], writes[n, h]
            norm = _inverse_norm(kn, scale)
            for j in range(kn.shape[0]):
                reads_n[j] = -norm * kn[j] * scale[j]
            for j in range(kn.shape[0]):
                writes_n[j] = ONE / (ONE + exp32(-ln[j]))
            for j in range(kn.shape[0]):
                key_n[j] = kn[j] * (ONE + (writes_n[j] - ONE) * learn[j])
            for j in range(kn.shape[0]):
                writes_n[j] *= -rate * reads_n[j]


@jit_views
def _keys_backward(begin, end, k, logits, k_k, k_a, rate, dkey, dreads, dwrites, dk, dlogits, dk_k, dk_a, scratch):
    wide_vectors()
    for problem in range(begin, end):
        a, removed, back = scratch[problem, 0], scratch[problem, 1], scratch[problem, 2]
        for h in range(k.shape[1]):
            scale, learn, dscale, dlearn = k_k[h], k_a[h], dk_k[problem, h], dk_a[problem, h]
            for j in range(a.shape[0]):
                dscale[j] = ZERO
            for j in range(a.shape[0]):
                dlearn[j] = ZERO
            for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, k.shape[0])):
                kn, ln, to_key, dkn, dln = k[n, h], logits[n, h], dkey[n, h], dk[n, h], dlogits[n, h]
                to_reads, to_writes = dreads[n, h], dwrites[n, h]
                norm = _inverse_norm(kn, scale)
                for j in range(a.shape[0]):
                    a[j] = ONE / (ONE + exp32(-ln[j]))
                for j in range(a.shape[0]):
                    removed[j] = norm * kn[j] * scale[j]
                for j in range(a.shape[0]):
                    back[j] = rate * a[j] * to_writes[j] - to_reads[j]
                along = ZERO
                for j in range(a.shape[0]):
                    along += back[j] * removed[j]
                for j in range(a.shape[0]):
                    back[j] = norm * (back[j] - along * removed[j])
                for j in range(a.shape[0]):
                    dkn[j] = back[j] * scale[j] + to_key[j] * (ONE + (a[j] - ONE) * learn[j])
                for j in range(a.shape[0]):
                    dscale[j] += back[j] * kn[j]
                for j in range(a.shape[0]):
                    dlearn[j] += to_key[j] * kn[j] * (a[j] - ONE)
                for j in range(a.shape[0]):
                    through = rate * to_writes[j] * removed[j] + to_key[j] * kn[j] * learn[j]
                    dln[j] = through * a[j] * (ONE - a[j])


# -- output ------------------------------------------------------------------------------------------------------------
@jit_views
def _sums(o, r, k, bonus, eps):
    """Mean and inverse deviation of o, and sum r k bonus."""
    wide_vectors()
    count = np.float32(o.shape[0])
    mean, square, seen = ZERO, ZERO, ZERO
    for j in range(o.shape[0]):
        mean += o[j]
    mean /= count
    for j in range(o.shape[0]):
        square += (o[j] - mean) * (o[j] - mean)
    for j in range(o.shape[0]):
        seen += r[j] * k[j] * bonus[j]
    return mean, ONE / np.sqrt(min(square, HUGE) / count + eps), seen


@jit_views
def _output(begin, end, o, r, k, v, gate, bonus, weight, bias, eps, y):
    wide_vectors()
    for n in range(begin * BLOCK, min(end * BLOCK, o.shape[0])):
        for h in range(o.shape[1]):
            on, vn, gn, out, w, b = o[n, h], v[n, h], gate[n, h], y[n, h], weight[h], bias[h]
            mean, inverse, seen = _sums(on, r[n, h], k[n, h], bonus[h], eps)
            for j in range(out.shape[0]):
                out[j] = ((on[j] - mean) * inverse * w[j] + b[j] + seen * vn[j]) * gn[j]


@jit_views
def _output_backward(
    begin, end, o, r, k, v, gate, bonus, weight, bias, eps, dy, do, dr, dk, dv, dgate, dbonus, dweight, dbias, scratch
):  # fmt: skip
    wide_vectors()
    count = np.float32(o.shape[2])
    for problem in range(begin, end):
        z, back = scratch[problem, 0], scratch[problem, 1]  # the normalised o, and the gradient before the gate
        for h in range(o.shape[1]):
            w, b, own = weight[h], bias[h], bonus[h]
            dw, db, down = dweight[problem, h], dbias[problem, h], dbonus[problem, h]
            for j in range(z.shape[0]):
                dw[j] = ZERO
            for j in range(z.shape[0]):
                db[j] = ZERO
            for j in range(z.shape[0]):
                down[j] = ZERO
            for n in range(problem * BLOCK, min(problem * BLOCK + BLOCK, o.shape[0])):
                on, rn, kn, vn, gn, dyn = o[n, h], r[n, h], k[n, h], v[n, h], gate[n, h], dy[n, h]
                don, drn, dkn, dvn, dgn = do[n, h], dr[n, h], dk[n, h], dv[n, h], dgate[n, h]
                mean, inverse, seen = _sums(on, rn, kn, own, eps)
                for j in range(z.shape[0]):
                    z[j] = (on[j] - mean) * inverse
                for j in range(z.shape[0]):
                    back[j] = dyn[j] * gn[j]
                for j in range(z.shape[0]):
                    dgn[j] = dyn[j] * (z[j] * w[j] + b[j] + seen * vn[j])
                for j in range(z.shape[0]):
                    dvn[j] = back[j] * seen
                for j in range(z.shape[0]):
                    dw[j] += back[j] * z[j]
                for j in range(z.shape[0]):
                    db[j] += back[j]
                level, along, dseen = ZERO, ZERO, ZERO
                for j in range(z.shape[0]):
                    dseen += back[j] * vn[j]
                for j in range(z.shape[0]):
                    level += back[j] * w[j]
                for j in range(z.shape[0]):
                    along += back[j] * w[j] * z[j]
                level, along = level / count, along / count
                for j in range(z.shape[0]):
                    don[j] = inverse * (back[j] * w[j] - level - along * z[j])
                for j in range(z.shape[0]):
                    drn[j] = dseen * kn[j] * own[j]
                for j in range(z.shape[0]):
                    dkn[j] = dseen * rn[j] * own[j]
                for j in range(z.shape[0]):
                    down[j] += dseen * rn[j] * kn[j]


# -- operators ---------------------------------------------------------------------------------------------------------
def _tokens(x: Tensor) -> np.ndarray:
    return kernels.array(x).reshape(-1, *x.shape[2:])


def _run(kernel: Any, tokens: int, *arguments: Any) -> None:
    kernels.run(kernel, -(-tokens // BLOCK), *arguments)


def _shares(like: Tensor, count: int, problems: int) -> list[Tensor]:
    """Every problem's share of the gradients of `count` parameters (H, N)."""
    return [torch.empty(problems, *like.shape[2:]) for _ in range(count)]


@torch.library.custom_op("tidegate::rwkv7_keys", mutates_args=(), device_types="cpu")
def _keys_op(k: Tensor, logits: Tensor, k_k: Tensor, k_a: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    results = [torch.empty(k.shape) for _ in range(3)]
    inputs = _tokens(k), _tokens(logits), kernels.array(k_k), kernels.array(k_a)
    _run(_keys, len(inputs[0]), *inputs, np.float32(rate), *map(_tokens, results))
    return results[0].to(k.dtype), results[1], results[2]


@torch.library.custom_op("tidegate::rwkv7_keys_backward", mutates_args=(), device_types="cpu")
def _keys_backward_op(
    k: Tensor, logits: Tensor, k_k: Tensor, k_a: Tensor, rate: float, dkey: Tensor, dreads: Tensor, dwrites: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dk, dlogits = torch.empty(k.shape), torch.empty(k.shape)
    inputs = _tokens(k), _tokens(logits), kernels.array(k_k), kernels.array(k_a)
    problems = -(-len(inputs[0]) // BLOCK)
    dk_k, dk_a = _shares(k, 2, problems)
    scratch = np.empty((problems, 3, k.shape[3]), np.float32)
    upstream = (_tokens(dy) for dy in (dkey, dreads, dwrites))
    results = _tokens(dk), _tokens(dlogits), dk_k.numpy(), dk_a.numpy(), scratch
    kernels.run(_keys_backward, problems, *inputs, np.float32(rate), *upstream, *results)
    return dk.to(k.dtype), dlogits.to(logits.dtype), dk_k.sum(0).to(k_k.dtype), dk_a.sum(0).to(k_a.dtype)


@_keys_op.register_fake
def _(k, logits, k_k, k_a, rate):
    return k.new_empty(k.shape), k.new_empty(k.shape, dtype=torch.float32), k.new_empty(k.shape, dtype=torch.float32)


@_keys_backward_op.register_fake
def _(k, logits, k_k, k_a, rate, dkey, dreads, dwrites):
    return tuple(x.new_empty(x.shape) for x in (k, logits, k_k, k_a))


def _keys_setup(ctx, inputs, output):
    *tensors, ctx.rate = inputs
    ctx.save_for_backward(*tensors)


def _keys_formula(ctx, *upstream):
    inputs = [*ctx.saved_tensors]
    if torch.is_grad_enabled():
        found = kernels.differentiable_gradients(lambda *x: parallel.rwkv7_keys(*x, ctx.rate), inputs, upstream)
    else:
        found = _call_keys_backward(*inputs, ctx.rate, *upstream)
    return (*found, None)


_keys_op.register_autograd(_keys_formula, setup_context=_keys_setup)
_call_keys, _call_keys_backward = (
    kernels.direct(_keys_op, _keys_setup, _keys_formula),
    kernels.direct(_keys_backward_op),
)


@torch.library.custom_op("tidegate::rwkv7_output", mutates_args=(), device_types="cpu")
def _output_op(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    y = torch.empty(o.shape)
    tokens, parameters = [_tokens(x) for x in (o, r, k, v, gate)], [kernels.array(x) for x in (bonus, weight, bias)]
    _run(_output, len(tokens[0]), *tokens, *parameters, np.float32(1e-5 * o.shape[3]), _tokens(y))
    return y.to(o.dtype)


@torch.library.custom_op("tidegate::rwkv7_output_backward", mutates_args=(), device_types="cpu")
def _output_backward_op(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> list[Tensor]:
    inputs = o, r, k, v, gate
    tokens, parameters = [_tokens(x) for x in inputs], [kernels.array(x) for x in (bonus, weight, bias)]
    gradients = [torch.empty(o.shape) for _ in inputs]
    problems = -(-len(tokens[0]) // BLOCK)
    shares = _shares(o, 3, problems)
    results = [*map(_tokens, gradients), *(x.numpy() for x in shares), np.empty((problems, 2, o.shape[3]), np.float32)]
    eps = np.float32(1e-5 * o.shape[3])
    kernels.run(_output_backward, problems, *tokens, *parameters, eps, _tokens(dy), *results)
    found = [*gradients, *(share.sum(0) for share in shares)]
    return [dx.to(x.dtype) for dx, x in zip(found, (*inputs, bonus, weight, bias), strict=True)]


@_output_op.register_fake
def _(o, r, k, v, gate, bonus, weight, bias):
    return o.new_empty(o.shape)


@_output_backward_op.register_fake
def _(o, r, k, v, gate, bonus, weight, bias, dy):
    return [x.new_empty(x.shape) for x in (o, r, k, v, gate, bonus, weight, bias)]


def _output_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _output_formula(ctx, dy):
    inputs = [*ctx.saved_tensors]
    if torch.is_grad_enabled():
        return (*kernels.differentiable_gradients(lambda *x: (parallel.rwkv7_output(*x),), inputs, (dy,)),)
    return (*_call_output_backward(*inputs, dy),)


_output_op.register_autograd(_output_formula, setup_context=_output_setup)
_call_output_backward = kernels.direct(_output_backward_op)


def rwkv7_keys(k: Tensor, logits: Tensor, k_k: Tensor, k_a: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    return _call_keys(k, logits, k_k, k_a, rate)


rwkv7_output = kernels.direct(_output_op, _output_setup, _output_formula)
