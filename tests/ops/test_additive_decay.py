"""additive_decay: three implementations against each other, and the running softmax it stands for."""

import pytest
import torch

import tidegate
from tidegate import Segments
from tidegate.ops import scan
from tidegate.ops.additive_decay import additive_decay

B, D = 3, 11
LENGTHS = (1, 2, 17, 64, 65, 131)
BACKENDS = ("reference", "parallel", "numba")
NAMES = ("share", "log_decay", "state", "dx", "dstate")


def make_inputs(time, dtype=torch.float64, spread=1.0):
    """Numbers of float32, so that every dtype computes with the same ones; some channels come with no past."""
    x, state = spread * torch.randn(B, time, D), spread * torch.randn(B, D)
    state[:, ::3] = -torch.inf
    return [tensor.to(dtype).requires_grad_() for tensor in (x, state)]


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
        outputs = additive_decay(inputs[0], state=inputs[1], segments=segments)
    draw = torch.Generator().manual_seed(1)
    loss = 0
    for tensor in outputs:
        weight = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        loss = loss + (torch.where(tensor == -torch.inf, 0, tensor) * weight).sum()
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_close(actual, expected, tolerance):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        empty = e == -torch.inf
        assert torch.equal(a == -torch.inf, empty), name
        a, e = (torch.where(empty, 0, t.detach().double()) for t in (a, e))
        error = float((a - e).abs().max()) / max(float(e.abs().max()), 1e-2)
        assert error <= tolerance * (5 if name.startswith("d") else 1), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_implementations_agree(spread):
    for time in LENGTHS:
        for segments in make_segments(time):
            inputs = make_inputs(time, spread=spread)
            expected = run("reference", inputs, segments)
            assert_close(run("parallel", inputs, segments), expected, 1e-9)
            single = [tensor.detach().float().requires_grad_() for tensor in inputs]
            assert_close(run("numba", single, segments), expected, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_softmax_over_time(backend):
    dtype = torch.float32 if backend == "numba" else torch.float64
    x, v = torch.randn(B, 40, D, dtype=dtype), torch.randn(B, 40, D, dtype=dtype)
    with tidegate.backend(backend):
        share, log_decay, state = additive_decay(x)
        mean, _ = scan(log_decay.exp(), share * v)
    tolerance = dict(rtol=1e-4, atol=1e-5) if backend == "numba" else dict(rtol=1e-10, atol=1e-12)
    for t in (0, 1, 17, 39):
        expected = (x[:, : t + 1].softmax(1) * v[:, : t + 1]).sum(1)
        torch.testing.assert_close(mean[:, t], expected, **tolerance)
    torch.testing.assert_close(state, x.logsumexp(1), **tolerance)
    torch.testing.assert_close(share[:, 1:] + log_decay[:, 1:].exp(), torch.ones_like(x[:, 1:]), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_differences_count(backend):
    x = torch.randn(B, 30, D, dtype=torch.float32 if backend == "numba" else torch.float64)
    x = (16 * x).round() / 16  # so that adding 1024 loses nothing
    with tidegate.backend(backend):
        share, log_decay, state = additive_decay(x)
        for shift in (-1024.0, 1024.0):
            moved, moved_decay, moved_state = additive_decay(x + shift)
            torch.testing.assert_close(moved, share, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moved_decay, log_decay, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moved_state - shift, state, rtol=0, atol=1e-2)


def test_any_dimension_and_dtype():
    x = torch.randn(2, 9, 3)
    whole, _, last = additive_decay(x)
    share, log_decay, state = additive_decay(x.bfloat16())
    assert {share.dtype, log_decay.dtype, state.dtype} == {torch.float32}
    first, _, state = additive_decay(x[:, :4])
    second, _, state = additive_decay(x[:, 4:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state, last)


def test_second_derivatives_and_vmap():
    x, state = make_inputs(5)
    x, state = x.detach()[:1, :, :4].requires_grad_(), torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    segments = Segments.packed([[3, 2]], continues=True)
    assert torch.autograd.gradgradcheck(lambda x, z: additive_decay(x, state=z, segments=segments), (x, state))
    batch = torch.randn(2, B, 9, D, dtype=torch.float64)
    shares = torch.vmap(lambda x: additive_decay(x)[0])(batch)
    torch.testing.assert_close(shares[1], additive_decay(batch[1])[0])


def test_operators_are_registered_correctly():
    from tidegate.ops.additive_decay import numba_cpu

    x, state = make_inputs(9, torch.float32)
    codes = Segments.packed([[4, 5]] * B).codes()
    for given in (None, codes):
        torch.library.opcheck(numba_cpu._forward_op, (x, state, given))
        torch.library.opcheck(
            numba_cpu._backward_op, (x.detach(), state.detach(), given, x.detach(), x.detach(), x.detach()[:, 0])
        )


def test_compile_and_threads():
    x, state = make_inputs(3000, torch.float32)
    compiled = torch.compile(lambda x, z: additive_decay(x, state=z), fullgraph=True, backend="aot_eager")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run("numba", (x, state), None))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, state), results[0][:3], strict=True))


def test_wrong_arguments_are_explained():
    x = torch.zeros(2, 3, 4)
    for name, call in {
        "x": lambda: additive_decay(x[0]),
        "state": lambda: additive_decay(x, state=torch.zeros(2, 3)),
        "segments": lambda: additive_decay(x, segments=Segments.packed([[2]])),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
