"""ops.scan: three backends against each other, and against the sum it abbreviates."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.export import Dim

import tidegate
from tidegate import Segments
from tidegate.ops import scan

B, D = 3, 5
LENGTHS = (1, 2, 17, 64, 65, 131)
# Of float32 against float64, relative to the largest value.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


def layouts(T, batch=B):
    """Packed, padded on the left, on the right, in the middle, all at once, and a row without any token."""
    if T == 1:
        return [None, Segments.packed([[1]] * batch), Segments.padded(torch.tensor([[1], [0], [1]][:batch]))]
    time = torch.arange(T)
    packed = Segments.packed([[T // 2, T - T // 2], [1] * T, [T]][:batch])
    holes = torch.rand(batch, T, generator=torch.Generator().manual_seed(T)) > 0.4
    holes[-1] = False
    left = Segments.padded(time >= torch.tensor([0, T // 2, T - 1][:batch])[:, None])
    right = Segments.padded(time < torch.tensor([T, T // 2, 1][:batch])[:, None])
    return [None, packed, left, right, Segments.padded(holes), packed & Segments.padded(holes)]


def inputs(T, *, dtype=torch.float64, constant=False, batch=B, dim=D):
    # Decays of modulus up to 1, exact zeros and ones among them.
    shape = (dim,) if constant else (batch, T, dim)
    a = torch.rand(shape, dtype=torch.float64) * 1.2 - 0.1
    a = a.clamp(0, 1).to(dtype)
    if dtype.is_complex:
        a = a * torch.exp(1j * torch.rand(shape, dtype=torch.float64) * 7)
    return a, torch.randn(batch, T, dim, dtype=dtype), torch.randn(batch, dim, dtype=dtype)


def results(backend, arguments, dtype=None, **options):
    """h, the final state, and the gradients of all arguments, through both."""
    leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        h, last = scan(leaves[0], leaves[1], state=leaves[2], **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in (h, last)]
    loss = (h * weights[0]).sum() + (last * weights[1]).sum()
    return [h, last, *torch.autograd.grad(loss.real, leaves)]


def assert_close(seen, wanted, outputs, gradients):
    for position, (s, w) in enumerate(zip(seen, wanted, strict=True)):
        assert s.shape == w.shape
        limit = (outputs if position < 2 else gradients) * max(1.0, float(w.detach().abs().max()))
        error = float((s.to(w.dtype) - w).detach().abs().max())
        assert error <= limit, f"result {position}: {error} > {limit}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("T", LENGTHS)
def test_parallel_and_kernel_equal_reference(T, dtype, constant, reverse):
    for segments in layouts(T):
        arguments = inputs(T, dtype=dtype, constant=constant)
        options = dict(segments=segments, reverse=reverse)
        wanted = results("reference", arguments, **options)
        assert_close(results("parallel", arguments, **options), wanted, 1e-9, 1e-9)
        single = torch.complex64 if dtype.is_complex else torch.float32
        assert_close(results("numba", arguments, single, **options), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_is_the_weighted_sum_of_its_inputs(backend, dtype):
    """h_t = prod_{r <= t} a_r state + sum_s prod_{s < r <= t} a_r b_s, and powers of a for a constant decay."""
    T = 33
    a, b, state = inputs(T, dtype=dtype)
    expected = torch.stack(
        [
            a[:, : t + 1].prod(1) * state + sum(a[:, s + 1 : t + 1].prod(1) * b[:, s] for s in range(t + 1))
            for t in range(T)
        ],
        dim=1,
    )
    single = torch.complex64 if dtype.is_complex else torch.float32

    def narrow(x):
        return x.to(single) if backend == "numba" else x

    with tidegate.backend(backend):
        h, last = scan(narrow(a), narrow(b), state=narrow(state))
        assert_close([h, last], [expected, expected[:, -1]], OUTPUT_TOLERANCE, 0)

        a, b, state = inputs(T, dtype=dtype, constant=True)
        lag = torch.arange(T)[:, None] - torch.arange(T)
        powers = torch.where((lag >= 0)[..., None], a ** lag.clamp(min=0)[..., None], 0)
        expected = torch.einsum("tsd,bsd->btd", powers, b) + a ** torch.arange(1, T + 1)[:, None] * state[:, None]
        h, last = scan(narrow(a), narrow(b), state=narrow(state))
        assert_close([h, last], [expected, expected[:, -1]], OUTPUT_TOLERANCE, 0)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_reverse_is_forward_on_the_flipped_row(backend):
    lengths = [[3, 1, 5], [9], [4, 5]]
    a, b, state = (x.float() for x in inputs(9))
    with tidegate.backend(backend):
        h, last = scan(a, b, state=state, segments=Segments.packed(lengths), reverse=True)
        # Right to left, the row's last document is the one that continues from the state.
        flipped = Segments.packed([row[::-1] for row in lengths], continues=True)
        expected, expected_last = scan(a.flip(1), b.flip(1), state=state, segments=flipped)
        torch.testing.assert_close(h, expected.flip(1))
        torch.testing.assert_close(last, expected_last)
        # Each document is a sequence of its own; the state goes into the last and comes out of the first.
        for row, documents in enumerate(lengths):
            begin = 0
            for number, length in enumerate(documents):
                own = slice(begin, begin + length)
                begin += length
                inner = state[row : row + 1] if number == len(documents) - 1 else None
                alone, out = scan(a[row : row + 1, own], b[row : row + 1, own], state=inner, reverse=True)
                torch.testing.assert_close(h[row : row + 1, own], alone)
                if number == 0:
                    torch.testing.assert_close(last[row : row + 1], out)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
@pytest.mark.parametrize("reverse", [False, True])
def test_splits_and_padding_change_nothing(backend, reverse):
    T = 40
    a, b, state = (x.float() for x in inputs(T))
    with tidegate.backend(backend):
        h, last = scan(a, b, state=state, reverse=reverse)
        for cut in (1, 16, 39):
            parts = [(a[:, :cut], b[:, :cut]), (a[:, cut:], b[:, cut:])]
            carried, pieces = state, []
            for part in parts[::-1] if reverse else parts:
                piece, carried = scan(*part, state=carried, reverse=reverse)
                pieces.append(piece)
            torch.testing.assert_close(torch.cat(pieces[::-1] if reverse else pieces, 1), h)
            torch.testing.assert_close(carried, last)
        # Whatever stands on padding is never read, and gets no gradient.
        wide_a, wide_b = (torch.full((B, T + 3, D), torch.nan) for _ in range(2))
        real = torch.ones(B, T + 3, dtype=torch.bool)
        real[:, [0, 11, T + 2]] = False
        where = real[0].nonzero()[:, 0]
        wide_a[:, where], wide_b[:, where] = a, b
        wide_a.requires_grad_()
        wide_b.requires_grad_()
        wide, wide_last = scan(wide_a, wide_b, state=state, segments=Segments.padded(real), reverse=reverse)
        torch.testing.assert_close(wide[:, where], h)
        torch.testing.assert_close(wide_last, last)
        assert (wide[~real] == 0).all()
        (wide.sum() + wide_last.sum()).backward()
        for gradient in (wide_a.grad, wide_b.grad):
            assert gradient.isfinite().all()
            assert (gradient[~real] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_extreme_decays_are_exact(backend):
    T = 50
    a = torch.exp(torch.tensor([0.0, -200.0, -1e4, -1e-8])[torch.randint(4, (B, T, D))])
    b, state = torch.randn(B, T, D) * 1e6, torch.randn(B, D)
    wanted = results("reference", (a, b, state), torch.float64)
    seen = results(backend, (a, b, state))
    assert all(x.isfinite().all() for x in seen)
    assert_close(seen, wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


def test_broadcasts_and_mixes_dtypes():
    a, b, state = inputs(7)
    for shape in ((1, 7, D), (B, 1, D), (B, 7, 1), (1, 1, D), (1, 1, 1)):
        part = torch.rand(shape, dtype=torch.float64).requires_grad_()
        h, _ = scan(part, b, state=state)
        expected, _ = scan(part.expand(B, 7, D).clone(), b, state=state)
        torch.testing.assert_close(h, expected)
        assert torch.autograd.grad(h.sum(), part)[0].shape == shape
    h, last = scan(a.bfloat16(), b.bfloat16())
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = scan(a.bfloat16().double(), b.bfloat16().double())
    torch.testing.assert_close(h.double(), expected, atol=0.05, rtol=0.01)
    h, last = scan(a.float(), b.to(torch.complex64))
    assert h.dtype == last.dtype == torch.complex64
    torch.testing.assert_close(h.real.double(), scan(a, b)[0], atol=1e-5, rtol=1e-5)


def test_operators_pass_opcheck():
    module = importlib.import_module("tidegate.ops.scan.numba_cpu")
    for dtype in (torch.float32, torch.complex64):
        for constant in (False, True):
            for segments in (None, layouts(6)[-1]):
                codes = None if segments is None else segments.codes()
                arguments = [x.to(dtype).requires_grad_() for x in inputs(6, constant=constant)]
                torch.library.opcheck(module._forward_op, (*arguments, codes, segments is None))
                a, h, state = (x.detach() for x in arguments)
                torch.library.opcheck(module._backward_op, (a, h, state, codes, False, h, state))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_second_derivatives(dtype):
    segments = Segments.packed([[2, 3]])

    def function(a, b, state):
        return scan(a, b, state=state, segments=segments)

    for constant in (False, True):
        arguments = [x.requires_grad_() for x in inputs(5, dtype=dtype, batch=1, dim=2, constant=constant)]
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_second_derivatives_of_the_kernel(dtype, constant, reverse):
    for segments in layouts(9):
        arguments = inputs(9, dtype=dtype, constant=constant)
        found = []
        for backend, cast in (("parallel", dtype), ("numba", torch.complex64 if dtype.is_complex else torch.float32)):
            leaves = [x.to(cast).clone().requires_grad_() for x in arguments]
            with tidegate.backend(backend):
                h, last = scan(leaves[0], leaves[1], state=leaves[2], segments=segments, reverse=reverse)
            first = torch.autograd.grad(((h * h).sum() + (last**3).sum()).real, leaves, create_graph=True)
            penalty = sum((g * g.conj()).real.sum() for g in first)
            found.append([*first, *torch.autograd.grad(penalty, leaves)])
        assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_vmap():
    a, b, state = (torch.stack([x, x.flip(0)]) for x in inputs(21, dtype=torch.float32))
    h, last = torch.vmap(lambda a, b, s: scan(a, b, state=s))(a, b, state)
    for n in range(2):
        expected, expected_last = scan(a[n], b[n], state=state[n])
        torch.testing.assert_close(h[n], expected)
        torch.testing.assert_close(last[n], expected_last)


class Scan(torch.nn.Module):
    def __init__(self, reverse=False):
        super().__init__()
        self.reverse = reverse

    def forward(self, a, b, state, segments=None):
        return scan(a, b, state=state, segments=segments, reverse=self.reverse)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_to_one_graph(dtype, constant):
    arguments = [x.requires_grad_() for x in inputs(33, dtype=dtype, constant=constant)]
    compiled = torch.compile(Scan(), fullgraph=True, backend="aot_eager")
    for segments in (None, layouts(33)[-1]):
        found = []
        for module in (compiled, Scan()):
            h, last = module(*arguments, segments)
            found.append([h, last, *torch.autograd.grad(h.sum() + last.sum(), arguments)])
        assert_close(found[0], found[1], 1e-6, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_exports_with_any_length(reverse):
    T = Dim("T", min=1)
    for with_segments in (False, True):
        example = inputs(6, dtype=torch.float32)
        segments = layouts(6)[-1] if with_segments else None
        shapes = ({1: T}, {1: T}, {}, [{1: T}, {1: T}] if with_segments else None)
        program = torch.export.export(Scan(reverse), (*example, segments), dynamic_shapes=shapes).module()
        for length in (1, 2, 17):
            arguments = inputs(length, dtype=torch.float32)
            segments = layouts(length)[-1] if with_segments else None
            wanted = scan(*arguments[:2], state=arguments[2], segments=segments, reverse=reverse)
            assert_close(program(*arguments, segments), wanted, 1e-6, 0)


def test_errors_name_the_argument():
    a, b, state = inputs(4)
    for match, arguments, options in (
        (r"b: seen shape \(4, 5\)", (a, b[0]), {}),
        (r"b: seen T = 0", (a, b[:, :0]), {}),
        (r"a: seen shape \(3, 4, 4\)", (a[..., :4], b), {}),
        (r"a: seen shape \(4,\), wanted \(5,\)", (a[0, :, 0], b), {}),
        (r"a: seen dtype torch.int64", (a.long(), b), {}),
        (r"state: seen shape \(3, 4\)", (a, b), {"state": state[:, :4]}),
        (r"state: seen dtype torch.complex128", (a, b), {"state": state + 0j}),
        (r"segments: made for \(batch, time\) = \(3, 6\)", (a, b), {"segments": layouts(6)[1]}),
    ):
        with pytest.raises(ValueError, match=match):
            scan(*arguments, **options)


def test_an_empty_batch_is_an_empty_answer():
    h, state = scan(torch.ones(3), torch.ones(0, 4, 3))
    assert h.shape == (0, 4, 3)
    assert state.shape == (0, 3)
