"""Kernels give the same bits for any number of threads, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.contract.helpers import segments_of
from tests.contract.test_equality import drawn
from tidegate import ops

B, T, H, K, V = 3, 131, 2, 8, 16


def leaf(*shape: int, complex_numbers: bool = False) -> Tensor:
    dtype = torch.complex64 if complex_numbers else torch.float32
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def decay(*shape: int) -> Tensor:
    return (-torch.rand(*shape)).requires_grad_()


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.detach(), dim=-1).requires_grad_()


def scan(segments):
    a, b, state = decay(B, T, K), leaf(B, T, K), leaf(B, K)
    return lambda: ops.scan(a.exp(), b, state=state, segments=segments), (a, b, state)


def complex_scan(segments):
    a, b, state = leaf(B, T, K, complex_numbers=True), leaf(B, T, K, complex_numbers=True), leaf(B, K)
    return lambda: ops.scan(a / (1 + a.abs()), b, state=state.to(b.dtype), segments=segments), (a, b, state)


def linear_attention(*shape: int):
    def call(segments):
        q, k, v, state = leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V), leaf(B, H, K, V)
        g = decay(*shape) if shape else None
        inputs = (q, k, v, state) if g is None else (q, k, v, state, g)
        return lambda: ops.linear_attention(q, k, v, g, state=state, segments=segments), inputs

    return call


def mlstm(segments):
    q, k, v, log_input = leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V), leaf(B, T, H)
    g, state = decay(B, T, H), (leaf(B, H, K, V), leaf(B, H, K), leaf(B, H))

    def call():
        h, last = ops.mlstm(q, k, v, log_input, g, state=state, segments=segments)
        return h, *last

    return call, (q, k, v, log_input, g, *state)


def delta_rule(*shape: int):
    def call(segments):
        q, k, v = leaf(B, T, H, K), unit(leaf(B, T, H, K)), leaf(B, T, H, V)
        beta, state = torch.rand(B, T, H).requires_grad_(), leaf(B, H, K, V)
        g = decay(*shape) if shape else None
        inputs = (q, k, v, beta, state) if g is None else (q, k, v, beta, state, g)
        return lambda: ops.delta_rule(q, k, v, beta, g, state=state, segments=segments), inputs

    return call


def dplr(segments):
    q, k, v, state = leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V), leaf(B, H, K, V)
    a, b, g = unit(leaf(B, T, H, K)), unit(leaf(B, T, H, K)), decay(B, T, H, K)
    return lambda: ops.dplr(q, k, v, -a, b, g, state=state, segments=segments), (q, k, v, a, b, g, state)


def selective_scan(segments):
    x, dt, z, b, c = leaf(B, T, 150), leaf(B, T, 150), leaf(B, T, 150), leaf(B, T, K), leaf(B, T, K)
    a, d, bias, state = decay(150, K), leaf(150), leaf(150), leaf(B, 150, K)
    options = dict(d=d, dt_bias=bias, z=z, state=state, segments=segments)
    return lambda: ops.selective_scan(x, dt, a, b, c, **options), (x, dt, a, b, c, d, bias, z, state)


def diagonal_ssm(segments):
    u, state = leaf(B, T, K), leaf(B, K, 4, complex_numbers=True)
    decay, weight = leaf(K, 4, complex_numbers=True), leaf(K, 4, complex_numbers=True)
    inputs = (u, decay, weight, state)
    return lambda: ops.diagonal_ssm(u, decay / (1 + decay.abs()), weight, state=state, segments=segments), inputs


def dense_ssm(segments):
    u, state, c = leaf(B, T, 37), leaf(B, 37, K), leaf(37, 2, K)
    a, b = leaf(37, K, K), leaf(37, K)
    inputs = (u, a, b, c, state)
    return lambda: ops.dense_ssm(
        u, a / torch.linalg.matrix_norm(a)[:, None, None], b, c, state=state, segments=segments
    ), inputs


def sru(segments):
    x, projected, bias, weight, state = leaf(B, T, K), leaf(B, T, 3 * K), leaf(2, K), leaf(2, K), leaf(B, K)
    inputs = (x, projected, bias, weight, state)
    return lambda: ops.sru(x, projected, bias, weight, state=state, segments=segments), inputs


def slot_scores(segments):
    q, k, slots, g, state = leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V), decay(B, T, H, V), leaf(B, H, V, K)
    return lambda: ops.slot_scores(q, k, slots, g, state=state, segments=segments), (q, k, slots, g, state)


def additive_decay(segments):
    x, state = leaf(B, T, K), leaf(B, K)
    return lambda: ops.additive_decay(x, state=state, segments=segments), (x, state)


def short_convolution(segments):
    x, weight, bias, state = leaf(B, T, K), leaf(K, 4), leaf(K), leaf(B, 3, K)
    return lambda: ops.short_convolution(x, weight, bias, state=state, segments=segments), (x, weight, bias, state)


def long_convolution(segments):
    x, filters, past = leaf(B, T, K), leaf(K, T + 9), leaf(B, 9, K)
    length = torch.tensor([9, 4, 0])[:B]

    def call():
        y, (inputs, _) = ops.long_convolution(x, filters, state=(past, length), segments=segments)
        return y, inputs

    return call, (x, filters, past)


def two_sided_convolution(segments):
    x, filters, future = leaf(B, T, K), leaf(K, T), leaf(K, T)
    return lambda: (ops.two_sided_convolution(x, filters, future),), (x, filters, future)


OPS: dict[str, Callable] = {
    "scan": scan,
    "complex scan": complex_scan,
    "linear attention": linear_attention(),
    "linear attention, decay by head": linear_attention(H),
    "linear attention, decay by token": linear_attention(B, T, H),
    "linear attention, decay by key": linear_attention(B, T, H, K),
    "mlstm": mlstm,
    "delta rule": delta_rule(),
    "delta rule, decay by token": delta_rule(B, T, H),
    "delta rule, decay by key": delta_rule(B, T, H, K),
    "dplr": dplr,
    "selective scan": selective_scan,
    "diagonal ssm": diagonal_ssm,
    "dense ssm": dense_ssm,
    "sru": sru,
    "slot scores": slot_scores,
    "additive decay": additive_decay,
    "short convolution": short_convolution,
    "long convolution": long_convolution,
    "two-sided convolution": two_sided_convolution,
}


@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(op: str, kind: str):
    segments = segments_of(kind, B, T, drawn("threads", op))
    call, inputs = OPS[op](segments)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outputs = call()
        draw = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(o.shape, dtype=o.dtype, generator=draw) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, cotangents)])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert torch.equal(got, wanted)
    assert all(result.isfinite().all() for result in results[0])
