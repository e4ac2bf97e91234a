"""ops.dense_ssm: three backends against each other, and against the convolution and the matrix powers that it is."""

from __future__ import annotations

import importlib

import pytest
import torch

import tidegate
from tests.ops.test_scan import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, B, assert_close, layouts
from tidegate import Segments
from tidegate.ops import diagonal_ssm
from tidegate.ops.dense_ssm import dense_ssm

D = 5
BACKENDS = ["reference", "parallel", "numba"]


def inputs(T, *, states=9, outputs=2, dim=D, batch=B):
    a = torch.randn(dim, states, states, dtype=torch.float64)
    a = a / torch.linalg.matrix_norm(a, 2)[:, None, None]  # nothing grows
    shapes = (batch, T, dim), (dim, states), (dim, outputs, states), (batch, dim, states)
    u, b, c, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [u, a, b, c, state]


def results(backend, arguments, **options):
    """y, the final state, and the gradients of all arguments, through both; the kernel's in float32."""
    leaves = [(x.float() if backend == "numba" else x).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        y, last = dense_ssm(*leaves[:4], state=leaves[4], **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (y, last)]
    return [y, last, *torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), leaves)]


@pytest.mark.parametrize(("states", "outputs"), [(1, 1), (9, 2), (16, 1)])
@pytest.mark.parametrize("T", [1, 2, 17, 63, 64, 65, 131])
def test_parallel_and_kernel_equal_reference(T, states, outputs):
    for segments in layouts(T):
        arguments = inputs(T, states=states, outputs=outputs)
        wanted = results("reference", arguments, segments=segments)
        assert_close(results("parallel", arguments, segments=segments), wanted, 1e-9, 1e-9)
        assert_close(results("numba", arguments, segments=segments), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_convolution(backend):
    """y_t = sum_s K_{t-s} u_s + c a^(t+1) state, K_s = c a^s b."""
    T = 80
    u, a, b, c, state = inputs(T)
    powers = [torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)]
    for _ in range(T):
        powers.append(a @ powers[-1])
    powers = torch.stack(powers)  # (T + 1, D, N, N)
    kernel = torch.einsum("dmi,tdij,dj->tdm", c, powers[:T], b)
    lag = torch.arange(T)[:, None] - torch.arange(T)
    toeplitz = torch.where((lag >= 0)[..., None, None], kernel[lag.clamp(min=0)], 0)
    y = torch.einsum("tsdm,bsd->btdm", toeplitz, u) + torch.einsum("dmi,tdij,bdj->btdm", c, powers[1:], state)
    last = torch.einsum("dij,bdj->bdi", powers[T], state)
    last = last + torch.einsum("sdij,dj,bsd->bdi", powers[:T].flip(0), b, u)
    with tidegate.backend(backend):
        u, a, b, c, state = (x.float() if backend == "numba" else x for x in (u, a, b, c, state))
        seen = dense_ssm(u, a, b, c, state=state)
    assert_close(seen, [y, last], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotations_are_a_diagonal_model(backend):
    """Blocks [[x, -y], [y, x]] are complex numbers x + i y."""
    T, pairs = 70, 3
    angle, modulus = torch.rand(2, D, pairs, dtype=torch.float64)
    decay = torch.polar(modulus, 7 * angle)
    weight = torch.randn(D, pairs, dtype=torch.complex128)
    a = torch.cat(
        [torch.cat([x.diag_embed() for x in row], -1) for row in ((decay.real, -decay.imag), (decay.imag, decay.real))],
        -2,
    )
    b = torch.cat([torch.ones(D, pairs), torch.zeros(D, pairs)], -1).double()
    c = torch.cat([weight.real, -weight.imag], -1)[:, None]
    u = torch.randn(B, T, D, dtype=torch.float64)
    wanted, memory = diagonal_ssm(u, decay, weight)
    with tidegate.backend(backend):
        y, last = dense_ssm(*((x.float() if backend == "numba" else x) for x in (u, a, b, c)))
    assert_close([y[..., 0], last], [wanted, torch.cat([memory.real, memory.imag], -1)], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_and_padding_change_nothing(backend):
    T = 150
    u, a, b, c, state = (x.float() for x in inputs(T))
    close = dict(atol=1e-4, rtol=1e-4)
    with tidegate.backend(backend):
        y, last = dense_ssm(u, a, b, c, state=state)
        for cut in (1, 64, 90, 149):
            first, carried = dense_ssm(u[:, :cut], a, b, c, state=state)
            second, carried = dense_ssm(u[:, cut:], a, b, c, state=carried)
            torch.testing.assert_close(torch.cat([first, second], 1), y, **close)
            torch.testing.assert_close(carried, last, **close)
        real = torch.ones(B, T + 3, dtype=torch.bool)
        real[:, [0, 11, T + 2]] = False
        wide = torch.full((B, T + 3, D), torch.nan)
        wide[real] = u.flatten(0, 1)
        wide.requires_grad_()
        padded, padded_last = dense_ssm(wide, a, b, c, state=state, segments=Segments.padded(real))
        torch.testing.assert_close(padded[real].view(y.shape), y, **close)
        torch.testing.assert_close(padded_last, last, **close)
        assert (padded[~real] == 0).all()
        padded.sum().backward()
        assert wide.grad.isfinite().all()
        assert (wide.grad[~real] == 0).all()


def test_padding_is_never_cut_into_pieces():
    """What stands on padding reaches no number: not even NaN, and blank rows keep their state bit by bit."""
    T = 40
    u, a, b, c, state = (x.float() for x in inputs(T))
    real = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5
    real[1] = False
    u[~real] = torch.nan
    y, last = dense_ssm(u, a, b, c, state=state, segments=Segments.padded(real))
    assert y.isfinite().all()
    assert torch.equal(last[1], state[1])


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.dense_ssm.numba_cpu")
    for segments in (None, layouts(6)[-1]):
        codes = None if segments is None else segments.codes()
        u, a, b, c, state = (x.float().requires_grad_() for x in inputs(6))
        torch.library.opcheck(module._forward_op, (u, a, b, c, state, codes))
        plain = [x.detach() for x in (u, a, b, c, state)]
        y, last = module._forward_op(*plain, codes)
        torch.library.opcheck(module._backward_op, (*plain, codes, y, last))


@pytest.mark.parametrize("segments", [None, Segments.packed([[2, 3]])], ids=["whole", "packed"])
def test_second_derivatives(segments):
    def function(u, a, b, c, state):
        return dense_ssm(u, a, b, c, state=state, segments=segments)

    arguments = inputs(5, states=2, dim=2, batch=1)
    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in arguments])
    found = []
    for backend in ("parallel", "numba"):
        leaves = [(x.float() if backend == "numba" else x).clone().requires_grad_() for x in arguments]
        with tidegate.backend(backend):
            y, last = function(*leaves)
            first = torch.autograd.grad((y * y).sum() + (last**3).sum(), leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_half_precision_and_errors():
    u, a, b, c, state = inputs(7)
    y, last = dense_ssm(u.bfloat16(), a, b, c)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    for name, arguments, options in (
        ("u", (u[0], a, b, c), {}),
        ("u", (u[:, :0], a, b, c), {}),
        ("u", (u + 0j, a, b, c), {}),
        ("a", (u, a[1:], b, c), {}),
        ("a", (u, a[:, 1:], b, c), {}),
        ("b", (u, a, b[:, 1:], c), {}),
        ("c", (u, a, b, c[:, 0]), {}),
        ("c", (u, a, b, c[..., 1:]), {}),
        ("state", (u, a, b, c), {"state": state[:1]}),
        ("segments", (u, a, b, c), {"segments": Segments.packed([[7]])}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            dense_ssm(*arguments, **options)
