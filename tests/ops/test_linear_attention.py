"""linear_attention: three implementations of one equation, and the closed form."""

import pytest
import torch

import tidegate
from tidegate import Segments
from tidegate.ops import linear_attention

B, H, K, V = 3, 2, 8, 5
LENGTHS = (1, 2, 17, 64, 65, 131)
DECAYS = ("none", "head", "token", "key")


def make_inputs(time, decay, extreme=False, dtype=torch.float64):
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    shape = {"none": None, "head": (H,), "token": (B, time, H), "key": (B, time, H, K)}[decay]
    g = None if shape is None else -normal(*shape).abs() / 2
    if extreme:
        g = torch.where(torch.rand_like(g) < 0.3, 400 * g, 0.01 * g)
    inputs = [normal(B, time, H, K), normal(B, time, H, K), normal(B, time, H, V), g, normal(B, H, K, V), normal(H, K)]
    return [None if x is None else x.to(dtype).requires_grad_() for x in inputs]


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


def run(backend, inputs, segments, read_before_write=False):
    """Output, final state, and the gradients of everything through both."""
    q, k, v, g, state, bonus = inputs
    options = {"read_before_write": True, "bonus": bonus} if read_before_write else {}
    with tidegate.backend(backend):
        o, last = linear_attention(q, k, v, g, scale=0.5, state=state, segments=segments, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, last)]
    wanted = [x for x in (q, k, v, g, state, bonus if read_before_write else None) if x is not None]
    gradients = torch.autograd.grad((o * weights[0]).sum() + (last * weights[1]).sum(), wanted)
    return [o, last, *gradients]


def assert_close(actual, expected, tolerance):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = max(float(e.abs().max()), 1e-3)
        error = float((a.double() - e.double()).abs().max()) / scale
        assert error <= tolerance * (1 if index < 2 else 5), f"result {index}: relative error {error:.1e}"


