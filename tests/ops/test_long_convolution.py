"""ops.long_convolution and ops.two_sided_convolution: backends against each other, and against the sums they are."""

from __future__ import annotations

import importlib

import pytest
import torch

import tidegate
from tests.ops.test_scan import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, B, assert_close, layouts
from tidegate import Segments, State
from tidegate.ops import long_convolution, two_sided_convolution

D = 21  # one vector and a part of one
BACKENDS = ["reference", "parallel", "numba"]
module = importlib.import_module("tidegate.ops.long_convolution.numba_cpu")


def inputs(T, past=0, *, dim=D, batch=B):
    """x, the filters, and a past of a different length in every row."""
    length = torch.tensor([past, past // 2, 0])[:batch]
    kept = torch.randn(batch, past, dim, dtype=torch.float64)
    kept[torch.arange(past) >= length[:, None]] = 0
    x, filters = torch.randn(batch, T, dim, dtype=torch.float64), torch.randn(dim, past + T, dtype=torch.float64)
    return [x, filters, kept], length


def run(backend, function, arguments):
    """Results and, for a random combination of them, all gradients; the kernel's in float32."""
    leaves = [(x.float() if backend == "numba" else x).clone().requires_grad_() for x in arguments]
    with tidegate.backend(backend):
        results = function(*leaves)
    draw = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=draw, dtype=torch.float64)).sum() for y in results)
    found = [*results, *torch.autograd.grad(loss, leaves)]
    return [y for y in found if y.numel()]  # without a past, its gradient is empty


def streamed(length, segments=None):
    def function(x, filters, past):
        y, (inputs, _) = long_convolution(x, filters, state=(past, length), segments=segments)
        return y, inputs

    return function


# Term by term, by FFT, and some documents so, some so; in calls of a size, and in many pieces.
@pytest.fixture(params=[(10**9, 1 << 20), (0, 1 << 20), (5, 1 << 8)], ids=["terms", "fft", "both"])
def forms(request, monkeypatch):
    monkeypatch.setattr(module, "FEW", request.param[0])
    monkeypatch.setattr(module, "CHUNK", request.param[1])


@pytest.mark.parametrize("past", [0, 1, 20])
@pytest.mark.parametrize("T", [1, 2, 7, 9, 33, 131])
def test_parallel_equals_reference(T, past):
    for segments in layouts(T):
        arguments, length = inputs(T, past)
        function = streamed(length, segments)
        assert_close(run("parallel", function, arguments), run("reference", function, arguments), 1e-9, 1e-9)


