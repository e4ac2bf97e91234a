"""ops.sru: three backends against each other, the scan it is without v, and its operators."""

from __future__ import annotations

import importlib

import pytest
import torch

import tidegate
from tests.ops.test_scan import GRADIENT_TOLERANCE, LENGTHS, OUTPUT_TOLERANCE, B, D, assert_close, layouts
from tidegate import Segments
from tidegate.ops import scan
from tidegate.ops.sru import sru

ALPHA = 1.7


def inputs(T, *, see=True, dim=D, batch=B, dtype=torch.float64, size=1.0):
    shapes = [(batch, T, dim), (batch, T, 3 * dim), (2, dim), *([(2, dim)] if see else []), (batch, dim)]
    return [size * torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in shapes]


def call(arguments, **options):
    x, projected, bias, *weight, state = arguments
    return sru(x, projected, bias, *weight, alpha=ALPHA, state=state, **options)


def results(backend, arguments, dtype=None, **options):
    """y, the final state, and the gradients of all arguments, through both."""
    leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        y, last = call(leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in (y, last)]
    return [y, last, *torch.autograd.grad((y * weights[0]).sum() + (last * weights[1]).sum(), leaves)]


@pytest.mark.parametrize("see", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
def test_parallel_and_kernel_equal_reference(T, see):
    for segments in layouts(T):
        arguments = inputs(T, see=see)
        wanted = results("reference", arguments, segments=segments)
        assert_close(results("parallel", arguments, segments=segments), wanted, 1e-9, 1e-9)
        kernel = results("numba", arguments, torch.float32, segments=segments)
        assert_close(kernel, wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_without_weights_on_the_state_it_is_a_scan(backend):
    x, projected, bias, state = inputs(33, see=False, dtype=torch.float32)
    u, f, r = projected.double().chunk(3, -1)
    f, r = torch.sigmoid(f + bias[0]), torch.sigmoid(r + bias[1])
    c, last = scan(f, (1 - f) * u, state=state.double())
    with tidegate.backend(backend):
        seen = call((x, projected, bias, state))
    assert_close(seen, [r * c + (1 - r) * ALPHA * x, last], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_padding_is_never_read(backend):
    arguments = inputs(8, dtype=torch.float32)
    real = torch.ones(B, 8, dtype=torch.bool)
    real[:, [0, 3, 7]] = False
    leaves = [x.clone() for x in arguments]
    for x in leaves[:2]:
        x[~real] = torch.nan
    leaves = [x.requires_grad_() for x in leaves]
    kept = [x[:, real[0]] if x.ndim == 3 else x for x in arguments]
    with tidegate.backend(backend):
        y, last = call(leaves, segments=Segments.padded(real))
        expected, expected_last = call(kept)
    torch.testing.assert_close(y[:, real[0]], expected)
    torch.testing.assert_close(last, expected_last)
    assert (y[~real] == 0).all()
    gradients = torch.autograd.grad(y.sum() + last.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert all((g[~real] == 0).all() for g in gradients[:2])


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_extreme_gates_stay_finite(backend):
    for size in (30.0, 1e4):
        arguments = inputs(50, size=size)
        arguments[0], arguments[-1] = arguments[0] / size, arguments[-1] / size
        seen = results(backend, arguments, torch.float32)
        assert all(x.isfinite().all() for x in seen)


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.sru.numba_cpu")
    for see in (True, False):
        for segments in (None, layouts(6)[-1]):
            codes = None if segments is None else segments.codes()
            x, projected, bias, *weight, state = (y.requires_grad_() for y in inputs(6, see=see, dtype=torch.float32))
            arguments = (x, projected, bias, weight[0] if see else None, state, codes, ALPHA)
            torch.library.opcheck(module._forward_op, arguments)
            detached = [y.detach() if isinstance(y, torch.Tensor) else y for y in arguments]
            torch.library.opcheck(module._backward_op, (*detached, x.detach(), x.detach(), state.detach()))


def test_bitwise_equal_for_any_number_of_threads():
    arguments = inputs(20, dtype=torch.float32, dim=700, batch=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = results("numba", arguments)
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(results("numba", arguments), single, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("see", [True, False])
def test_second_derivatives(see):
    segments = Segments.packed([[2, 3]])
    arguments = [x.requires_grad_() for x in inputs(5, see=see, batch=1, dim=2)]
    assert torch.autograd.gradgradcheck(lambda *given: call(given, segments=segments), arguments)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
        y, last = call(leaves, segments=segments)
        first = torch.autograd.grad((y * y).sum() + (last**3).sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum((g * g).sum() for g in first), leaves)])
    assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_half_precision_and_errors():
    x, projected, bias, weight, state = inputs(7, dtype=torch.bfloat16)
    y, last = sru(x, projected, bias, weight, state=state.float())
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    for name, arguments, options in (
        ("x", (x[0], projected, bias), {}),
        ("x", (x[:, :0], projected[:, :0], bias), {}),
        ("projected", (x, projected[..., 1:], bias), {}),
        ("bias", (x, projected, bias[0]), {}),
        ("weight", (x, projected, bias, weight[:1]), {}),
        ("state", (x, projected, bias), {"state": state[:1]}),
        ("segments", (x, projected, bias), {"segments": Segments.packed([[7]])}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            sru(*arguments, **options)
