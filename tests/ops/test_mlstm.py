"""mlstm: three implementations against the equations step by step, and against the quadratic form of the paper."""

import pytest
import torch

import tidegate
from tidegate import Segments
from tidegate.ops import linear_attention, mlstm

B, H, K, V = 3, 2, 8, 5
LENGTHS = (1, 2, 17, 64, 65, 131)
NAMES = ("h", "memory", "normaliser", "maximum", "dq", "dk", "dv", "di", "df", "dmemory", "dnormaliser", "dmaximum")


def make_inputs(time, dtype=torch.float64, batch=B):
    """Numbers of float32, so that every dtype computes with the same ones."""

    def normal(*shape):
        return torch.randn(*shape)

    q, k, v = normal(batch, time, H, K), normal(batch, time, H, K), normal(batch, time, H, V)
    log_input, log_decay = 2 * normal(batch, time, H), -normal(batch, time, H).abs() / 2
    state = normal(batch, H, K, V), normal(batch, H, K), normal(batch, H)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_input, log_decay, *state)]


def extreme_inputs(time, dtype=torch.float64):
    """Gates from e^-100 to e^100; queries and keys positive, for what no quotient of small differences can blur."""
    q, k, v, log_input, log_decay, *state = (x.detach() for x in make_inputs(time))
    log_input = (100 * (2 * torch.rand(B, time, H) - 1)).double()
    log_decay = torch.where(torch.rand(B, time, H) < 0.2, 100 * log_decay, 0.01 * log_decay).float().double()
    inputs = (q.abs(), k.abs(), v, log_input, log_decay, state[0], state[1].abs(), state[2])
    return [x.to(dtype).requires_grad_() for x in inputs]