@pytest.mark.parametrize("past", [0, 1, 20])
@pytest.mark.parametrize("T", [1, 2, 7, 9, 33, 131])
def test_kernel_equals_parallel(forms, T, past):
    for segments in layouts(T):
        arguments, length = inputs(T, past)
        function = streamed(length, segments)
        wanted = run("parallel", function, arguments)
        assert_close(run("numba", function, arguments), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("T", [1, 2, 8, 40, 131])
def test_two_sided_forms_agree(forms, T):
    def function(x, filters, future):
        return (two_sided_convolution(x, filters, future),)

    (x, filters, _), _ = inputs(T)
    arguments = [x, torch.cat([filters, filters[:, :1]], 1), torch.randn(D, T + 2, dtype=torch.float64)]
    wanted = run("reference", function, arguments)
    assert_close(run("parallel", function, arguments), wanted, 1e-9, 1e-9)
    assert_close(run("numba", function, arguments), wanted, OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_sum_that_it_says(forms, backend):
    """Literally, document by document: y_t = sum_{s<=t} filter[:, t - s] x_s, and the future's taps backwards."""
    T, rows = 30, [[11, 19], [30], [1, 2, 27]]
    (x, filters, _), _ = inputs(T)
    future = torch.randn(D, T, dtype=torch.float64)
    y, two_sided = torch.zeros_like(x), torch.zeros_like(x)
    for row, lengths in enumerate(rows):
        begin = 0
        for n in lengths:
            for t in range(n):
                for s in range(t + 1):
                    y[row, begin + t] += filters[:, t - s] * x[row, begin + s]
            begin += n
    for t in range(T):
        for s in range(T):
            two_sided[:, t] += (filters[:, t - s] if s <= t else future[:, s - t - 1]) * x[:, s]
    with tidegate.backend(backend):
        kind = torch.float32 if backend == "numba" else torch.float64
        x, filters, future = x.to(kind), filters.to(kind), future.to(kind)
        seen, (kept, length) = long_convolution(x, filters, segments=Segments.packed(rows))
        assert_close([seen, two_sided_convolution(x, filters, future)], [y, two_sided], OUTPUT_TOLERANCE, 0)
    assert length.tolist() == [19, 30, 27]
    for row, n in enumerate(length.tolist()):
        assert torch.equal(kept[row, :n], x[row, T - n :])
        assert not kept[row, n:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_different_age_are_joined(backend):
    T = 40
    (x, filters, _), _ = inputs(T)
    x, filters = x.float(), filters.float()
    with tidegate.backend(backend):
        whole, _ = long_convolution(x, filters)
        states = []
        for row, cut in enumerate((3, 25, 0)):
            if cut:
                _, (kept, length) = long_convolution(x[row : row + 1, :cut], filters)
            else:
                kept, length = x.new_zeros(1, 0, D), torch.zeros(1, dtype=torch.int64)
            states.append(State(kept=kept, length=length))
        joined = State.concat(states)
        then = torch.stack([x[0, 3:13], x[1, 25:35], x[2, :10]])
        y, (_, length) = long_convolution(then, filters, state=(joined["kept"], joined["length"]))
    torch.testing.assert_close(y, torch.stack([whole[0, 3:13], whole[1, 25:35], whole[2, :10]]), atol=1e-4, rtol=1e-4)
    assert length.tolist() == [13, 35, 10]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_read(forms, backend):
    real = torch.ones(B, 43, dtype=torch.bool)
    real[:, [0, 11, 42]] = False
    (x, filters, _), _ = inputs(40)
    x, filters = x.float(), torch.cat([filters, filters[:, :3]], 1).float()
    wide = torch.full((B, 43, D), torch.nan)
    wide[real] = x.flatten(0, 1)
    wide.requires_grad_()
    with tidegate.backend(backend):
        y, _ = long_convolution(x, filters)
        padded, _ = long_convolution(wide, filters, segments=Segments.padded(real))
    torch.testing.assert_close(padded[real].view(y.shape), y, atol=1e-4, rtol=1e-4)
    assert not padded[~real].any()
    padded.sum().backward()
    assert wide.grad.isfinite().all()
    assert not wide.grad[~real].any()


def test_operators_pass_opcheck(forms):
    for segments in (None, layouts(6)[-1]):
        codes = None if segments is None else segments.codes()
        (x, filters, past), length = inputs(6, 4)
        x, past, taps = (t.float().requires_grad_() for t in (x, past, filters.t()))
        torch.library.opcheck(module._forward_op, (x, past, length, taps, 0, codes))
        plain = [t.detach() for t in (x, past, taps)]
        torch.library.opcheck(module._backward_op, (*plain[:2], length, plain[2], 0, codes, plain[0]))


@pytest.mark.parametrize("segments", [None, Segments.packed([[40, 30]])], ids=["whole", "packed"])
def test_bitwise_equal_for_any_number_of_threads(forms, segments):
    arguments, length = inputs(70, 5, dim=200, batch=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("numba", streamed(length, segments), arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("segments", [None, Segments.packed([[2, 3]], continues=True)], ids=["whole", "packed"])
def test_second_derivatives(segments):
    arguments, length = inputs(5, 3, dim=2, batch=1)
    function = streamed(length, segments)
    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in arguments])
    two_sided = [arguments[0], arguments[1], arguments[1].flip(1)]
    assert torch.autograd.gradgradcheck(two_sided_convolution, [x.clone().requires_grad_() for x in two_sided])
    for call, given in ((function, arguments), (lambda *x: (two_sided_convolution(*x),), two_sided)):
        found = []
        for backend in ("parallel", "numba"):
            leaves = [(x.float() if backend == "numba" else x).clone().requires_grad_() for x in given]
            with tidegate.backend(backend):
                loss = sum((y**3).sum() for y in call(*leaves))
                first = torch.autograd.grad(loss, leaves, create_graph=True)
                found.append([*first, *torch.autograd.grad(sum((g * g).sum() for g in first), leaves)])
        assert_close(found[1], found[0], GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)


def test_a_single_token_is_no_fft(monkeypatch):
    """What a step costs is one product per token of the past."""

    def refuse(*_, **__):
        raise AssertionError("an FFT")

    monkeypatch.setattr(torch.fft, "rfft", refuse)
    arguments, length = inputs(1, 4000)
    x, filters, past = (t.float() for t in arguments)
    y, _ = long_convolution(x, filters, state=(past, length))
    tail = filters.flip(1)[:, -4001:]
    wanted = (tail[:, :-1] * past[0].t()).sum(1) + tail[:, -1] * x[0, 0]
    torch.testing.assert_close(y[0, 0], wanted, atol=1e-3, rtol=1e-4)


def test_half_precision_and_errors():
    (x, filters, past), length = inputs(7, 4)
    y, (kept, _) = long_convolution(x.bfloat16(), filters, state=(past, length))
    assert (y.dtype, kept.dtype) == (torch.bfloat16, torch.bfloat16)
    assert two_sided_convolution(x.half(), filters, filters).dtype == torch.float16
    for name, arguments, options in (
        ("x", (x[0], filters), {}),
        ("x", (x[:, :0], filters), {}),
        ("x", (x + 0j, filters), {}),
        ("filter", (x, filters[1:]), {}),
        ("filter", (x, filters[:, :6]), {}),
        ("filter", (x, filters[:, :10]), {"state": (past, length)}),
        ("state", (x, filters), {"state": (past,)}),
        ("state", (x, filters), {"state": (past[:1], length)}),
        ("state", (x, filters), {"state": (past, length.int())}),
        ("segments", (x, filters), {"segments": Segments.packed([[7]])}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            long_convolution(*arguments, **options)
    with pytest.raises(ValueError, match=r"^future: seen torch.float64 \(21, 5\), wanted .* \(dim=21, 6 or more\)"):
        two_sided_convolution(x, filters, filters[:, :5])
