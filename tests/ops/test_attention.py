"""Attention against its definition, against plain matrix algebra, and through everything torch does with functions."""

from __future__ import annotations

import itertools
import math
import statistics
import time

import pytest
import torch

import tidegate
from tidegate import Segments
from tidegate.ops import attention

B, H, G, D, V = 2, 4, 2, 4, 3
LENGTHS = (1, 2, 17, 64, 65, 131)
WINDOWS = (None, 1, 5, 16)


def inputs(T, *, dtype=torch.float64, value_dim=V, heads=H, groups=G, dim=D):
    q = torch.randn(B, T, heads, dim, dtype=dtype, requires_grad=True)
    k = torch.randn(B, T, groups, dim, dtype=dtype, requires_grad=True)
    v = torch.randn(B, T, groups, value_dim, dtype=dtype, requires_grad=True)
    return q, k, v


def segmentations(T):
    yield None
    if T == 1:
        return
    half, order = T // 2, torch.arange(T).expand(B, T)
    holes = torch.arange(T).expand(B, T) % 3 != torch.tensor([[0], [2]])
    yield Segments.packed([[half, T - half], [T - 1, 1]])
    yield Segments.packed([[half, T - half], [1, T - 1]], continues=True) & Segments.padded(holes)
    yield Segments.padded(holes)
    yield Segments.padded(order >= torch.tensor([[half], [0]]))
    yield Segments.padded(order < torch.tensor([[half], [T]]))


def past(length, window, dtype=torch.float64, value_dim=V):
    """A state of two rows with unequal pasts, and the leaves it was made from."""
    k = torch.randn(B, length, G, D, dtype=dtype, requires_grad=True)
    v = torch.randn(B, length, G, value_dim, dtype=dtype, requires_grad=True)
    real = torch.arange(length) < torch.tensor([[length], [length // 2]])
    with tidegate.backend("reference"):
        _, state = attention(k.new_zeros(B, length, H, D), k, v, window=window, segments=Segments.padded(real))
    return state, [k, v]


def outputs_and_gradients(backend, leaves, window, state, segments, weights):
    with tidegate.backend(backend):
        o, (keys, values, length) = attention(*leaves[:3], window=window, state=state, segments=segments)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=weights)).sum() for x in (o, keys, values))
    return [o, keys, values, length, *torch.autograd.grad(loss, leaves, retain_graph=True)]


def close(found, wanted, tolerance=1e-9):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance), (found - wanted).abs().max()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("before", [0, 9, 20])
def test_parallel_is_the_definition(window, before):
    for T in LENGTHS if before == 9 else (1, 17, 65):
        for segments in segmentations(T):
            leaves = list(inputs(T))
            state = None
            if before:
                state, more = past(before, window)
                leaves += more
            arguments = leaves, window, state, segments
            wanted = outputs_and_gradients("reference", *arguments, torch.Generator().manual_seed(1))
            found = outputs_and_gradients("parallel", *arguments, torch.Generator().manual_seed(1))
            for x, y in zip(found, wanted, strict=True):
                close(x, y)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_quadratic_form(backend, window):
    T = 23
    q, k, v = inputs(T)
    order = torch.arange(T)
    distance = order[:, None] - order
    hidden = (distance < 0) | (distance >= (window or T))
    wide_k, wide_v = k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, wide_k) / D**0.5
    wanted = torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), wide_v)
    with tidegate.backend(backend):
        found, (keys, _, length) = attention(q, k, v, window=window)
    close(found, wanted)
    if window is None:
        assert torch.equal(keys, k)
    else:
        assert all(torch.equal(keys[:, t % window], k[:, t]) for t in range(T - window, T))
    assert length.tolist() == [T, T]


@pytest.mark.parametrize("window", [None, 4, 64])
def test_any_split_gives_the_same_state_bit_for_bit(window):
    T = 37
    q, k, v = inputs(T)
    whole, state = attention(q, k, v, window=window)
    for sizes in ([1] * T, [5, 32], [36, 1]):
        pieces, carried = [], None
        for part in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
            frozen = carried and [x.clone() for x in carried]
            o, following = attention(*part, window=window, state=carried)
            assert carried is None or all(map(torch.equal, carried, frozen)), "the state passed in was written to"
            pieces.append(o)
            carried = following
        close(torch.cat(pieces, 1), whole)
        assert all(map(torch.equal, carried, state))