def make_segments(time):
    """None, padding with holes, packed documents, both, and both continuing from the state."""
    mask = torch.rand(B, time) > 0.3
    yield None
    yield Segments.padded(mask)
    if time > 2:
        lengths = [[1, time - 1], [time], [time // 2, time - time // 2]]
        yield Segments.packed(lengths)
        yield Segments.packed(lengths) & Segments.padded(mask)
        yield Segments.packed(lengths, continues=True) & Segments.padded(mask)
        yield Segments.packed(lengths) & Segments.padded(torch.arange(B)[:, None].expand(B, time) != 1)


def run(backend, inputs, segments):
    """Output, final state, and the gradients of everything through all of them."""
    with tidegate.backend(backend):
        h, last = mlstm(*inputs[:5], scale=0.5, state=tuple(inputs[5:]), segments=segments)
    generator = torch.Generator().manual_seed(1)
    outputs = [h, *last]
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    """Relative to the largest magnitude of each, or, for gradients that are nearly zero, to a hundredth of all."""
    largest = max(float(e.detach().abs().max()) for e in expected[4:])
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        scale, factor = max(float(e.detach().abs().max()), 1e-3), 1
        if name.startswith("d"):
            scale, factor = max(scale, 1e-2 * largest), 5
        error = float((a.detach().double() - e.detach().double()).abs().max()) / scale
        assert error <= factor * tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("make", [make_inputs, extreme_inputs], ids=["mild", "extreme"])
def test_implementations_agree(make):
    for time in LENGTHS:
        for segments in make_segments(time):
            inputs = make(time)
            expected = run("reference", inputs, segments)
            assert_close(run("parallel", inputs, segments), expected, 1e-9)
            single = [x.detach().float().requires_grad_() for x in inputs]
            assert_close(run("numba", single, segments), expected, 2e-5)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_quadratic_form(backend):
    """h = (S / max(|sum S|, exp(-m))) V with S = q k^T exp(log D - m), from log D for all pairs and its row maxima."""
    q, k, v, log_input, log_decay = (x.detach() for x in make_inputs(50)[:5])
    F = log_decay.cumsum(1).mT  # (B, H, T)
    log_d = F[..., :, None] - F[..., None, :] + log_input.mT[..., None, :]
    log_d = log_d.masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
    m = torch.maximum(log_d.amax(-1), F)  # m starts from zero, which decays like all else
    scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5 * torch.exp(log_d - m[..., None])
    denominator = torch.maximum(scores.sum(-1).abs(), torch.exp(-m)) + 1e-6
    expected = torch.einsum("bhts,bshv->bthv", scores / denominator[..., None], v)
    with tidegate.backend(backend):
        h, (_, _, maximum) = mlstm(q, k, v, log_input, log_decay, scale=K**-0.5)
    torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(maximum, m[..., -1], rtol=1e-12, atol=1e-12)


def test_without_stabiliser():
    """In exact numbers m is not there: linear attention written with exp(log_input), over |n . q| with a floor of 1."""
    q, k, v, log_input, log_decay = (x.detach() for x in make_inputs(40)[:5])
    gated, ones = k * log_input.exp()[..., None], torch.ones(B, 40, H, 1, dtype=torch.float64)
    numerator, memory = linear_attention(q, gated, v, log_decay)
    denominator, normaliser = linear_attention(q, gated, ones, log_decay)
    h, (C, n, m) = mlstm(q, k, v, log_input, log_decay, eps=0.0)
    torch.testing.assert_close(h, numerator / denominator.abs().clamp(min=1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(C * m.exp()[..., None, None], memory, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(n * m.exp()[..., None], normaliser.squeeze(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_the_maximum_that_an_empty_memory_starts_from_does_not_matter(backend):
    inputs = [x.detach().float() for x in make_inputs(70)[:5]]
    empty = torch.zeros(B, H, K, V), torch.zeros(B, H, K)
    with tidegate.backend(backend):
        h, (memory, _, m) = mlstm(*inputs)
        for start in (-1e30, -50.0, 20.0):
            # eps is added to what is relative to m, so weighs e^20 times as much at m = 20.
            eps = 1e-6 if start < 0 else 0.0
            state = *empty, torch.full((B, H), start)
            other, (memory_other, _, m_other) = mlstm(*inputs, state=state, eps=eps)
            torch.testing.assert_close(other, h, rtol=1e-4, atol=1e-5)
            restored = memory_other * torch.exp(m_other - m)[..., None, None]
            torch.testing.assert_close(restored, memory, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_gates_of_any_size_stay_finite(size, dtype):
    for log_input, log_decay in ((size, 0.0), (-size, 0.0), (-size, -size), (size, -size), (0.0, -size)):
        q, k, v, *_ = make_inputs(70, dtype)
        i = (log_input + torch.randn(B, 70, H)).to(dtype).requires_grad_()
        f = torch.full((B, 70, H), log_decay, dtype=dtype).requires_grad_()
        h, last = mlstm(q, k, v, i, f)
        loss = h.sum() + sum(x.sum() for x in last)
        for x in (h, *last, *torch.autograd.grad(loss, (q, k, v, i, f))):
            assert x.isfinite().all(), (log_input, log_decay)


def test_ten_thousand_tokens_in_single_precision():
    """The maximum wanders and the decays add up; pieces carry their state. Float64 takes the same numbers."""
    time = 10_000
    q, k, v = torch.rand(1, time, H, K), torch.rand(1, time, H, K), torch.randn(1, time, H, V)
    log_input = torch.randn(1, time, H).cumsum(1)  # a random walk, up to some hundreds
    log_decay = torch.nn.functional.logsigmoid(torch.randn(1, time, H) + 5)
    expected, wanted = mlstm(*(x.double() for x in (q, k, v, log_input, log_decay)))
    for backend in ("numba", "parallel"):
        with tidegate.backend(backend):
            h, (memory, _, m) = mlstm(q, k, v, log_input, log_decay)
        assert (h - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (m - wanted[2]).abs().max() <= 1e-5 * wanted[2].abs().max()
        restored = memory * torch.exp(m - wanted[2])[..., None, None]  # each is relative to its own maximum
        assert (restored - wanted[0]).abs().max() <= 1e-4 * wanted[0].abs().max()
    pieces, state = [], None
    for begin in range(0, time, 1000):
        piece = slice(begin, begin + 1000)
        h, state = mlstm(q[:, piece], k[:, piece], v[:, piece], log_input[:, piece], log_decay[:, piece], state=state)
        pieces.append(h)
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_running_maximum_where_inputs_repeat():
    """At a tie the later input counts, in every implementation: the gradient of m goes to it alone."""
    gates = torch.full((1, 5, H), 2.0), torch.zeros(1, 5, H)
    q, k, v = (x.detach()[:1] for x in make_inputs(5)[:3])
    for backend in ("reference", "parallel", "numba"):
        log_input = gates[0].clone().requires_grad_()
        zero = torch.zeros(1, H, K, V), torch.zeros(1, H, K), torch.zeros(1, H)
        with tidegate.backend(backend):
            _, (_, _, m) = mlstm(q.float(), k.float(), v.float(), log_input, gates[1], state=zero)
        (gradient,) = torch.autograd.grad(m.sum(), log_input)
        assert gradient[0, :, 0].tolist() == [0, 0, 0, 0, 1], backend


def test_gradients_against_finite_differences():
    inputs = make_inputs(4, batch=1)
    segments = Segments.packed([[2, 2]], continues=True) & Segments.padded(torch.tensor([[1, 0, 1, 1]]))

    def function(*inputs):
        h, last = mlstm(*inputs[:5], state=tuple(inputs[5:]), segments=segments)
        return h, *last

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_of_the_kernel():
    def second(backend, inputs):
        with tidegate.backend(backend):
            h, last = mlstm(*inputs[:5], state=tuple(inputs[5:]))
            first = torch.autograd.grad(h.square().sum() + last[0].square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    inputs = make_inputs(5)
    expected = second("reference", inputs)
    found = second("numba", [x.detach().float().requires_grad_() for x in inputs])
    for a, e in zip(found, expected, strict=True):
        assert (a - e).abs().max() <= 5e-5 * e.abs().max()


def test_opcheck():
    from tidegate.ops.mlstm import numba_cpu

    inputs = make_inputs(20, torch.float32)
    codes = Segments.packed([[5, 15], [20], [19, 1]]).codes()
    for flags in (codes, None):
        torch.library.opcheck(numba_cpu.forward_op, (*inputs, flags, 0.5, 1e-6))


def test_threads_give_the_same_bits():
    inputs = make_inputs(260, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("numba", inputs, None))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_vmap_over_an_extra_axis():
    q, *others = (x.detach() for x in make_inputs(20)[:5])
    h, last = torch.vmap(lambda q: mlstm(q, *others))(torch.stack([q, 2 * q]))
    expected, wanted = mlstm(2 * q, *others)
    torch.testing.assert_close(h[1], expected)
    for a, e in zip(last, wanted, strict=True):
        torch.testing.assert_close(a[1], e)


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, i, f, memory, normaliser, maximum):
            return mlstm(q, k, v, i, f, state=(memory, normaliser, maximum))

    inputs = [x.detach() for x in make_inputs(20, torch.float32)]
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    (h, last), (expected, wanted) = compiled(*inputs), Module()(*inputs)
    assert all(torch.equal(a, b) for a, b in zip((h, *last), (expected, *wanted), strict=True))
    time = torch.export.Dim("time", min=1)
    shapes = ({1: time},) * 5 + (None,) * 3
    exported = torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes).module()
    for length in (1, 33):
        inputs = [x.detach() for x in make_inputs(length, torch.float32)]
        (h, last), (expected, wanted) = exported(*inputs), Module()(*inputs)
        for a, b in zip((h, *last), (expected, *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    inputs = [x.detach().to(dtype) for x in make_inputs(20)[:5]]
    h, last = mlstm(*inputs)
    assert h.dtype == dtype
    assert {x.dtype for x in last} == {torch.float32}
    exact, _ = mlstm(*(x.double() for x in inputs))
    assert (h.double() - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 8)}, "q: seen shape"),
        ({"k": torch.zeros(1, 4, 2, 3)}, "k: seen shape"),
        ({"v": torch.zeros(1, 5, 2, 3)}, "v: seen shape"),
        ({"log_input": torch.zeros(1, 4)}, "log_input: seen shape"),
        ({"log_decay": torch.zeros(1, 4, 2, 4)}, "log_decay: seen shape"),
        ({"state": (torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, 1))}, "state: seen shapes"),
        ({"segments": Segments.packed([[3]])}, "segments: made for"),
    ],
)
def test_bad_input_is_explained(change, message):
    good = {"q": torch.zeros(1, 4, 2, 4), "k": torch.zeros(1, 4, 2, 4), "v": torch.zeros(1, 4, 2, 3)}
    gates = {"log_input": torch.zeros(1, 4, 2), "log_decay": torch.zeros(1, 4, 2)}
    with pytest.raises(ValueError, match=message):
        mlstm(**{**good, **gates, **change})


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_a_document_start_drops_whatever_the_state_was(backend):
    inputs = [x.detach().float() for x in make_inputs(20)]
    segments = Segments.packed([[7, 13]] * B)
    spoilt_state = tuple(torch.full_like(x, torch.inf) for x in inputs[5:])
    with tidegate.backend(backend):
        clean, _ = mlstm(*inputs[:5], segments=segments)
        spoilt, last = mlstm(*inputs[:5], state=spoilt_state, segments=segments)
    assert torch.equal(clean, spoilt)
    assert all(x.isfinite().all() for x in last)


def test_an_empty_batch_is_an_empty_answer():
    q, gate = torch.zeros(0, 5, 2, 4), torch.zeros(0, 5, 2)
    h, last = mlstm(q, q, q, gate, gate)
    assert h.shape == (0, 5, 2, 4)
    assert [tuple(x.shape) for x in last] == [(0, 2, 4, 4), (0, 2, 4), (0, 2)]