@pytest.mark.parametrize("extreme", [False, True], ids=["mild", "extreme"])
@pytest.mark.parametrize("read_before_write", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("decay", DECAYS)
def test_implementations_agree(decay, read_before_write, extreme):
    if extreme and decay in ("none", "head"):
        extreme = False  # a constant extreme decay leaves gradients of 1e-80 to compare
    for time in LENGTHS:
        for segments in make_segments(time):
            inputs = make_inputs(time, decay, extreme)
            expected = run("reference", inputs, segments, read_before_write)
            assert_close(run("parallel", inputs, segments, read_before_write), expected, 1e-9)
            single = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
            assert_close(run("numba", single, segments, read_before_write), expected, 2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_closed_form(decay):
    """o_t = sum_{s <= t} (q_t * exp(G_t - G_s)) . k_s v_s, written with all pairs at once."""
    q, k, v, g, state, _ = make_inputs(40, decay)
    o, last = linear_attention(q, k, v, g, state=state)
    full = torch.zeros_like(q) if g is None else g.expand(B, 40, H)[..., None] if g.ndim < 4 else g
    G = full.expand_as(q).cumsum(1)
    pairs = torch.einsum("bthk,bshk,btshk->btsh", q, k, (G[:, :, None] - G[:, None]).exp())
    pairs = pairs * torch.ones(40, 40).tril()[None, :, :, None]
    expected = torch.einsum("btsh,bshv->bthv", pairs, v) + torch.einsum("bthk,bhkv->bthv", q * G.exp(), state)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    written = torch.einsum("bthk,bthv->bhkv", k * (G[:, -1:] - G).exp(), v) + G[:, -1].exp()[..., None] * state
    torch.testing.assert_close(last, written, rtol=1e-10, atol=1e-10)


def test_fully_decayed_gates_stay_finite():
    q, k, v = (torch.randn(1, 100, 2, 8, requires_grad=True) for _ in range(3))
    g = torch.full((1, 100, 2, 8), -1e4, requires_grad=True)
    o, last = linear_attention(q, k, v, g)
    # Nothing survives a step, so every token sees only itself.
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v)
    for gradient in torch.autograd.grad(o.sum() + last.sum(), (q, k, v, g)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("decay", ["token", "key"])
def test_threads_give_the_same_bits(decay):
    inputs = make_inputs(131, decay, dtype=torch.float32)
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


def test_opcheck():
    from tidegate.ops.linear_attention import numba_cpu

    q, k, v, g, state, _ = make_inputs(20, "key", dtype=torch.float32)
    codes = Segments.packed([[5, 15], [20], [19, 1]]).codes()
    for arguments in ((q, k, v, g, state, codes, 0.5), (q, k, v, None, state, None, 1.0)):
        torch.library.opcheck(numba_cpu.forward_op, arguments)


@pytest.mark.parametrize("backend", ["parallel", "numba"])
def test_second_derivatives(backend):
    dtype = torch.float64 if backend == "parallel" else torch.float32
    inputs = [x for x in make_inputs(5, "key", dtype=dtype)[:5]]

    def second(backend, inputs):
        with tidegate.backend(backend):
            o, last = linear_attention(*inputs[:4], state=inputs[4])
            first = torch.autograd.grad(o.square().sum() + last.square().sum(), inputs, create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    expected = second("reference", [x.detach().double().requires_grad_() for x in inputs])
    assert_close(second(backend, inputs), expected, 1e-5 if backend == "numba" else 1e-9)


def test_vmap_over_an_extra_axis():
    q, k, v, g, state, _ = (x.detach().float() for x in make_inputs(20, "key"))
    o, last = torch.vmap(lambda q: linear_attention(q, k, v, g, state=state))(torch.stack([q, 2 * q]))
    assert o.shape == (2, B, 20, H, V)
    torch.testing.assert_close(o[1], 2 * o[0])
    torch.testing.assert_close(last[1], last[0])


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, g, state):
            return linear_attention(q, k, v, g, state=state)

    q, k, v, g, state, _ = (x.detach().float() for x in make_inputs(20, "key"))
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v, g, state), linear_attention(q, k, v, g, state=state), strict=True):
        assert torch.equal(a, b)
    time = torch.export.Dim("time", min=1)
    exported = torch.export.export(Module(), (q, k, v, g, state), dynamic_shapes=({1: time},) * 4 + (None,)).module()
    q, k, v, g, state, _ = (x.detach().float() for x in make_inputs(33, "key"))
    for a, b in zip(exported(q, k, v, g, state), linear_attention(q, k, v, g, state=state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype):
    q, k, v, g, _, _ = (x.detach().to(dtype) for x in make_inputs(20, "key"))
    o, last = linear_attention(q, k, v, g)
    assert o.dtype == dtype
    assert last.dtype == torch.float32
    exact, _ = linear_attention(q.double(), k.double(), v.double(), g.double())
    assert (o.double() - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 4, 2, 3)}, "k: seen shape"),
        ({"v": torch.zeros(1, 5, 2, 3)}, "v: seen shape"),
        ({"log_decay": torch.zeros(1, 4)}, "log_decay: seen shape"),
        ({"state": torch.zeros(1, 2, 4, 4)}, "state: seen shape"),
        ({"bonus": torch.zeros(2, 4)}, "bonus: only has a meaning"),
        ({"segments": Segments.packed([[3]])}, "segments: made for"),
    ],
)
def test_bad_input_is_explained(change, message):
    good = {"q": torch.zeros(1, 4, 2, 4), "k": torch.zeros(1, 4, 2, 4), "v": torch.zeros(1, 4, 2, 3)}
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**good, **change})


@pytest.mark.parametrize("backend", ["reference", "parallel", "numba"])
def test_a_document_start_drops_whatever_the_state_was(backend):
    q, k, v, g, state, _ = (x.detach().float() for x in make_inputs(20, "key"))
    segments = Segments.packed([[7, 13]] * B)
    with tidegate.backend(backend):
        clean, _ = linear_attention(q, k, v, g, segments=segments)
        spoilt, last = linear_attention(q, k, v, g, state=torch.full_like(state, torch.inf), segments=segments)
    assert torch.equal(clean, spoilt)
    assert last.isfinite().all()


def test_an_empty_batch_is_an_empty_answer():
    q = torch.zeros(0, 5, 2, 4)
    o, last = linear_attention(q, q, q)
    assert o.shape == (0, 5, 2, 4)
    assert last.shape == (0, 2, 4, 4)
