"""slot_scores: three implementations against each other, and the quadratic form."""

import pytest
import torch

import tidegate
from tidegate import Segments
from tidegate.ops.slot_scores import slot_scores

B, H, K, M = 3, 2, 8, 20
LENGTHS = (1, 2, 17, 64, 65, 131)
NAMES = ("o", "state", "dq", "dk", "dslots", "dlog_decay", "dstate")


def make_inputs(time, dtype=torch.float64, batch=B):
    """Numbers of float32, so that every dtype computes with the same ones."""
    q, k, slots = torch.randn(batch, time, H, K), torch.randn(batch, time, H, K), torch.rand(batch, time, H, M)
    inputs = q, k, slots, -torch.rand(batch, time, H, M), torch.randn(batch, H, M, K)
    return [x.to(dtype).requires_grad_() for x in inputs]


def extreme_inputs(time, dtype=torch.float64):
    q, k, slots, g, state = (x.detach() for x in make_inputs(time))
    g = torch.where(torch.rand(g.shape) < 0.2, -200.0, torch.where(torch.rand(g.shape) < 0.5, 0.0, g))
    g = torch.where(torch.rand(g.shape) < 0.05, -1e4, g)
    return [x.to(dtype).requires_grad_() for x in (q, k, slots, g, state)]


def make_segments(time):
    mask = torch.rand(B, time) > 0.3
    yield None
    yield Segments.padded(mask)
    if time > 2:
        lengths = [[1, time - 1], [time], [time // 2, time - time // 2]]
        yield Segments.packed(lengths)
        yield Segments.packed(lengths, continues=True) & Segments.padded(mask)
        yield Segments.packed(lengths) & Segments.padded(torch.arange(B)[:, None].expand(B, time) != 1)


def run(backend, inputs, segments):
    with tidegate.backend(backend):
        outputs = slot_scores(*inputs[:4], scale=0.5, state=inputs[4], segments=segments)
    draw = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=draw).to(x.dtype)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    """Relative to the largest magnitude of each, or, for gradients that are nearly zero, to a hundredth of all."""
    largest = max(float(e.detach().abs().max()) for e in expected[2:])
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
    """o_tm = sum over s <= t of (q_t . k_s) slots_sm prod_{s < r <= t} decay_rm."""
    q, k, slots, g, _ = (x.detach() for x in make_inputs(30))
    G = g.cumsum(1)
    decays = (G[:, :, None] - G[:, None]).exp() * torch.ones(30, 30).tril()[None, :, :, None, None]
    expected = torch.einsum("bthk,bshk,btshm,bshm->bthm", q, k, decays, slots)
    with tidegate.backend(backend):
        torch.testing.assert_close(slot_scores(q, k, slots, g)[0], expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_and_vmap():
    inputs = [x.detach()[..., :2].requires_grad_() for x in make_inputs(5, batch=1)]
    inputs[4] = torch.randn(1, H, 2, 2, dtype=torch.float64, requires_grad=True)
    segments = Segments.packed([[3, 2]], continues=True)

    def call(*inputs):
        return slot_scores(*inputs[:4], state=inputs[4], segments=segments)

    assert torch.autograd.gradgradcheck(call, inputs)
    several = [torch.stack([x.detach(), 2 * x.detach()]) for x in inputs[:4]]
    together = torch.vmap(lambda *inputs: slot_scores(*inputs)[0])(*several)
    torch.testing.assert_close(together[1], slot_scores(*(x[1] for x in several))[0])


def test_operator_is_registered_correctly():
    from tidegate.ops.slot_scores import numba_cpu

    inputs = make_inputs(9, torch.float32)
    for codes in (None, Segments.packed([[4, 5]] * B).codes()):
        torch.library.opcheck(numba_cpu._forward_op, (*inputs, codes, 0.5))


def test_compile_threads_and_dtypes():
    inputs = make_inputs(1000, torch.float32, batch=1)
    compiled = torch.compile(lambda *x: slot_scores(*x[:4], scale=0.5, state=x[4]), fullgraph=True, backend="aot_eager")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("numba", inputs, None))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), results[0][:2], strict=True))
    o, state = slot_scores(*(x.bfloat16() for x in inputs[:3]), inputs[3])
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_wrong_arguments_are_explained():
    q, k, slots, g, state = (x.detach() for x in make_inputs(4))
    for name, call in {
        "q": lambda: slot_scores(q[0], k, slots, g),
        "k": lambda: slot_scores(q, k[:, 1:], slots, g),
        "slots": lambda: slot_scores(q, k, slots[:, 1:], g),
        "log_decay": lambda: slot_scores(q, k, slots, g[..., 0]),
        "state": lambda: slot_scores(q, k, slots, g, state=state.mT),
        "segments": lambda: slot_scores(q, k, slots, g, segments=Segments.packed([[2]])),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
