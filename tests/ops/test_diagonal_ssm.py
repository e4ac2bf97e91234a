"""ops.diagonal_ssm: three backends against each other, and against the convolution that it is."""

from __future__ import annotations

import importlib

import pytest
import torch

import tidegate
from tests.ops.test_scan import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, B, assert_close, layouts
from tidegate import Segments
from tidegate.ops.diagonal_ssm import diagonal_ssm

D = 21  # one vector and a part of one
BACKENDS = ["reference", "parallel", "numba"]


def inputs(T, *, states=3, dim=D, batch=B):
    # Decays of modulus up to 1, exact zeros and ones among them.
    decay = (torch.rand(dim, states, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1)
    decay = decay * torch.exp(7j * torch.rand(dim, states, dtype=torch.float64))
    numbers = torch.complex128
    return [
        torch.randn(batch, T, dim, dtype=torch.float64),
        decay,
        torch.randn(dim, states, dtype=numbers),
        torch.randn(batch, dim, states, dtype=numbers),
    ]


def narrow(x):
    return x.to(torch.complex64 if x.is_complex() else torch.float32)


def results(backend, arguments, **options):
    """y, the final state, and the gradients of all arguments, through both; the kernel's in float32."""
    leaves = [(narrow(x) if backend == "numba" else x).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        y, last = diagonal_ssm(*leaves[:3], state=leaves[3], **options)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    turned = torch.randn(last.shape, generator=generator, dtype=torch.complex128)
    return [y, last, *torch.autograd.grad((y * weights).sum() + (last * turned).sum().real, leaves)]


@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 65, 131])
def test_parallel_and_kernel_equal_reference(T, states):
    for segments in layouts(T):
        arguments = inputs(T, states=states)
        wanted = results("reference", arguments, segments=segments)
        assert_close(results("parallel", arguments, segments=segments), wanted, 1e-9, 1e-9)
        assert_close(results("numba", arguments, segments=segments), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_convolution(backend):
    """y_t = sum_s K_{t-s} u_s + Re sum_n weight decay^(t+1) state, K_s = Re sum_n weight decay^s."""
    T = 40
    u, decay, weight, state = inputs(T)
    powers = torch.stack([torch.ones_like(decay), *[decay] * T]).cumprod(0)  # (T + 1, D, N)
    kernel = (weight * powers).sum(-1).real
    lag = torch.arange(T)[:, None] - torch.arange(T)
    toeplitz = torch.where((lag >= 0)[..., None], kernel[lag.clamp(min=0)], 0)
    y = torch.einsum("tsd,bsd->btd", toeplitz, u) + torch.einsum("tdn,bdn->btd", powers[1:], weight * state).real
    last = powers[T] * state + torch.einsum("sdn,bsd->bdn", powers[:T].flip(0), u.to(powers.dtype))
    with tidegate.backend(backend):
        arguments = [narrow(x) if backend == "numba" else x for x in (u, decay, weight, state)]
        seen = diagonal_ssm(*arguments[:3], state=arguments[3])
    assert_close(seen, [y, last], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_and_padding_change_nothing(backend):
    T = 70
    u, decay, weight, state = (narrow(x) for x in inputs(T))
    with tidegate.backend(backend):
        y, last = diagonal_ssm(u, decay, weight, state=state)
        for cut in (1, 32, 69):
            first, carried = diagonal_ssm(u[:, :cut], decay, weight, state=state)
            second, carried = diagonal_ssm(u[:, cut:], decay, weight, state=carried)
            torch.testing.assert_close(torch.cat([first, second], 1), y, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(carried, last, atol=1e-4, rtol=1e-4)
        real = torch.ones(B, T + 3, dtype=torch.bool)
        real[:, [0, 11, T + 2]] = False
        wide = torch.full((B, T + 3, D), torch.nan)
        wide[real] = u.flatten(0, 1)
        wide.requires_grad_()
        padded, padded_last = diagonal_ssm(wide, decay, weight, state=state, segments=Segments.padded(real))
        torch.testing.assert_close(padded[real].view(y.shape), y, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(padded_last, last, atol=1e-4, rtol=1e-4)
        assert (padded[~real] == 0).all()
        padded.sum().backward()
        assert wide.grad.isfinite().all()
        assert (wide.grad[~real] == 0).all()


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.diagonal_ssm.numba_cpu")
    for segments in (None, layouts(6)[-1]):
        codes = None if segments is None else segments.codes()
        u, decay, weight, state = (narrow(x).requires_grad_() for x in inputs(6))
        torch.library.opcheck(module._forward_op, (u, decay, weight, state, codes))
        plain = [x.detach() for x in (u, decay, weight)]
        saved = module._forward_op(*plain, state.detach(), codes)[2]
        torch.library.opcheck(module._backward_op, (*plain, codes, saved, u.detach(), state.detach()))


def test_bitwise_equal_for_any_number_of_threads():
    arguments = inputs(70, dim=200, batch=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = results("numba", arguments)
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(results("numba", arguments), single, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("segments", [None, Segments.packed([[2, 3]])], ids=["whole", "packed"])
def test_second_derivatives(segments):
    def function(u, decay, weight, state):
        return diagonal_ssm(u, decay, weight, state=state, segments=segments)

    arguments = inputs(5, states=2, dim=2, batch=1)
    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in arguments])
    found = []
    for backend in ("parallel", "numba"):
        leaves = [(narrow(x) if backend == "numba" else x).clone().requires_grad_() for x in arguments]
        with tidegate.backend(backend):
            y, last = function(*leaves)
            first = torch.autograd.grad((y * y).sum() + (last**3).sum().real, leaves, create_graph=True)
            penalty = sum((g * g.conj()).real.sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, leaves)])
    assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_half_precision_and_errors():
    u, decay, weight, state = inputs(7)
    y, last = diagonal_ssm(u.bfloat16(), decay, weight)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.complex64)
    for name, arguments, options in (
        ("u", (u[0], decay, weight), {}),
        ("u", (u[:, :0], decay, weight), {}),
        ("u", (u + 0j, decay, weight), {}),
        ("decay", (u, decay[1:], weight), {}),
        ("decay", (u, decay.real, weight), {}),
        ("weight", (u, decay, weight[:, 1:]), {}),
        ("state", (u, decay, weight), {"state": state[:1]}),
        ("segments", (u, decay, weight), {"segments": Segments.packed([[7]])}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            diagonal_ssm(*arguments, **options)
