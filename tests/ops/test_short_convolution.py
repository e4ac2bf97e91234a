"""ops.short_convolution: three backends against each other, and against torch.nn.Conv1d."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.export import Dim

import tidegate
from tidegate import Segments
from tidegate.ops import short_convolution

B, D = 3, 5
LENGTHS = (1, 2, 17, 64, 65, 131)
WIDTHS = (1, 2, 4, 7)
# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


def layouts(T):
    """None; packed; padded left, right and in the middle; both; both, continuing; the last row may be empty."""
    if T == 1:
        return [None, Segments.packed([[1]] * B), Segments.padded(torch.tensor([[1], [0], [1]]))]
    time = torch.arange(T)
    documents = [[T // 2, T - T // 2], [1] * T, [T]]
    packed = Segments.packed(documents)
    holes = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) > 0.4
    holes[-1] = False
    left = Segments.padded(time >= torch.tensor([0, T // 2, T - 1])[:, None])
    right = Segments.padded(time < torch.tensor([T, T // 2, 1])[:, None])
    continuing = Segments.packed(documents, continues=True) & Segments.padded(holes)
    return [None, packed, left, right, Segments.padded(holes), packed & Segments.padded(holes), continuing]


def inputs(T, width, dtype=torch.float64, batch=B, dim=D):
    shapes = ((batch, T, dim), (dim, width), (dim,), (batch, width - 1, dim))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def results(backend, arguments, dtype=None, segments=None, with_bias=True, activation=None):
    """y, the tail, and the gradients of x, weight, bias and state, through both."""
    leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in arguments]
    x, weight, bias, state = leaves
    with tidegate.backend(backend):
        options = dict(activation=activation, state=state, segments=segments)
        y, tail = short_convolution(x, weight, bias if with_bias else None, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in (y, tail)]
    loss = (y * weights[0]).sum() + (tail * weights[1]).sum()
    return [y, tail, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_close(seen, wanted, outputs, gradients):
    for position, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        if s.numel():
            s, w = s.detach().to(w.dtype), w.detach()
            limit = (outputs if position < 2 else gradients) * max(1.0, float(w.abs().max()))
            assert float((s - w).abs().max()) <= limit, f"result {position}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("T", LENGTHS)
def test_parallel_and_kernel_equal_reference(T, width):
    for number, segments in enumerate(layouts(T)):
        arguments = inputs(T, width)
        options = dict(segments=segments, with_bias=number % 2 == 0, activation=(None, "silu")[number // 2 % 2])
        wanted = results("reference", arguments, **options)
        assert_close(results("parallel", arguments, **options), wanted, 1e-9, 1e-9)
        seen = results("numba", arguments, torch.float32, **options)
        assert_close(seen, wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_torch_conv1d(backend, width):
    x, weight, bias, _ = inputs(19, width, torch.float32)
    conv = torch.nn.Conv1d(D, D, width, groups=D, padding=width - 1)
    conv.weight.data, conv.bias.data = weight[:, None], bias
    expected = conv(x.mT)[..., : x.shape[1]].mT
    with tidegate.backend(backend):
        y, tail = short_convolution(x, weight, bias)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail, torch.nn.functional.pad(x, (0, 0, width, 0))[:, -width:][:, 1:])


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_documents_are_alone_and_splits_and_padding_change_nothing(backend):
    width, T = 4, 12
    x, weight, bias, state = inputs(T, width, torch.float32)
    with tidegate.backend(backend):
        y, tail = short_convolution(x, weight, bias, state=state)
        for cut in (1, 2, 5, 11):
            first, carried = short_convolution(x[:, :cut], weight, bias, state=state)
            second, carried = short_convolution(x[:, cut:], weight, bias, state=carried)
            torch.testing.assert_close(torch.cat([first, second], 1), y)
            torch.testing.assert_close(carried, tail)
        packed, packed_tail = short_convolution(
            x, weight, bias, state=state, segments=Segments.packed([[5, 1, 6], [2, 10], [12]])
        )
        alone = [short_convolution(x[:1, own], weight, bias) for own in (slice(0, 5), slice(5, 6), slice(6, 12))]
        torch.testing.assert_close(packed[:1], torch.cat([y for y, _ in alone], 1))
        torch.testing.assert_close(packed_tail[:1], alone[-1][1])
        # Whatever stands on padding is never read, and gets no gradient.
        real = torch.ones(B, T + 3, dtype=torch.bool)
        real[:, [0, 6, T + 2]] = False
        where = real[0].nonzero()[:, 0]
        wide = torch.full((B, T + 3, D), torch.nan)
        wide[:, where] = x
        wide.requires_grad_()
        weight.requires_grad_()
        wide_y, wide_tail = short_convolution(wide, weight, bias, state=state, segments=Segments.padded(real))
        torch.testing.assert_close(wide_y[:, where], y)
        torch.testing.assert_close(wide_tail, tail)
        assert (wide_y[~real] == 0).all()
        (wide_y.square().sum() + wide_tail.sum()).backward()
        assert wide.grad.isfinite().all()
        assert weight.grad.isfinite().all()
        assert (wide.grad[~real] == 0).all()


def test_half_precision_keeps_its_dtype():
    x, weight, bias, state = inputs(9, 4, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        y, tail = short_convolution(x.to(dtype), weight, bias, state=state)
        assert y.dtype == tail.dtype == dtype
        torch.testing.assert_close(y.float(), short_convolution(x, weight, bias, state=state)[0], atol=0.1, rtol=0.02)


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.convolution.numba_cpu")
    for width in (1, 4):
        for segments in (None, layouts(6)[-1]):
            codes = None if segments is None else segments.codes()
            x, weight, bias, state = (z.requires_grad_() for z in inputs(6, width, torch.float32))
            torch.library.opcheck(
                module._forward_op, (x, weight, None if codes is None else bias, state, codes, width == 4)
            )
            x, weight, bias, state = (z.detach() for z in (x, weight, bias, state))
            torch.library.opcheck(module._backward_op, (x, weight, bias, state, codes, width == 4, x, state))


def test_bitwise_equal_for_any_number_of_threads():
    before = torch.get_num_threads()
    arguments = inputs(20, 4, torch.float32, batch=1, dim=700)
    try:
        torch.set_num_threads(1)
        single = results("numba", arguments)
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(results("numba", arguments), single, strict=True))
    finally:
        torch.set_num_threads(before)


def test_second_derivatives():
    for segments in (None, Segments.packed([[2, 3]])):
        arguments = [z.requires_grad_() for z in inputs(5, 3, batch=1, dim=2)]

        def function(x, weight, bias, state, segments=segments):
            return short_convolution(x, weight, bias, state=state, segments=segments)

        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_second_derivatives_of_the_kernel():
    for segments in layouts(9):
        arguments = inputs(9, 4)
        found = []
        for backend, dtype in (("parallel", torch.float64), ("numba", torch.float32)):
            leaves = [z.to(dtype).clone().requires_grad_() for z in arguments]
            with tidegate.backend(backend):
                y, tail = short_convolution(*leaves[:3], state=leaves[3], segments=segments)
            first = torch.autograd.grad((y**3).sum() + (tail**3).sum(), leaves, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, leaves)])
        assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_vmap():
    x, weight, bias, state = inputs(9, 4, torch.float32)
    xs, states = torch.stack([x, x.flip(1)]), torch.stack([state, -state])
    y, tail = torch.vmap(lambda x, s: short_convolution(x, weight, bias, state=s))(xs, states)
    for n in range(2):
        expected, expected_tail = short_convolution(xs[n], weight, bias, state=states[n])
        torch.testing.assert_close(y[n], expected)
        torch.testing.assert_close(tail[n], expected_tail)


class Convolution(torch.nn.Module):
    def forward(self, x, weight, bias, state, segments=None):
        return short_convolution(x, weight, bias, state=state, segments=segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_to_one_graph(dtype):
    compiled = torch.compile(Convolution(), fullgraph=True, backend="aot_eager")
    arguments = [z.requires_grad_() for z in inputs(17, 4, dtype)]
    for segments in (None, layouts(17)[-1]):
        found = []
        for module in (compiled, Convolution()):
            y, tail = module(*arguments, segments)
            found.append([y, tail, *torch.autograd.grad(y.square().sum() + tail.sum(), arguments)])
        assert_close(found[0], found[1], 1e-6, 1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_exports_with_any_length(width):
    T = Dim("T", min=1)
    for with_segments in (False, True):
        segments = layouts(6)[-1] if with_segments else None
        shapes = ({1: T}, {}, {}, {}, [{1: T}, {1: T}] if with_segments else None)
        example = (*inputs(6, width, torch.float32), segments)
        program = torch.export.export(Convolution(), example, dynamic_shapes=shapes).module()
        for length in (1, 2, 3, 17):
            arguments = inputs(length, width, torch.float32)
            segments = layouts(length)[-1] if with_segments else None
            assert_close(program(*arguments, segments), Convolution()(*arguments, segments), 1e-6, 0)


def test_errors_name_the_argument():
    x, weight, bias, state = inputs(6, 4)
    for match, arguments, options in (
        (r"x: seen shape \(6, 5\)", (x[0], weight), {}),
        (r"x: seen T = 0", (x[:, :0], weight), {}),
        (r"x: seen dtype torch.int64", (x.long(), weight), {}),
        (r"weight: seen shape \(4, 5\), wanted \(dim=5, width\)", (x, weight.t()), {}),
        (r"bias: seen shape \(4,\)", (x, weight, bias[:4]), {}),
        (r"state: seen shape \(3, 2, 5\)", (x, weight), {"state": state[:, :2]}),
        (r"segments: made for \(batch, time\) = \(3, 9\)", (x, weight), {"segments": layouts(9)[1]}),
    ):
        with pytest.raises(ValueError, match=match):
            short_convolution(*arguments, **options)