@pytest.mark.parametrize("window", [None, 16])
def test_long_masked_calls_agree_with_short_ones(window):
    """More queries than one masked call takes, with a past, over several documents."""
    T = 1100
    q, k, v = inputs(T, dtype=torch.float32, value_dim=D)
    state, _ = past(20, window, torch.float32, D)
    segments = Segments.packed([[700, 400], [3, 1097]], continues=True)
    whole, final = attention(q, k, v, window=window, state=state, segments=segments)
    whole.square().sum().backward()
    pieces = []
    for begin in range(0, T, 100):
        now = slice(begin, begin + 100)
        o, state = attention(q[:, now], k[:, now], v[:, now], window=window, state=state, segments=segments[now])
        pieces.append(o)
    close(torch.cat(pieces, 1), whole, 2e-5)
    grads = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), (q, k, v))
    for x, y in zip(grads, (q.grad, k.grad, v.grad), strict=True):
        close(x, y, 1e-4)
    assert all(torch.equal(a[:, : b.shape[1]] if a.ndim > 1 else a, b) for a, b in zip(state, final, strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_padding_is_silent(window):
    q, k, v = inputs(7)
    real = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [0] * 7]).bool()
    segments = Segments.padded(real)
    with torch.no_grad():
        for x in (q, k, v):
            x[~real] = torch.nan
    o, state = attention(q, k, v, window=window, segments=segments)
    assert (o[~real] == 0).all()
    assert o.isfinite().all()
    alone, alone_state = attention(*(x[:1, real[0]] for x in (q, k, v)), window=window)
    close(o[:1, real[0]], alone)
    for x, y in zip(state, alone_state, strict=True):
        assert torch.equal(x[:1, : y.shape[1]] if x.ndim > 1 else x[:1], y)
    assert state[2].tolist() == [4, 0]
    assert not state[0][1].any()
    upstream = torch.where(real[:, :, None, None], 1.0, torch.nan).to(o.dtype).expand_as(o)
    for gradient in torch.autograd.grad(o, (q, k, v), upstream):
        assert (gradient[~real] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_first_and_second_order(window, packed):
    T = 5
    q, k, v = inputs(T, value_dim=2)
    state, _ = past(3, window, value_dim=2)
    keys, values = (x.detach().requires_grad_() for x in state[:2])
    segments = Segments.packed([[2, 3], [4, 1]], continues=True) if packed else None

    def function(q, k, v, keys, values):
        o, after = attention(q, k, v, window=window, state=(keys, values, state[2]), segments=segments)
        return o, *after[:2]

    assert torch.autograd.gradcheck(function, (q, k, v, keys, values))
    assert torch.autograd.gradgradcheck(function, (q, k, v, keys, values))
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, window=window)[0], (q, k, v))


def test_backward_twice_needs_and_respects_retain_graph():
    q, k, v = inputs(6, value_dim=D)
    o, _ = attention(q, k, v)
    first = torch.autograd.grad(o.sum(), q, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(o.sum(), q)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(o.sum(), q)


@pytest.mark.parametrize("window", [None, 3])
def test_vmap(window):
    q, k, v = (torch.stack([x.detach(), 2 * x.detach()]) for x in inputs(8))
    state, _ = past(5, window)
    segments = Segments.packed([[3, 5], [8]], continues=True)

    def function(q, k, v):
        return attention(q, k, v, window=window, state=state, segments=segments)[0]

    mapped = torch.vmap(function)(q, k, v)
    close(mapped, torch.stack([function(*x) for x in zip(q, k, v, strict=True)]))
    close(
        torch.vmap(lambda *x: attention(*x, window=window)[0])(q, k, v)[1],
        attention(q[1], k[1], v[1], window=window)[0],
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("streaming", [False, True])
def test_compile_in_one_graph(window, streaming):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    state = tuple(x.detach() for x in past(5, window, torch.float32)[0]) if streaming else None
    for T in (9, 14, 1):
        leaves = inputs(T, dtype=torch.float32)
        segments = Segments.packed([[1], [T]], continues=True) if streaming else None
        wanted, wanted_state = attention(*leaves, window=window, state=state, segments=segments)
        found, found_state = compiled(*leaves, window=window, state=state, segments=segments)
        close(found, wanted, 2e-5)
        for x, y in zip(found_state, wanted_state, strict=True):
            close(x, y, 1e-6)
        found_grads = torch.autograd.grad(found.square().sum(), leaves)
        for x, y in zip(found_grads, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
            close(x, y, 1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_export_with_dynamic_time_and_a_carried_state(window):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, state, segments):
            return attention(q, k, v, window=window, state=state, segments=segments)

    T, L = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    state = tuple(x.detach() for x in past(6, window)[0])
    segments = Segments.packed([[3, 4], [7]], continues=True)
    slots = {1: L} if window is None else None
    program = torch.export.export(
        Module(),
        (*(x.detach() for x in inputs(7)), state, segments),
        dynamic_shapes=({1: T}, {1: T}, {1: T}, (slots, slots, None), [{1: T}, {1: T}]),
    ).module()
    for length in (2, 11, 3):
        segments = Segments.packed([[length], [1, length - 1]], continues=True)
        arguments = *(x.detach() for x in inputs(length)), state, segments
        found, state_after = program(*arguments)
        wanted, state = Module()(*arguments)
        close(found, wanted)
        for x, y in zip(state_after, state, strict=True):
            close(x, y)


# -- other weights than a softmax's ------------------------------------------------------------------------------------
# kernel, window, whether there is a bias
WEIGHTS = [
    ("relu2", None, False),
    ("relu2", 5, False),
    ("relu2", 5, True),
    ("laplace", None, False),
    ("laplace", 16, True),
    ("softmax", 5, True),
]


def weighted(kernel, window, biased, dtype=torch.float64):
    """Keyword arguments, with a scale at which every kernel is far from flat."""
    bias = torch.randn(H, window, dtype=dtype, requires_grad=True) if biased else None
    return dict(kernel=kernel, window=window, bias=bias, scale=None if kernel == "softmax" else 5.0)


@pytest.mark.parametrize(("kernel", "window", "biased"), WEIGHTS)
def test_other_weights_by_hand(kernel, window, biased):
    """A double loop over pairs of tokens, with numbers and math alone."""
    T = 11
    q, k, v = (x.detach() for x in inputs(T))
    given = weighted(kernel, window, biased)
    wanted = torch.zeros(B, T, H, V, dtype=torch.float64)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        near = range(max(0, t + 1 - (window or T)), t + 1)
        n = math.sqrt(D) if kernel == "softmax" else (window or t + 1) / 5.0
        scores = [float(q[b, t, h] @ k[b, s, h // (H // G)]) / n for s in near]
        if biased:
            scores = [x + given["bias"][h, t - s].item() for s, x in zip(near, scores, strict=True)]
        if kernel == "softmax":
            weights = [math.exp(x) / sum(map(math.exp, scores)) for x in scores]
        elif kernel == "relu2":
            weights = [max(x, 0.0) ** 2 for x in scores]
        else:  # the normal distribution's integral
            law = statistics.NormalDist(math.sqrt(0.5), math.sqrt(1 / (4 * math.pi)))
            weights = [law.cdf(x) for x in scores]
        wanted[b, t, h] = sum(w * v[b, s, h // (H // G)] for s, w in zip(near, weights, strict=True))
    for backend in ("reference", "parallel"):
        with tidegate.backend(backend), torch.no_grad():
            close(attention(q, k, v, **given)[0], wanted)


@pytest.mark.parametrize("before", [0, 9, 20])
@pytest.mark.parametrize(("kernel", "window", "biased"), WEIGHTS)
def test_other_weights_in_blocks_are_the_definition(kernel, window, biased, before):
    for T in (1, 17, 65) if before != 9 else (2, 64, 131):
        for segments in segmentations(T):
            state, leaves = past(before, window) if before else (None, [])
            leaves = [*inputs(T), *leaves]
            given = weighted(kernel, window, biased)
            results = []
            for backend in ("reference", "parallel"):
                with tidegate.backend(backend):
                    o, (keys, values, length) = attention(*leaves[:3], **given, state=state, segments=segments)
                draw = torch.Generator().manual_seed(1)
                loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=draw)).sum() for x in (o, keys, values))
                wanted = [*leaves, given["bias"]] if biased else leaves
                gradients = torch.autograd.grad(loss, wanted, retain_graph=True)
                results.append([o, keys, values, length, *gradients])
            for x, y in zip(*results, strict=True):
                close(x, y)


@pytest.mark.parametrize(("kernel", "window", "biased"), WEIGHTS)
def test_other_weights_split_anywhere(kernel, window, biased):
    T = 37
    q, k, v = inputs(T)
    given = weighted(kernel, window, biased)
    whole, state = attention(q, k, v, **given)
    for sizes in ([1] * T, [5, 32], [36, 1]):
        pieces, carried = [], None
        for part in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
            o, carried = attention(*part, **given, state=carried)
            pieces.append(o)
        close(torch.cat(pieces, 1), whole)
        assert all(map(torch.equal, carried, state))


@pytest.mark.parametrize(("kernel", "window", "biased"), WEIGHTS)
def test_gradients_of_other_weights(kernel, window, biased):
    q, k, v = inputs(5, value_dim=2)
    window = window and 3
    given = weighted(kernel, window, biased)
    bias = given.pop("bias")
    segments = Segments.packed([[2, 3], [4, 1]], continues=True)
    state, _ = past(3, window, value_dim=2)
    state = [x.detach() for x in state]

    def function(q, k, v, *bias):
        options = dict(bias=bias[0]) if bias else {}
        return attention(q, k, v, **given, **options, state=state, segments=segments)[0]

    arguments = (q, k, v, bias) if biased else (q, k, v)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize(("kernel", "window", "biased"), [WEIGHTS[0], WEIGHTS[2]])
def test_other_weights_compiled_and_mapped(kernel, window, biased):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    given = weighted(kernel, window, biased, torch.float32)
    state = tuple(x.detach() for x in past(5, window, torch.float32)[0])
    segments = Segments.packed([[1], [9]], continues=True)
    leaves = inputs(9, dtype=torch.float32)
    wanted, _ = attention(*leaves, **given, state=state, segments=segments)
    found, _ = compiled(*leaves, **given, state=state, segments=segments)
    close(found, wanted, 2e-5)
    leaves = [*leaves, given["bias"]] if biased else leaves
    wanted_grads = torch.autograd.grad(wanted.square().sum(), leaves)
    for x, y in zip(torch.autograd.grad(found.square().sum(), leaves), wanted_grads, strict=True):
        close(x, y, 1e-4)
    q, k, v = (torch.stack([x.detach(), 2 * x.detach()]) for x in leaves[:3])
    with torch.no_grad():

        def function(q, k, v):
            return attention(q, k, v, **given, state=state, segments=segments)[0]

        mapped = torch.vmap(function)(q, k, v)
        close(mapped, torch.stack([function(*x) for x in zip(q, k, v, strict=True)]), 1e-5)


@pytest.mark.parametrize("window", [None, 16])
def test_blocks_of_other_weights_are_not_kept(window):
    """What a training step remembers between forward and backward grows with T, not with T x T or T x window."""
    kept = 0

    def count(x):
        nonlocal kept
        kept += x.numel()
        return x

    T = 1200
    leaves = inputs(T, dtype=torch.float32, heads=1, groups=1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        attention(*leaves, kernel="relu2", window=window)
    assert kept < 12 * sum(x.numel() for x in leaves)
    assert kept < B * T * T / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype):
    q, k, v = inputs(9, dtype=dtype)
    o, (keys, values, _) = attention(q, k, v, window=4)
    assert o.dtype == keys.dtype == values.dtype == dtype
    with tidegate.backend("reference"):
        exact = attention(q.double(), k.double(), v.double(), window=4)[0]
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(dtype, 1e-6)
    close(o, exact.to(dtype), tolerance)


def test_same_bits_for_any_number_of_threads():
    q, k, v = (x.detach() for x in inputs(300, dtype=torch.float32, value_dim=D))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([attention(q, k, v, window=window)[0] for window in (None, 16)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_a_window_costs_the_same_per_token_at_any_length():
    """Counted in processor time, with room for a noisy machine; a quadratic form would be 16 times dearer here."""

    def cost(T):
        q, k, v = (torch.randn(1, T, 2, 32) for _ in range(3))
        best = float("inf")
        for _ in range(4):
            begin = time.process_time()
            attention(q, k, v, window=64)
            best = min(best, time.process_time() - begin)
        return best / T

    cost(1024)
    assert cost(16384) < 2 * cost(1024)


def test_a_large_score_overflows_nothing():
    q, k, v = inputs(20, dtype=torch.float32)
    for window in (None, 3):
        o, _ = attention(1e4 * q, k, v, window=window)
        assert o.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4)), "q: seen shape"),
        (dict(q=torch.zeros(2, 0, 4, 4), k=torch.zeros(2, 0, 2, 4), v=torch.zeros(2, 0, 2, 4)), "T = 0"),
        (dict(k=torch.zeros(2, 4, 2, 4)), "k: seen shape"),
        (dict(k=torch.zeros(2, 3, 3, 4), v=torch.zeros(2, 3, 3, 4)), "3 key-value heads do not divide"),
        (dict(v=torch.zeros(2, 3, 1, 4)), "v: seen shape"),
        (dict(v=torch.zeros(2, 3, 2, 4).double()), "v: seen torch.float64"),
        (dict(window=0), "window: seen 0"),
        (dict(kernel="relu"), "kernel: seen 'relu', wanted one of softmax, relu2, laplace"),
        (dict(bias=torch.zeros(4, 3)), "bias: wanted None without a window"),
        (dict(window=3, bias=torch.zeros(1, 3)), "bias: seen shape"),
        (dict(state=(torch.zeros(2, 3, 2, 4),)), "state: seen 1 entries"),
        (dict(window=5, state=(torch.zeros(2, 4, 2, 4),) * 2 + (torch.zeros(2, dtype=torch.int64),)), "window=5"),
        (dict(state=(torch.zeros(1, 4, 2, 4),) * 2 + (torch.zeros(2, dtype=torch.int64),)), "its keys have shape"),
        (dict(state=(torch.zeros(2, 4, 2, 4),) * 2 + (torch.zeros(2),)), "one int64 per row"),
        (dict(segments=Segments.packed([[4], [4]])), "segments: made for"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(q=torch.zeros(2, 3, 4, 4), k=torch.zeros(2, 3, 2, 4), v=torch.zeros(2, 3, 2, 4)) | change
    with pytest.raises(ValueError, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
